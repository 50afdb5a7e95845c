"""Layers whose tokens, rows or chunks are on several ranks equal one process: outputs, and the gradients of all that
learns."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import Ranks, check_forecast
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from saccade import masks, parallel
from saccade.attention.attention_engine import EngineAttention
from saccade.attention.fast import FastmaxAttention
from saccade.attention.flex_attention import FlexAttention
from saccade.attention.marginal_probability import MarginalAttention
from saccade.attention.mega import MegaAttention
from saccade.attention.moh import MoH
from saccade.attention.neural_attention import NeuralAttention
from saccade.attention.nexus import Nexus
from saccade.attention.slay import SLAYAttention
from saccade.layers.window_attention import WindowAttention
from saccade.models.dat.attention import ShiftedWindowAttention
from saccade.models.vit_adapters_mtl import TaskAdaptedAttention
from saccade.ops.neighbours import with_neighbours

C = 16

#: name -> what makes the layer
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "mega": lambda: MegaAttention(C, ema_dim=3, causal=True),
    "mega, both ways": lambda: MegaAttention(C, ema_dim=3, attention="laplace", position="simple"),
    "mega, chunks": lambda: MegaAttention(C, ema_dim=3, causal=True, chunk_size=6, attention="relu2"),
    "mega, both ways, chunks": lambda: MegaAttention(C, 2, ema_dim=3, chunk_size=5, position="simple"),
    "mega, cut": lambda: MegaAttention(C, ema_dim=3, chunk_size=16, truncation=9),
    "engine, sigmoid": lambda: EngineAttention(C, 2, True, variant="sigmoid"),
    "engine, retention": lambda: EngineAttention(C, 2, True, variant="retention"),
    "flex": lambda: FlexAttention(C, 2, True, window=7, global_tokens=2, use_alibi=True, reach=4),
    "moh": lambda: MoH(C, 4, True, num_kv_heads=2).eval(),
    "neural": lambda: NeuralAttention(C, 2, True),
    "nexus": lambda: Nexus(C, 2, True, order=3),
    "marginal": lambda: MarginalAttention(C, 2, True, learned_hops=True),
    "slay": lambda: SLAYAttention(C, 2, num_kv_heads=1),
    "slay, laplace, both ways": lambda: SLAYAttention(C, 2, False, variant="laplace"),
    "fast": lambda: FastmaxAttention(C, 2, True),
}


def _compare(
    mesh: DeviceMesh, module: nn.Module, x: Tensor, row: int, run: Callable[..., Tensor], **options: Any
) -> Any:
    """`run(module, tokens)` in one process and in parts of `row` tokens or more, and what is forecast."""
    whole = x.clone().requires_grad_()
    alone = run(module, whole)
    to_out = torch.randn(alone.shape, generator=torch.Generator().manual_seed(3))
    learned = [p for p in module.parameters() if p.requires_grad]
    expected = torch.autograd.grad(alone, [whole, *learned], to_out, allow_unused=True)
    with parallel(mesh, **{"unit": row, **options}) as shards:
        part = parallel.shard(x, shards).requires_grad_()
        out = run(module, part)
        grad, *shares = torch.autograd.grad(out, [part, *learned], parallel.shard(to_out, shards), allow_unused=True)
    torch.testing.assert_close(out, parallel.shard(alone, shards), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad, parallel.shard(expected[0], shards), atol=1e-5, rtol=1e-4)
    for share, one in zip(shares, expected[1:]):
        if one is not None:
            share = torch.zeros_like(one) if share is None else share.contiguous()
            torch.distributed.all_reduce(share, group=shards.group)
            torch.testing.assert_close(share, one, atol=1e-4, rtol=1e-4)
    parts = parallel.plan(run, module, whole, mesh=shards)
    assert parts.exact
    check_forecast(parts, shards)
    return {f"{kind} {way}": count[:2] for (kind, way), count in shards.traffic.counts.items()}


def layer(mesh: DeviceMesh, name: str, n: int, balance: str, padded: bool) -> None:
    torch.manual_seed(0)
    module, x = LAYERS[name](), torch.randn(2, n, C)
    real = (torch.arange(n) >= torch.tensor([[2], [0]])) & (torch.arange(n) < torch.tensor([[n], [n - 5]]))

    def run(module: nn.Module, x: Tensor) -> Tensor:
        out = module(x, mask=real if padded else None)
        return out[0] if isinstance(out, tuple) else out

    _compare(mesh, module, x, 1, run, balance=balance)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(ranks: Ranks, name: str) -> None:
    ranks(layer, name, 41, "contiguous", True)
    ranks(layer, name, 37, "head-tail", False)
    ranks(layer, name, 22, "contiguous", False, size=2)


def few(mesh: DeviceMesh) -> None:
    for name in ("mega, chunks", "mega, cut", "slay"):
        layer(mesh, name, 3, "contiguous", False)


def test_fewer_tokens_than_ranks(ranks: Ranks) -> None:
    ranks(few)


def _on_values(module: WindowAttention, x: Tensor, *more: Any, **options: Any) -> Tensor:
    """What its weights give values that are the tokens."""
    return module.mix(x, x.unflatten(2, (2, -1)).transpose(1, 2), *more, **options).transpose(1, 2).flatten(2)


def others(mesh: DeviceMesh, grid: tuple[int, int], name: str) -> None:
    """Swin's layer on given values, and the layers that are made of it."""
    torch.manual_seed(0)
    x, omega, row = torch.randn(2, prod(grid), C), torch.randn(2, 9), grid[1]
    as_map = lambda x: x.unflatten(1, (-1, row))  # noqa: E731
    if name == "dat":
        shifted = ShiftedWindowAttention(C, 2, window_size=3)
        _compare(mesh, shifted, x, row, lambda module, x: module(as_map(x)).flatten(1, 2))
    elif name == "vit-adapters":
        adapted = TaskAdaptedAttention(C, 2, 9, 3, shift=1)
        _compare(mesh, adapted, x, row, lambda module, x: module(x, omega, grid))
        _compare(mesh, adapted, x, row, lambda module, x: _on_values(module, x, omega, size=grid))
    else:
        module = WindowAttention(C, 2, window_size=(2, 3), shift=1)
        _compare(mesh, module, x, row, lambda module, x: _on_values(module, x, size=grid))


