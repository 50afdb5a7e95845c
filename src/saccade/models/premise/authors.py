"""How the modules of the first author's code for the same task map to ours; of the paper itself there is no code."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments, of_function
from saccade.models.premise.baseline import ConvKNRM
from saccade.models.ranking import rank_hinge


def _features(module: ConvKNRM, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    said = module(inputs["product_tokens"], inputs["review_tokens"])
    return {
        "features": said.features,
        "score": said.score[:, None],
        "kernel_mu": module.centre,
        "kernel_sigma": module.width,
    }


def _losses(module: nn.Module, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    score, label, negatives = inputs["y_pred"].flatten(), inputs["y_true"].flatten(), args["num_neg"]
    fixed = rank_hinge(score, label, negatives, margin=float(args.get("margin", 1.0)))
    return {"adaptive": rank_hinge(score, label, negatives)[None], "fixed": fixed[None]}


PORTS = (
    AuthorsPort(
        "conv_knrm_features",
        build=Arguments(
            ConvKNRM,
            {
                "vocab": "vocabulary",
                "embed_dim": "word_dim",
                "hidden": "dim",
                "kernel_size": ("windows", tuple),
                "kernel_num": "kernels",
                "use_crossmatch": "crossmatch",
                "sigma": "sigma",
                "exact_sigma": "exact_sigma",
            },
            needed=("vocab",),
        ),
        convert=Names(
            {
                "q_embedding.weight": "product_words.weight",
                "d_embedding.weight": "review_words.weight",
                "q_convs.{i}.1.{leaf}": "product.{i}.conv.{leaf}",
                "d_convs.{i}.1.{leaf}": "review.{i}.conv.{leaf}",
                "out.{leaf}": "out.{leaf}",
            }
        ),
        run=_features,
    ),
    of_function("rank_hinge", run=_losses),
)
