"""How the authors' module and parameters map to ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.names import joined
from saccade.catalogue.ports import Arguments
from saccade.explain.post_hoc_interpretability.classifier import AttentionClassifier


def _run(module: AttentionClassifier, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    ids_BT, unknown = inputs["tokens"], int(inputs["unk_id"])
    said = module(ids_BT)
    maps = {name: each[0] for name, each in said.maps().items()}
    value_T = module.lime_limit(ids_BT, unknown)[0]
    real_T = ids_BT[0, : int(inputs["n_tokens"])]
    words = torch.cat([real_T[: module.class_position], real_T[module.class_position + 1 :]]).unique()
    return {
        "logits": said.logits,
        "attention_heads": said.attention[0],
        "attention_mean": maps["attention mean"],
        "attention_max": maps["attention max"],
        "embedding_input": said.embedded,
        "gradient": said.gradient[0],
        "gradient_theory": module(ids_BT, query_term=False).gradient[0],
        "grad_mean": maps["gradient mean"],
        "grad_l1": maps["gradient l1"],
        "grad_l2": maps["gradient l2"],
        "grad_x_input": maps["gradient x input"],
        "lime_words": words,
        "lime_approx": torch.stack([value_T[ids_BT[0] == word].sum() for word in words]),
        "lime_per_position": value_T,
    }


def _stacked(theirs: str, ours: str, join: Any) -> dict[str, Any]:
    return {f"heads.{{i}}.{theirs}.weight": joined(ours, "i", join)}


PORTS = (
    AuthorsPort(
        "multi_head",
        build=Arguments(
            AttentionClassifier,
            {
                "vocab_size": "vocabulary",
                "d_in": "dim",
                "d_attn": "head_dim",
                "d_out": "value_dim",
                "num_heads": "num_heads",
                "num_classes": "num_classes",
                "max_len": "max_length",
                "cls_pos": "class_position",
                "scale": "scaled",
                "pos": "positional",
            },
        ),
        convert=Names(
            {
                "embedding.weight": "embed.weight",
                **_stacked("query", "q_proj.weight", torch.cat),
                **_stacked("key", "k_proj.weight", torch.cat),
                **_stacked("value", "v_proj.weight", torch.cat),
                **_stacked("classifier", "classifier", torch.stack),
            }
        ),
        run=_run,
    ),
)
