"""What a run was told: its options, arguments, refusals, and what follows from its checkpoint. Imports no torch."""
