"""The moving average by chunks, by FFT, step by step and as a Toeplitz matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.ops.ema import ema, ema_kernel, ema_reference, ema_step, fft_convolve


def case(B: int, N: int, C: int = 3, E: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    torch.manual_seed(N)
    q = torch.rand(C, E, dtype=dtype)
    q[0, 0], q[1, 1], q[2, 2] = 1.0, 0.0, 0.9999
    tensors = torch.randn(B, N, C, dtype=dtype), q, torch.randn(C, E, dtype=dtype), torch.randn(C, E, dtype=dtype)
    return tuple(t.requires_grad_() for t in tensors)


@pytest.mark.parametrize(("N", "chunk"), [(0, None), (1, None), (7, 3), (64, None), (65, None), (331, 5), (131, 1)])
@pytest.mark.parametrize("with_state", [False, True])
def test_chunks_equal_the_recurrence_forward_and_backward(N: int, chunk: int | None, with_state: bool) -> None:
    x, q, w, c = case(2, N)
    state = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) if with_state else None
    y, after = ema(x, q, w, c, state=state, return_state=True, chunk_size=chunk)
    expected, expected_after = ema_reference(x, q, w, c, state)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(after, expected_after)
    torch.testing.assert_close(ema(x, q, w, c, state=state, chunk_size=chunk), expected)
    leaves = [x, q, w, c] + ([state] if with_state else [])
    weights = torch.randn_like(y), torch.randn_like(after)

    def gradients(y: Tensor, after: Tensor) -> tuple[Tensor, ...]:
        loss = (y * weights[0]).sum() + (after * weights[1]).sum()
        return torch.autograd.grad(loss, leaves, allow_unused=True)

    if N or with_state:
        for a, b in zip(gradients(y, after), gradients(expected, expected_after), strict=True):
            if b is not None or (a is not None and a.any()):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("N", [1, 63, 200])
def test_fft_equals_toeplitz_equals_chunks(N: int) -> None:
    x, q, w, c = case(2, N)
    taps = torch.stack([(w * c * q**t).sum(-1) for t in range(N)], 1)
    kernel = ema_kernel(q, w, c, N)
    torch.testing.assert_close(kernel, taps)
    distance = torch.arange(N)[:, None] - torch.arange(N)
    matrix = torch.where(distance >= 0, taps[:, distance.clamp(min=0)], 0.0)
    expected = torch.einsum("cij,bjc->bic", matrix, x)
    torch.testing.assert_close(fft_convolve(x, kernel), expected)
    torch.testing.assert_close(ema(x, q, w, c), expected)
    cut = torch.einsum("cij,bjc->bic", matrix * (distance < 5), x)
    torch.testing.assert_close(ema(x, q, w, c, taps=5), cut)
    torch.testing.assert_close(ema(x, q, w, c, taps=10**6), expected)


def test_steps_and_split_prefill_equal_the_whole() -> None:
    x, q, w, c = (t.detach().float() for t in case(2, 150))
    expected, last = ema(x, q, w, c, return_state=True)
    y, state = ema(x[:, :90], q, w, c, return_state=True)
    pieces = [y]
    for t in range(90, 120):
        y, state = ema_step(x[:, t : t + 1], q, w, c, state)
        pieces.append(y)
    y, state = ema(x[:, 120:], q, w, c, state=state, return_state=True)
    torch.testing.assert_close(torch.cat([*pieces, y], 1), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state, last, atol=1e-5, rtol=1e-5)


def test_no_decay_is_a_cumulative_sum_at_length() -> None:
    x = torch.randn(1, 5000, 2, dtype=torch.float64)
    one = torch.ones(2, 1, dtype=torch.float64)
    torch.testing.assert_close(ema(x, one, one, one), x.cumsum(1))


def test_half_precision_computes_in_float32() -> None:
    x, q, w, c = (t.detach().bfloat16() for t in case(1, 100))
    y, state = ema(x, q, w, c, return_state=True)
    expected, _ = ema_reference(*(t.float() for t in (x, q, w, c)))
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(y.float(), expected, atol=1e-2, rtol=1e-2)


def test_bad_arguments() -> None:
    x, q, w, c = case(2, 5)
    for arguments, message in (
        ({"taps": 0}, "taps must be at least 1, got 0"),
        ({"taps": 3, "return_state": True}, "has no state"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"state": torch.zeros(1, 3, 4)}, r"state must be \(B, C, E\) = \(2, 3, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ema(x, q, w, c, **arguments)
    with pytest.raises(ValueError, match="x must be floating point"):
        ema(x[0], q, w, c)
    with pytest.raises(ValueError, match="weight must be"):
        ema(x, q, w[:2], c)
    with pytest.raises(ValueError, match="one token, got 5"):
        ema_step(x, q, w, c)
