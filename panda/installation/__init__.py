"""What is installed, and what is wrong with it: metadata, names, requirements, imports, the machine. No torch."""
