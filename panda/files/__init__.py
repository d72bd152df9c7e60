"""Work with the file system: locks, files and folders that are complete or absent, errors of a full disk; terminals."""
