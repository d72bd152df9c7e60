"""Weights as files and names: where a checkpoint is found, how it is read and matched, and what an export writes."""
