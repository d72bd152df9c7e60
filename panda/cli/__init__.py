"""One module for each command; it imports heavy modules only when it runs."""
