"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments
from saccade.fusion.attention_conditioning.classifier import ConditionedClassifier

_KINDS = {
    "concat": "concat",
    "gate": "gate",
    "affine": "affine",
    "non_linear_affine": "non-linear-affine",
}

_BUILD = Arguments(
    ConditionedClassifier,
    {
        "ntokens": "vocabulary",
        "nclasses": "num_classes",
        "feature_size": "features",
        "attention_type": ("conditioning", _KINDS),
        "emb_size": "embedding_dim",
        "rnn_size": "hidden",
        "embed_noise": "noise",
        "embed_dropout": "embedding_dropout",
        "rnn_dropout": "dropout",
        "attention_layers": "attention_layers",
        "attention_dropout": "attention_dropout",
        "conc_emb": "concat_embeddings",
        "conc_rnn": "concat_hidden",
    },
    defaults={"rnn_layers": 1, "no_rnn": False},
    derived={"layers": lambda args: 0 if args["no_rnn"] else args["rnn_layers"]},
)


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The energy is the last linear layer of the attention's; a hidden one stands before it or not."""
    deep = "attention.attention.3.weight" in state
    return Names(
        {
            "word_embedding.embedding.{leaf}": "embed.{leaf}",
            "rnn.rnn.{leaf}": "lstm.{leaf}",
            "gate.{leaf}": "pooling.gate.{leaf}",
            "scale.{leaf}": "pooling.scale.{leaf}",
            "shift.{leaf}": "pooling.shift.{leaf}",
            "attention.attention.0.{leaf}": "pooling.hidden.0.{leaf}" if deep else "pooling.energy.{leaf}",
            **({"attention.attention.3.{leaf}": "pooling.energy.{leaf}"} if deep else {}),
            "classes.{leaf}": "head.{leaf}",
        }
    )(state)


def _run(module: ConditionedClassifier, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    said = module(inputs["src"], inputs["features"], inputs["lengths"])
    return {"logits": said.logits, "representations": said.features, "attentions": said.weights}


PORTS = tuple(AuthorsPort(name, build=_BUILD, convert=_convert, run=_run) for name in _KINDS)
