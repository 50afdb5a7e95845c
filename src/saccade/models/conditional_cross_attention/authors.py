"""How the modules and parameters of the one runnable implementation (not the authors') map to ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.catalogue import AuthorsPort, Names, split
from saccade.catalogue.ports import Arguments
from saccade.models.conditional_cross_attention.head import PROJECTIONS, ConditionalHead

_NAMES = Names(
    {
        "con_q.embedding.weight": "conditions.table",
        "con_encoder.ln_1.{leaf}": "block.norm1.{leaf}",
        "con_encoder.ln_2.{leaf}": "block.norm2.{leaf}",
        "con_encoder.cross_attention.in_proj_weight": split("block.attention.{part}_proj.weight", "q", "k", "v"),
        "con_encoder.cross_attention.in_proj_bias": split("block.attention.{part}_proj.bias", "q", "k", "v"),
        "con_encoder.cross_attention.out_proj.{leaf}": "block.attention.out_proj.{leaf}",
        "con_encoder.mlp.0.{leaf}": "block.mlp.fc1.{leaf}",
        "con_encoder.mlp.3.{leaf}": "block.mlp.fc2.{leaf}",
        "ln.{leaf}": "norm.{leaf}",
        "dis_proj.{leaf}": "projections.0.{leaf}",
        "dis_proj.{k}.{leaf}": "projections.{k}.{leaf}",
    }
)


def _run(module: ConditionalHead, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    tokens = inputs["tokens"]
    queries = module.conditions().unbind(0)
    return {
        "sequence": torch.stack([module.block.sequence(each.expand(len(tokens), -1), tokens) for each in queries]),
        "embedding": module(tokens).transpose(0, 1),
    }


PORTS = (
    AuthorsPort(
        "conditional_head",
        build=Arguments(
            ConditionalHead,
            {
                "num_attr": "num_attributes",
                "hidden_dim": "dim",
                "num_heads": "num_heads",
                "mlp_dim": "hidden",
                "dim_chunk": "embedding_dim",
                "mode": ("projection", {name: name for name in PROJECTIONS}),
                "dropout": "dropout",
            },
            needed=("hidden_dim", "num_heads", "mlp_dim", "dim_chunk"),
        ),
        convert=_NAMES,
        run=_run,
    ),
)
