"""The one room that imports deepspeed and fairscale: configuration, process groups, stepping, checkpoints.

It knows neither tasks nor models: the runner hands it a module, an optimizer and batches.
"""
