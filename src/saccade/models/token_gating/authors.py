"""How the authors' models and losses map to ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names, split
from saccade.catalogue.ports import Arguments, Late
from saccade.models.token_gating.losses import LexiconContrast, contrast
from saccade.models.token_gating.network import DualStream


def _attention(theirs: str, ours: str) -> dict[str, Any]:
    return {
        f"{theirs}.in_proj_{{leaf}}": split(f"{ours}.{{part}}_proj.{{leaf}}", "q", "k", "v"),
        f"{theirs}.out_proj.{{leaf}}": f"{ours}.out_proj.{{leaf}}",
    }


_LAYER, _ENCODER = "decoder.layers.{i}", "image_encoder.encoder.layers.{i}"
_NAMES = Names(
    {
        "text_embedding.token_embedding.weight": "words.weight",
        "text_embedding.position_embedding.weight": "positions.weight",
        "text_embedding.layer_norm.{leaf}": "text_norm.{leaf}",
        "image_embedding.projection_layer.{leaf}": "project.{leaf}",
        **_attention(f"{_ENCODER}.self_attn", "image_encoder.{i}.attention"),
        f"{_ENCODER}.linear1.{{leaf}}": "image_encoder.{i}.mlp.fc1.{leaf}",
        f"{_ENCODER}.linear2.{{leaf}}": "image_encoder.{i}.mlp.fc2.{leaf}",
        f"{_ENCODER}.norm1.{{leaf}}": "image_encoder.{i}.attention_norm.{leaf}",
        f"{_ENCODER}.norm2.{{leaf}}": "image_encoder.{i}.mlp_norm.{leaf}",
        **_attention(f"{_LAYER}.self_attn", "layers.{i}.attention"),
        **_attention(f"{_LAYER}.cross_attn_txt_image", "layers.{i}.cross"),
        **{f"{_LAYER}.norm{k}.{{leaf}}": f"layers.{{i}}.norm{k}.{{leaf}}" for k in (1, 2, 3)},
        f"{_LAYER}.gate.gate_fc.{{leaf}}": "layers.{i}.gate.weigh.{leaf}",
        f"{_LAYER}.gate.gate.{{leaf}}": "layers.{i}.gate.weigh.{leaf}",
        f"{_LAYER}.gate.layer_norm.{{leaf}}": "layers.{i}.gate.norm.{leaf}",
        f"{_LAYER}.ff.0.{{leaf}}": "layers.{i}.mlp.fc1.{leaf}",
        f"{_LAYER}.ff.3.{{leaf}}": "layers.{i}.mlp.fc2.{leaf}",
        f"{_LAYER}.film.gamma_fc.{{leaf}}": "layers.{i}.enhance.gamma.{leaf}",
        f"{_LAYER}.film.beta_fc.{{leaf}}": "layers.{i}.enhance.beta.{leaf}",
        "output_layer.{leaf}": "logits.{leaf}",
    }
)


def _build(**fixed: Any) -> Any:
    """The rows of the table of positions are told by the weights, as recordings have fewer than the model."""
    build = Arguments(
        DualStream,
        {
            "vocab_size": "vocab_size",
            "d_model": "dim",
            "n_head": "num_heads",
            "d_hid": "hidden",
            "num_encoder_layers": "image_depth",
            "num_decoder_layers": "depth",
            "dino_dim": "image_dim",
            "dropout": "dropout",
            "max_len": "max_len",
        },
        per_sample=False,
        **fixed,
    )

    def made(args: dict[str, Any], state: Any) -> nn.Module:
        return build({**args, "max_len": len(state["positions.weight"])})

    return lambda args: Late(made, args)


def _run(module: Late, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    network = module.made
    assert isinstance(network, DualStream)
    words_BL, there_BL = inputs["input_ids"], inputs["padding_mask"] == 0
    both = network.streams(words_BL, inputs["dino_embedding"], there_BL)
    return {
        "logits": both.logits,
        "logits_text_only": network.streams(words_BL, None, there_BL).logits,
        "gate_output": torch.stack(both.mixed),
    }


def _losses(module: LexiconContrast, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    there_BL = inputs["padding_mask"] == 0
    lexicon = module.of_features(inputs["text_features"], inputs["image_features"], there_BL)
    pairs = contrast(inputs["text_pooled"], inputs["image_pooled"], args["clip_tau"])
    return {"lcg": lexicon.reshape(1), "clip": pairs.reshape(1)}


PORTS = (
    AuthorsPort("dual_stream", build=_build(), convert=_NAMES, run=_run),
    AuthorsPort("dual_stream_token_gate", build=_build(per="token"), convert=_NAMES, run=_run),
    AuthorsPort("dual_stream_film", build=_build(enhance="film", place="cross"), convert=_NAMES, run=_run),
    AuthorsPort(
        "contrastive_losses",
        build=Arguments(LexiconContrast, {"d_model": "dim"}, form="fraction"),
        convert=Names({"tau": "temperature", "MV.weight": "of_image.weight", "ML.weight": "of_words.weight"}),
        run=_losses,
    ),
)