@pytest.mark.parametrize("name", ["mix", "dat", "vit-adapters"])
def test_layers_of_shifted_windows(ranks: Ranks, name: str) -> None:
    ranks(others, (7, 5), name)
    ranks(others, (11, 6), name, size=2)


def swin(mesh: DeviceMesh, grid: tuple[int, ...], options: dict[str, Any], balance: str, rows: int) -> Any:
    torch.manual_seed(0)
    module, row = WindowAttention(C, 2, **options), prod(grid[1:])
    x = torch.randn(2, prod(grid), C)
    # a map, or the tokens of one whose whole size is said
    as_map = lambda module, x: module(x.unflatten(1, (-1, *grid[1:]))).flatten(1, -2)  # noqa: E731
    as_tokens = lambda module, x: module(x, grid)  # noqa: E731
    _compare(mesh, module, x, rows * row, as_tokens, balance=balance)
    return _compare(mesh, module, x, rows * row, as_map, balance=balance, length=prod(grid))


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((8, 6), {"window_size": (2, 3), "shift": (1, 1)}),
        ((13, 7), {"window_size": 4, "shift": True}),
        ((5, 9), {"window_size": 4, "shift": True, "bias": False}),
        ((11, 5), {"window_size": 3, "shift": 2, "border": "cut"}),
        ((23,), {"window_size": (4,), "shift": True}),
        ((3, 4), {"window_size": 5}),
    ],
)
def test_shifted_windows_of_a_map_whose_rows_are_shared(ranks: Ranks, grid: Any, options: Any) -> None:
    ranks(swin, grid, options, "contiguous", 1)
    ranks(swin, grid, options, "head-tail", 1)
    ranks(swin, grid, options, "contiguous", 2, size=2)


