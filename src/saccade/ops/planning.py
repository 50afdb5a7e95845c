"""What is asked of the engine (`Problem`) and what it forecasts (`Plan`, and `Parts` of a sequence on many ranks).

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim of q and k, E head dim of v.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
from torch import Tensor

from saccade.ops import masks
from saccade.ops.autocast import working_dtype
from saccade.ops.masks import EMPTY, FULL, Mask
from saccade.ops.score_mods import ScoreMod

#: tokens per block in which the planner looks at a mask, unless the mask brings its own
PLANNING_BLOCK = 64

#: blocks that the planner looks at, at most: beyond, it looks at larger ones
PLANNED_BLOCKS = 2**18

ScoreFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(eq=False)
class Shapes:
    """Sizes, type and device of the queries, keys and values of a call: the letters at the top of this file."""

    B: int
    H: int
    K: int
    N: int
    M: int
    D: int
    E: int
    dtype: torch.dtype
    device: torch.device

    @property
    def io_bytes(self) -> int:
        """Inputs and outputs."""
        elements = self.B * self.H * self.N * (self.D + self.E) + self.B * self.K * self.M * (self.D + self.E)
        return elements * self.dtype.itemsize


@dataclass(eq=False)
class Problem(Shapes):
    """One call of `attend`, without the tensors' contents.

    `M` counts the keys from `first_key` on that some query may see; `unseen_keys` more are left out.
    """

    needs_grad: bool
    mask: Mask | None = None
    score: ScoreFunction | None = None
    score_mod: ScoreMod | None = None
    normalize: Any = "softmax"
    scale: float = 1.0
    dropout: float = 0.0
    return_lse: bool = False
    memory_mb: float = 64.0
    first_key: int = 0
    unseen_keys: int = 0

    _states: Tensor | None = field(default=None, init=False, repr=False)
    _coarse: Tensor | None = field(default=None, init=False, repr=False)
    _density: float | None = field(default=None, init=False, repr=False)

    @property
    def block_size(self) -> tuple[int, int]:
        """Tokens per (query, key) block of `block_map`: the mask's own where it is made of blocks."""
        return own_block_size(self.mask) or (PLANNING_BLOCK, PLANNING_BLOCK)

    @property
    def map_device(self) -> torch.device:
        """Where block states are: planning needs them themselves, also where the tensors are only shapes."""
        return torch.device("cpu") if self.device.type == "meta" else self.device

    @property
    def reading_device(self) -> torch.device:
        """Where block states are made that are only read: what a mask without tensors is like, the processor tells, and
        no device is waited for."""
        return torch.device("cpu") if self.mask is None or not self.mask.tensors() else self.map_device

    @property
    def block_map(self) -> Tensor:
        """The mask's block states (B', H', n, m), worked out once; without a mask every block is full."""
        if self._states is None:
            device = self.map_device
            if self.mask is None:
                blocks = (ceil(self.N / self.block_size[0]), ceil(self.M / self.block_size[1]))
                full = torch.full((1, 1, 1, 1), FULL, dtype=torch.int8, device=device)
                self._states = full.expand(1, 1, *blocks)
            else:
                self._states = self.mask.block_map(self.N, self.M, self.block_size, device)
        return self._states

    @property
    def coarse_map(self) -> Tensor:
        """`block_map` for weighing paths, in larger blocks where there would be more than `PLANNED_BLOCKS`."""
        size = self.block_size
        while ceil(self.N / size[0]) * ceil(self.M / size[1]) > PLANNED_BLOCKS:
            size = (2 * size[0], 2 * size[1])
        if self.mask is None:
            return self.block_map[..., :1, :1]  # all are alike
        if size == self.block_size and self.reading_device == self.map_device:
            return self.block_map
        if self._coarse is None:
            self._coarse = self.mask.block_map(self.N, self.M, size, self.reading_device)
        return self._coarse

    @property
    def density(self) -> float:
        """Share of the N x M pairs in blocks with work to do."""
        if self.mask is None:
            return 1.0
        if self._density is None:
            states = self.coarse_map
            self._density = float((states != EMPTY).float().mean().item()) if states.numel() else 0.0
        return self._density

    @property
    def flops(self) -> int:
        """Multiply-adds counted as two, forward, over the blocks with work to do."""
        return int(2 * self.B * self.H * self.N * self.M * (self.D + self.E) * self.density)

    @property
    def dense_seconds(self) -> float:
        """What dense SDPA takes on a CPU: 60 GFLOP/s a thread (measured), and some 20 microseconds to begin with."""
        pairs = self.B * self.H * self.N * self.M
        return pairs * 2 * (self.D + self.E) / (60e9 * torch.get_num_threads()) + 2e-5


