"""The trunk of ResNet beside transformers', by torchvision's names; its maps, bad arguments."""

from __future__ import annotations

import pytest
import torch

from saccade.catalogue import Names
from saccade.layers.resnet import DEPTHS, TORCHVISION, ResNetTrunk

#: transformers' names -> torchvision's
_OTHERS = Names(
    {
        "embedder.embedder.convolution.{leaf}": "conv1.{leaf}",
        "embedder.embedder.normalization.{leaf}": "bn1.{leaf}",
        **{
            f"encoder.stages.{i}.layers.{{j}}.{theirs}.{{leaf}}": f"layer{i + 1}.{{j}}.{named}.{{leaf}}"
            for i in range(4)
            for theirs, named in (
                *((f"layer.{k}.convolution", f"conv{k + 1}") for k in range(3)),
                *((f"layer.{k}.normalization", f"bn{k + 1}") for k in range(3)),
                ("shortcut.convolution", "downsample.0"),
                ("shortcut.normalization", "downsample.1"),
            )
        },
    }
)


@pytest.mark.parametrize("depth", [18, 50])
def test_equals_transformers(depth: int) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    blocks, bottleneck = DEPTHS[depth]
    ours = ResNetTrunk(depth, width=8)
    theirs = transformers.ResNetModel(
        transformers.ResNetConfig(
            embedding_size=8,
            hidden_sizes=list(ours.channels),
            depths=list(blocks),
            layer_type="bottleneck" if bottleneck else "basic",
        )
    ).eval()
    state = _OTHERS(theirs.state_dict())
    ours.load_state_dict(TORCHVISION({**state, "fc.weight": torch.zeros(2, 2), "fc.bias": torch.zeros(2)}))
    image = torch.randn(1, 3, 70, 45)
    expected = theirs(image, output_hidden_states=True).hidden_states[1:]
    for got, want in zip(ours.eval()(image), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_maps_of_the_stages() -> None:
    trunk = ResNetTrunk(34, width=4, in_channels=1, stages=3)
    maps = trunk(torch.randn(2, 1, 64, 33))
    assert [x.shape[1] for x in maps] == [4, 8, 16] == list(trunk.channels) and trunk.strides == (4, 8, 16)
    assert [tuple(x.shape[2:]) for x in maps] == [(16, 9), (8, 5), (4, 3)]
    assert ResNetTrunk(50, width=4).channels == (16, 32, 64, 128)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 20}, "depth must be one of 18, 34, 50, 101, 152, got 20"),
        ({"depth": 18, "stages": 5}, "stages from 1 to 4, got 64, 3 and 5"),
        ({"depth": 18, "width": 0}, "width and in_channels must be positive"),
    ],
)
def test_refusals(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNetTrunk(**arguments)