def test_the_halo_of_shifted_windows_does_not_grow_with_the_map(ranks: Ranks) -> None:
    options = {"window_size": 4, "shift": True}
    small, large = (ranks(swin, (rows, 8), options, "contiguous", 1) for rows in (16, 32))
    assert small == large and set(small[0]) == {"halo forward", "halo backward"}


class Convolution(nn.Conv1d):
    """Along the tokens of (B, N, C), by their neighbours."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(C, C, before + 1 + after, groups=4)
        self.reach = before, after

    def forward(self, x_BNC: Tensor) -> Tensor:
        return with_neighbours(super().forward, x_BNC.mT, *self.reach, dim=2).mT


def convolved(mesh: DeviceMesh, n: int, before: int, after: int, balance: str) -> Any:
    torch.manual_seed(0)
    module, x = Convolution(before, after), torch.randn(2, n, C)
    plain = F.conv1d(F.pad(x.mT, (before, after)), module.weight, module.bias, groups=4).mT
    torch.testing.assert_close(module(x), plain)
    return _compare(mesh, module, x, 1, lambda module, x: module(x), balance=balance, length=n)


@pytest.mark.parametrize(("before", "after"), [(3, 0), (2, 2), (0, 1), (9, 4), (0, 0)])
def test_convolutions(ranks: Ranks, before: int, after: int) -> None:
    for n, balance in ((19, "contiguous"), (21, "head-tail"), (3, "contiguous")):
        ranks(convolved, n, before, after, balance)
    ranks(convolved, 9, before, after, "contiguous", size=2)


def test_a_convolution_sends_the_neighbours_and_no_others(ranks: Ranks) -> None:
    token = 2 * C * 4
    for n in (20, 40):
        counts = ranks(convolved, n, 3, 1, "contiguous")
        # three to the next rank, one to that before it; back go their gradients
        assert [one["halo forward"] for one in counts] == [
            (sent * token, received * token) for sent, received in ((3, 1), (4, 4), (4, 4), (1, 3))
        ]
        assert [one["halo backward"] for one in counts] == [one["halo forward"][::-1] for one in counts]


def refusing(mesh: DeviceMesh) -> None:
    x = torch.randn(2, 8, C)
    with parallel(mesh, length=32):
        with pytest.raises(ValueError, match="must give 8 tokens for those and their neighbours, got 10"):
            with_neighbours(lambda x: x, x, 1, 1)
        with pytest.raises(ValueError, match="before and after must be numbers of tokens"):
            with_neighbours(lambda x: x, x, -1)
        with pytest.raises(ValueError, match="decode outside"):
            module = MegaAttention(C, causal=True)
            module(x, cache=module.new_cache(2))
        with pytest.raises(ValueError, match="a batch norm that learns does not take a sequence in parts"):
            MegaAttention(C, norm="batch")(x)
        with pytest.raises(ValueError, match="balance of heads, which is of all tokens, does not take"):
            MoH(C, 4)(x)
        with pytest.raises(ValueError, match="FastmaxAttention does not take a sequence in parts"):
            FastmaxAttention(C, 2)(x)
        with pytest.raises(ValueError, match=r"a grid is cut by rows: parallel\(mesh, unit=4\)"):
            WindowAttention(C, 2, window_size=2)(x, (8, 4))
        with pytest.raises(ValueError, match="one window covers an axis, and is shifted, does not take a sequence"):
            ShiftedWindowAttention(C, 2, window_size=4)(x.unflatten(1, (2, 4)))
        with pytest.raises(ValueError, match="a mask of pairs needs all tokens in one chunk"):
            MegaAttention(C, chunk_size=4)(x, mask=masks.window(2))


def test_what_cannot_be_done_is_refused(ranks: Ranks) -> None:
    ranks(refusing)
