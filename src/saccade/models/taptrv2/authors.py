"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names, split
from saccade.catalogue.ports import Arguments
from saccade.layers.resnet import TORCHVISION
from saccade.models.taptrv2.attention import KeyAwareDeformableAttention
from saccade.models.taptrv2.decoder import DecoderLayer
from saccade.models.taptrv2.network import TAPTRv2

_KEY_AWARE = Names({"{part}.{leaf}": "{part}.{leaf}"})
_FEEDFORWARD = {"linear1.{leaf}": "feedforward.0.{leaf}", "linear2.{leaf}": "feedforward.3.{leaf}"}


def _attention(theirs: str, ours: str) -> dict[str, Any]:
    return {
        f"{theirs}.in_proj_weight": split(f"{ours}.{{part}}_proj.weight", "q", "k", "v"),
        f"{theirs}.in_proj_bias": split(f"{ours}.{{part}}_proj.bias", "q", "k", "v"),
        f"{theirs}.out_proj.{{leaf}}": f"{ours}.out_proj.{{leaf}}",
    }


def _layers(theirs: str, ours: str, count: int) -> dict[str, str]:
    """Linears of an MLP, that stand without their ReLUs in the authors' names."""
    return {f"{theirs}.layers.{i}.{{leaf}}": f"{ours}.{2 * i}.{{leaf}}" for i in range(count)}


_LAYER = Names({
    **_KEY_AWARE.within("cross_attn.", "cross_attention."),
    **_attention("temp_self_attn", "time_attention"),
    **_attention("self_attn", "point_attention"),
    "norm_temp.{leaf}": "norm_time.{leaf}",
    **{f"norm{i}.{{leaf}}": f"norm{i}.{{leaf}}" for i in (1, 2, 3)},
    **_FEEDFORWARD,
    **_layers("update_pos_embed_head", "place", 2),
    "caupdate_weight_normalizer.{k}.{leaf}": "update.disentangle.{k}.{leaf}",
    "caupdate_weight_regressor.0.{leaf}": "update.disentangle.4.{leaf}",
})  # fmt: skip
_NETWORK = Names({
    **TORCHVISION.within("backbone.0.body.", "backbone."),
    "input_proj.{l}.{i}.{leaf}": "projections.{l}.{i}.{leaf}",
    "transformer.level_embed": "level",
    **{
        f"transformer.encoder.layers.{{i}}.{theirs}": f"encoder.{{i}}.{ours}"
        for theirs, ours in (
            ("self_attn.{part}.{leaf}", "attention.{part}.{leaf}"),
            ("norm1.{leaf}", "norm1.{leaf}"),
            ("norm2.{leaf}", "norm2.{leaf}"),
            *_FEEDFORWARD.items(),
        )
    },
    "transformer.query_feature_initializer.{leaf}": "first.{leaf}",
    **_LAYER.within("transformer.decoder.layers.{i}.", "decoder.layers.{i}."),
    **_layers("transformer.decoder.ref_point_head", "decoder.place", 2),
    "transformer.decoder.query_updater.{i}.{leaf}": "decoder.renew.{i}.{leaf}",
    "transformer.decoder.ca_update_fuser.{i}.{leaf}": "decoder.fuse.{i}.{leaf}",
    **_layers("bbox_embed.{n}", "decoder.box_heads.{n}", 3),
    "class_embed.{n}.{leaf}": "decoder.class_heads.{n}.{leaf}",
    # the same again
    "transformer.decoder.bbox_embed.{rest*}": None,
    "transformer.decoder.class_embed.{rest*}": None,
    "query_between_window_updater.{i}.{leaf}": "hand_on.{i}.{leaf}",
})  # fmt: skip

_ATTENTION_ARGUMENTS: dict[str, Any] = {
    "d_model": "dim",
    "n_heads": "num_heads",
    "n_levels": "num_levels",
    "n_points": "num_points",
    "ignore_wh_inca": ("by_box", lambda ignored: not ignored),
}


def _shapes(args: dict[str, Any]) -> list[tuple[int, int]]:
    return [(height, width) for height, width in args["spatial_shapes"]]


def _run_attention(
    module: KeyAwareDeformableAttention, inputs: dict[str, Tensor], args: dict[str, Any]
) -> dict[str, Tensor]:
    padding = inputs.get("padding_mask")
    looked = module(
        inputs["query"], inputs["reference_points"], inputs["input_flatten"], _shapes(args),
        None if padding is None else ~padding,
    )  # fmt: skip
    return {
        "output": looked.out,
        "logits": looked.logits.flatten(2).transpose(0, 1),
        "sampling_offsets": looked.offsets.unflatten(3, (module.num_levels, module.num_points)),
    }


def _run_layer(module: DecoderLayer, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    """Theirs are (points, frames, ...); positions are given for each level, all the same."""
    levels = inputs["reference_points"].shape[2]
    said = module(
        *(inputs[name].transpose(0, 1)[None] for name in ("tgt", "query_pos")),
        inputs["reference_points"][:, :, 0].transpose(0, 1)[None],
        inputs["memory"].transpose(0, 1)[None],
        _shapes(args),
        *(inputs[name].transpose(1, 2) for name in ("update_mask", "track_mask")),
    )
    box, delta = (x[0].transpose(0, 1)[:, :, None].expand(-1, -1, levels, -1) for x in (said.box, said.delta))
    return {"tgt": said.x[0].transpose(0, 1), "reference_points": box, "position_delta": delta}


def _network(args: dict[str, Any]) -> nn.Module:
    """Where channels are given, the maps are given too, and there is no backbone."""
    fixed: dict[str, Any] = {"backbone": nn.Identity()} if "channels" in args else {}
    build = Arguments(
        TAPTRv2,
        {
            "hidden_dim": "dim",
            "nheads": "num_heads",
            "dim_feedforward": "feedforward",
            "enc_layers": "encoder_layers",
            "dec_layers": "decoder_layers",
            "enc_n_points": "encoder_points",
            "dec_n_points": "num_points",
            "sliding_window_size": "window",
            "sliding_window_stride": "stride",
            "groups": "groups",
            "channels": "channels",
        },
        transposed=True,
        **fixed,
    )
    return build(args)


def _run_network(module: TAPTRv2, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    memory, shapes = module.encode([inputs[f"feat{level}"] for level in range(len(module.channels))])
    points = torch.cat([inputs["starts"][:, None].to(inputs["points"].dtype), inputs["points"]], 1)
    state = module.track(memory[None], shapes, points[None])
    return {"pred_boxes": state.boxes[-1], "pred_logits": state.logits[-1]}


PORTS = (
    AuthorsPort(
        "key_aware_deformable_attention",
        build=Arguments(KeyAwareDeformableAttention, _ATTENTION_ARGUMENTS),
        convert=_KEY_AWARE,
        run=_run_attention,
    ),
    AuthorsPort(
        "apu_decoder_layer",
        build=Arguments(
            DecoderLayer,
            {**_ATTENTION_ARGUMENTS, "d_ffn": "feedforward", "dropout": "dropout", "pe_temperature": "temperature"},
            transposed=True,
        ),
        convert=_LAYER,
        run=_run_layer,
    ),
    AuthorsPort("network", build=_network, convert=_NETWORK, run=_run_network),
)
