"""Reinforcement learning for panda. Names are declared in setup.cfg; nothing is imported here."""
