"""Modules before training: built without weights, or with random ones."""
