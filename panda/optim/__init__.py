"""Optimizers, parameter groups and learning-rate schedules; none of them knows a model or a file."""
