"""Limits of normalisation: bounds by random checks, averages over all sets, rows of different lengths."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.explain.normalization_limits import (
    NormalizationLimits,
    coverage,
    critical_count,
    cumulative_distance,
    distance_bound,
    expected_distance,
    jacobian_bounds,
    sensitivity,
    separability_bounds,
    separable,
    softmax_bounds,
    top,
    weight_bounds,
)


def drawn(rows: int, length: int, width: int, *, unit: bool = True, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(rows, length, width, dtype=torch.double)
    alpha = (spread * torch.randn(rows, length, dtype=torch.double)).softmax(-1)
    return alpha, F.normalize(x, dim=-1) if unit else x


def test_weights_lie_within_their_bounds() -> None:
    torch.manual_seed(0)
    logits = 4 * torch.rand(300, 40, dtype=torch.double) - 2
    for low, high, alpha in (
        (*softmax_bounds(2.0, 0.7, 40), (logits / 0.7).softmax(-1)),
        (*weight_bounds(lambda x: 3 + x, 2.0, 40), (3 + logits) / (3 + logits).sum(-1, keepdim=True)),
    ):
        assert low <= float(alpha.min()) and float(alpha.max()) <= high
    assert softmax_bounds(0.0, 1.0, 8) == (1 / 8, 1 / 8)


@pytest.mark.parametrize("count", [1, 3, 11, 12])
def test_the_distance_is_within_its_bound(count: int) -> None:
    alpha, x = drawn(500, 12, 5, unit=False)
    index = top(alpha, count)
    found, bound = cumulative_distance(alpha, x, index), distance_bound(alpha, x, index)
    assert (found <= bound + 1e-9).all()
    chosen = torch.zeros_like(alpha, dtype=torch.bool).scatter(1, index, True)
    s = ((alpha * chosen)[..., None] * x).sum(1)
    by_hand = ((alpha[..., None] * x - s[:, None]).norm(dim=-1) * ~chosen).sum(1)
    torch.testing.assert_close(found, by_hand, atol=1e-7, rtol=1e-6)
    if count == 12:
        assert found.eq(0).all() and bound.eq(0).all()
        torch.testing.assert_close(s, (alpha[:, None] @ x)[:, 0])
    other = cumulative_distance(alpha, x, index, distance="aggregate")
    torch.testing.assert_close(other, ((alpha * (1.0 - 2.0 * chosen))[:, None] @ x)[:, 0].norm(dim=-1))


def test_the_expected_distance_lies_between_its_forms() -> None:
    alpha, x = drawn(4, 9, 5)
    sets = list(itertools.combinations(range(9), 3))
    every = []
    for chosen in sets:
        every.append(cumulative_distance(alpha, x, torch.tensor(chosen).expand(4, -1)))
    mean = torch.stack(every).mean(0)
    main, upper = expected_distance(alpha, x, 3)
    assert (main <= mean + 1e-12).all() and (mean <= upper + 1e-12).all()
    assert ((upper - main) / mean < 0.5).all()
    nearly, _ = expected_distance(alpha, x, 9)
    assert nearly.eq(0).all()


@pytest.mark.parametrize("count", [1, 4, 10])
def test_what_can_be_told_apart_is_within_its_bounds(count: int) -> None:
    alpha, x = drawn(300, 40, 16)
    index = top(alpha, count)
    share, r = separable(alpha, x, index)
    low, high = separability_bounds(alpha, x, index)
    chosen = torch.zeros_like(alpha, dtype=torch.bool).scatter(1, index, True)
    assert (low <= share + 1e-9).all() and (share <= high + 1e-9).all()
    away = ((alpha[..., None] * x) - ((alpha * chosen)[..., None] * x).sum(1, keepdim=True)).norm(dim=-1)
    torch.testing.assert_close(r, away.masked_fill(chosen, torch.inf).amin(1))
    if count == 1:
        assert share.eq(1).all()
    whole, nowhere = separable(alpha, x, torch.arange(40).expand(300, -1))
    assert whole.eq(1).all() and nowhere.isinf().all()


def test_separability_rises_with_width_and_falls_with_count() -> None:
    shares = {}
    for width in (16, 768):
        alpha, x = drawn(20, 64, width)
        for count in (5, 20):
            shares[width, count] = float(separable(alpha, x, top(alpha, count))[0].mean())
    assert shares[16, 5] < shares[768, 5] and shares[16, 20] < shares[768, 20]
    assert shares[16, 20] < shares[16, 5] and shares[768, 20] < shares[768, 5]
    assert coverage(0.8, 3) == pytest.approx(0.992)


def test_jacobian_of_softmax() -> None:
    torch.manual_seed(0)
    for temperature in (0.3, 2.0):
        bounds = jacobian_bounds(temperature)
        for logits in (*torch.randn(20, 6, dtype=torch.double), torch.tensor([0.0, 0.0, -900.0], dtype=torch.double)):
            alpha = (logits / temperature).softmax(-1)
            jacobian = (alpha.diag() - alpha[:, None] * alpha) / temperature
            assert float(jacobian.abs().max()) <= bounds["entry"] + 1e-12
            norm = float(torch.linalg.matrix_norm(jacobian, 2))
            assert norm <= bounds["norm"] + 1e-12
        assert norm == pytest.approx(bounds["norm"])  # two weights of a half
        logits = torch.randn(50, 6, dtype=torch.double)
        assert (sensitivity(logits, temperature, 1e-4) <= bounds["norm"] + 1e-6).all()
        assert (sensitivity(logits, temperature, 10.0) <= math.sqrt(2) / 10).all()


def test_rows_that_see_different_tokens_are_measured_by_what_they_see() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 10, 4)
    weights = torch.randn(2, 3, 10, 10).masked_fill(~torch.ones(10, 10).tril().bool(), -torch.inf).softmax(-1)
    found = NormalizationLimits(3)(weights, x)
    assert found.distance[:, :, :3].eq(0).all() and found.distance[:, :, 3:].gt(0).all()
    assert found.separable[:, :, :3].eq(1).all() and found.lengths[0, 0].tolist() == list(range(1, 11))
    torch.testing.assert_close(found.of_heads()["distance"], found.distance[:, :, 3:].mean((0, 2)))
    alpha, tokens = weights[1, 2, 6, :7], F.normalize(x[1, :7], dim=-1)
    chosen = top(alpha, 3)
    torch.testing.assert_close(found.distance[1, 2, 6], cumulative_distance(alpha, tokens, chosen))
    torch.testing.assert_close(found.separable[1, 2, 6], separable(alpha, tokens, chosen)[0])
    torch.testing.assert_close(found.mass[1, 2, 6], alpha[chosen].sum())
    assert (found.distance <= found.bound + 1e-5)[:, :, 3:].all()
    assert "separable" in found.table() and found.of_heads()["distance"].shape == (3,)
    without = NormalizationLimits(3, sinks=1)(weights, x)
    kept = alpha[1:] / alpha[1:].sum()
    torch.testing.assert_close(without.distance[1, 2, 6], cumulative_distance(kept, tokens[1:], top(kept, 3)))
    pytest.importorskip("matplotlib")
    assert len(found.plot().axes) == 2


def test_the_critical_count_and_a_model() -> None:
    pytest.importorskip("scipy")
    torch.manual_seed(0)
    expected = torch.rand(60, 3)
    distance = expected + torch.tensor([5.0, 5.0, 0.0])
    assert critical_count(distance, expected, [1, 5, 20]) == 20
    assert critical_count(distance[:, :2], expected[:, :2], [1, 5]) is None
    transformers = pytest.importorskip("transformers")
    from saccade.explain.normalization_limits import of_record
    from saccade.explain.recording import recorded

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=20, **sizes)).eval()
    with recorded(model) as recording, torch.no_grad():
        model(input_ids=torch.arange(12)[None])
    (record,) = recording.layers
    found = of_record(record, model.get_input_embeddings()(torch.arange(12)[None]), count=2, rows=[-1])
    assert found.distance.shape == (1, 2, 1) and found.distance.gt(0).all()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="positive"):
        NormalizationLimits(0)
    with pytest.raises(ValueError, match="weights must be"):
        NormalizationLimits()(torch.rand(1, 2, 3, 4), torch.rand(1, 5, 8))
    alpha, x = drawn(1, 4, 2)
    with pytest.raises(ValueError, match="between 1 and 4"):
        top(alpha, 5)
    with pytest.raises(ValueError, match="'sum' or 'aggregate'"):
        cumulative_distance(alpha, x, top(alpha, 1), distance="far")
