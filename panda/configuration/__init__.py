"""The configuration of a run: its options, arguments and refusals, and what follows from its checkpoint. No torch."""
