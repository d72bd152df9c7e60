"""What authors of packages test their components with: checks of optimizers, models, tasks and plugins.

Each check is a function that prints what it found and raises AssertionError where a promise is broken. They need no
pytest. Importing this package imports nothing heavy.
"""
