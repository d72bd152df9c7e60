"""Answers of trained models: loading a model for inference, generation, dialogues."""
