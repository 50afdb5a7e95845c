"""The kernels of routed block attention against masked attention in double precision, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.ops.attend import attend
from saccade.ops.native import build
from saccade.ops.routed import routed_attend
from saccade.ops.triton import routed


def choose(B: int, H: int, N: int, M: int, size: int, j: int, own: bool) -> Tensor:
    """Random different blocks, some missing; one query that chooses none; only past ones where the own one is seen."""
    chosen = torch.rand(B, H, N, M // size).argsort(-1)[..., :j]
    chosen[torch.rand(chosen.shape) < 0.2] = -1
    chosen[:, :, N // 2] = -1
    if own:
        chosen[chosen >= (torch.arange(M - N, M) // size)[:, None]] = -1
    return chosen


def allowed(chosen: Tensor, M: int, size: int, own: bool) -> Tensor:
    N, n = chosen.shape[2], M // size
    blocks = torch.zeros(*chosen.shape[:3], n + 1, dtype=torch.bool)
    blocks.scatter_(-1, torch.where(chosen < 0, n, chosen), True)
    pairs = blocks[..., :n].repeat_interleave(size, -1)
    if own:
        query, key = torch.arange(M - N, M)[:, None], torch.arange(M)
        pairs = pairs | ((query // size == key // size) & (key <= query))
    return pairs


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize(
    ("H", "K", "N", "M", "D", "size", "j", "own", "waiting"),
    [
        (4, 2, 24, 40, 4, 8, 3, True, None),
        (4, 2, 23, 40, 20, 8, 3, False, None),
        (2, 1, 40, 80, 100, 20, 2, True, 1),  # a range of queries for each block
        (2, 2, 70, 140, 8, 70, 1, True, None),  # blocks of more than one tile
        (2, 2, 16, 16, 8, 8, 0, True, None),
    ],
)
def test_equals_masked_attention(
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    H: int,
    K: int,
    N: int,
    M: int,
    D: int,
    size: int,
    j: int,
    own: bool,
    waiting: int | None,
    dtype: torch.dtype,
    bound: float,
) -> None:
    if waiting is not None:
        monkeypatch.setattr(routed, "WAITING", waiting)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, D).to(dtype) for heads, tokens in ((H, N), (K, M), (K, M)))
    chosen = choose(1, H, N, M, size, j, own)
    mask = allowed(chosen, M, size, own)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = attend(*leaves, mask=mask, scale=D**-0.5, return_lse=True, backend="reference")
    seen = mask.any(-1)
    grad, grad_lse = torch.randn(out.shape), torch.randn(lse.shape).masked_fill(~seen, 0.0)
    here = [x.to(kernel_device) for x in (q, k, v, chosen)]
    found, found_lse = routed.attend_routes_in_triton(*here, size, D**-0.5, own)
    assert torch.equal(found_lse.isfinite().cpu(), seen) and not found.cpu()[~seen].any() and found.dtype == dtype
    assert (found_lse.cpu()[seen] - lse[seen]).abs().max() <= bound
    for more in (0.0, 1.0):
        loss = (out * grad).sum() + more * (lse.masked_fill(~seen, 0.0) * grad_lse).sum()
        expected = [out, *torch.autograd.grad(loss, leaves, retain_graph=True)]
        of_lse = grad_lse.to(kernel_device) if more else None
        gradients = routed.route_gradients_in_triton(
            *here, size, D**-0.5, own, found, found_lse, grad.to(kernel_device), of_lse
        )
        for ours, truth in zip((found, *gradients), expected, strict=True):
            assert (ours.double().cpu() - truth).abs().max() <= bound * truth.abs().max().clamp(min=1.0)


def test_the_operator_calls_the_kernels(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are chosen, as they are on CUDA; values of another width than keys'."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 24, 6), torch.randn(1, 2, 32, 6), torch.randn(1, 2, 32, 9)
    chosen = choose(1, 4, 24, 32, 8, 2, True)
    calls = []
    results = []
    for single in (True, False):
        monkeypatch.setattr(routed, "chosen", lambda *kind, single=single: calls.append(single) or single)
        place, dtype = (kernel_device, torch.float32) if single else (torch.device("cpu"), torch.float64)
        leaves = [x.to(place, dtype).requires_grad_() for x in (q, k, v)]
        with build.turned_off("not in this test"):
            out, lse = routed_attend(*leaves, chosen.to(place), 8)
            results.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)])
    assert any(calls)
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours.double().cpu(), truth, atol=1e-4, rtol=1e-4)
