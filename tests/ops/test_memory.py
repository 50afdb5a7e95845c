"""No path returns memory that it has not written: fresh memory is full of NaN, results are as from the definition."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.ops import masks, score_mods
from saccade.ops.attend import attend
from saccade.ops.deformable import bias_at_points, deformable_attend
from saccade.ops.expansion import Polynomial, expanded_attend
from saccade.ops.linear import linear_attend
from saccade.ops.masks import Mask
from saccade.ops.memory import large_empty
from saccade.ops.native import build
from saccade.ops.partitions import window_attend
from saccade.ops.routed import routed_attend

#: mask, query heads, key heads; the first five had no tiling once, in the backward pass or without native code
PROBLEMS: dict[str, tuple[Mask | None, int, int]] = {
    "stride as long as a large window": (masks.neighborhood((48, 24), 24, stride=24), 1, 1),
    "stride times grouped heads": (masks.neighborhood(512, 128, stride=128), 8, 1),
    "corners that share a window": (masks.neighborhood((9, 9, 9), 8), 4, 1),
    "corners that share a window, grouped heads": (masks.neighborhood((14, 14), 13), 16, 1),
    "more heads on a key head than a tile has rows": (masks.neighborhood((3, 4), 2), 520, 1),
    "odd strides": (masks.neighborhood((23, 9), (11, 5), stride=(7, 5)), 2, 1),
    "dilation and borders": (masks.neighborhood((13, 17), (5, 3), (2, 5), (False, True)), 2, 2),
    "rows that see nothing": (masks.window(-3, 5), 2, 1),
    "one token": (masks.neighborhood((1, 1), 1), 1, 1),
    "blocks, some rows empty": (masks.blocks(torch.eye(7, 7)[None, None].bool().roll(3, -1).tril(), 16), 2, 1),
    "documents and padding": (masks.documents(torch.tensor([[0] * 33 + [1] * 40 + [-1] * 8])), 2, 2),
    "any function": (masks.function(lambda b, h, i, j: (i + j) % 3 == 0) & masks.causal(), 2, 1),
    "no mask": (None, 3, 1),
}


@pytest.fixture
def poisoned() -> Iterator[None]:
    """`torch.empty` and its kin, inside torch too, give NaN."""
    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all() and large_empty((3,), torch.float32, torch.device("cpu")).isnan().all()
    yield
    torch.use_deterministic_algorithms(was[0])
    torch.utils.deterministic.fill_uninitialized_memory = was[1]


@pytest.fixture(params=["native", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(build, "_loaded", lambda: (None, "turned off"))
    elif reason := build.refusal(torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    return str(request.param)


def tokens(mask: Mask | None) -> int:
    if isinstance(mask, masks.Neighborhood):
        return int(torch.Size(mask.size).numel())
    return 112 if isinstance(mask, masks.Blocks) else 81


def with_gradients(function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Results, and the gradients of a weighted sum of what is finite in them."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = function(*leaves)
    total = torch.zeros((), dtype=inputs[0].dtype)
    for x in results:
        seen = x.isfinite()
        total = total + (x[seen] * torch.linspace(-1, 1, int(seen.sum())).to(x.dtype)).sum()
    return [*(x.detach() for x in results), *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("backend", [None, "blocksparse", "stream"])
@pytest.mark.parametrize(("mask", "H", "K"), PROBLEMS.values(), ids=PROBLEMS)
def test_attend(poisoned: None, engine: str, mask: Mask | None, H: int, K: int, backend: str | None) -> None:
    torch.manual_seed(0)
    if backend == "stream" and engine == "native":
        pytest.skip("stream has no native code")
    n = tokens(mask)
    inputs = torch.randn(1, H, n, 4), torch.randn(1, K, n, 4), torch.randn(1, K, n, 3)

    def run(backend: str | None) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *x: attend(*x, mask=mask, backend=backend, return_lse=True)

    want = with_gradients(run("reference"), inputs)
    for got, expected in zip(with_gradients(run(backend), inputs), want, strict=True):
        torch.testing.assert_close(got, expected, atol=3e-4, rtol=1e-4)


def _linear(*x: Tensor, **options: Any) -> tuple[Tensor, ...]:
    out, state = linear_attend(*x[:3], return_state=True, decay=x[3] if len(x) > 3 else None, **options)
    return out, *(state if isinstance(state, tuple) else (state,))


def _routed(*x: Tensor, own: bool) -> tuple[Tensor, ...]:
    chosen = torch.tensor([-1, 0, -1, 1, 0, 2])[torch.arange(48) // 8, None].expand(1, 4, 48, 1)
    if own:  # the first two blocks choose nothing
        chosen = torch.where(torch.arange(48)[:, None] < 16, -1, chosen)
    return routed_attend(*x, chosen, 8, own=own)


def _biased(q: Tensor, k: Tensor, v: Tensor, table: Tensor, *, grid: Mask) -> tuple[Tensor, ...]:
    mod = score_mods.grid_bias(table, grid)
    return attend(q, k, v, mask=grid, score_mod=mod, return_lse=True, backend="blocksparse")


def _rows(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape) for shape in shapes)


#: operators beside `attend`, and the shapes of what they take
OPERATORS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "linear": (_linear, _rows((1, 4, 130, 4), (1, 2, 130, 4), (1, 2, 130, 3))),
    "linear, one token": (_linear, _rows((1, 4, 1, 4), (1, 2, 1, 4), (1, 2, 1, 3))),
    "linear, decay per token": (_linear, (*_rows(*[(1, 2, 70, 4)] * 3), torch.rand(1, 2, 70))),
    "linear, decay per channel": (_linear, (*_rows(*[(1, 2, 70, 4)] * 3), torch.rand(1, 2, 70, 4))),
    "linear, both ways": (partial(_linear, causal=False), _rows(*[(1, 2, 70, 4)] * 3)),
    "expanded": (partial(expanded_attend, expansion=Polynomial()), _rows(*[(1, 2, 150, 4)] * 3)),
    "expanded, both ways": (
        partial(expanded_attend, expansion=Polynomial(), causal=False),
        _rows(*[(1, 2, 150, 4)] * 3),
    ),
    "routed": (partial(_routed, own=False), _rows((1, 4, 48, 4), (1, 2, 48, 4), (1, 2, 48, 5))),
    "routed, own block": (partial(_routed, own=True), _rows((1, 4, 48, 4), (1, 2, 48, 4), (1, 2, 48, 5))),
    "shifted windows, bias": (
        lambda q, k, v, bias: window_attend(q, k, v, (9, 13), (4, 5), (1, 3), bias),
        _rows((2, 4, 117, 4), (2, 2, 117, 4), (2, 2, 117, 4), (4, 20, 20)),
    ),
    "shifted windows, a window larger than the grid": (
        lambda q, k, v: window_attend(q, k, v, (3, 3), 4, 2),
        _rows(*[(2, 2, 9, 4)] * 3),
    ),
    "deformable": (
        lambda v, at, weights: deformable_attend(v, [(4, 4), (2, 2)], at * 2 - 0.5, weights, [4, 2]),
        (torch.randn(2, 20, 4, 8), torch.rand(2, 5, 4, 6, 2), torch.rand(2, 5, 4, 6)),
    ),
    "bias at points": (
        lambda table, points: bias_at_points(table, points, (4, 5)),
        (torch.randn(4, 7, 9), torch.rand(2, 6, 2, 2) * 2 - 1),
    ),
    "neighbourhood with a bias": (
        partial(_biased, grid=masks.neighborhood((9, 11), 5)),
        _rows(*[(2, 3, 99, 4)] * 3, (3, 9, 9)),
    ),
    "neighbourhood with a bias, dilated, strided and causal": (
        partial(
            _biased, grid=masks.neighborhood((5, 7, 9), (2, 3, 3), (1, 2, 3), (True, False, False), stride=(1, 2, 1))
        ),
        _rows((1, 4, 315, 4), (1, 2, 315, 4), (1, 2, 315, 3), (4, 3, 5, 5)),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("function", "inputs"), OPERATORS.values(), ids=OPERATORS)
def test_operators(
    request: pytest.FixtureRequest,
    engine: str,
    function: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    dtype: torch.dtype,
) -> None:
    inputs = tuple(x.to(dtype) for x in inputs)

    def run(*x: Tensor) -> tuple[Tensor, ...]:
        results = function(*x)
        return results if isinstance(results, tuple) else (results,)

    want = with_gradients(run, inputs)
    request.getfixturevalue("poisoned")
    for got, expected in zip(with_gradients(run, inputs), want, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
