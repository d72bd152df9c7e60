"""Random weights that are drawn when they are read: the numbers that a module would have had from the beginning.

A huge module is built on the meta device while what would have been done to its parameters is noted,
with the state of torch's generator before each draw. A parameter can then be had alone, in any
order, on any rank, and its numbers depend on none of that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from panda.stored_tensor import StoredTensor
from panda.stored_tensor import Weights

_IS_META: Any = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]
_EMPTY = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default}
_OVERWRITES = {
    torch.ops.aten.normal_.default,
    torch.ops.aten.uniform_.default,
    torch.ops.aten.zero_.default,
    torch.ops.aten.fill_.Scalar,
}
"""What they are applied to may be forgotten."""


def drawn_later(build: Callable[[], torch.nn.Module]) -> tuple[torch.nn.Module, Weights]:
    """The module that ``build`` builds, its large parameters on the meta device, and all of its tensors by name.

    They are, bit for bit, what ``build`` alone would have put there, and torch's generator is left as it
    would have left it. Each draw is made twice: once to leave the generator where it has to be. Where a
    parameter comes to be in a way that cannot be noted it is there at once, and takes its memory.
    """
    before = torch.get_rng_state()
    recorder = _Recorder()
    try:
        with recorder.registering(), recorder, _NotOnMeta():
            module = build()
    except _NotNotedError:
        torch.set_rng_state(before)
        recorder, module = _Recorder(), build()
    weights: dict[str, StoredTensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        notes = recorder.notes_on(tensor)
        read = partial(_there, tensor) if notes is None else partial(_draw, tensor, notes)
        weights[name] = StoredTensor(tuple(tensor.shape), tensor.dtype, read)
    return module, weights


@dataclass(frozen=True)
class _Note:
    """An operation in place on a parameter, or on a part of it."""

    operation: Any
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    more: tuple[Any, ...]
    keywords: dict[str, Any]
    random_state: torch.Tensor | None


class _NotOnMeta(TorchFunctionMode):
    """Has no parameter say that it is on the meta device: torch does nothing then in some initialisations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return False if func == _IS_META else func(*args, **(kwargs or {}))


class _NotNotedError(Exception):
    """A parameter was used in a way that cannot be repeated later."""


class _Recorder(TorchDispatchMode):
    """Notes what is done to parameters; tensors are told by their storages, which views share."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._untouched: dict[int, Any] = {}  # storages that nothing was written to yet
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._noted: dict[int, tuple[Any, list[_Note]]] = {}

    def notes_on(self, tensor: torch.Tensor) -> list[_Note] | None:
        found = self._noted.get(_key(tensor))
        return found[1] if found else None

    def registering(self) -> Any:
        """A context in which parameters that nothing was written to go to the meta device when they are registered."""
        from unittest.mock import patch

        register = torch.nn.Module.register_parameter

        def register_noted(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
            if parameter is not None and self._untouched.pop(_key(parameter), None) is not None:
                layout = parameter.shape, parameter.stride()
                with _disable_current_modes():
                    empty = torch.empty_strided(*layout, dtype=parameter.dtype, device="meta")
                    torch.utils.swap_tensors(parameter, torch.nn.Parameter(empty, parameter.requires_grad))  # type: ignore[no-untyped-call]
                self._noted[_key(parameter)] = parameter.untyped_storage(), []
            register(module, name, parameter)

        return patch.object(torch.nn.Module, "register_parameter", register_noted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        noted = [tensor for tensor in tensors if _key(tensor) in self._noted]
        is_view = any(a.alias_info and not a.alias_info.is_write for a in func._schema.arguments)
        if not noted or is_view:
            result = func(*args, **kwargs)
            made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            if any(_is_meta(tensor) and _key(tensor) not in self._noted for tensor in made):
                raise _NotNotedError(func)  # a tensor like a parameter, whose values are not there
            if func in _EMPTY:
                self._untouched[_key(result)] = result.untyped_storage()
            elif not is_view:
                for tensor in tensors:
                    self._untouched.pop(_key(tensor), None)
            return result
        target = args[0]
        writes = func._schema.arguments[0].alias_info is not None
        if not writes or len(noted) > 1 or noted[0] is not target or kwargs.get("generator") is not None:
            raise _NotNotedError(func)
        self._note(func, target, args[1:], kwargs)
        return target

    def _note(self, func: Any, target: torch.Tensor, more: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        state = None
        if torch.Tag.nondeterministic_seeded in func.tags:
            state = torch.get_rng_state()
            func(self._scratch_like(target), *more, **keywords)
        storage, notes = self._noted[_key(target)]
        if func in _OVERWRITES and target.numel() * target.element_size() == storage.nbytes():
            notes.clear()
        more = tuple(value.clone() if isinstance(value, torch.Tensor) else value for value in more)
        layout = tuple(target.shape), target.stride(), int(target.storage_offset())
        notes.append(_Note(func, *layout, more, keywords, state))

    def _scratch_like(self, target: torch.Tensor) -> torch.Tensor:
        """A tensor like ``target``, of any content: one memory for all, or what is freed piles up between the rest."""
        span = 1 + sum((size - 1) * stride for size, stride in zip(target.shape, target.stride(), strict=True))
        if self._scratch.numel() < span * target.element_size():
            self._scratch = torch.empty(span * target.element_size(), dtype=torch.uint8)
        whole = self._scratch[: span * target.element_size()].view(target.dtype)
        return whole.as_strided(target.shape, target.stride())


def _key(tensor: torch.Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def _is_meta(tensor: torch.Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return tensor.is_meta


def _there(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach()


@torch.no_grad()
def _draw(parameter: torch.Tensor, notes: list[_Note]) -> torch.Tensor:
    """A tensor like ``parameter`` to which was done what ``notes`` say. Leaves torch's generator as it is."""
    tensor = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="cpu")
    before = torch.get_rng_state()
    for note in notes:
        if note.random_state is not None:
            torch.set_rng_state(note.random_state)
        note.operation(tensor.as_strided(note.size, note.stride, note.offset), *note.more, **note.keywords)
    torch.set_rng_state(before)
    return tensor
