"""Feed-forward layers equal their equations, and refuse what they do not know."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saccade.layers.mlp import ACTIVATIONS, MLP, GatedMLP

FUNCTIONS = {
    "gelu": nn.GELU(),
    "gelu-tanh": nn.GELU(approximate="tanh"),
    "quick-gelu": lambda x: x * (1.702 * x).sigmoid(),
    "relu": nn.ReLU(),
    "silu": nn.SiLU(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "identity": nn.Identity(),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_plain_and_gated_layers_equal_their_equations(name: str) -> None:
    torch.manual_seed(0)
    x, f = torch.randn(3, 5, 12), FUNCTIONS[name]
    plain, gated, biased = (
        MLP(12, 7, activation=name), GatedMLP(12, 7, activation=name), GatedMLP(12, 7, activation=name, bias=True)
    )  # fmt: skip
    torch.testing.assert_close(plain(x), plain.fc2(f(plain.fc1(x))))
    for layer in (gated, biased):
        torch.testing.assert_close(layer(x), layer.down_proj(f(layer.gate_proj(x)) * layer.up_proj(x)))
    assert sum(p.numel() for p in gated.parameters()) == 3 * 7 * 12
    assert sum(p.numel() for p in biased.parameters()) == 3 * 7 * 12 + 7 + 7 + 12


def test_a_gated_layer_has_as_many_weights_as_a_plain_one() -> None:
    plain, gated = MLP(12), GatedMLP(12)
    assert plain.fc1.weight.numel() + plain.fc2.weight.numel() == sum(p.numel() for p in gated.parameters())


@pytest.mark.parametrize("layer", [MLP, GatedMLP])
def test_unknown_activations_and_widths_are_refused(layer: type[MLP] | type[GatedMLP]) -> None:
    with pytest.raises(ValueError, match=r"activation must be one of gelu, gelu-tanh, .*, got 'swish'"):
        layer(4, activation="swish")
    with pytest.raises(ValueError, match="hidden must be positive, got 0"):
        layer(4, 0)
