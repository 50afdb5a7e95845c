"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.names import Place, joined, split
from saccade.catalogue.ports import Arguments, calls
from saccade.explain.attention_rank.attention import RankAttention, farthest, full_rank, logits, nearest, rank_attend
from saccade.explain.attention_rank.encoder import RankEncoder
from saccade.explain.attention_rank.features import best_weights

_HEADS = Names({"Q": "query", "K": "key", "VO": "output"})


def _attention(module: RankAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    x, y = inputs["X"], inputs["Y"]
    q, k, vo = module.query, module.key, module.output
    return {
        "logits": logits(x, y, q, k),
        "soft": rank_attend(x, y, q, k, vo),
        "hard": rank_attend(x, y, q, k, vo, hard=True),
        "perfect_full_rank": full_rank(module.dim)(x, y),
        "label_nearest": nearest(x, y),
        "label_farthest_self": farthest(x),
    }


def _features(module: RankAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    found = best_weights(module.query[:, 0], module.key[:, 0], args["num_gegenbauer_terms"])
    return {
        "head_vs_head": found.products,
        "head_vs_target": found.targets,
        "expected_error": found.error,
        "out": module(inputs["X"], inputs["Y"]),
    }


def _positions(args: dict[str, Any]) -> str | None:
    if args["additive_positional"]:
        return "added"
    return "appended" if args["positional_dim"] else None


def _thirds(join: Callable[[list[Tensor]], Tensor]) -> Callable[[list[Tensor]], Tensor]:
    """Queries of all attentions, then keys, then values; each attention has its own three in one."""
    return lambda parts: torch.cat([join(list(each)) for each in zip(*(part.chunk(3) for part in parts), strict=True)])


def _mean_of_outputs(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, 1) / len(parts)


def _mean(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).mean(0)


def _layers(attention: dict[str, Place]) -> dict[str, Place]:
    within = Names(attention).within("encoder.layers.{i}.", "layers.{i}.")
    return {
        "positional_encodings": "positions",
        **within,
        "encoder.layers.{i}.linear1.{leaf}": "layers.{i}.mlp.fc1.{leaf}",
        "encoder.layers.{i}.linear2.{leaf}": "layers.{i}.mlp.fc2.{leaf}",
        "encoder.layers.{i}.norm1.scale": "layers.{i}.norm1.scale",
        "encoder.layers.{i}.norm2.scale": "layers.{i}.norm2.scale",
    }


_WIDENED = Names(
    _layers(
        {
            "self_attn.{rest*}": None,
            "widened_self_attn.{w}.in_proj_weight": joined("attention.qkv.weight", "w", _thirds(torch.cat)),
            "widened_self_attn.{w}.in_proj_bias": joined("attention.qkv.bias", "w", _thirds(torch.cat)),
            "widened_self_attn.{w}.out_proj.weight": joined("attention.out_proj.weight", "w", _mean_of_outputs),
            "widened_self_attn.{w}.out_proj.bias": joined("attention.out_proj.bias", "w", _mean),
        }
    )
)
_SEPARATE = Names(
    {
        "layers.{i}.attention.qkv.{leaf}": split("layers.{i}.attention.{part}_proj.{leaf}", "q", "k", "v"),
        "{name*}": "{name}",
    }
)

PORTS = (
    AuthorsPort(
        "rank_attention",
        build=Arguments(RankAttention, {"dim": "dim", "rank": "rank", "nheads": "num_heads"}),
        convert=_HEADS,
        run=_attention,
    ),
    AuthorsPort(
        "random_features",
        build=Arguments(RankAttention, {"dim": "dim", "nheads": "num_heads"}, rank=1, hard=True),
        convert=_HEADS,
        run=_features,
        tolerance=2e-4,
        reason="theirs is in float32, where asin near 1 has errors of the root of the precision; ours in float64",
    ),
    AuthorsPort(
        "encoder",
        build=Arguments(
            RankEncoder,
            {
                "dim": "dim",
                "nheads": "num_heads",
                "num_layers": "num_layers",
                "width_multiplier": "width",
                "dim_feedforward": "hidden",
                "bias": "bias",
                "maxN": "max_points",
            },
            defaults={"additive_positional": False, "positional_dim": 0},
            derived={
                "positions": _positions,
                "position_dim": lambda args: args["positional_dim"] if _positions(args) == "appended" else 0,
            },
        ),
        convert=lambda state: _SEPARATE(_WIDENED(state)),
        run=calls("X", gives="out"),
    ),
)
