"""How the authors' model and parameters map to ours; a released file leaves the encoder out, or has it, unused here."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.catalogue import AuthorsPort, Names, split
from saccade.catalogue.ports import Arguments
from saccade.models.gaze_lle.network import GazeLLE, head_maps

_NAMES = Names(
    {
        "pos_embed": None,
        "backbone.{name*}": None,
        "head_token.weight": "head_token",
        "inout_token.weight": "inout_token",
        "linear.{leaf}": "linear.{leaf}",
        "transformer.{i}.attn.qkv.weight": split("blocks.{i}.attention.{part}_proj.weight", "q", "k", "v"),
        "transformer.{i}.attn.proj.{leaf}": "blocks.{i}.attention.out_proj.{leaf}",
        "transformer.{i}.{name*}": "blocks.{i}.{name}",
        "heatmap_head.0.{leaf}": "up.{leaf}",
        "heatmap_head.1.{leaf}": "to_map.{leaf}",
        "inout_head.{i}.{leaf}": "inout_head.{i}.{leaf}",
    }
)


def _run(module: GazeLLE, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    """Boxes are listed image by image; -1 stands for none."""
    counts = args.get("people_per_image", [1] * len(inputs["features"]))
    rows = [None if box[0] < 0 else box for box in inputs["bboxes"].tolist()]
    bboxes = [[rows.pop(0) for _ in range(count)] for count in counts]
    out = module(features=inputs["features"], bboxes=bboxes)
    assert out.boxes is not None
    height, width = inputs["features"].shape[2:]
    found = {"heatmap": out.heatmap, "head_maps": head_maps(out.boxes, height, width).float()}
    return found if out.inside is None else {**found, "inout": out.inside}


PORTS = (
    AuthorsPort(
        "gazelle",
        build=Arguments(
            GazeLLE,
            {
                "backbone_dim": "channels",
                "dim": "dim",
                "num_layers": "num_layers",
                "num_heads": "num_heads",
                "inout": "inout",
                "out_size": ("out_size", tuple),
            },
        ),
        convert=_NAMES,
        run=_run,
    ),
)
