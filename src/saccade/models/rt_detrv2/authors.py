"""How the authors' modules and parameters map to ours; the names of transformers too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.names import Place, split
from saccade.catalogue.ports import Arguments, calls
from saccade.layers.deformable_attention import MSDeformableAttention
from saccade.layers.norms import freeze_norms
from saccade.models.detection import Detection, Target, surest
from saccade.models.rt_detrv2.backbones import DEPTHS, HGNetV2, HGStage, ResNetVD, Stage, vd_block
from saccade.models.rt_detrv2.decoder import Decoder
from saccade.models.rt_detrv2.encoder import HybridEncoder
from saccade.models.rt_detrv2.losses import Criterion, HungarianMatcher
from saccade.models.rt_detrv2.network import RTDETRv2, Trained


def _unit(theirs: str, ours: str, norm: str = "norm") -> dict[str, Place]:
    """Convolution and norm."""
    return {f"{theirs}.conv.{{leaf}}": f"{ours}.0.{{leaf}}", f"{theirs}.{norm}.{{leaf}}": f"{ours}.1.{{leaf}}"}


def _same(*names: str) -> dict[str, Place]:
    return {f"{name}.{{leaf}}": f"{name}.{{leaf}}" for name in names}


_LINEARS = _same("sampling_offsets", "attention_weights", "value_proj", "output_proj")


def _attention(ours: str) -> dict[str, Place]:
    return {
        "self_attn.in_proj_weight": split(f"{ours}.{{part}}_proj.weight", "q", "k", "v"),
        "self_attn.in_proj_bias": split(f"{ours}.{{part}}_proj.bias", "q", "k", "v"),
        "self_attn.out_proj.{leaf}": f"{ours}.out_proj.{{leaf}}",
    }


_MLP: dict[str, Place] = {"linear1.{leaf}": "mlp.fc1.{leaf}", "linear2.{leaf}": "mlp.fc2.{leaf}"}
_DEFORMABLE = Names({
    **_LINEARS,
    "num_points_scale": None,  # 1 / n for each point
})  # fmt: skip
_BLOCK = Names({
    "branch2a.conv.{leaf}": "conv1.{leaf}",
    "branch2a.norm.{leaf}": "norm1.{leaf}",
    "branch2b.conv.{leaf}": "conv2.{leaf}",
    "branch2b.norm.{leaf}": "norm2.{leaf}",
    "branch2c.conv.{leaf}": "conv3.{leaf}",
    "branch2c.norm.{leaf}": "norm3.{leaf}",
    "short.conv.{leaf}": "shortcut.1.{leaf}",
    "short.norm.{leaf}": "shortcut.2.{leaf}",
    "short.conv.conv.{leaf}": "shortcut.1.{leaf}",  # behind a pool
    "short.conv.norm.{leaf}": "shortcut.2.{leaf}",
})  # fmt: skip
_RESNET = {
    **{key: place for k in (1, 2, 3) for key, place in _unit(f"conv1.conv1_{k}", f"stem.{k - 1}").items()},
    **_BLOCK.within("res_layers.{i}.blocks.{j}.", "stages.{i}.{j}."),
}


_HG_STAGE = Names({
    **_unit("downsample", "downsample", "bn"),
    **_unit("blocks.{j}.layers.{k}", "blocks.{j}.layers.{k}", "bn"),
    **_unit("blocks.{j}.layers.{k}.conv1", "blocks.{j}.layers.{k}.0", "bn"),
    **_unit("blocks.{j}.layers.{k}.conv2", "blocks.{j}.layers.{k}.1", "bn"),
    **_unit("blocks.{j}.aggregation_squeeze_conv", "blocks.{j}.squeeze", "bn"),
    **_unit("blocks.{j}.aggregation_excitation_conv", "blocks.{j}.expand", "bn"),
})  # fmt: skip
#: the card does not name the stem's convolutions, nor the affine maps: whole files of HGNetv2 are refused by name
_HGNET = _HG_STAGE.within("stages.{i}.", "stages.{i}.")
_CSP = Names({
    **_unit("conv1", "conv1"),
    **_unit("conv2", "conv2"),
    **_unit("conv3", "conv3"),
    **_unit("bottlenecks.{j}.conv1", "blocks.{j}.conv1"),
    **_unit("bottlenecks.{j}.conv2", "blocks.{j}.conv2"),
})  # fmt: skip
_AMONG_MAPS = {
    **_unit("lateral_convs.{i}", "lateral.{i}"),
    **_unit("downsample_convs.{i}", "down.{i}"),
    **_CSP.within("fpn_blocks.{i}.", "from_coarse.{i}."),
    **_CSP.within("pan_blocks.{i}.", "from_fine.{i}."),
}
_ENCODER = Names({
    **_unit("input_proj.{i}", "project.{i}"),
    **Names({**_attention("attention"), **_MLP, **_same("norm1", "norm2")}).within(
        "encoder.{e}.layers.{i}.", "attention.{e}.{i}."
    ),
    **_AMONG_MAPS,
})  # fmt: skip
_LAYER = Names({
    **_attention("self_attention"),
    **_MLP,
    **_same("norm1", "norm2", "norm3"),
    **_DEFORMABLE.within("cross_attn.", "cross_attention."),
})  # fmt: skip


def _boxes(theirs: str, ours: str) -> dict[str, Place]:
    """Three linear layers with ReLUs between."""
    return {f"{theirs}.layers.{k}.{{leaf}}": f"{ours}.{2 * k}.{{leaf}}" for k in range(3)}


#: the heads, of the authors and of transformers
_HEADS: dict[str, Place] = {
    "denoising_class_embed.{leaf}": "denoising.{leaf}",
    "enc_score_head.{leaf}": "enc_score.{leaf}",
    **_boxes("enc_bbox_head", "enc_box"),
    "anchors": None,  # are made anew
    "valid_mask": None,
}
_PLACES: dict[str, Place] = {
    "query_pos_head.layers.0.{leaf}": "place.0.{leaf}",
    "query_pos_head.layers.1.{leaf}": "place.2.{leaf}",
}
_DECODER = Names({
    **_HEADS,
    **_PLACES,
    **_unit("input_proj.{i}", "project.{i}"),
    **_LAYER.within("decoder.layers.{i}.", "layers.{i}."),
    "tgt_embed.{leaf}": "content.{leaf}",
    "enc_output.proj.{leaf}": "enc_output.0.{leaf}",
    "enc_output.norm.{leaf}": "enc_output.1.{leaf}",
    "dec_score_head.{i}.{leaf}": "scores.{i}.{leaf}",
    **_boxes("dec_bbox_head.{i}", "boxes.{i}"),
})  # fmt: skip
_NETWORK = Names({
    **Names(_RESNET).within("backbone.", "backbone."),
    **Names(_HGNET).within("backbone.", "backbone."),
    **_ENCODER.within("encoder.", "encoder."),
    **_DECODER.within("decoder.", "decoder."),
})  # fmt: skip


def _theirs_layer(attention: str, *norms: str) -> dict[str, Place]:
    """A layer in transformers: as its modules are called, and as its files call them."""
    return {
        **{f"self_attn.{k}_proj.{{leaf}}": f"{attention}.{k}_proj.{{leaf}}" for k in "qkv"},
        **{f"self_attn.{out}_proj.{{leaf}}": f"{attention}.out_proj.{{leaf}}" for out in ("o", "out")},
        **{f"{mlp}fc{k}.{{leaf}}": f"mlp.fc{k}.{{leaf}}" for mlp in ("mlp.", "") for k in (1, 2)},
        **{f"{name}_layer_norm.{{leaf}}": f"norm{i + 1}.{{leaf}}" for i, name in enumerate(norms)},
    }


_THEIRS_RESNET = {
    "embedder.embedder.{i}.convolution.{leaf}": "stem.{i}.0.{leaf}",
    "embedder.embedder.{i}.normalization.{leaf}": "stem.{i}.1.{leaf}",
    **{
        f"encoder.stages.{{i}}.layers.{{j}}.{theirs}.{kind}.{{leaf}}": f"stages.{{i}}.{{j}}.{ours}.{{leaf}}"
        for theirs, conv, norm in (
            *((f"layer.{k}", f"conv{k + 1}", f"norm{k + 1}") for k in range(3)),
            *((shortcut, "shortcut.1", "shortcut.2") for shortcut in ("shortcut", "shortcut.1")),
        )
        for kind, ours in (("convolution", conv), ("normalization", norm))
    },
}
_THEIRS_ENCODER_LAYER = Names(_theirs_layer("attention", "self_attn", "final"))
_THEIRS_DECODER_LAYER = Names({
    **_theirs_layer("self_attention", "self_attn", "encoder_attn", "final"),
    **Names(_LINEARS).within("encoder_attn.", "cross_attention."),
    "encoder_attn.n_points_scale": None,
})  # fmt: skip
_TRANSFORMERS = Names({
    **Names(_THEIRS_RESNET).within("backbone.model.", "backbone."),
    "encoder_input_proj.{i}.{k}.{leaf}": "encoder.project.{i}.{k}.{leaf}",
    **_THEIRS_ENCODER_LAYER.within("encoder.aifi.{e}.layers.{i}.", "encoder.attention.{e}.{i}."),
    **_THEIRS_ENCODER_LAYER.within("encoder.encoder.{e}.layers.{i}.", "encoder.attention.{e}.{i}."),
    **Names(_AMONG_MAPS).within("encoder.", "encoder."),
    **Names(_HEADS).within("", "decoder."),
    "decoder_input_proj.{i}.{k}.{leaf}": "decoder.project.{i}.{k}.{leaf}",
    "weight_embedding.{leaf}": "decoder.content.{leaf}",
    "enc_output.{k}.{leaf}": "decoder.enc_output.{k}.{leaf}",
    **Names(_PLACES).within("decoder.", "decoder."),
    **_THEIRS_DECODER_LAYER.within("decoder.layers.{i}.", "decoder.layers.{i}."),
    "decoder.class_embed.{i}.{leaf}": "decoder.scores.{i}.{leaf}",
    **_boxes("decoder.bbox_embed.{i}", "decoder.boxes.{i}"),
})  # fmt: skip


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the authors, or of transformers' `RTDetrV2ForObjectDetection`."""
    if not any(name.startswith("model.") for name in state):
        return _NETWORK(state)
    once: dict[str, Tensor] = {}  # of heads that stand in the model under two names
    for name, tensor in state.items():
        name = name.removeprefix("model.")
        name = f"decoder.{name}" if name.startswith(("class_embed.", "bbox_embed.")) else name
        if name in once and not torch.equal(once[name], tensor):
            raise ValueError(f"{name} stands twice in the file, and differs")
        once[name] = tensor
    return _TRANSFORMERS(once)


