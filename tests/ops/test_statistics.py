"""Statistics of maps and volumes, and the gates made of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saccade.layers.gates import ChannelGate, SpatialGate
from saccade.ops.statistics import STATISTICS, channel_statistics, check_statistics, spatial_gate, spatial_statistics

BY_HAND = {
    "avg": lambda values: sum(values) / len(values),
    "max": max,
    "std": lambda values: (sum((x - sum(values) / len(values)) ** 2 for x in values) / len(values)) ** 0.5,
    "lp": lambda values: sum(x * x for x in values) ** 0.5,
    "lse": lambda values: torch.tensor(values).exp().sum().log().item(),
}


@pytest.mark.parametrize("sizes", [(1, 1), (3, 5), (7,), (2, 3, 4)])
@pytest.mark.parametrize("name", sorted(STATISTICS))
def test_each_statistic_is_its_definition(name: str, sizes: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *sizes, dtype=torch.double)
    of_channels, of_places = channel_statistics(x, [name]), spatial_statistics(x, [name])
    assert of_channels.shape == (1, 2, 3) and of_places.shape == (2, 1, *sizes)
    assert float(of_channels[0, 1, 2]) == pytest.approx(BY_HAND[name](x[1, 2].flatten().tolist()))
    assert float(of_places[1, 0].flatten()[-1]) == pytest.approx(BY_HAND[name](x.flatten(2)[1, :, -1].tolist()))


@pytest.mark.parametrize("name", sorted(STATISTICS))
def test_gradients(name: str) -> None:
    x = torch.randn(2, 3, 2, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: (channel_statistics(x, [name]), spatial_statistics(x, [name])), x)


def test_gates_lie_between_zero_and_one_and_are_shared_by_what_they_gate() -> None:
    x = torch.randn(2, 4, 5, 3)
    channel, spatial = ChannelGate(4, 2, statistics=("avg", "max")), SpatialGate(3)
    assert channel.gate(x).shape == (2, 4, 1, 1) and spatial.gate(x).shape == (2, 1, 5, 3)
    for gate in (channel, spatial):
        torch.testing.assert_close(gate(x), x * gate.gate(x))
        factors = gate.gate(x).detach()
        assert float(factors.min()) > 0 and float(factors.max()) < 1
        for parameter in gate.parameters():
            nn.init.zeros_(parameter)
        torch.testing.assert_close(gate(x), x / 2)
    volume = torch.randn(2, 4, 3, 5, 2)
    assert channel(volume).shape == volume.shape
    assert spatial_gate(volume, nn.Conv3d(2, 1, 1)).shape == (2, 1, 3, 5, 2)


@pytest.mark.parametrize("names", [(), "avg", ("avg", "median")])
def test_unknown_statistics_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="pools must be some of avg"):
        check_statistics(names, "pools")
    with pytest.raises(ValueError, match="statistics must be some of"):
        ChannelGate(4, 2, statistics=names)
    with pytest.raises(ValueError, match="odd"):
        SpatialGate(2)
