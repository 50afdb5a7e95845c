"""The patterns on `--device`, forward and backward, against their slow references in double precision on the processor.

What each pattern does at its edges, its own file tests; here is what must hold wherever it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import saccade
from saccade import masks
from saccade.ops.deformable import deformable_attend, deformable_attend_reference
from saccade.ops.ema import ema, ema_reference
from saccade.ops.keywise import distributed_attention, distributed_reference
from saccade.ops.linear import linear_attend, linear_attend_reference
from saccade.ops.matching import (
    local_correlation,
    local_correlation_reference,
    row_column_lse,
    row_column_lse_reference,
)
from saccade.ops.routed import routed_attend
from saccade.ops.selective_scan import selective_scan, selective_scan_reference
from saccade.ops.wkv import wkv, wkv_reference


@dataclass(frozen=True)
class Pattern:
    """A pattern, its definition, and what both take: tensors drawn on the processor, and options."""

    ours: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[[], list[Tensor]]
    options: Callable[[], dict[str, Any]] = dict


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def qkv(N: int, M: int) -> list[Tensor]:
    return drawn((2, 4, N, 8), (2, 2, M, 8), (2, 2, M, 12))


def attention(mask: masks.Mask | None, N: int = 37, M: int = 53, backend: str | None = None) -> Pattern:
    def ours(*inputs: Tensor) -> Tensor:
        on = None if mask is None else mask.to(inputs[0].device)
        return saccade.attend(*inputs, mask=on, backend=backend)

    def reference(*inputs: Tensor) -> Tensor:
        return saccade.attend(*inputs, mask=mask, backend="reference")

    return Pattern(ours, reference, lambda: qkv(N, M))


def linear(decay: tuple[int, ...] | None, normalize: bool = False) -> Pattern:
    def inputs() -> list[Tensor]:
        q, k, v, *factors = drawn((2, 4, 77, 6), (2, 4, 77, 6), (2, 4, 77, 5), *([decay] if decay else []))
        return [q.abs(), k.abs(), v, *(x.sigmoid() for x in factors)]

    def called(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda q, k, v, decay=None: function(
            q, k, v, decay=decay, normalize=normalize, return_state=not normalize
        )

    return Pattern(called(linear_attend), called(linear_attend_reference), inputs)


def routed(own: bool) -> Pattern:
    """Blocks of 8; some queries choose fewer than three, some with `own=False` none."""
    torch.manual_seed(1)
    chosen = torch.rand(2, 4, 40, 5).argsort(-1)[..., :3]
    chosen[torch.rand(chosen.shape) < 0.3] = -1
    if own:
        chosen[chosen >= (torch.arange(40) // 8)[:, None]] = -1
    table = torch.zeros(2, 4, 40, 6, dtype=torch.bool).scatter_(-1, torch.where(chosen < 0, 5, chosen), True)
    pairs = table[..., :5].repeat_interleave(8, -1)
    if own:
        place = torch.arange(40)
        pairs |= (place[:, None] // 8 == place // 8) & (place <= place[:, None])

    def ours(*inputs: Tensor) -> Tensor:
        return routed_attend(*inputs, chosen.to(inputs[0].device), 8, own=own)[0]

    def reference(*inputs: Tensor) -> Tensor:
        return saccade.attend(*inputs, mask=pairs, backend="reference")

    return Pattern(ours, reference, lambda: qkv(40, 40))


def scanned() -> list[Tensor]:
    u, step, a, b, c, skip = drawn((2, 131, 12), (2, 131, 12), (12, 5), (2, 131, 2, 5), (2, 131, 2, 5), (12,))
    return [u, step.exp(), -a.exp(), b, c, skip]


def deformed() -> list[Tensor]:
    values, places, weights = drawn((2, 20, 4, 8), (2, 5, 4, 6, 2), (2, 5, 4, 6))
    return [values, places.sigmoid(), weights]


def block_mask() -> masks.Mask:
    return masks.blocks(torch.rand(1, 4, 10, 13, generator=torch.Generator().manual_seed(2)) < 0.4, 16)


PATTERNS: dict[str, Pattern] = {
    "attend": attention(None),
    "attend causal": attention(masks.causal(16)),
    "attend window": attention(masks.window(9, 2), 150, 150),
    "attend window with sinks": attention(masks.window(9, 0, sinks=3), 150, 150),
    "attend prefix": attention(masks.prefix(20) | masks.causal(16)),
    "attend documents": attention(masks.documents(torch.arange(90)[None] // 17), 90, 90),
    "attend padding": attention(masks.padding(torch.arange(53) < torch.tensor([[50], [31]]))),
    "attend neighbourhood": attention(masks.neighborhood((9, 11), (3, 5), (2, 1)), 99, 99),
    "attend blocks": attention(block_mask(), 150, 200),
    **{f"attend by {path}": attention(block_mask(), 150, 200, path) for path in ("sdpa", "blocksparse", "stream")},
    "linear": linear(None),
    "linear normalised": linear(None, True),
    "linear, decay of heads": linear((4,)),
    "linear, decay of channels": linear((4, 6), True),
    "linear, decay of tokens": linear((2, 4, 77)),
    "linear, decay of tokens and channels": linear((2, 4, 77, 6), True),
    "routed": routed(True),
    "routed, chosen blocks alone": routed(False),
    "selective scan": Pattern(selective_scan, selective_scan_reference, scanned),
    "wkv": Pattern(wkv, wkv_reference, lambda: drawn((2, 131, 6), (2, 131, 6), (6,), (6,))),
    "wkv of the kernel": Pattern(
        wkv, wkv_reference, lambda: drawn((2, 75, 6), (2, 75, 6), (6,), (6,)), lambda: {"distance": "kernel"}
    ),
    "moving average": Pattern(
        lambda *x: ema(*x),
        lambda *x: ema_reference(*x)[0],
        lambda: [x if i == 0 else x.sigmoid() for i, x in enumerate(drawn((2, 77, 6), (6, 3), (6, 3), (6, 3)))],
    ),
    "deformable": Pattern(
        lambda x, *rest: deformable_attend(x, [(4, 4), (2, 2)], *rest, [4, 2]),
        lambda x, *rest: deformable_attend_reference(x, [(4, 4), (2, 2)], *rest, [4, 2]),
        deformed,
    ),
    "regions of keys": Pattern(
        distributed_attention,
        distributed_reference,
        lambda: drawn((2, 8, 9, 10), (2, 8, 9, 10), (2, 4, 9, 10)),
        lambda: {"region": 4, "num_heads": 2},
    ),
    "correlation": Pattern(
        local_correlation,
        local_correlation_reference,
        lambda: [x if i < 2 else 3 * x.abs() for i, x in enumerate(drawn((2, 6, 5, 7), (2, 6, 8, 6), (2, 5, 7, 2)))],
        lambda: {"radius": 2},
    ),
    "sums of all pairs": Pattern(row_column_lse, row_column_lse_reference, lambda: drawn((2, 33, 6), (2, 41, 6))),
}


#: patterns that read values back on some device, and what
WAITING = {
    "attend prefix": "a mask's tensors, for the density that the planner weighs",
    "attend documents": "a mask's tensors",
    "attend padding": "a mask's tensors",
    "attend blocks": "a mask's tensors",
    "attend by sdpa": "a mask's tensors",
    "attend by blocksparse": "lists of blocks",
    "attend by stream": "the tiles with pairs",
    "routed": "on the processor, how many tiles the choices fill",
    "routed, chosen blocks alone": "on the processor, how many tiles the choices fill",
}


def values(function: Callable[..., Any], inputs: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Outputs, and the gradients of a weighted sum of them."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    given = function(*leaves, **options)
    outputs = [given] if isinstance(given, Tensor) else [x for x in given if x is not None]
    loss = sum(
        (x * torch.linspace(-1, 1, x.numel(), dtype=torch.float64).cos().view_as(x).to(x)).sum() for x in outputs
    )
    assert isinstance(loss, Tensor)
    return [*outputs, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 3e-5), (torch.bfloat16, 4e-2)], ids=str
)
@pytest.mark.parametrize("name", PATTERNS)
def test_equals_its_definition(name: str, dtype: torch.dtype, bound: float, device: torch.device) -> None:
    pattern = PATTERNS[name]
    inputs = [x.to(dtype) for x in pattern.inputs()]
    ours = values(pattern.ours, [x.to(device) for x in inputs], pattern.options())
    expected = values(pattern.reference, [x.double() for x in inputs], pattern.options())
    for place, (found, truth) in enumerate(zip(ours, expected, strict=True)):
        assert found.device.type == device.type and found.shape == truth.shape
        gap = (found.double().cpu() - truth).abs().max() / truth.abs().max().clamp(min=1.0)
        assert gap <= bound, (place, gap.item())


@pytest.mark.parametrize("name", [name for name in PATTERNS if name not in WAITING])
def test_waits_for_no_device(
    name: str, device: torch.device, waits: Callable[[Callable[[], object]], list[str]]
) -> None:
    """Forward and backward, in single precision."""
    pattern = PATTERNS[name]
    leaves = [x.float().to(device).requires_grad_() for x in pattern.inputs()]

    def both() -> None:
        given = pattern.ours(*leaves, **pattern.options())
        outputs = [given] if isinstance(given, Tensor) else [x for x in given if x is not None]
        sum((x.square().sum() for x in outputs), torch.zeros((), device=device)).backward()

    assert waits(both) == []
