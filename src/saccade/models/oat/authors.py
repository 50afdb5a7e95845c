"""How the authors' model maps to ours; the table of places is a file of theirs, and is handed on by `run`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.catalogue import AuthorsPort, Names, split
from saccade.catalogue.ports import Arguments
from saccade.models.oat.network import OAT


def _attention(theirs: str, ours: str) -> dict[str, Any]:
    return {
        f"{theirs}.in_proj_{{leaf}}": split(f"{ours}.{{part}}_proj.{{leaf}}", "q", "k", "v"),
        f"{theirs}.out_proj.{{leaf}}": f"{ours}.out_proj.{{leaf}}",
    }


_ENCODER, _DECODER = "transformer_encoder.layers.{i}", "transformer_decoder.layers.{i}"
_NAMES = Names(
    {
        **_attention(f"{_ENCODER}.self_attn", "encoder.{i}.attention"),
        **_attention(f"{_DECODER}.self_attn", "decoder.{i}.attention"),
        **_attention(f"{_DECODER}.multihead_attn", "decoder.{i}.cross"),
        f"{_ENCODER}.linear1.{{leaf}}": "encoder.{i}.mlp.fc1.{leaf}",
        f"{_ENCODER}.linear2.{{leaf}}": "encoder.{i}.mlp.fc2.{leaf}",
        f"{_DECODER}.linear1.{{leaf}}": "decoder.{i}.mlp.fc1.{leaf}",
        f"{_DECODER}.linear2.{{leaf}}": "decoder.{i}.mlp.fc2.{leaf}",
        f"{_ENCODER}.norm1.{{leaf}}": "encoder.{i}.norm1.{leaf}",
        f"{_ENCODER}.norm2.{{leaf}}": "encoder.{i}.norm3.{leaf}",
        f"{_DECODER}.norm1.{{leaf}}": "decoder.{i}.norm1.{leaf}",
        f"{_DECODER}.norm2.{{leaf}}": "decoder.{i}.norm2.{leaf}",
        f"{_DECODER}.norm3.{{leaf}}": "decoder.{i}.norm3.{leaf}",
        "cnn_embedding.cnn1.0.{leaf}": "appearance.conv1.{leaf}",
        "cnn_embedding.cnn2.0.{leaf}": "appearance.conv2.{leaf}",
        "cnn_embedding.fc.{leaf}": "appearance.fc.{leaf}",
        "cross_attentions.{h}.decode_fc.{leaf}": "point.of_step.{h}.{leaf}",
        "cross_attentions.{h}.encode_fc.{leaf}": "point.of_object.{h}.{leaf}",
        "readout.{leaf}": "point.readout.{leaf}",
        "generator.{leaf}": None,  # not used where objects are pointed at
        "LinearEmbedding.{leaf}": None,
        "{name*}.pos_table": None,
        "{name*}.pos_embedding": None,
    }
)


def _run(module: OAT, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    """Their tensors have the sequence first, and channels of pictures last."""
    if "pe" in inputs:
        module.places.take(inputs["pe"])
    source, given = (inputs[name].permute(0, 1, 4, 2, 3) for name in ("src_img", "tgt_img"))
    there_BS, there_BT = (args["PAD"] != inputs[name].T for name in ("src_index", "tgt_index"))
    memory = module.encode(module.tokens(source, inputs["src"].transpose(0, 1).long()), there_BS)
    tokens = module.tokens(given, inputs["tgt"].transpose(0, 1).long())
    return {"logits": module.decode(tokens, memory, there_BT, there_BS).transpose(0, 1)}


def _grid(args: dict[str, Any]) -> tuple[int, int]:
    """Their other versions answer by one linear layer of as many classes as there were objects."""
    if args.get("CAVersion", 3) != 3:
        raise ValueError(f"CAVersion must be 3, where objects are pointed at, got {args['CAVersion']}")
    return args["rows"], args["cols"]


PORTS = (
    AuthorsPort(
        "oat",
        build=Arguments(
            OAT,
            {
                "emb_size": "dim",
                "nhead": "num_heads",
                "dim_feedforward": "hidden",
                "num_encoder_layers": "depth",
                "num_decoder_layers": "decoder_depth",
                "dropout": "dropout",
                "CA_head": "pointers",
                "CA_d_k": "key_dim",
                "spp": "levels",
                "functionChoice": ("positions", {"learned": "distance", "original": "sinusoid"}),
            },
            defaults={"functionChoice": "learned"},
            derived={"grid": _grid},
        ),
        convert=_NAMES,
        run=_run,
    ),
)
