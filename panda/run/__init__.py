"""A run, from its preparation to its export."""
