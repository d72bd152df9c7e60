"""The only package that imports deepspeed and fairscale: configuration, process groups, steps, checkpoints.

It knows neither tasks nor models: the runner passes it a module, an optimizer and batches.

Where the code works around DeepSpeed, FairScale or torch, a comment says what, in which version it was last
seen, and when the workaround can go. The versions are those of November 2026.
"""
