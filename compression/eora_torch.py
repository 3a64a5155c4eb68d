"""Walks a decoder layer by layer, collects what its linear layers read, and compensates each.

Knows torch modules and `compression.eora`. Does not know bundles, tokenizers or quantizers.

`calibrate` follows the order in which the model computes: the inputs of a layer come from layers
that are compressed and compensated already, down to the projections within one block. `covariances`
is one pass over the model as it is: what a device can do alone and send once (`eora.one_pass`).
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from compression.eora import (
    A_SUFFIX,
    B_SUFFIX,
    F32,
    F64,
    Factors,
    Moments,
    as_factors,
    branch,
    eigen_root,
    second_moment,
)
from compression.errors import WeightsError

Root = Callable[[F64], F64 | None]
"""How C is turned into a root: eigen_root, diagonal_root, or a function that returns None."""

Error = Callable[[str, nn.Linear, F64], F64]
"""(name, layer, C) -> D = W - Wq; it may write Wq into the layer."""

_BLOCK = re.compile(r"^(.*\.(?:layers|h)\.\d+)\.")


class _Reached(Exception):  # noqa: N818 - an event: nothing later in the block is needed
    pass


def groups(model: Any, names: Iterable[str], ids: torch.Tensor) -> list[tuple[str, ...]]:
    """The linear layers `names` in the order they run; those that read the same tensor together.

    `ids`: token ids (B, T) to run once.

    Raises:
        WeightsError: one of them is no part of the model, or does not run.
    """
    found: list[list[str]] = []
    last: list[torch.Tensor] = []

    def note(name: str, x: torch.Tensor) -> None:
        if last and last[0] is x:
            found[-1].append(name)
        else:
            found.append([name])
        last[:] = [x]

    with _watching(model, names, note), torch.no_grad():
        model.base_model(input_ids=ids[:1], use_cache=False)
    missing = set(names) - {name for group in found for name in group}
    if missing:
        raise WeightsError(f"{min(missing)}: this linear layer is never run")
    return [tuple(group) for group in found]


def covariances(model: Any, batches: Sequence[torch.Tensor], names: Iterable[str]) -> Moments:
    """C of the first layer of each group of `names`, over `batches` of ids (B, T), in one pass.

    Layers that read the same tensor have the same C, so only one of them is named.
    """
    firsts = [group[0] for group in groups(model, names, batches[0])]
    moments: Moments = {}

    def add(name: str, x: torch.Tensor) -> None:
        part = second_moment(_rows(x))
        moments[name] = moments[name] + part if name in moments else part

    with _watching(model, firsts, add), torch.no_grad():
        for ids in batches:
            model.base_model(input_ids=ids, use_cache=False)
    return moments


def calibrate(
    model: Any,
    batches: Sequence[torch.Tensor],
    names: Iterable[str],
    error: Error,
    *,
    rank: int,
    root: Root = eigen_root,
) -> Factors:
    """The branches of the linear layers `names`, each from inputs that those before it produced.

    `batches`: token ids (B, T) without padding. The model's layers are as `error` leaves them; the
    branches themselves are not left in the model.

    Raises:
        WeightsError: a layer lies in no block of the model, or does not run.
    """
    order = groups(model, names, batches[0])
    blocks: dict[str, list[tuple[str, ...]]] = {}
    for group in order:
        match = _BLOCK.match(group[0])
        if match is None:
            raise WeightsError(f"{group[0]}: not within a block such as model.layers.0")
        blocks.setdefault(match[1], []).append(group)
    factors: Factors = {}
    with torch.no_grad(), contextlib.ExitStack() as branches:
        calls = _entry(model, list(blocks), batches)
        for path, inside in blocks.items():
            block = model.get_submodule(path)
            for group in inside:
                moment = _moment(model, block, group[0], calls[path])
                weights = root(moment)
                for name in group:
                    layer = model.get_submodule(name)
                    found = as_factors({name: branch(error(name, layer, moment), rank, weights)})
                    branches.enter_context(branches_on(model, found))
                    factors |= found
            _advance(block, calls, path)
    return factors


@contextlib.contextmanager
def branches_on(model: Any, factors: Mapping[str, F32], *, scale: float = 1.0) -> Iterator[None]:
    """Within this block every adapted layer computes y + scale * B A x; after it, y again."""
    handles = []
    for key in factors:
        if not key.endswith(A_SUFFIX):
            continue
        name = key.removesuffix(A_SUFFIX)
        layer = model.get_submodule(name)
        like = next(layer.parameters(), torch.zeros(0))
        A, B = (
            torch.from_numpy(np.ascontiguousarray(factors[name + side].T)).to(like)
            for side in (A_SUFFIX, B_SUFFIX)
        )

        def add(_: Any, x: Any, y: torch.Tensor, A: Any = A, B: Any = B * scale) -> Any:
            return y + (x[0] @ A) @ B

        handles.append(layer.register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
# One batch at a block: its hidden states (B, T, width) and the block's other arguments.


def _entry(model: Any, paths: Sequence[str], batches: Sequence[torch.Tensor]) -> dict[str, Any]:
    # What every block is called with: hidden states for the first, the other arguments (positions,
    # masks) for all. Later blocks' hidden states are filled in by _advance.
    calls: dict[str, list[Call]] = {path: [] for path in paths}
    handles = []
    for path in paths:

        def keep(_: Any, given: tuple[Any, ...], named: dict[str, Any], path: str = path) -> None:
            calls[path].append((given[0] if path == paths[0] else None, given[1:], named))

        block = model.get_submodule(path)
        handles.append(block.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        for ids in batches:
            model.base_model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _moment(model: Any, block: Any, name: str, calls: Sequence[Call]) -> F64:
    parts: list[F64] = []

    def add(_: str, x: torch.Tensor) -> None:
        part = second_moment(_rows(x))
        parts[:] = [parts[0] + part if parts else part]
        raise _Reached

    with _watching(model, [name], add):
        for hidden, given, named in calls:
            with contextlib.suppress(_Reached):
                block(hidden, *given, **named)
    return parts[0]


def _advance(block: Any, calls: dict[str, Any], path: str) -> None:
    paths = list(calls)
    at = paths.index(path) + 1
    for number, (hidden, given, named) in enumerate(calls[path]):
        made = block(hidden, *given, **named)
        made = made[0] if isinstance(made, tuple) else made
        if at < len(paths):
            calls[paths[at]][number] = (made, *calls[paths[at]][number][1:])
    calls[path] = []  # the hidden states of a block that is done


@contextlib.contextmanager
def _watching(
    model: Any, names: Iterable[str], see: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    handles = []
    try:
        for name in names:
            try:
                layer = model.get_submodule(name)
            except AttributeError as exc:
                raise WeightsError(f"{name}: the model has no such layer") from exc

            def hook(_: Any, given: tuple[torch.Tensor, ...], name: str = name) -> None:
                see(name, given[0])

            handles.append(layer.register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(x: torch.Tensor) -> F32:
    rows: F32 = x.detach().reshape(-1, x.shape[-1]).float().numpy()
    return rows