_SAMPLING = {"default": "bilinear", "discrete": "discrete"}
_BUILD_DEFORMABLE = Arguments(
    MSDeformableAttention,
    {
        "embed_dim": "dim",
        "num_heads": "num_heads",
        "num_levels": "num_levels",
        "num_points": "num_points",
        "method": ("sampling", _SAMPLING),
        "offset_scale": "offset_scale",
    },
)
_BUILD_ENCODER = Arguments(
    HybridEncoder,
    {
        "in_channels": "in_channels",
        "hidden_dim": "dim",
        "nhead": "num_heads",
        "dim_feedforward": "hidden",
        "dropout": "drop",
        "num_encoder_layers": "layers",
        "use_encoder_idx": "encoded",
        "expansion": "expansion",
        "depth_mult": "depth",
        "pe_temperature": "temperature",
    },
)
_BUILD_DECODER = Arguments(
    Decoder,
    {
        "num_classes": "num_classes",
        "hidden_dim": "dim",
        "num_queries": "num_queries",
        "feat_channels": "in_channels",
        "num_levels": "num_levels",
        "num_points": "num_points",
        "nhead": "num_heads",
        "num_layers": "layers",
        "dim_feedforward": "hidden",
        "dropout": "drop",
        "num_denoising": "num_denoising",
        "label_noise_ratio": "label_noise",
        "box_noise_scale": "box_noise",
        "learn_query_content": "learned_content",
        "eval_idx": "eval_layer",
        "eps": "eps",
        "cross_attn_method": ("sampling", _SAMPLING),
        "query_select_method": "selection",
        "offset_scale": "offset_scale",
    },
)


