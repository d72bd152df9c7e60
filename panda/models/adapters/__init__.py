"""Adapters on a frozen base: LoRA, quantised bases, merging."""
