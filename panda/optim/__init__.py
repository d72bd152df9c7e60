"""Optimizers and learning-rate schedules, and nothing that knows a model or a file."""
