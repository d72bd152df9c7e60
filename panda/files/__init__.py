"""Work with the file system: locks, files and folders that are complete or absent, and errors of a full disk."""
