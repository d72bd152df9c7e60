"""A page that reports runs: its parts as HTML. What it says is gathered by ``panda report``."""
