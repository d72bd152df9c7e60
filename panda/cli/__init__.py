"""One module a command; each imports what it runs only when it runs."""
