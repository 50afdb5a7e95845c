"""Shifted windows: the definition, as on the whole matrix."""

import pytest
import torch

from saccade.ops import shifted


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
    out, lse = shifted.window_attend(q, k, v, grid, window, shift, bias, return_lse=True)
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
    zero = shifted.window_attend(q, k, v, (8, 6), (4, 3), (1, 2), shifted.relative_bias(table, (4, 3)))
    assert torch.equal(zero, shifted.window_attend(q, k, v, (8, 6), (4, 3), (1, 2)))
    bias = shifted.relative_bias(torch.arange(2 * 35.0).view(2, 7, 5), (4, 3))
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
            shifted.window_attend(q, k, v, **arguments)
    with pytest.raises(ValueError, match="table must be"):
        shifted.relative_bias(torch.zeros(2, 7), 3)
