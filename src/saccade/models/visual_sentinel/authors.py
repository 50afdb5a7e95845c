"""How the third-party port's decoder, and its whole released model, map to ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments
from saccade.layers.resnet import TORCHVISION
from saccade.models.visual_sentinel.network import VisualSentinel

_DECODER = {
    "embed.weight": "words.weight",
    "LSTM.weight_ih_l0": "of_input.weight",
    "LSTM.bias_ih_l0": "of_input.bias",
    "LSTM.weight_hh_l0": "of_hidden.weight",
    "LSTM.bias_hh_l0": "of_hidden.bias",
    "adaptive.sentinel.affine_x.weight": "sentinel.of_input.weight",
    "adaptive.sentinel.affine_h.weight": "sentinel.of_state.weight",
    "adaptive.atten.affine_v.weight": "attention.of_region.weight",
    "adaptive.atten.affine_g.weight": "attention.of_state.weight",
    "adaptive.atten.affine_s.weight": "attention.of_sentinel.weight",
    "adaptive.atten.affine_h.weight": "attention.score.weight",
    "adaptive.mlp.{leaf}": "logits.{leaf}",
}
#: torchvision's children of a ResNet by their numbers, without the last two
_NUMBERED = {"conv1": "0", "bn1": "1", **{f"layer{i}": str(i + 3) for i in range(1, 5)}}


def _trunk() -> dict[str, Any]:
    found = {}
    for theirs, ours in TORCHVISION.table.items():
        first, _, rest = theirs.partition(".")
        if first in _NUMBERED:
            found[f"encoder.resnet_conv.{_NUMBERED[first]}.{rest}"] = f"trunk.{ours}"
    return found


_NAMES = Names(
    {
        **_DECODER,
        **{f"decoder.{theirs}": ours for theirs, ours in _DECODER.items()},
        "encoder.affine_a.{leaf}": "region_map.{leaf}",
        "encoder.affine_b.{leaf}": "whole_map.{leaf}",
        **_trunk(),
    }
)


def _run(module: VisualSentinel, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    state = module.seen(inputs["V"], inputs["v_g"])
    said = module.told(inputs["captions"], state)
    for word_B in inputs["captions"].unbind(1):
        _, state = module.advance(word_B, state)
    assert said.logits is not None and said.attention is not None and said.looks is not None
    return {
        "scores": said.logits,
        "attention": said.attention,
        "beta": 1 - said.looks[..., None],
        "h_last": state.hidden[None],
        "c_last": state.memory[None],
    }


PORTS = (
    AuthorsPort(
        "decoder",
        build=Arguments(
            VisualSentinel,
            {
                "embed_size": "word_dim",
                "hidden_size": "dim",
                "vocab_size": "vocab_size",
                "regions": "attention_dim",
            },
            defaults={"regions": 49},
            channels=0,
        ),
        convert=_NAMES,
        run=_run,
    ),
)
