"""The context: which group of ranks shares the sequence, how it is dealt to them, and what is counted."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode

from saccade.ops.sharding import Layout, in_force, put_in_force, suspended
from saccade.parallel.counted import Traffic
from saccade.parallel.exchange import ask

__all__ = ["Shards", "parallel", "replicated", "traffic"]


@dataclass(eq=False)
class Shards:
    """The ranks that share a sequence, as one of them sees it.

    Attributes:
        group: of processes.
        device: where their tensors lie.
        balance: how a sequence is dealt to them, of `saccade.ops.sharding.BALANCES`.
        unit: tokens that are never parted.
        lengths: of whole sequences that are known; where there are none, ranks ask each other at every call.
        traffic: what this rank sent and received.
    """

    group: dist.ProcessGroup
    device: torch.device
    balance: str = "contiguous"
    unit: int = 1
    lengths: tuple[int, ...] = ()
    traffic: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.layout(0)  # refuses a balance that there is not
        layouts = [self.layout(length) for length in sorted(set(self.lengths))]
        for one, other in zip(layouts, layouts[1:]):
            if any(a == b for a, b in zip(one.shares, other.shares)):
                raise ValueError(
                    f"lengths {one.length} and {other.length} give some rank of {self.ranks} the same share, so that "
                    "no rank can tell which of them a tensor is part of: give none, and ranks ask each other"
                )
        self._by_share = {layout.share(self.rank): layout for layout in layouts}

    def layout(self, length: int) -> Layout:
        """Who holds which of `length` tokens."""
        return Layout(length, self.ranks, self.balance, self.unit)

    def layouts(self, *local: int) -> list[Layout]:
        """Who holds which tokens of the sequences of which this rank holds so many.

        Raises:
            ValueError: if the ranks' parts are not those that `shard` gives.
        """
        if self._by_share:
            for n in local:
                if n not in self._by_share:
                    known = ", ".join(map(str, sorted(self.lengths)))
                    raise ValueError(f"rank {self.rank} holds {n} tokens, which is its share of no length of {known}")
            return [self._by_share[n] for n in local]
        answers = list(zip(*ask(self, local, "lengths")))
        found = [self.layout(sum(parts)) for parts in answers]
        for layout, parts in zip(found, answers):
            if list(parts) != layout.shares:
                raise ValueError(
                    f"the ranks hold {list(parts)} tokens, and parts of {layout.length} are {layout.shares}: "
                    "saccade.parallel.shard cuts them so"
                )
        return found

    def whole(self, n: int) -> int:
        """Tokens of the whole sequence of which this rank holds `n`."""
        return self.layouts(n)[0].length

    def places(self, n: int, device: torch.device | str) -> Tensor:
        """Where in the whole sequence the `n` tokens of this rank stand, (n,)."""
        return places_of(self.layouts(n)[0], self.rank, device)

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """What `function` gives for the whole sequence, this rank's part of it, by the row that has its name.

        Raises:
            ValueError: if there is no row.
        """
        from saccade.parallel.rows import row

        computed = row(function)
        with suspended():
            return computed(self, function, *arguments, **options)

    @contextmanager
    def named_errors(self, kind: str) -> Iterator[None]:
        """An error of the group in one line that says who waited for what."""
        try:
            yield
        except RuntimeError as error:
            why = str(error).strip().splitlines()[0]
            raise RuntimeError(f"rank {self.rank} of {self.ranks} lost the others ({kind}): {why}") from error


def places_of(layout: Layout, rank: int, device: torch.device | str = "cpu") -> Tensor:
    """Where in the whole sequence the tokens of a rank stand.

    Args:
        layout: who holds which.
        rank: whose.
        device: of the answer.
    """
    pieces = [torch.arange(piece.start, piece.stop, device=device) for piece in layout.pieces(rank)]
    return torch.cat(pieces) if pieces else torch.arange(0, device=device)


#: what says which ranks share a sequence
Mesh: TypeAlias = DeviceMesh | dist.ProcessGroup | Shards

_last: Traffic | None = None


#: torch's attention, in every form in which it can be seen to be called; a module's own calls hide what is inside
_TORCHS = {
    F.scaled_dot_product_attention,
    F.multi_head_attention_forward,
    torch._native_multi_head_attention,
    torch._transformer_encoder_layer_fwd,
}


class Watching(TorchFunctionMode):
    """Refuses torch's attention on a part of a sequence, which would be of that part alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _TORCHS and in_force() is not None:
            raise ValueError(
                f"{func.__name__} would attend to this rank's part alone: use saccade.attend, in a model "
                'of transformers saccade.switch(model, "softmax"), or saccade.parallel.replicated() for what is whole'
            )
        return func(*args, **(kwargs or {}))


