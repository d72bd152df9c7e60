"""Architectures, and what goes in and out of them: weights, exports, answers.

A model is a ``torch.nn.Module`` that is causal and whose ``forward(input_ids)`` takes int64
[rows, length] and returns logits [rows, length, vocabulary], or an object that has them as
``logits`` (as transformers' models do). One that is to train on packed rows also takes ``position_ids``,
int64 [rows, length], which begin anew in each sample of a row, and lets no token see another sample's.
Where its layers are named with a number, ``layers.0``, each becomes a parameter group, and the
optimizer's step needs less memory.
"""