def _backbone(args: Mapping[str, Any]) -> Any:
    """Their PResNet, or HGNetv2 where there is a name."""
    returned = args.get("return_idx", (1, 2, 3))
    if "name" in args:
        backbone: nn.Module = HGNetV2(args["name"], affine=args.get("use_lab", False), returned=returned)
        frozen = args.get("freeze_norm", True)
    else:
        depth = args.get("depth", 50)
        if args.get("variant", "d") != "d":
            raise ValueError(f"variant must be 'd', got {args['variant']!r}")
        width = 64 // args.get("channels_divided_by", 1)
        blocks = args.get("blocks")
        if blocks is None and "num_stages" in args:
            blocks = DEPTHS[depth][: args["num_stages"]]
        backbone = ResNetVD(depth, blocks=blocks, width=width, returned=returned)
        frozen = args.get("freeze_norm", depth >= 50)
    return freeze_norms(backbone) if frozen else backbone


def _build_network(args: dict[str, Any]) -> nn.Module:
    """Of their three parts; where nothing is said of a part, it is RT-DETRv2-S's."""
    backbone = _backbone(args.get("backbone", {"depth": 18}))
    model = RTDETRv2(backbone=backbone, layers=1)
    encoder = args.get("encoder", {"expansion": 0.5})
    decoder = args.get("decoder", {"num_layers": 3})
    width = encoder.get("hidden_dim", 256)
    model.encoder = HybridEncoder(**_BUILD_ENCODER.ours({"in_channels": backbone.channels, **encoder}))
    model.decoder = Decoder(**_BUILD_DECODER.ours({"feat_channels": [width] * len(backbone.channels), **decoder}))
    return model


