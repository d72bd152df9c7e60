"""What panda asks of a file system: locks, files and folders that are whole or absent, and words for a full disk."""
