"""Explanations of parts of the catalogue and of networks made of them: effective attention, gates, numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import saccade
from saccade.explain.explanation import explain, subject
from saccade.layers.qkv_attention import QKVAttention
from saccade.layers.wrapping import footprint

FEW: dict[str, Any] = {"random": 2, "subsets": 4, "stages": 1}


@pytest.mark.parametrize(("slug", "options"), [("softmax", {}), ("mega", {}), ("lightning", {}), ("moba", {})])
def test_the_effective_attention_of_a_part(slug: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    part = saccade.create(slug, dim=16, **({"num_heads": 2} if slug != "mega" else {}), **options).eval()
    x = torch.randn(1, 12, 16)
    before = footprint(part)
    found = explain(part, x, 9, **FEW)
    assert footprint(part) == before
    tells = isinstance(part, QKVAttention)
    maps = {"raw", "rollout", "flow", "input x gradient", "occlusion", *["gradient x attention"] * tells}
    assert set(found.maps) == maps and found.target is None
    assert tells == (not found.remark) and (tells or "does not tell the values" in found.table())
    expected = saccade.attention_map(part, x, rows=9)[0].float().mean(0)[0]
    torch.testing.assert_close(found.maps["raw"], expected, atol=1e-5, rtol=1e-4)
    assert found.probability == pytest.approx(1.0, abs=1e-5) and found.score_is == "likeness to itself"


def test_gradients_of_a_part_s_weights() -> None:
    """Of one layer gradient x attention is I + mean_h max(0, dL/dA A), here with A a leaf."""
    torch.manual_seed(0)
    part, x = saccade.create("softmax", dim=16, num_heads=2).eval(), torch.randn(1, 6, 16)
    found = explain(part, x, 4, faithful=False).maps["gradient x attention"]
    weights = saccade.attention_map(part, x).requires_grad_()
    assert isinstance(part, QKVAttention)
    value = part.project(x, None, part.positions(x, None, 0))[2]
    out = part.out(weights @ value)[0, 4]
    (out @ F.normalize(part(x)[0, 4].detach(), dim=0)).backward()
    assert weights.grad is not None
    expected = torch.eye(6)[4] + (weights * weights.grad).clamp(min=0)[0].mean(0)[4]
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-4)


def test_a_network_of_parts_and_numbers() -> None:
    torch.manual_seed(0)

    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 16), nn.Linear(16, 11)
            self.blocks = nn.ModuleList(
                [saccade.create("softmax", dim=16, num_heads=2), saccade.create("lightning", dim=16, num_heads=2)]
            )

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            for block in self.blocks:
                x = x + block(x)
            return self.head(x)

    model, ids = Language().eval(), torch.tensor([[1, 4, 2, 9, 7]])
    found = explain(model, ids, **FEW)
    assert found.labels == ["1", "4", "2", "9", "7"] and found.heads[0].shape == (2, 2, 5)
    said = model(ids)[0, -1].detach()
    assert found.target == (4, int(said.argmax()))
    assert found.probability == pytest.approx(float(said.softmax(0).max()))
    x = model.embed(ids).detach().requires_grad_()
    y = x
    for block in model.blocks:
        y = y + block(y)
    model.head(y)[0, -1].max().backward()
    torch.testing.assert_close(
        found.maps["input x gradient"], (x * x.grad).sum(-1)[0].abs().detach(), atol=1e-5, rtol=1e-4
    )
    assert found.sanity is not None and found.sanity.stages == ["all"]
    assert explain(model, ids, (2, 3), faithful=False).target == (2, 3)


def test_positions_of_a_map_and_a_gate() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 8, 5, 4)
    gate = saccade.create("cbam", channels=8, reduction=2).eval()
    found = explain(gate, x, 7, **FEW)
    assert found.grid == (5, 4) and set(found.maps) == {"gate", "input x gradient", "occlusion"}
    expected = gate.gate(x).expand_as(x).abs().mean(1).flatten().detach()
    torch.testing.assert_close(found.maps["gate"], expected)
    assert not found.heads and "gate" in str(found)


def test_a_classifier_of_maps() -> None:
    torch.manual_seed(0)
    gate = saccade.create("cbam", channels=8, reduction=2)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), gate, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()
    x = torch.randn(1, 3, 8, 8)
    found = explain(network, x, 2, **FEW)
    assert found.target == (None, 2) and found.maps["gate"].shape == (64,)
    assert found.probability == pytest.approx(float(network(x).softmax(1)[0, 2].detach()))
    whole = explain(network, x, faithful=False)
    assert whole.target is None and whole.score_is == "likeness to itself"


def test_what_is_taken_away_has_the_mean_of_all() -> None:
    torch.manual_seed(0)
    part, x = saccade.create("softmax", dim=8, num_heads=2).eval(), torch.randn(1, 4, 8)
    seen = subject(part, x, 3)
    kept = torch.tensor([[True, False, True, True]])
    changed = x.clone()
    changed[:, 1] = x.mean(1)
    expected = torch.cosine_similarity(part(changed)[:, 3], part(x)[:, 3])
    torch.testing.assert_close(seen.score(kept), expected.detach())


def test_refusals() -> None:
    part = saccade.create("softmax", dim=8, num_heads=2)
    x = torch.randn(1, 4, 8)
    linear = saccade.create("lightning", dim=8, num_heads=2)
    recurrent = nn.Sequential(nn.Linear(8, 8))
    recurrent.gate = nn.Linear(8, 8)  # a projection, not the gate of a map
    for model, inputs, target, options, message in (
        (part, torch.randn(2, 4, 8), None, {}, "one example"),
        (part, x, 4, {}, "below 4"),
        (linear, x, None, {"methods": ["gradient x attention"]}, "cannot be had here: no gradients.*does not tell"),
        (nn.Linear(8, 8), x, None, {}, "no part with mix"),
        (recurrent, x, None, {}, "no part with mix"),
        (nn.Linear(8, 8), {"x": x}, None, {}, "not a transformers model"),
    ):
        with pytest.raises(ValueError, match=message):
            explain(model, inputs, target, **options)
