"""The kernels of the selective scan and of WKV against their forms in torch, in double precision, forward and backward.

The references of both are what those forms are tested against.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.ops import triton
from saccade.ops.native import build
from saccade.ops.selective_scan import operator as scan_operator
from saccade.ops.selective_scan import selective_scan
from saccade.ops.triton import selective_scan as scan_kernels
from saccade.ops.triton import wkv as wkv_kernels
from saccade.ops.wkv import operator as wkv_operator
from saccade.ops.wkv import wkv


def close(found: Tensor, truth: Tensor, bound: float = 2e-5) -> bool:
    gap = (found.double().cpu() - truth).abs().max() / truth.abs().max().clamp(min=1.0)
    return found.shape == truth.shape and bool(gap <= bound)


@pytest.mark.parametrize(
    ("B", "T", "G", "C", "N", "segment"),
    [(1, 1, 1, 1, 1, 16), (2, 19, 2, 5, 3, 8), (1, 16, 1, 40, 16, 8), (1, 17, 1, 33, 5, 16)],
)
@pytest.mark.parametrize("step", [0.5, 1e4])
def test_scan(
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    B: int,
    T: int,
    G: int,
    C: int,
    N: int,
    segment: int,
    step: float,
) -> None:
    """Any steps; channels and states that fill no tile; backward in one piece of segments, or one after the other."""
    torch.manual_seed(0)
    u, delta, grad = (torch.randn(B, T, G, C) for _ in range(3))
    a, b, c = -torch.rand(G, N, C), torch.randn(B, T, G, N), torch.randn(B, T, G, N)
    given = [u, step * delta.exp(), a, b, c]
    monkeypatch.setattr(scan_operator, "SEGMENT", segment)
    y, states = scan_operator.forward(*(x.double() for x in given))
    of_given = scan_operator.backward(*(x.double() for x in given), states, grad.double())
    here = [x.to(kernel_device) for x in given]
    found, starts = scan_kernels.scan_in_triton(*here, segment)
    assert close(found, y) and close(starts, states)
    for kept in (scan_kernels.KEPT, 1):
        monkeypatch.setattr(scan_kernels, "KEPT", kept)
        gradients = scan_kernels.scan_backward_in_triton(*here, starts, grad.to(kernel_device), segment)
        assert [close(*pair, 1e-4) for pair in zip(gradients, of_given, strict=True)] == [True] * 5


def numbers(sums: Tensor, w: Tensor) -> Tensor:
    """What sums are: e^(key - w age) times each. Keys and ages alone may be those of either of two equal terms."""
    key, age = sums[:2].double()
    return sums[2:].double() * (key - w.double() * age).exp()


@pytest.mark.parametrize(("T", "chunk", "shift"), [(1, 1, 1), (19, 19, 1), (21, 5, 0), (21, 13, 0)])
@pytest.mark.parametrize("moments", [True, False])
def test_wkv(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch, T: int, chunk: int, shift: int, moments: bool
) -> None:
    """Forward with moments, backward without; decay of either sign; segments end within chunks and at their ends."""
    monkeypatch.setattr(wkv_kernels, "SEGMENT", 8)
    torch.manual_seed(0)
    tokens, w = torch.randn(6 if moments else 4, 1, T, 5), 0.3 * torch.randn(5)
    tokens[1] = 0.0 if moments else -3.0 * tokens[1].abs()
    tokens[4:] = 0.0
    given = tokens.double(), w.double(), chunk, shift, moments, not moments
    truth = wkv_operator._around(*given)
    found = wkv_kernels.around_in_triton(*(x.to(kernel_device) for x in (tokens, w)), *given[2:]).cpu()
    expected = numbers(truth, w)
    assert close(numbers(found, w), expected)
    if moments:  # which count from the largest term: the sums with them do not depend on which one that is
        ages = [x[1] * x[2:4].double() + x[4:].double() for x in (found, truth)]
        scales = [(x[0].double() - w.double() * x[1]).exp() for x in (found, truth)]
        assert close(ages[0] * scales[0], ages[1] * scales[1])


def test_wkv_of_any_decay(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exponents up to 2e7 of either sign, and tokens that are not seen: the means are those of the torch form."""
    monkeypatch.setattr(wkv_kernels, "SEGMENT", 8)
    torch.manual_seed(0)
    tokens, w = torch.randn(4, 1, 20, 4), torch.tensor([1e6, -1e6, 1e-6, 300.0])
    tokens[1], tokens[3] = 0.0, 1.0
    tokens[0, :, 7:10] = wkv_operator.EMPTY
    truth = wkv_operator._around(tokens.double(), w.double(), 20, 1, False)
    found = wkv_kernels.around_in_triton(tokens.to(kernel_device), w.to(kernel_device), 20, 1, False, False)
    assert close(found[2] / found[3], truth[2] / truth[3])


def test_operators_call_the_kernels(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are chosen, as on CUDA in single precision; outputs and gradients are those of the torch form."""
    torch.manual_seed(0)
    k, v, w, u = torch.randn(2, 21, 3), torch.randn(2, 21, 3), torch.randn(3), torch.randn(3)
    x, step, b, c = torch.randn(2, 21, 4), torch.rand(2, 21, 4), torch.randn(2, 21, 3), torch.randn(2, 21, 3)
    calls = [
        (lambda *y: wkv(*y, distance="kernel", chunks=3), [k, v, w, u]),
        (selective_scan, [x, step, -torch.rand(4, 3), b, c, torch.randn(4)]),
    ]
    chosen: list[bool] = []
    with build.turned_off("not in this test"):
        for function, inputs in calls:
            results = []
            for place, dtype in ((kernel_device, torch.float32), (torch.device("cpu"), torch.float64)):
                single = dtype == torch.float32
                monkeypatch.setattr(
                    triton, "chosen", lambda device, kind, single=single: chosen.append(single) or single
                )
                leaves = [y.to(place, dtype).requires_grad_() for y in inputs]
                out = function(*leaves)
                results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
            assert all(close(found, truth, 1e-4) for found, truth in zip(*results, strict=True))
    assert any(chosen)
