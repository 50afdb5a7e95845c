"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.catalogue import AuthorsPort
from saccade.ops.maps import attention_map
from saccade.vision.cnntention.gate import Form, MultiHeadAttention2d, ResidualCBAM, ResNet20, SelfAttention2d


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = (
        ("val.", "value."), ("weights", "gamma"), ("channel_attention.mlp.0.", "down."),
        ("channel_attention.mlp.2.", "up."), ("spatial_attention.conv.", "conv."),
    )  # fmt: skip
    converted = {}
    for key, tensor in state.items():
        head, _, rest = key.partition(".")
        if head[:-1] in ("layer", "att"):
            place = "stages" if head.startswith("layer") else "attentions"
            key, prefix = rest, f"{place}.{int(head[-1]) - 1}."
        else:
            prefix = ""
        for theirs, ours in names:
            if key.startswith(theirs) and not prefix.startswith("stages"):
                key = ours + key[len(theirs) :]
        converted[prefix + key] = tensor
    return converted


def _run_attention(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    weights = attention_map(module, inputs["x"])
    # the authors' single head has no axis of heads
    return {"y": module(inputs["x"]), "attention": weights[:, 0] if isinstance(module, SelfAttention2d) else weights}


def _network(form: Form, **fixed: Any) -> AuthorsPort:
    return AuthorsPort(
        f"resnet20_{'cbam' if form == 'cbam' else 'self_att'}",
        build=lambda a: ResNet20(
            a.get("num_classes", 10),
            form,
            in_channels=a.get("in_channels", 3),
            blocks=tuple(a.get("layers", (3, 3, 3))),
            **fixed,
        ),
        convert=_convert,
        run=lambda module, inputs, args: {"logits": module(inputs["x"])},
    )


PORTS = (
    AuthorsPort("self_att", build=lambda a: SelfAttention2d(a["in_ch"]), convert=_convert, run=_run_attention),
    AuthorsPort(
        "mha",
        build=lambda a: MultiHeadAttention2d(a["in_ch"], a.get("num_heads", 8)),
        convert=_convert,
        run=_run_attention,
    ),
    AuthorsPort(
        "cbam",
        build=lambda a: ResidualCBAM(a["c_in"], a.get("kernel_size", 7), a.get("reduction", 16)),
        convert=_convert,
        run=lambda module, inputs, args: {"y": module(inputs["x"])},
    ),
    _network("self"),
    _network("cbam", reduction=8),
)
