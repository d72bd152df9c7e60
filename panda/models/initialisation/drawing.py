"""Random weights that are drawn when they are read: the numbers that a module would have had from the beginning.

A huge module is built on the meta device while what would have been done to its parameters is noted,
with the state of torch's generator before each draw. A parameter can then be had alone, in any
order, on any rank, and its numbers depend on none of that.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from typing import NoReturn

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from panda.weights.stored_tensor import StoredTensor
from panda.weights.stored_tensor import Weights

_IS_META: Any = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]
_EMPTY = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default}
_OVERWRITES = {
    torch.ops.aten.normal_.default,
    torch.ops.aten.uniform_.default,
    torch.ops.aten.zero_.default,
    torch.ops.aten.fill_.Scalar,
}
"""What they are applied to may be forgotten."""
_OPENINGS = {
    torch.Tensor.__array__,
    torch.Tensor.__dlpack__,
    torch.Tensor.data_ptr,
    torch.Tensor.numpy,
    torch.Tensor.storage,
    torch.Tensor.untyped_storage,
}
"""What gives a tensor's memory away, to be written to where no operation tells it."""


def drawn_later(build: Callable[[], torch.nn.Module]) -> tuple[torch.nn.Module, Weights]:
    """The module that ``build`` builds, its large parameters on the meta device, and all of its tensors by name.

    They are, bit for bit, what ``build`` alone would have put there, and the generators of torch, numpy and
    Python are left as it would have left them. Each draw is made twice: once to leave the generator where
    it has to be. A parameter whose memory is in other hands, too, is there at once, and takes it. All
    are where something was done that cannot be noted: ``build`` is called again then.
    """
    rewind = _rewinding()
    recorder = _Recorder()
    module = recorder.noting(build)
    if module is None:
        rewind()
        recorder = _Recorder()  # before: the other one has memory that is wanted now
        module = build()
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


class _NotNotedError(Exception):
    """A parameter was used in a way that cannot be repeated later."""