@contextmanager
def parallel(
    mesh: DeviceMesh | dist.ProcessGroup,
    *,
    balance: str = "contiguous",
    unit: int = 1,
    length: int | Sequence[int] | None = None,
    timeout: float | None = None,
) -> Iterator[Shards]:
    """Within, every tensor holds this rank's part of a sequence, and masks describe the whole sequence.

    Args:
        mesh: one dimension of a `DeviceMesh`, `mesh["sequence"]`, or a group of processes.
        balance: "contiguous", in the order of the ranks; or "head-tail", which gives all ranks the same work where
            attention is causal (windows and states are cheaper in contiguous parts).
        unit: tokens that are never parted, of which parts are multiples: the tokens of a block for mechanisms that
            choose blocks, of a row for grids.
        length: tokens of the whole sequence, or of several that are met inside (queries and keys of cross-attention).
            Where it is not given the ranks ask each other at every call, which is a message of some bytes, and on an
            accelerator a moment in which its queue is empty.
        timeout: seconds after which a rank that waits for another gives up with an error, inside; the group's own where
            None.

    Yields:
        `Shards`: rank, ranks, layouts, traffic.

    Raises:
        ValueError: if the mesh has several dimensions, or an argument is none of these; inside, where torch's own
            attention is called.
        RuntimeError: inside, if another rank fails or does not answer in time.
    """
    global _last
    lengths = () if length is None else tuple(length) if isinstance(length, Sequence) else (length,)
    if not all(isinstance(n, int) and n >= 0 for n in lengths):
        raise ValueError(f"length must be a number of tokens, or several such numbers, got {length!r}")
    shards = Shards(*_group(mesh), balance, unit, lengths)
    if timeout is not None:
        if not 0 < timeout < float("inf"):
            raise ValueError(f"timeout must be positive and finite, got {timeout}")
    _last = shards.traffic
    with _patient(shards, timeout), put_in_force(shards), Watching():
        yield shards


@contextmanager
def _patient(shards: Shards, timeout: float | None) -> Iterator[None]:
    """The group with another timeout on these ranks' kind of device; afterwards with its own."""
    if timeout is None:
        yield
        return
    backend: Any = shards.group._get_backend(shards.device)
    if hasattr(backend, "wrapped_pg"):
        backend = backend.wrapped_pg
        warnings.warn(
            "timeout: TORCH_DISTRIBUTED_DEBUG=DETAIL compares the calls of ranks first, and waits as long as the group",
            stacklevel=4,
        )
    before = backend.options._timeout
    backend._set_default_timeout(timedelta(seconds=timeout))
    try:
        yield
    finally:
        backend._set_default_timeout(before)


def replicated() -> AbstractContextManager[None]:
    """Inside of `parallel`: tensors hold what they hold on every rank, and nothing is sent."""
    return suspended()


def traffic() -> Traffic:
    """What this rank sent and received in the context in force, or in the last one.

    Raises:
        RuntimeError: if there was none.
    """
    if _last is None:
        raise RuntimeError("nothing was sent: there was no saccade.parallel(mesh) in this process")
    return _last


def shards_of(mesh: Mesh, balance: str = "contiguous", unit: int = 1) -> Shards:
    """The ranks of a mesh, as `parallel` takes it; or what that yields, as it is.

    Args:
        mesh: those.
        balance, unit: how they are dealt a sequence.

    Raises:
        ValueError: as `parallel`.
    """
    return mesh if isinstance(mesh, Shards) else Shards(*_group(mesh), balance, unit)


def _group(mesh: Any) -> tuple[dist.ProcessGroup, torch.device]:
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            last = (mesh.mesh_dim_names or ("sequence",))[-1]
            raise ValueError(f"a sequence is shared along one dimension of a mesh, got {mesh.ndim}: say mesh[{last!r}]")
        group, kind = mesh.get_group(), mesh.device_type
    elif isinstance(mesh, dist.ProcessGroup):
        group, kind = mesh, "cuda" if "nccl" in dist.get_backend(mesh) else "cpu"
    else:
        hint = "" if dist.is_initialized() else "; none was initialised (torch.distributed.init_process_group)"
        raise ValueError(
            f"mesh must be a dimension of a DeviceMesh or a group of processes, got {type(mesh).__name__}{hint}"
        )
    if kind == "cpu":
        return group, torch.device("cpu")
    return group, torch.device(kind, torch.get_device_module(kind).current_device())
