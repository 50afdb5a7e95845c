"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments, Late
from saccade.layers.bert import BERT
from saccade.models.covr.losses import hard_negative_nce
from saccade.models.covr.network import ComposedQuery

_ARGUMENTS = Arguments(
    ComposedQuery,
    {
        "vocab_size": "vocabulary",
        "hidden_size": "dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "num_heads",
        "intermediate_size": "hidden",
        "encoder_width": "vision_dim",
        "embed_dim": "embed_dim",
    },
    defaults={"vocab_size": 30524, "intermediate_size": 3072},
    encode_token=None,  # it stands in the words that are handed over
)


def _made(args: dict[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """How many positions there are, the authors' arguments do not say."""
    positions = len(state["text.embeddings.positions.weight"])
    return ComposedQuery(**_ARGUMENTS.ours(args), positions=positions)


def _run(late: Late, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    module = late.made
    assert isinstance(module, ComposedQuery)
    words, description = inputs["text_mask"] != 0, inputs["prompt_mask"] != 0
    query = F.normalize(module(inputs["image_embeds"], inputs["text_ids"], words, inputs["prompt_ids"], description))
    target = F.normalize(inputs["target"], dim=-1)
    options = {ours: args[theirs] for theirs, ours in _LOSS.items() if theirs in args}
    return {
        "prompt_embed": module.describe(inputs["prompt_ids"], description),
        "query_feat": query,
        "hn_nce": hard_negative_nce(query, target, **options)[None],
    }


_LOSS = {"temp": "temperature", "alpha": "alpha", "beta": "beta"}

PORTS = (
    AuthorsPort(
        "composed_query",
        build=lambda args: Late(_made, args),
        convert=Names(
            {
                **BERT.within("text_encoder.", "text."),
                "prompt_proj.{leaf}": "prompt_proj.{leaf}",
                "text_proj.{leaf}": "text_proj.{leaf}",
                # of a released file: what embeds targets, and what no query is made with
                "visual_encoder.{rest*}": None,
                "vision_proj.{leaf}": None,
                "itm_head.{leaf}": None,
                "temp": None,
            }
        ),
        run=_run,
    ),
)
