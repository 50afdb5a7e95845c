"""The cosine schedule and DDIM's step, by hand."""

from __future__ import annotations

from math import cos, pi

import torch

from saccade.ops.diffusion import cosine_alphas, ddim_step, noised


def test_the_schedule_is_the_squared_cosine() -> None:
    alphas = cosine_alphas(100)
    expected = [
        cos(((t + 1) / 100 + 0.008) / 1.008 * pi / 2) ** 2 / cos(0.008 / 1.008 * pi / 2) ** 2 for t in range(99)
    ]
    torch.testing.assert_close(alphas[:99], torch.tensor(expected, dtype=torch.float64))
    assert 0 < alphas[99] < alphas[98] * 0.0011  # betas are at most 0.999


def test_a_step_keeps_the_noise_that_there_is() -> None:
    torch.manual_seed(0)
    start, noise = torch.randn(3, 4), torch.randn(3, 4)
    now, then = torch.tensor(0.3), torch.tensor(0.8)
    x = noised(start, noise, now)
    torch.testing.assert_close(ddim_step(x, start, now, then), noised(start, noise, then))
    torch.testing.assert_close(ddim_step(x, start, now, torch.tensor(1.0)), start)
    fresh = torch.randn(3, 4)
    sigma2 = (1 - 0.3 / 0.8) * 0.2 / 0.7
    expected = 0.8**0.5 * start + (0.2 - sigma2) ** 0.5 * noise + sigma2**0.5 * fresh
    torch.testing.assert_close(ddim_step(x, start, now, then, fresh, 1.0), expected)
    torch.testing.assert_close(ddim_step(x, start, now, then, fresh, 0.0), noised(start, noise, then))
