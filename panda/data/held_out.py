"""Held-out samples that are trained on as well, found by hashes of their tokens."""

from __future__ import annotations

import numpy as np

from panda.data.token_dataset import Sample
from panda.data.token_dataset import SampleSet
from panda.data.token_dataset import sample_hash

HASHES_AT_ONCE = 1 << 20


def note_shared_samples(trained: SampleSet, held_out: SampleSet) -> None:
    """Note in the report of ``held_out`` how many of its samples ``trained`` has too, if any."""
    if shared := shared_samples(trained, held_out):
        held_out.report.notes.append(
            f"{shared:,} of {len(held_out):,} held-out samples are also in the training data, and are trained on"
        )


def shared_samples(trained: SampleSet, held_out: SampleSet) -> int:
    """How many samples of ``held_out`` have the same tokens as one of ``trained``, wherever either comes from.

    Cheap for large training data: the cache has the hashes of its samples, 8 bytes each.
    """
    lengths = np.unique(held_out.lengths(np.arange(len(held_out))))
    sought, counts = np.unique(_hashes(held_out, lengths), return_counts=True)
    found = np.zeros(len(sought), dtype=bool)
    hashes = _hashes(trained, lengths)
    for start in range(0, len(hashes), HASHES_AT_ONCE):
        some = hashes[start : start + HASHES_AT_ONCE]
        places = np.searchsorted(sought, some)
        places[places == len(sought)] = 0
        found[places[sought[places] == some]] = True
    return int(counts[found].sum())


def _hashes(dataset: SampleSet, lengths: np.ndarray) -> np.ndarray:
    """The hashes of the samples of ``dataset``; of a task's own kind of data set, of those that have ``lengths``."""
    stored: np.ndarray | None = getattr(dataset, "sample_hashes", None)
    if stored is not None:
        return stored
    indices = np.arange(len(dataset))
    indices = indices[np.isin(dataset.lengths(indices), lengths)]
    return np.array([_hash_of(dataset[index]) for index in indices.tolist()], dtype=np.uint64)


def _hash_of(sample: Sample) -> int:
    return sample_hash(*([sample["token_ids"]] if "token_ids" in sample else sample.values()))
