"""Weights as files and names: finding a checkpoint, reading it, matching it with a model, and writing exports."""
