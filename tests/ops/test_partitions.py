"""Shifted windows: the definition, as on the whole matrix."""

import pytest
import torch

from saccade.ops import partitions, scratch


def inputs(
    n: int,
    m: int | None = None,
    H: int = 2,
    K: int = 2,
    D: int = 8,
    E: int = 8,
    dtype=torch.float64,
    B: int = 1,
):
    torch.manual_seed(0)
    m = n if m is None else m
    q, k, v = torch.randn(B, H, n, D), torch.randn(B, K, m, D), torch.randn(B, K, m, E)
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def shifted_reference(q, k, v, grid, window, shift, bias):
    """Windows by definition: equal window index on every axis, counted from the shift."""
    n = q.shape[2]
    place = torch.stack(torch.meshgrid(*(torch.arange(s) for s in grid), indexing="ij"), -1).view(n, -1)
    shifts = torch.tensor([0 if g <= w else s for g, w, s in zip(grid, window, shift)])
    w = torch.tensor(window)
    index, inside = (place - shifts).div(w, rounding_mode="floor"), (place - shifts) % w
    allowed = (index[:, None] == index[None]).all(-1)
    flat = torch.zeros(n, dtype=torch.long)
    for axis, length in enumerate(window):
        flat = flat * length + inside[:, axis]
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias[:, flat[:, None], flat]
    scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1) @ v.repeat_interleave(q.shape[1] // k.shape[1], 1), scores.logsumexp(-1)


@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [
        ((12,), (4,), (0,)),
        ((12,), (4,), (3,)),
        ((8, 12), (4, 4), (2, 2)),
        ((9, 10), (4, 3), (2, 1)),
        ((3, 10), (4, 5), (2, 2)),
        ((4, 6, 5), (2, 3, 2), (1, 1, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_shifted_windows_equal_the_definition(grid, window, shift, heads) -> None:
    n, T = int(torch.Size(grid).numel()), int(torch.Size(window).numel())
    q, k, v = inputs(n, H=heads[0], K=heads[1], E=5, B=2)
    bias = torch.randn(heads[0], T, T, dtype=torch.float64, requires_grad=True)
    out, lse = partitions.window_attend(q, k, v, grid, window, shift, bias, return_lse=True)
    want, want_lse = shifted_reference(q, k, v, grid, window, shift, bias)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    grad_out, grad_lse, leaves = torch.randn_like(out), torch.randn_like(lse), (q, k, v, bias)
    got = torch.autograd.grad((out * grad_out).sum() + (lse * grad_lse).sum(), leaves)
    expected = torch.autograd.grad((want * grad_out).sum() + (want_lse * grad_lse).sum(), leaves)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


def test_zero_bias_table_is_no_bias_and_the_table_is_read_by_relative_position() -> None:
    q, k, v = inputs(48)
    table = torch.zeros(2, 7, 5, dtype=torch.float64)
    zero = partitions.window_attend(q, k, v, (8, 6), (4, 3), (1, 2), partitions.window_bias(table, (4, 3)))
    assert torch.equal(zero, partitions.window_attend(q, k, v, (8, 6), (4, 3), (1, 2)))
    bias = partitions.window_bias(torch.arange(2 * 35.0).view(2, 7, 5), (4, 3))
    # query (1, 2), key (3, 0): key - query + window - 1 = (5, 0)
    assert bias[1, 1 * 3 + 2, 3 * 3 + 0] == 35 + 5 * 5 + 0


def test_shifted_windows_refuse_what_does_not_fit() -> None:
    q, k, v = inputs(12)
    for match, arguments in [
        ("12 tokens|13 tokens", dict(size=13, window=4)),
        ("below the window", dict(size=12, window=4, shift=4)),
        ("one entry per axis", dict(size=(3, 4), window=(2, 2, 2))),
        ("bias must be", dict(size=12, window=4, bias=torch.zeros(2, 3, 3))),
        ("one to three", dict(size=(1, 2, 2, 3), window=1)),
    ]:
        with pytest.raises(ValueError, match=match):
            partitions.window_attend(q, k, v, **arguments)
    with pytest.raises(ValueError, match="table must be"):
        partitions.window_bias(torch.zeros(2, 7), 3)


def test_queries_keys_and_values_side_by_side() -> None:
    qkv = torch.randn(2, 30, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 16, 16, dtype=torch.float64, requires_grad=True)
    out = partitions.packed_window_attend(qkv, (5, 6), 4, (2, 1), bias)
    want = partitions.window_attend(*(x.transpose(1, 2) for x in qkv.unbind(2)), (5, 6), 4, (2, 1), bias)
    assert out.transpose(1, 2).is_contiguous() and torch.equal(out, want)
    grad = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, (qkv, bias), grad), torch.autograd.grad(want, (qkv, bias), grad)):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="qkv must be"):
        partitions.packed_window_attend(qkv[:, :, :2], (5, 6), 4)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_mask_of_each_window(heads, with_bias) -> None:
    q, k, v = inputs(9, H=heads[0], K=heads[1], B=6)
    bias = torch.randn(heads[0], 9, 9, dtype=torch.float64, requires_grad=True) if with_bias else None
    mask = torch.where(torch.rand(3, 9, 9) < 0.5, -100.0, 0.0).double()
    out, lse = partitions.window_attend(q, k, v, (3, 3), 3, 0, bias, mask=mask, scale=0.7, return_lse=True)
    scores = 0.7 * q @ k.repeat_interleave(heads[0] // heads[1], 1).mT + mask.repeat(2, 1, 1)[:, None]
    scores = scores if bias is None else scores + bias
    want = scores.softmax(-1) @ v.repeat_interleave(heads[0] // heads[1], 1)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    leaves, grad = [x for x in (q, k, v, bias) if x is not None], torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(want, leaves, grad)):
        torch.testing.assert_close(a, b)
    for bad in (mask[:, :8], torch.zeros(9, 9), mask.bool()):
        with pytest.raises(ValueError, match="mask must be"):
            partitions.window_attend(q, k, v, (3, 3), 3, mask=bad)
    with pytest.raises(ValueError, match="grid of one window"):
        partitions.window_attend(q, k, v, (3, 3), (3, 1), mask=mask)


@pytest.mark.parametrize("level", [-400.0, -90.0, 90.0, 400.0])
def test_scores_far_from_zero(level) -> None:
    """Their powers leave the range of floats, or nearly, without the maximum."""
    q, k, v = (x.detach().float().requires_grad_() for x in inputs(24))
    bias = torch.full((1, 4, 4), level)
    out, lse = partitions.window_attend(q, k, v, 24, 4, 1, bias, return_lse=True)
    plain, plain_lse = partitions.window_attend(q, k, v, 24, 4, 1, return_lse=True)
    torch.testing.assert_close(out, plain, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(lse - level, plain_lse, atol=2e-4, rtol=2e-4)
    grad = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(plain, (q, k, v), grad)):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_a_row_that_may_attend_to_nothing_gives_zeros() -> None:
    q, k, v = inputs(6, B=2)
    mask = torch.zeros(1, 6, 6)
    mask[0, 2] = float("-inf")
    out, lse = partitions.window_attend(q, k, v, 6, 6, mask=mask, return_lse=True)
    assert (out[:, :, 2] == 0).all() and (lse[:, :, 2] == float("-inf")).all()
    assert lse[:, :, [0, 1, 3, 4, 5]].isfinite().all()
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(g.isfinite().all() for g in gradients) and (gradients[0][:, :, 2] == 0).all()


def test_shifted_gradcheck() -> None:
    q, k, v = inputs(12, D=2, E=3)
    bias = torch.randn(2, 6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: partitions.window_attend(*x[:3], (4, 3), (2, 3), (1, 0), x[3], return_lse=True), (q, k, v, bias)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype) -> None:
    q, k, v = inputs(60, dtype=dtype)
    bias = torch.randn(2, 16, 16).to(dtype).requires_grad_()
    leaves = (q, k, v, bias)
    out = partitions.window_attend(q, k, v, (6, 10), 4, 2, bias)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    want = partitions.window_attend(*exact[:3], (6, 10), 4, 2, exact[3])
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=2e-2)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(want, exact, grad.double())
    for a, b in zip(torch.autograd.grad(out, leaves, grad), expected):
        assert a.dtype == dtype and (a - b).abs().max() <= 2e-2 * b.abs().max()


def test_a_small_memory_bound_and_any_layout_change_nothing() -> None:
    q, k, v = (torch.randn(2, 150, 4, 8).transpose(1, 2) for _ in range(3))
    bias = torch.randn(4, 35, 35)
    want = partitions.window_attend(*(x.contiguous() for x in (q, k, v)), (10, 15), (5, 7), 3, bias)
    for memory_mb in (64.0, 0.01, 1e-9):
        out = partitions.window_attend(q, k, v, (10, 15), (5, 7), 3, bias, memory_mb=memory_mb)
        torch.testing.assert_close(out, want)


def test_nothing_of_pairs_is_kept_for_the_backward_pass() -> None:
    q, k, v = (x.detach().float().requires_grad_() for x in inputs(64 * 8, D=4, E=4))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        partitions.window_attend(q, k, v, 512, 64, 7, torch.zeros(2, 64, 64))
    assert sum(x.nbytes for x in kept) <= 4 * q.nbytes + q.nbytes // 4 + 2 * 64 * 64 * 4 < 2 * 512 * 64 * 4


def test_buffers_of_inference_mode_serve_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_free", scratch._Free())
    q, k, v = (x.detach().float() for x in inputs(12))
    with torch.inference_mode():
        want = partitions.window_attend(q, k, v, 12, 4)
    out = partitions.window_attend(q.requires_grad_(), k, v, 12, 4)
    out.sum().backward()
    assert torch.equal(out.detach(), want)


def test_shifted_windows_compile_into_one_graph() -> None:
    qkv = torch.randn(2, 30, 3, 2, 4, requires_grad=True)
    bias = torch.randn(2, 16, 16, requires_grad=True)

    def function(qkv: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return partitions.packed_window_attend(qkv, (5, 6), 4, (2, 1), bias).transpose(1, 2).flatten(2)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    got, want = compiled(qkv, bias), function(qkv, bias)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), (qkv, bias)) for out in (got, want))):
        torch.testing.assert_close(a, b)
