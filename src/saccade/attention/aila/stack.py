"""Layers joined by connections over depth, and the paper's recurrent network of them.

Shape letters: ... any leading axes, B batch, N tokens, M tokens so far, C width, H heads, L layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saccade import catalogue
from saccade.attention.aila.connections import (
    AttentionConnection,
    ConcatConnection,
    Connection,
    GatedConnection,
    ScalarConnection,
    SumConnection,
    Variant,
)
from saccade.layers.cache import LayerCaches, StateCache
from saccade.layers.pre_norm import PreNormBlock
from saccade.ops.masks import Mask
from saccade.ops.pattern import GivenMask, Pattern, Said


class AILAStack(nn.Module):
    """The network over any layers f_1 ... f_L of equal width: input h_0, output h_L.

    Args:
        dim: C.
        hosts: the layers, each a module from (..., C) to (..., C). `nn.LSTM`, `nn.GRU` and `nn.RNN` (batch first) may
            be given as they are. `mask` and `cache` go to those whose `forward` names them; one that names no cache is
            taken to work on every position alone.
        variant, residual, query, shared, project: see the paper's page.
        num_heads: H of "attention" (a divisor of C) and "gated".
        warm: "concat" starts at c_l = h_{l-1}.
        dropout: of f_l's output.
        channel_axis: where C stands in the input and for the hosts: -1, or 1 for feature maps (B, C, ...).

    Raises:
        ValueError: if an argument is out of range, or an option is not one of the variant's.
    """

    def __init__(
        self,
        dim: int,
        hosts: Sequence[nn.Module],
        *,
        variant: Variant = "attention",
        num_heads: int = 4,
        residual: Literal["previous", "connection"] = "previous",
        query: Literal["newest", "learned"] = "newest",
        shared: bool = False,
        project: bool = False,
        warm: bool = False,
        dropout: float = 0.1,
        channel_axis: int = -1,
    ) -> None:
        super().__init__()
        _check_options(dim, num_heads, len(hosts), variant, residual, dropout)
        for name, given, owner in (
            ("query='learned'", query != "newest", "attention"),
            ("shared", shared, "attention"),
            ("project", project, "scalar"),
            ("warm", warm, "concat"),
        ):
            if given and variant != owner:
                raise ValueError(f"{name} is an option of variant {owner!r}, got variant {variant!r}")
        self.dim, self.num_heads, self.variant, self.residual = dim, num_heads, variant, residual
        self.shared, self.channel_axis = shared, channel_axis
        self.hosts = nn.ModuleList(Recurrent(host) if isinstance(host, nn.RNNBase) else host for host in hosts)
        self._takes = [set(inspect.signature(host.forward).parameters) for host in self.hosts]
        layers = len(self.hosts)
        make: dict[str, Callable[[int], Connection]] = {
            "attention": lambda _: AttentionConnection(dim, num_heads, query=query, targets=layers if shared else 1),
            "gated": lambda j: GatedConnection(dim, num_heads, j),
            "concat": lambda j: ConcatConnection(dim, j, warm=warm),
            "scalar": lambda j: ScalarConnection(dim, j, project=project),
            "sum": lambda _: SumConnection(),
            "plain": lambda _: SumConnection(last=True),
        }
        self.connections = nn.ModuleList(make[variant](j) for j in range(1, 2 if shared else layers + 1))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *, mask: Tensor | Mask | None = None, cache: LayerCaches | None = None) -> Tensor:
        """h_L, in the layout of `x`.

        Args:
            mask: for the hosts that take one; the connections work on every position alone.
            cache: of `new_cache`; the hosts continue what it has seen. The connections keep nothing.

        Raises:
            ValueError: if the width does not fit.
        """
        return self._run(x, mask, cache, None)

    def depth_weights(self, x: Tensor, *, mask: Tensor | Mask | None = None) -> list[Tensor]:
        """For each layer l = 1 ... L the weights that it gives to h_0 ... h_{l-1}, (..., H, l), as they are applied.

        Raises:
            ValueError: if the variant has none.
        """
        if self.variant in ("concat", "sum", "plain"):
            raise ValueError(f"variant {self.variant!r} has no weights over earlier layers")
        found: list[Tensor] = []
        self._run(x, mask, None, found)
        return found

    def new_cache(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LayerCaches:
        """An empty cache for each host; a host without time has none.

        Raises:
            ValueError: if a host takes a cache and does not say what one is.
        """
        caches: list[Any] = []
        for host, takes in zip(self.hosts, self._takes):
            maker: Any = host.attention if isinstance(host, PreNormBlock) else host
            if "cache" in takes and not hasattr(maker, "new_cache"):
                raise ValueError(f"{type(maker).__name__} has no cache to decode with")
            caches.append(maker.new_cache(batch_size, device=device, dtype=dtype) if "cache" in takes else None)
        return LayerCaches(caches)

    def extra_repr(self) -> str:
        return f"variant={self.variant!r}, residual={self.residual!r}, shared={self.shared}"

    def _run(
        self, x: Tensor, mask: Tensor | Mask | None, cache: LayerCaches | None, found: list[Tensor] | None
    ) -> Tensor:
        axis = self.channel_axis
        if x.ndim < 2 or x.shape[axis] != self.dim:
            raise ValueError(f"x must have {self.dim} channels on axis {axis}, got shape {tuple(x.shape)}")
        states = [x.movedim(axis, -1)]
        projected: list[tuple[Tensor, Tensor]] = []
        for layer, (host, norm) in enumerate(zip(self.hosts, self.norms)):
            newest = states[-1]
            connection: Any = self.connections[0 if self.shared else layer]
            if self.shared:
                projected.append(connection.project(newest))
                k, v = (torch.stack(parts, -3) for parts in zip(*projected))
                c, weights = connection.attend(newest, k, v, layer)
            else:
                c, weights = connection.mix(torch.stack(states, -2))
            if found is not None and weights is not None:
                found.append(weights)
            given = {"mask": mask, "cache": None if cache is None else cache.layers[layer]}
            given = {name: value for name, value in given.items() if value is not None and name in self._takes[layer]}
            into = newest + c if self.variant == "attention" else c
            out = host(into.movedim(-1, axis), **given).movedim(axis, -1)
            states.append(norm((newest if self.residual == "previous" else c) + self.dropout(out)))
        if cache is not None:
            cache.length += x.shape[1]
        return states[-1].movedim(-1, axis)


def _check_options(dim: int, num_heads: int, layers: int, variant: str, residual: str, dropout: float) -> None:
    if dim < 1 or num_heads < 1:
        raise ValueError(f"dim and num_heads must be positive, got {dim} and {num_heads}")
    if layers < 1:
        raise ValueError(f"there must be at least 1 layer, got {layers}")
    if variant not in ("attention", "gated", "concat", "scalar", "sum", "plain"):
        raise ValueError(f"variant must be 'attention', 'gated', 'concat', 'scalar', 'sum' or 'plain', got {variant!r}")
    if residual not in ("previous", "connection"):
        raise ValueError(f"residual must be 'previous' or 'connection', got {residual!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")


class Recurrent(nn.Module):
    """An `nn.LSTM`, `nn.GRU` or `nn.RNN` as a host: (B, N, C) -> (B, N, C), its state in a cache.

    Raises:
        ValueError: if it is not batch first.
    """

    def __init__(self, cell: nn.RNNBase) -> None:
        super().__init__()
        if not cell.batch_first:
            raise ValueError("a recurrent host must be batch_first=True, got False")
        self.cell = cell

    def forward(self, x_BNC: Tensor, *, mask: GivenMask = None, cache: StateCache | None = None) -> Tensor:
        """`mask` (B, N), True = real: with padding behind, what stands before it is not touched.

        Raises:
            ValueError: if padding comes before a real token, which a recurrence would read, or the cell is
                bidirectional and there is a mask or a cache.
        """
        if self.cell.bidirectional and (mask is not None or cache is not None):
            raise ValueError("a bidirectional recurrence takes neither a mask nor a cache")
        (B, N), start = x_BNC.shape[:2], 0 if cache is None else cache.length
        takes: tuple[Said, ...] = ("padding",) if self.cell.bidirectional else ("causal", "padding")
        real_BM = Pattern.of(mask, B, N, start + N, offset=start).only(takes, "a recurrence").valid_BM
        if real_BM is not None and bool((real_BM[:, 1:] > real_BM[:, :-1]).any()):
            raise ValueError("a recurrence takes padding at the end only")
        if 0 in x_BNC.shape[:2]:
            return x_BNC
        out_BNC, state = self.cell(x_BNC, None if cache is None else cache.state)
        if cache is not None:
            cache.state = state.detach() if isinstance(state, Tensor) else tuple(part.detach() for part in state)
            cache.length += x_BNC.shape[1]
        return out_BNC

    def new_cache(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> StateCache:
        """An empty state."""
        return StateCache()


class AILA(AILAStack):
    """AILA on sequences (B, N, C): L layers of one kind.

    Args:
        dim, num_heads: C and H, of the connections and of attention hosts.
        causal: no token reads a later one. Otherwise recurrent hosts run in both directions, half the width each.
        layers: L.
        host: "attention": a pre-norm block of `mechanism` and a feed-forward layer; "lstm", "gru"; "mlp": Linear and
            ReLU, every token alone.
        mechanism: a slug of the catalogue; mechanism_options: its other arguments.
        stack: `AILAStack`'s other arguments.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        causal: bool = False,
        *,
        layers: int = 4,
        host: Literal["attention", "lstm", "gru", "mlp"] = "attention",
        mechanism: str = "softmax",
        mechanism_options: Mapping[str, Any] | None = None,
        **stack: Any,
    ) -> None:
        if host not in ("attention", "lstm", "gru", "mlp"):
            raise ValueError(f"host must be 'attention', 'lstm', 'gru' or 'mlp', got {host!r}")
        if host in ("lstm", "gru") and not causal and dim % 2:
            raise ValueError(f"two directions need an even dim, got {dim}")
        options = mechanism_options or {}

        def build() -> nn.Module:
            if host == "attention":
                mixer = catalogue.create(mechanism, dim=dim, num_heads=num_heads, causal=causal, **options)
                return PreNormBlock(mixer, dim)
            if host == "mlp":
                return nn.Sequential(nn.Linear(dim, dim), nn.ReLU())
            kind = nn.LSTM if host == "lstm" else nn.GRU
            return kind(dim, dim if causal else dim // 2, batch_first=True, bidirectional=not causal)

        _check_options(dim, num_heads, layers, "plain", "previous", 0.0)
        super().__init__(dim, [build() for _ in range(layers)], num_heads=num_heads, **stack)
        self.causal = causal

    def forward(  # type: ignore[override]
        self,
        x_BNC: Tensor,
        context_BMC: None = None,
        *,
        mask: Tensor | Mask | None = None,
        cache: LayerCaches | None = None,
    ) -> Tensor:
        """h_L (B, N, C) of `x_BNC`, which continues what `cache` has seen; `mask` is the hosts'.

        Raises:
            ValueError: if the arguments do not fit together, or there is a context.
        """
        if x_BNC.ndim != 3 or x_BNC.shape[-1] != self.dim:
            raise ValueError(f"x must be (batch, tokens, {self.dim}), got {tuple(x_BNC.shape)}")
        if context_BMC is not None:
            raise ValueError("the layers read their own tokens and take no context")
        if cache is not None and not self.causal:
            raise ValueError("only causal layers decode with a cache")
        return super().forward(x_BNC, mask=mask, cache=cache)
