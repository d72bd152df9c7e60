"""The fields of a sample. Imports no numpy: the modules of tasks state them at their top."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Field:
    """One of the arrays that every sample of a data set has."""

    name: str
    kind: str
    """``tokens`` (token ids), ``supervised`` (0 and 1: whether a token carries loss), or numpy's name of a type:
    ``float32``, ``int64``, ``uint8``."""
    along: str | None = None
    """The field before it that is as long in every sample; None for one of lengths of its own."""
    optional: bool = False
    """Whether samples may lack it, and then have ones: where all do, nothing is stored. It needs ``along``."""

    def type_of(self, vocabulary: int) -> str:
        """The type in which it is stored, of token ids below ``vocabulary``."""
        if self.kind == "tokens":
            return "uint16" if vocabulary <= 1 << 16 else "int32"
        return {"supervised": "bool"}.get(self.kind, self.kind)

    @property
    def made_in(self) -> str:
        """The type of array in which a ``SampleBlock`` collects it."""
        if code := {"tokens": "i", "supervised": "B"}.get(self.kind):
            return code
        import numpy as np

        return "q" if self.kind == "int64" else np.dtype(self.kind).char


TEXT = (
    Field("token_ids", "tokens"),
    Field("supervised", "supervised", along="token_ids"),
    Field("weights", "float32", along="token_ids", optional=True),
)
"""Of a sample of text: its tokens, which of them are to be predicted, and the weight of each in the loss."""
