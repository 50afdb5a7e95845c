"""How the names of the baseline's fuser map to ours; of the paper's own modules no code is released."""

from __future__ import annotations

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments, calls
from saccade.models.ms_occ.fusion import AdaptiveFusion

_NAMES = Names(
    {
        "img_enc.{i}.{leaf}": "camera.{i}.{leaf}",
        "pts_enc.{i}.{leaf}": "scanner.{i}.{leaf}",
        "vis_enc.{i}.{leaf}": "weight.{i}.{leaf}",
    }
)

PORTS = (
    AuthorsPort(
        "adaptive_fusion_baseline",
        build=Arguments(AdaptiveFusion, {"in_channels": "in_channels", "out_channels": "channels"}),
        convert=_NAMES,
        run=calls("img", "pts", gives={"fused": "voxels", "weight": "weight"}),
    ),
)
