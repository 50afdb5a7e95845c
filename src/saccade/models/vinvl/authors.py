"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments, of_function
from saccade.layers.bert import BERT
from saccade.models.vinvl.oscar import OscarPlus
from saccade.models.vinvl.regions import AttributeHead, attribute_loss, select_boxes
from saccade.models.vinvl.training import pretraining_loss


def _run_attributes(module: AttributeHead, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    regions = inputs["roi_features"], inputs["labels"]
    logits = module(*regions)
    found = {"logits": logits, "hidden": module.hidden(*regions)}
    return found | {"loss": attribute_loss(logits, inputs["soft_targets"])[None]}


def _run_selection(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    kept = select_boxes(
        inputs["boxes"],
        inputs["class_probs"],
        threshold=args["score_thresh"],
        least=args["min_detections"],
        most=args["max_detections"],
        overlap=args["nms_per_class"],
    )
    given = {name: inputs[name][kept.numbers] for name in ("boxes", "features")}
    return {**given, "labels": kept.labels, "scores": kept.scores}


def _run_oscar(module: OscarPlus, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    said = module(inputs["input_ids"], inputs["img_feats"], inputs["attention_mask"], inputs["token_type_ids"])
    return {
        "loss": pretraining_loss(said, inputs["masked_lm_labels"], inputs["contrast_label"]).loss[None],
        "lm_scores": said.logits,
        "contrast_logits": said.matched,
        "sequence": said.states,
        "pooled": said.pooled,
    }


PORTS = (
    AuthorsPort(
        "attribute_head",
        build=Arguments(
            AttributeHead,
            {
                "in_channels": "in_channels",
                "num_classes": "num_classes",
                "num_attributes": "num_attributes",
                "cls_emd_dim": "class_dim",
                "attr_emd_dim": "hidden",
            },
        ),
        convert=Names(
            {
                "cls_embedding.weight": "classes.weight",
                "fc_attr.{leaf}": "inner.{leaf}",
                "attr_score.{leaf}": "score.{leaf}",
            }
        ),
        run=_run_attributes,
    ),
    of_function("box_selection", run=_run_selection),
    AuthorsPort(
        "oscar_plus",
        build=Arguments(
            OscarPlus,
            {
                "vocab_size": "vocabulary",
                "hidden_size": "dim",
                "num_attention_heads": "num_heads",
                "intermediate_size": "hidden",
                "num_hidden_layers": "depth",
                "max_position_embeddings": "positions",
                "layer_norm_eps": "norm_eps",
                "img_feature_dim": "region_dim",
                "use_img_layernorm": ("region_norm", bool),
                "img_layer_norm_eps": "region_eps",
                "num_contrast_classes": "kinds",
            },
        ),
        convert=Names(
            {
                **BERT.within("bert.", "bert."),
                "bert.img_embedding.{leaf}": "regions.{leaf}",
                "bert.LayerNorm.{leaf}": "region_norm.{leaf}",
                "bert.pooler.dense.{leaf}": "pooler.{leaf}",
                "cls.predictions.bias": "bias",
                "cls.predictions.transform.dense.{leaf}": "transform.0.{leaf}",
                "cls.predictions.transform.LayerNorm.{leaf}": "transform.2.{leaf}",
                "cls.predictions.decoder.weight": None,
                "cls.seq_relationship.{leaf}": "kind.{leaf}",
            }
        ),
        run=_run_oscar,
    ),
)
