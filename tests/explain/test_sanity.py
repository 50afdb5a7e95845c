"""Randomisation: what depends on the weights changes, what does not is found out, and the model is as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from saccade import tables
from saccade.explain.sanity import groups, sanity
from saccade.layers.wrapping import footprint


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 30, bias=False)
        self.head.weight = self.embed.weight


def model() -> Tied:
    torch.manual_seed(0)
    return Tied()


def test_groups_stand_from_the_top() -> None:
    assert [name for name, _ in groups(model())] == ["head", "norm", "layers.2", "layers.1", "layers.0", "the input's"]
    assert [name for name, _ in groups(nn.Linear(2, 2))] == ["the input's"]
    pair = nn.ModuleDict({"text": nn.Sequential(nn.Linear(2, 2)), "image": nn.Sequential(nn.Linear(2, 2))})
    assert [name for name, _ in groups(pair)] == ["image.0", "text.0"]


def test_maps_of_weights_change_and_of_inputs_stay_in_the_order_of_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "terminal_width", lambda: 200)
    network = model()
    before = footprint(network)
    random = torch.randn(64)

    def maps() -> dict[str, Tensor]:
        assert network.head.weight is network.embed.weight or not torch.equal(network.head.weight, network.embed.weight)
        return {
            "input": random,
            "top": network.layers[2].weight.detach().flatten(),
            "bottom": network.layers[0].weight.detach().flatten(),
            "signless": -network.layers[1].weight.detach().flatten().abs(),
        }

    found = sanity(network, maps, stages=6)
    assert footprint(network) == before
    assert found.stages == ["to head", "to norm", "to layers.2", "to layers.1", "to layers.0", "all"]
    torch.testing.assert_close(found.agreement["input"], torch.ones(6))
    torch.testing.assert_close(found.agreement["bottom"][:4], torch.ones(4))
    assert (
        float(found.agreement["bottom"][4:].abs().max()) < 0.5 and float(found.agreement["top"][2:].abs().max()) < 0.5
    )
    assert found.passed("top") and found.passed("bottom") and not found.passed("input")
    words = found.table()
    assert all(word in words for word in ("input", "depends on weights", "yes", "no", "to layers.1"))


def test_few_stages_the_same_seed_and_values_that_stay() -> None:
    network = model()
    value = network.layers[1].weight.detach().clone()
    seen: list[Tensor] = []

    def maps() -> dict[str, Tensor]:
        seen.append(network.layers[1].weight.detach().clone())
        return {"a": seen[-1].flatten()}

    first, second = (sanity(network, maps, stages=2, seed=3) for _ in range(2))
    assert first.stages == ["to layers.2", "all"] and torch.equal(first.agreement["a"], second.agreement["a"])
    assert torch.equal(seen[1], value) and not torch.equal(seen[2], value)
    torch.testing.assert_close(seen[2].flatten().sort().values, value.flatten().sort().values)  # shuffled
    assert torch.equal(network.layers[1].weight, value)
    assert len(sanity(network, maps, stages=99).stages) == 6


def test_it_is_drawn() -> None:
    pytest.importorskip("matplotlib")
    network = model()
    assert len(sanity(network, lambda: {"a": network.norm.weight.detach()}).plot().axes) == 1


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        sanity(model(), dict, stages=0)
    with pytest.raises(ValueError, match="no weights"):
        sanity(nn.Identity(), dict)
