"""Architectures, and what is applied to their modules: forward passes, adapters, initialisation.

A model is a ``torch.nn.Module`` that is causal and whose ``forward(input_ids)`` takes int64
[rows, length] and returns logits [rows, length, vocabulary], or an object that has them as
``logits`` (as transformers' models do). To be trained on packed rows, a model also has to take ``position_ids``,
int64 [rows, length], which start at 0 in each sample of a row, and to let no token attend to another sample.
A model that can train without logits has an attribute ``sums_loss`` that is true, and its
``forward(input_ids, labels=..., supervised_tokens=...)`` returns the cross-entropy of each label under
the token before it, summed in float32 over the ``supervised_tokens`` labels that are not ``IGNORED_LABEL``. If it
also takes ``label_weights`` [rows, length] and ``label_smoothing``, it says so with ``sums_varied_loss``.
If the names of a model's layers end with a number, ``layers.0``, each layer becomes a parameter group, and the
optimizer's step needs less memory.
"""
