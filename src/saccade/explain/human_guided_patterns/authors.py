"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names
from saccade.explain.human_guided_patterns.attention import PatternAttention, ProjectedAttention
from saccade.explain.human_guided_patterns.patterns import (
    POSITIONAL,
    assigned,
    by_head,
    matching,
    segmentation,
    summarization,
)

_ATTENTION = {"query.{leaf}": "q_proj.{leaf}", "key.{leaf}": "k_proj.{leaf}", "value.{leaf}": "v_proj.{leaf}"}


class _Modules(nn.Module):
    """The attention and the projected layer of the authors' file."""

    def __init__(self, args: dict[str, Any]) -> None:
        super().__init__()
        heads = args["num_heads"]
        self.attn = PatternAttention(args["hidden"], heads)
        self.pals = ProjectedAttention(args["hidden_pals_outer"], args["hidden"], heads)


def _run(module: _Modules, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    count, ids_BL = args["num_heads"], inputs["input_ids"]
    summary, segments = summarization(args["cls_id"], args["sep_id"]), segmentation(args["sep_id"])
    heads = assigned(summary, count, args.get("heads_per_pattern", 1))
    fixed = [h for h, name in heads.items() if name in POSITIONAL]
    mask = by_head(ids_BL, summary, heads, count)
    bias = inputs["attention_mask"]
    attended = module.attn(inputs["hidden"], mask, fixed=fixed, bias=bias)
    sides = assigned(segments, count, args.get("heads_per_pattern", 1))
    return {
        "mask_summarization": mask,
        "mask_match_synthesize": matching(ids_BL, ignored=args["ignore_ids"]),
        "mask_segmentation": by_head(inputs["input_ids_segmentation"], segments, sides, count),
        "context": attended.out,
        "probs": attended.weights,
        "context_no_patterns": module.attn(inputs["hidden"], bias=bias).out,
        "pals": module.pals(inputs["hidden_pals"], mask, fixed=fixed, bias=bias),
    }


PORTS = (
    AuthorsPort(
        "pattern_attention",
        build=_Modules,
        convert=Names(
            {
                **{f"attn.{theirs}": f"attn.{ours}" for theirs, ours in _ATTENTION.items()},
                **{f"pals.attn.{theirs}": f"pals.attention.{ours}" for theirs, ours in _ATTENTION.items()},
                "pals.aug_dense.{leaf}": "pals.down.{leaf}",
                "pals.aug_dense2.{leaf}": "pals.up.{leaf}",
            }
        ),
        run=_run,
    ),
)
