"""Architectures, and what goes in and out of them: weights, exports, answers.

A model is a ``torch.nn.Module`` that is causal and whose ``forward(input_ids)`` takes int64
[rows, length] and returns logits [rows, length, vocabulary], or an object that has them as
``logits`` (as transformers' models do). One that is to train on packed rows also takes ``position_ids``,
int64 [rows, length], which begin anew in each sample of a row, and lets no token see another sample's.
One that can do without logits in training has an attribute ``sums_loss``, true, and its
``forward(input_ids, labels=..., supervised_tokens=...)`` returns the cross-entropy of each label under
the token before, summed in float32 over the ``supervised_tokens`` labels that are not -100.
Where its layers are named with a number, ``layers.0``, each becomes a parameter group, and the
optimizer's step needs less memory.
"""
