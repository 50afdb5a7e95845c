from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from saccade.ops.attend import attend
from saccade.ops.merge import merge
from saccade.ops.routed import block_layout, routed_attend, routes, tiles


def choose(B: int, H: int, N: int, n: int, j: int, *, below_own: int | None = None) -> Tensor:
    """Random different blocks, some missing; only past ones with `below_own` = block size."""
    chosen = torch.rand(B, H, N, n).argsort(-1)[..., :j]
    chosen[torch.rand(chosen.shape) < 0.2] = -1
    if below_own is not None:
        chosen[chosen >= (torch.arange(N) // below_own)[:, None]] = -1
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


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    ("H", "K", "N", "M", "D", "E", "size", "j"), [(4, 2, 24, 40, 4, 4, 8, 3), (2, 2, 32, 32, 4, 7, 4, 2)]
)
def test_equals_masked_attention_with_lse_and_gradients(
    H: int, K: int, N: int, M: int, D: int, E: int, size: int, j: int, own: bool
) -> None:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, tokens, width, dtype=torch.float64, requires_grad=True)
        for heads, tokens, width in ((H, N, D), (K, M, D), (K, M, E))
    )
    chosen = choose(2, H, N, M // size, j)
    chosen[:, :, 5] = -1
    if own:
        chosen[chosen >= (torch.arange(M - N, M) // size)[:, None]] = -1
    ours = routed_attend(q, k, v, chosen, size, own=own, scale=0.7)
    mask = allowed(chosen, M, size, own)
    theirs = attend(q, k, v, mask=mask, scale=0.7, return_lse=True, backend="reference")
    empty = ~mask.any(-1)
    assert empty.any() != own
    assert (ours[0][empty] == 0).all() and (ours[1][empty] == float("-inf")).all()
    torch.testing.assert_close(ours, theirs)
    grad, grad_lse = torch.randn_like(ours[0]), torch.randn_like(ours[1]).masked_fill(empty, 0.0)
    for more in (0.0, 1.0):
        gradients = [
            torch.autograd.grad(
                (out * grad).sum() + more * (lse.masked_fill(empty, 0.0) * grad_lse).sum(), (q, k, v), retain_graph=True
            )
            for out, lse in (ours, theirs)
        ]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)


def columns(x: Tensor) -> Tensor:
    """`x` with its last axis apart in memory."""
    return x.mT.contiguous().mT


def overlapping(x: Tensor) -> Tensor:
    """Rows like `x`'s in shape, of which each begins one element after the last."""
    return torch.randn(*x.shape[:2], x.shape[2] + x.shape[3] - 1, dtype=x.dtype).unfold(-1, x.shape[3], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lay_out", [columns, overlapping])
@pytest.mark.parametrize("size", [8, 2 * tiles._STRIP])
def test_strides_do_not_matter(size: int, lay_out: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    chosen = torch.zeros(1, 1, 3 * size, 1, dtype=torch.long)
    chosen[:, :, :size] = -1
    tensors = [lay_out(torch.randn(1, 1, 3 * size, 16, dtype=dtype)) for _ in range(4)]

    def run(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = routed_attend(*inputs, chosen, size)
        return out, lse, *torch.autograd.grad(out, inputs, grad)

    for ours, theirs in zip(run(*tensors), run(*(x.contiguous() for x in tensors)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("scale", [0.0, -0.3])
@pytest.mark.parametrize("size", [8, 2 * tiles._STRIP])
def test_scales_of_zero_and_below(size: int, scale: float) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 2 * size, 4, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1))
    chosen = torch.zeros(1, 2, 2 * size, 1, dtype=torch.long)
    chosen[:, :, :size] = -1
    ours = routed_attend(q, k, v, chosen, size, scale=scale)
    mask = allowed(chosen, 2 * size, size, True)
    theirs = attend(q, k, v, mask=mask, scale=scale, return_lse=True, backend="reference")
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v)) for out, lse in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_many_pieces_and_ranges_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 512, 8, requires_grad=True) for heads in (4, 2, 2))
    chosen = choose(1, 4, 512, 2, 1, below_own=256)
    chosen[:, :, 256:] = 0
    grad = torch.randn(1, 4, 512, 8)

    def run() -> tuple[Tensor, ...]:
        out, lse = routed_attend(q, k, v, chosen, 256)
        return out, lse, *torch.autograd.grad(out, (q, k, v), grad)

    whole = run()
    expected = attend(q, k, v, mask=allowed(chosen, 512, 256, True), backend="reference")
    torch.testing.assert_close(whole[0], expected, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(routes, "_WAITING", 2**14)
    monkeypatch.setattr(routes, "_PIECE", 2**16)
    assert len(list(routes.ranges_of_queries(chosen, 8, 4))) > 2
    for a, b in zip(run(), whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_the_path_of_other_devices_equals_the_kernel(causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v, grad = torch.randn(4, 3, 16, 8)
    ours, kernels = (f(q, k, v, 0.3, causal=causal) for f in (tiles._forward_by_matmul, tiles.tiles_forward))
    torch.testing.assert_close(ours, kernels)
    out, lse = ours[0] + 0.1, ours[1] + 0.2  # a row of which this is a part has another output and LSE
    torch.testing.assert_close(
        *(f(grad, q, k, v, out, lse, 0.3, causal=causal) for f in (tiles._backward_by_matmul, tiles.tiles_backward))
    )


def test_parts_merge() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 32, 8)
    first, second = torch.zeros(1, 2, 32, 1, dtype=torch.long), torch.full((1, 2, 32, 1), 3)
    both = routed_attend(q, k, v, torch.cat([first, second], -1), 8, own=False)
    parts = [routed_attend(q, k, v, chosen, 8, own=False) for chosen in (first, second)]
    torch.testing.assert_close(merge(*parts[0], *parts[1]), both)


def test_layout_puts_each_sequence_at_the_start_of_a_block() -> None:
    ids = torch.tensor([[3, 3, 3, 3, 3, -1, 7, 7], [0, 0, 0, 0, 0, 0, 0, 0]])
    layout = block_layout(ids, 4)
    assert layout.source_BL.tolist() == [[0, 1, 2, 3, 4, 8, 8, 8, 6, 7, 8, 8], [*range(8), 8, 8, 8, 8]]
    assert layout.document_Bn.tolist() == [[0, 0, 1], [0, 0, -1]]
    assert layout.start_Bn[0].tolist() == [0, 0, 2] and layout.start_Bn[1, :2].tolist() == [0, 0]
    x = torch.arange(1.0, 17).view(2, 1, 8, 1)
    back = layout.restore(layout.align(x))
    x[0, 0, 5] = 0
    assert torch.equal(back, x)
    torch.testing.assert_close(layout.restore(layout.align(x[:, :, 3:], first=3), first=3), x[:, :, 3:])


def test_interleaved_sequences_keep_their_order() -> None:
    layout = block_layout(torch.tensor([[1, 0, 1, 0, 1]]), 2)
    assert layout.source_BL.tolist() == [[1, 3, 0, 2, 4, 5]]


def test_compiled_equals_eager() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 16, 4, requires_grad=True) for _ in range(3))
    chosen = choose(1, 2, 16, 4, 2, below_own=4)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return routed_attend(q, k, v, chosen, 4)[0].square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for a, b in zip(*(torch.autograd.grad(f(q, k, v), (q, k, v)) for f in (loss, compiled)), strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_to_attend_to() -> None:
    empty = torch.zeros(0, 2, 8, 4)
    out, lse = routed_attend(empty, empty, empty, torch.zeros(0, 2, 8, 1, dtype=torch.long), 4)
    assert out.shape == (0, 2, 8, 4) and lse.shape == (0, 2, 8)
    q = torch.randn(1, 1, 8, 4)
    out, lse = routed_attend(q, q, q, torch.full((1, 1, 8, 2), -1), 4, own=False)
    assert not out.any() and (lse == float("-inf")).all()


def test_bad_arguments() -> None:
    q, chosen = torch.randn(1, 2, 8, 4), torch.zeros(1, 2, 8, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="whole blocks of 3"):
        routed_attend(q, q, q, chosen, 3)
    with pytest.raises(ValueError, match="chosen must be integers"):
        routed_attend(q, q, q, chosen[:, :1], 4)
    with pytest.raises(ValueError, match="chosen must be integers"):
        routed_attend(q, q, q, chosen.float(), 4)
    with pytest.raises(ValueError, match="do not fit"):
        routed_attend(q, q[..., :2], q, chosen, 4)
