"""The differentiable measures of maps: the metrics' values, their derivatives, and maps that say nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.explain import gaze
from saccade.ops.saliency import correlation, divergence, scanpath_saliency, similarity


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    p, g = torch.rand(3, 35, dtype=torch.double), torch.rand(3, 35, dtype=torch.double)
    return p, g, torch.rand(3, 35) < 0.2


def test_they_are_the_metrics() -> None:
    p, g, at = drawn()
    for row in range(3):
        one, other = p[row].view(5, 7), g[row].view(5, 7)
        assert float(divergence(p, g)[row]) == pytest.approx(gaze.divergence(one, other))
        assert float(correlation(p, g)[row]) == pytest.approx(gaze.correlation(one, other))
        spread = [(x - x.min()) / (x.max() - x.min()) for x in (one, other)]
        assert float(similarity(p, g)[row]) == pytest.approx(gaze.similarity(*spread))
        for correction in (0, 1):
            found = scanpath_saliency(p, at, correction=correction)[row]
            assert float(found) == pytest.approx(gaze.nss(one, at[row].view(5, 7), ddof=correction))


def test_derivatives() -> None:
    p, g, at = drawn()
    p.requires_grad_()
    for measure in (divergence, correlation, similarity):
        assert torch.autograd.gradcheck(lambda x, f=measure: f(x, g), (p,))
    assert torch.autograd.gradcheck(lambda x: scanpath_saliency(x, at), (p,))


def test_maps_that_say_nothing() -> None:
    _, g, at = drawn()
    constant = torch.full((3, 35), 0.5, dtype=torch.double, requires_grad=True)
    said = [correlation(constant, g), scanpath_saliency(constant, at), scanpath_saliency(g, torch.zeros_like(at))]
    assert all(each.abs().max() < 1e-6 for each in said)
    torch.stack(said).sum().backward()
    assert constant.grad is not None and constant.grad.isfinite().all()
