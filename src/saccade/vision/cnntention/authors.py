"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments, calls
from saccade.ops.maps import attention_map
from saccade.vision.cnntention.gate import Form, MultiHeadAttention2d, ResidualCBAM, ResNet20, SelfAttention2d

_GATE = Names(
    {
        "val.{leaf}": "value.{leaf}",
        "weights": "gamma",
        "channel_attention.mlp.0.{leaf}": "down.{leaf}",
        "channel_attention.mlp.2.{leaf}": "up.{leaf}",
        "spatial_attention.conv.{leaf}": "conv.{leaf}",
        "{name*}": "{name}",
    }
)
_NETWORK = Names(
    {
        "bn1.{leaf}": "norm1.{leaf}",
        **{
            f"layer{i + 1}.{{j}}.bn{k}.{{leaf}}": f"stages.{i}.{{j}}.norm{k}.{{leaf}}" for i in range(3) for k in (1, 2)
        },
        **{f"layer{i + 1}.{{name*}}": f"stages.{i}.{{name}}" for i in range(3)},
        **{name: place for i in range(3) for name, place in _GATE.within(f"att{i + 1}.", f"attentions.{i}.").items()},
        "{name*}": "{name}",
    }
)


def _run_attention(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    weights = attention_map(module, inputs["x"])
    # the authors' single head has no axis of heads
    return {"y": module(inputs["x"]), "attention": weights[:, 0] if isinstance(module, SelfAttention2d) else weights}


def _network(module: str, form: Form, **fixed: Any) -> AuthorsPort:
    build = Arguments(
        ResNet20,
        {"num_classes": "num_classes", "in_channels": "in_channels", "layers": ("blocks", tuple)},
        form=form,
        **fixed,
    )
    return AuthorsPort(module, build=build, convert=_NETWORK, run=calls("x", gives="logits"))


PORTS = (
    AuthorsPort("self_att", build=Arguments(SelfAttention2d, {"in_ch": "channels"}), convert=_GATE, run=_run_attention),
    AuthorsPort(
        "mha",
        build=Arguments(MultiHeadAttention2d, {"in_ch": "channels", "num_heads": "num_heads"}),
        convert=_GATE,
        run=_run_attention,
    ),
    AuthorsPort(
        "cbam",
        build=Arguments(ResidualCBAM, {"c_in": "channels", "kernel_size": "kernel_size", "reduction": "reduction"}),
        convert=_GATE,
        run=calls("x"),
    ),
    _network("resnet20_self_att", "self"),
    _network("resnet20_cbam", "cbam", reduction=8),
)
