"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from saccade.attention.efficient_attention.layer import EfficientAttention2d
from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments, calls

PORTS = (
    AuthorsPort(
        "efficient_attention",
        build=Arguments(
            EfficientAttention2d,
            {
                "in_channels": "channels",
                "head_count": "num_heads",
                "key_channels": "key_channels",
                "value_channels": "value_channels",
            },
            needed=("head_count", "key_channels", "value_channels"),
        ),
        convert=Names(
            {
                "keys.{leaf}": "k_proj.{leaf}",
                "queries.{leaf}": "q_proj.{leaf}",
                "values.{leaf}": "v_proj.{leaf}",
                "reprojection.{leaf}": "out_proj.{leaf}",
            }
        ),
        run=calls("x"),
    ),
)
