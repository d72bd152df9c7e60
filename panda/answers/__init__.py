"""Inference with a trained model: loading it, generation, dialogues."""