def nothing(q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    """No query, or none that has a key: zeros, and -inf as the LSE, which all inputs have a gradient of."""
    joined = q_BHND[..., :0].sum() + k_BKMD[..., :0].sum() + v_BKME[..., :0].sum()
    for x in others:
        joined = joined + x[..., :0].sum().to(joined.dtype)
    rows, dtype = q_BHND.shape[:3], working_dtype(q_BHND.dtype)
    out = q_BHND.new_zeros(*rows, v_BKME.shape[3]) + joined
    return out, q_BHND.new_full(rows, float("-inf"), dtype=dtype) + joined


def own_block_size(mask: Mask | None) -> tuple[int, int] | None:
    """The block size of the coarsest block mask inside `mask`, if it has one between 16 and 256."""
    if isinstance(mask, masks.Blocks):
        size = (mask.block_q, mask.block_k)
        return size if all(16 <= s <= 256 for s in size) else None
    if isinstance(mask, masks.Pairwise):
        return own_block_size(mask.left) or own_block_size(mask.right)
    if isinstance(mask, masks.Not):
        return own_block_size(mask.inner)
    return None


@dataclass(frozen=True)
class Share:
    """What falls to one rank.

    Attributes:
        flops: floating-point operations of the forward pass.
        sent, received: bytes, forward.
        sent_backward, received_backward: bytes, backward; 0 where nothing needs a gradient.
    """

    flops: int
    sent: int
    received: int
    sent_backward: int
    received_backward: int


@dataclass(frozen=True)
class Parts:
    """What falls to each rank.

    Attributes:
        path: of keys "ring" or "halo"; "states"; "blocks"; "tokens" that get another rank; "positions"; several of
            these with "and"; or "alone" where nobody needs anything of another.
        shares: by rank.
        exact: False where what is sent hangs on a choice that was not given: the most that the settings allow.
    """

    path: str
    shares: tuple[Share, ...]
    exact: bool = True

    @property
    def balance(self) -> float:
        """Work of the average rank as a share of that of the busiest, for which the others wait."""
        work = [share.flops for share in self.shares]
        return sum(work) / (len(work) * max(work)) if max(work) else 1.0

    def __str__(self) -> str:
        most = {name: max(getattr(share, name) for share in self.shares) for name in Share.__dataclass_fields__}
        back = f", backward {most['sent_backward']:.3g} and {most['received_backward']:.3g}"
        return (
            f"{len(self.shares)} ranks, {self.path}: at most {most['flops']:.3g} FLOPs, {most['sent']:.3g} bytes sent "
            f"and {most['received']:.3g} received{back if most['sent_backward'] else ''}; balance {self.balance:.0%}"
            f"{'' if self.exact else '; the most that the settings allow'}"
        )


@dataclass(frozen=True, kw_only=True)
class AnyPlan:
    """Which path a call takes, why, and what it costs.

    Attributes:
        backend: name of the path.
        reason: why this one.
        flops: floating-point operations of the forward pass.
        bytes: inputs, outputs and extra memory, in bytes.
        refused: what the other paths answered, by name.
        parts: what falls to each rank, where the sequence is in parts.
    """

    backend: str
    reason: str
    flops: int
    bytes: int
    refused: dict[str, str] = field(default_factory=dict)
    parts: Parts | None = None

    def figures(self) -> dict[str, str]:
        """What it costs, as it is shown, by name."""
        return {"FLOPs": f"{self.flops:.3g}", "bytes": f"{self.bytes:.3g}"}

    def __str__(self) -> str:
        said = {"backend": f"{self.backend}: {self.reason}", **self.figures()}
        if self.parts is not None:
            said["parts"] = str(self.parts)
        lines = [f"{name:<10}{text}" for name, text in said.items()]
        return "\n".join(lines + [f"not {name:<12}{why}" for name, why in self.refused.items()])


@dataclass(frozen=True, kw_only=True)
class Plan(AnyPlan):
    """Which path `attend` takes for the same arguments, why, and what it costs.

    Attributes:
        backend, reason, flops, bytes, refused, parts: as in `AnyPlan`.
        density: share of the query-key pairs that are computed.
        relative_time: expected time as a share of dense SDPA's on the same shapes.
    """

    density: float
    relative_time: float

    def figures(self) -> dict[str, str]:
        """What it costs, as it is shown, by name."""
        time = f"{self.relative_time:.0%} of dense SDPA's (expected)"
        return {**super().figures(), "density": f"{self.density:.1%}", "time": time}