def _run_network(module: RTDETRv2, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    out = module(inputs["x"])
    boxes, labels, scores = surest(out, inputs["orig_target_sizes"], args.get("num_top_queries", 300))
    return {"pred_logits": out.logits, "pred_boxes": out.pred_boxes, "boxes": boxes, "labels": labels, "scores": scores}


def _run_deformable(
    module: MSDeformableAttention, inputs: dict[str, Tensor], args: dict[str, Any]
) -> dict[str, Tensor]:
    shapes = [(int(height), int(width)) for height, width in inputs["value_spatial_shapes"]]
    given = (inputs["query"], inputs["reference_points"], inputs["value"], shapes)
    return {"out": module(*given, inputs["value_mask"]), "out_nomask": module(*given)}


def _features(inputs: dict[str, Tensor]) -> list[Tensor]:
    return [inputs[f"feat{i}"] for i in range(len(inputs))]


def _run_encoder(module: HybridEncoder, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    return {f"out{i}": x_BCHW for i, x_BCHW in enumerate(module(_features(inputs)))}


def _run_decoder(module: Decoder, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    out = module(_features(inputs))
    return {"pred_logits": out.logits[-1], "pred_boxes": out.boxes[-1]}


def _build_block(args: dict[str, Any]) -> nn.Module:
    if args.get("act", "relu") != "relu" or args.get("variant", "b") not in ("b", "c", "d"):
        raise ValueError(
            f"act must be 'relu' and variant 'b', 'c' or 'd', got {args.get('act')!r}, {args['variant']!r}"
        )
    return vd_block(
        args["ch_in"], args["ch_out"], args["stride"], bottleneck=args.get("block", "BottleNeck") == "BottleNeck",
        first=not args["shortcut"], pooled=args.get("variant", "b") == "d",
    )  # fmt: skip


def _build_stage(args: dict[str, Any]) -> nn.Module:
    named = {
        "in_channels": "in_channels", "mid_channels": "channels", "out_channels": "out_channels",
        "block_num": "blocks", "layer_num": "layers", "downsample": "downsample", "light_block": "light",
        "kernel_size": "kernel_size",
    }  # fmt: skip
    return HGStage(
        Stage(**{ours: args[theirs] for theirs, ours in named.items() if theirs in args}), args.get("use_lab", False)
    )


def _build_criterion(args: dict[str, Any]) -> nn.Module:
    weights, matcher = args.get("weights", {}), args.get("matcher", {})
    return Criterion(
        **{name.removeprefix("loss_"): weight for name, weight in weights.items()},
        **{name: args[name] for name in ("alpha", "gamma") if name in args},
        matcher=HungarianMatcher(
            *(matcher.get(name, default) for name, default in (("cost_class", 2), ("cost_bbox", 5), ("cost_giou", 2))),
            alpha=matcher.get("alpha", 0.25), gamma=matcher.get("gamma", 2.0),
        ),
    )  # fmt: skip


def _run_criterion(module: Criterion, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    def layer(prefix: str) -> Detection:
        return Detection(inputs[f"{prefix}pred_logits"], inputs[f"{prefix}pred_boxes"])

    last = layer("")
    targets: list[Target] = []
    while f"target{len(targets)}_labels" in inputs:
        targets.append({part: inputs[f"target{len(targets)}_{part}"] for part in ("labels", "boxes")})
    auxiliary: list[Detection] = []
    while f"aux{len(auxiliary)}_pred_logits" in inputs:
        auxiliary.append(layer(f"aux{len(auxiliary)}_"))
    proposals = [layer("enc_")] if "enc_pred_logits" in inputs else None
    losses = module(Trained(last.logits, last.pred_boxes, auxiliary=auxiliary, proposals=proposals), targets)
    for i, (query, target) in enumerate(module.matcher(last.logits, last.pred_boxes, targets)):
        losses |= {f"match{i}_query": query, f"match{i}_target": target}
    return losses


PORTS = (
    AuthorsPort("network", build=_build_network, convert=_convert, run=_run_network),
    AuthorsPort("hybrid_encoder", build=_BUILD_ENCODER, convert=_ENCODER, run=_run_encoder),
    AuthorsPort("decoder", build=_BUILD_DECODER, convert=_DECODER, run=_run_decoder),
    AuthorsPort("msdeform_attn_default", build=_BUILD_DEFORMABLE, convert=_DEFORMABLE, run=_run_deformable),
    AuthorsPort("msdeform_attn_discrete", build=_BUILD_DEFORMABLE, convert=_DEFORMABLE, run=_run_deformable),
    AuthorsPort("resnet_vd_block", build=_build_block, convert=_BLOCK, run=calls("x", gives="out")),
    AuthorsPort("hg_stage", build=_build_stage, convert=_HG_STAGE, run=calls("x", gives="out")),
    AuthorsPort("criterion", build=_build_criterion, convert=dict, run=_run_criterion),
)
