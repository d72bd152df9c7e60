"""Checkpoints: folders, writing and loading, their weights, and their redistribution over other ranks."""
