"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments, calls, of_function
from saccade.models.amfusionnet.network import Decoder, Encoder
from saccade.models.amfusionnet.rules import l1_rule


def _numbered(text: str) -> int:
    """The authors count from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r} must be a number from 1")
    return int(text) - 1


_ENCODER = Names(
    {
        "conv3.conv3.0.{leaf}": "stem.{leaf}",
        "conv{k}_{l}.0.{leaf}": lambda texts: f"levels.{_numbered(texts['l'])}.{texts['k']}.{texts['leaf']}",
        "shortcut.0.{leaf}": "shortcut.{leaf}",
        "cancha.1.{leaf}": "norm.{leaf}",
        "shard_mlp.0.{leaf}": "attention.mlp.fc1.{leaf}",
        "shard_mlp.2.{leaf}": "attention.mlp.fc2.{leaf}",
        "spatial.0.{leaf}": "attention.conv.{leaf}",
        "spatial.1.{leaf}": "attention.norm.{leaf}",
        "conv8.{i}.{leaf}": "attention.shortcut.{i}.{leaf}",
    }
)


def _decoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The last convolution is that of the highest number."""
    last = max((int(number) for name in state for number in re.findall(r"^conv(\d+)\.", name)), default=0)
    names = Names(
        {
            f"conv{last}.0.{{leaf}}": "last.{leaf}",
            "conv{n}.{i}.{leaf}": lambda texts: f"blocks.{_numbered(texts['n'])}.{texts['i']}.{texts['leaf']}",
        }
    )
    return names(state)


def _fuse(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    return {"fused": l1_rule(inputs["f1"], inputs["f2"], window=2 * args.get("window_width", 1) + 1)}


PORTS = (
    AuthorsPort(
        "encoder",
        build=Arguments(Encoder, {"inplanes": "stem", "out_channel": "widths"}),
        convert=_ENCODER,
        run=calls("x", gives="f"),
    ),
    AuthorsPort("decoder", build=Arguments(Decoder, {"widths": "widths"}), convert=_decoder, run=calls("f")),
    of_function("l1_rule", run=_fuse),
)