class _Recorder(TorchDispatchMode):
    """Notes what is done to parameters; tensors are told by their storages, which views share."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._untouched: dict[int, Any] = {}  # storages that nothing was written to yet
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._noted: dict[int, tuple[Any, torch.dtype, list[_Note]]] = {}
        self.failed = False
        """Whether something could not be noted; remembered, as a model may catch the exception that says so."""

    def noting(self, build: Callable[[], torch.nn.Module]) -> torch.nn.Module | None:
        """What ``build`` builds; None where that cannot be drawn later."""
        try:
            with self._registering(), self, _Watch(self):
                module = build()
            fits = all(self._fits(tensor) for tensor in module.state_dict(keep_vars=True).values())
        except Exception:  # of whatever kind: where it is the model's own, building it plainly raises it again
            return None
        return module if fits and not self.failed else None

    def _fits(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor``, if it is drawn later, is all of what was registered, as it was then."""
        if _key(tensor) not in self._noted:
            return True
        storage, dtype, _ = self._noted[_key(tensor)]
        is_whole = tensor.storage_offset() == 0 and _span(tensor) * tensor.element_size() == storage.nbytes()
        return is_whole and tensor.dtype == dtype

    def noted(self, values: Any) -> list[torch.Tensor]:
        """The parameters, and parts of them, in ``values`` that are drawn later."""
        return [tensor for tensor in _tensors(values) if _key(tensor) in self._noted]

    def touch(self, tensor: torch.Tensor) -> bool:
        """Note that ``tensor`` may hold something; whether nothing was written to it before."""
        return self._untouched.pop(_key(tensor), None) is not None

    def notes_on(self, tensor: torch.Tensor) -> list[_Note] | None:
        found = self._noted.get(_key(tensor))
        return found[2] if found else None

    def _registering(self) -> Any:
        """A context in which parameters that nothing wrote to, or can, go to the meta device when registered."""
        from unittest.mock import patch

        register = torch.nn.Module.register_parameter

        def register_noted(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
            if parameter is not None and self.touch(parameter) and _is_alone(parameter):
                layout = parameter.shape, parameter.stride()
                with _disable_current_modes():
                    empty = torch.empty_strided(*layout, dtype=parameter.dtype, device="meta")
                    torch.utils.swap_tensors(parameter, torch.nn.Parameter(empty, parameter.requires_grad))  # type: ignore[no-untyped-call]
                self._noted[_key(parameter)] = parameter.untyped_storage(), parameter.dtype, []
            register(module, name, parameter)

        return patch.object(torch.nn.Module, "register_parameter", register_noted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        noted = self.noted((args, kwargs))
        is_view = any(a.alias_info and not a.alias_info.is_write for a in func._schema.arguments)
        if not noted or is_view:
            result = func(*args, **kwargs)
            if any(_is_meta(tensor) and _key(tensor) not in self._noted for tensor in _tensors(result)):
                self._fail(func)  # a tensor like a parameter, whose values are not there
            if func in _EMPTY:
                self._untouched[_key(result)] = result.untyped_storage()
            elif not is_view:
                for tensor in _tensors((args, kwargs)):
                    self.touch(tensor)
            return result
        target = args[0]
        writes = func._schema.arguments[0].alias_info is not None
        if not writes or len(noted) > 1 or noted[0] is not target or kwargs.get("generator") is not None:
            self._fail(func)
        # A note says neither another layout nor another type.
        if torch.Tag.inplace_view in func.tags or target.dtype != self._noted[_key(target)][1]:
            self._fail(func)
        self._note(func, target, args[1:], kwargs)
        return target

    def _fail(self, operation: Any) -> NoReturn:
        self.failed = True
        raise _NotNotedError(operation)

    def _note(self, func: Any, target: torch.Tensor, more: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        state = None
        if torch.Tag.nondeterministic_seeded in func.tags:
            state = torch.get_rng_state()
            func(self._scratch_like(target), *more, **keywords)
        storage, _, notes = self._noted[_key(target)]
        if func in _OVERWRITES and target.numel() * target.element_size() == storage.nbytes():
            notes.clear()
        more = tuple(value.clone() if isinstance(value, torch.Tensor) else value for value in more)
        layout = tuple(target.shape), target.stride(), int(target.storage_offset())
        notes.append(_Note(func, *layout, more, keywords, state))

    def _scratch_like(self, target: torch.Tensor) -> torch.Tensor:
        """A tensor like ``target``, of any content: one memory for all, or what is freed piles up between the rest."""
        bytes_ = _span(target) * target.element_size()
        if self._scratch.numel() < bytes_:
            self._scratch = torch.empty(bytes_, dtype=torch.uint8)
        whole = self._scratch[:bytes_].view(target.dtype)
        return whole.as_strided(target.shape, target.stride())


class _Watch(TorchFunctionMode):
    """Sees what is no operation, and what goes wrong."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _IS_META:
            return False  # or torch does nothing in some initialisations
        if func in _OPENINGS:
            self._recorder.touch(args[0])
        try:
            return func(*args, **(kwargs or {}))
        except Exception:
            # Perhaps only because it is on the meta device, and the model may catch it and go another way.
            if self._recorder.noted((args, kwargs)):
                self._recorder.failed = True
            raise


def _key(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunction():
        key: int = tensor.untyped_storage()._cdata
    return key


def _span(tensor: torch.Tensor) -> int:
    """How many elements of memory ``tensor`` reaches over."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _is_alone(parameter: torch.nn.Parameter) -> bool:
    """Whether no other tensor has the memory of ``parameter``, by which it could be written to unseen."""
    with torch._C.DisableTorchFunction():
        storage = parameter.untyped_storage()
    users: int = torch._C._storage_Use_Count(storage._cdata)
    # Its own and that of `storage`. A weak reference would go on to see the memory that is given up.
    return users == 2 and not weakref.getweakrefs(parameter)


def _rewinding() -> Callable[[], None]:
    """A function that brings the generators that a model may draw from back to where they are now."""
    python, numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def rewind() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(of_torch)

    return rewind


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
