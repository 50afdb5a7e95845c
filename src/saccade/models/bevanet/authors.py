"""The authors' names and arguments, of the recorded parts and of both networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments, calls
from saccade.models.bevanet.model import BEVANet, BEVANetClassifier
from saccade.models.bevanet.parts import BGAF, CKS, DLKPPM, EVA, SDLSKA, PagFM


def _gate(theirs: str, ours: str) -> dict[str, str]:
    return {
        f"{theirs}.0.pwconv.{{leaf}}": f"{ours}.0.{{leaf}}",
        f"{theirs}.1.dwconv.{{leaf}}": f"{ours}.1.{{leaf}}",
        f"{theirs}.2.{{leaf}}": f"{ours}.2.{{leaf}}",
    }


_CKS = Names({
    **_gate("fc_reduce", "reduce"),
    **_gate("fc_expand_small", "expand.0"),
    **_gate("fc_expand_big_h", "expand.1"),
    **_gate("fc_expand_big_v", "expand.2"),
    "conv_squeeze.{leaf}": "squeeze.{leaf}",
})  # fmt: skip
_STRIPS = {
    "DW_D_conv_h.dwconv.{leaf}": "across.{leaf}",
    "DW_D_conv_v.dwconv.{leaf}": "down.{leaf}",
    "pwconv.pwconv.{leaf}": "project.{leaf}",
}
_SDLSKA = Names({**_STRIPS, "DW_conv.dwconv.{leaf}": "small.{leaf}", **_CKS.within("FS_kernel.", "select.")})
_LSKA = Names({
    **_STRIPS,
    "DW_conv_h.dwconv.{leaf}": "small_across.{leaf}",
    "DW_conv_v.dwconv.{leaf}": "small_down.{leaf}",
})  # fmt: skip


def _gated(gate: Names) -> Names:
    return Names({
        "proj_1.pwconv.{leaf}": "proj_in.{leaf}",
        "proj_2.pwconv.{leaf}": "proj_out.{leaf}",
        **gate.within("spatial_gating_unit.", "gate."),
    })  # fmt: skip


_EVA = Names({
    "norm1.{leaf}": "norm1.{leaf}",
    "norm2.{leaf}": "norm2.{leaf}",
    "layer_scale_1": "scale1",
    "layer_scale_2": "scale2",
    **_gated(_SDLSKA).within("attn.", "attention."),
    "mlp.fc1.pwconv.{leaf}": "fc1.{leaf}",
    "mlp.dwconv.dwconv.{leaf}": "mix.{leaf}",
    "mlp.fc2.pwconv.{leaf}": "fc2.{leaf}",
})  # fmt: skip


def _norm_conv(theirs: str, ours: str, first: int = 0, conv: str = "{i}.{leaf}") -> dict[str, str]:
    """Norm, ReLU, convolution; behind a pool they stand one place further on there."""
    place = conv.format(i=first + 2, leaf="{leaf}")
    return {f"{theirs}.{first}.{{leaf}}": f"{ours}.0.{{leaf}}", f"{theirs}.{place}": f"{ours}.2.{{leaf}}"}


_POINTWISE = "{i}.pwconv.{leaf}"
_DLKPPM = Names({
    **_norm_conv("scale0", "reduce.0", 0, _POINTWISE),
    **_norm_conv("scale1", "reduce.1", 1, _POINTWISE),
    **_norm_conv("scale2", "reduce.2", 1, _POINTWISE),
    **_norm_conv("scale4", "reduce.3", 1, _POINTWISE),
    **_norm_conv("scale5", "reduce.4", 1, _POINTWISE),
    "bn.{leaf}": "norm.{leaf}",
    **_gated(_LSKA).within("lska.", "attention."),
    "layer_scale_lska": "scale",
    **_norm_conv("process1", "process.0"),
    **_norm_conv("process2", "process.1"),
    **_norm_conv("process_lska", "process.2"),
    **_norm_conv("process4", "process.3"),
    **_norm_conv("process5", "process.4"),
    **_norm_conv("compression", "compression", 0, _POINTWISE),
    **_norm_conv("shortcut", "shortcut", 0, _POINTWISE),
})  # fmt: skip
_BGAF = Names(_norm_conv("conv_p", "detail") | _norm_conv("conv_i", "semantic") | _norm_conv("out", "out"))
_PAGFM = Names({"f_x.{i}.{leaf}": "detail.{i}.{leaf}", "f_y.{i}.{leaf}": "semantic.{i}.{leaf}"})
#: BasicBlock and Bottleneck
_BLOCK = Names({
    **{f"conv{i}.{{leaf}}": f"conv{i}.{{leaf}}" for i in (1, 2, 3)},
    **{f"bn{i}.{{leaf}}": f"norm{i}.{{leaf}}" for i in (1, 2, 3)},
    "downsample.{k}.{leaf}": "shortcut.{k}.{leaf}",
})  # fmt: skip
_HEAD = Names({
    "bn1.{leaf}": "0.{leaf}",
    "conv1.{leaf}": "2.{leaf}",
    "bn2.{leaf}": "3.{leaf}",
    "conv2.{leaf}": "5.{leaf}",
})  # fmt: skip


def _stage(ours: str, plain: str, first: str, blocks: Mapping[str, str]) -> dict[str, Any]:
    """A stage's names in both forms: blocks `plain`.{i}; or a block `first`.0, then EVA blocks and their norms."""
    table = {**_BLOCK.within(f"{plain}.{{i}}.", f"{ours}.{{i}}."), **_BLOCK.within(f"{first}.0.", f"{ours}.0.")}
    for i, (block, norm) in enumerate(blocks.items()):
        table |= _EVA.within(f"{block}.", f"{ours}.{2 * i + 1}.")
        table[f"{norm}.{{leaf}}"] = f"{ours}.{2 * i + 2}.{{leaf}}"
    return table


def _pair(stage: str, form: str = "") -> dict[str, str]:
    return {f"layer{stage}_semantic_{k}{form}": f"norm{stage}_semantic_{k}{form}" for k in (1, 2)}


_BRANCHES = {
    "conv1.{i}.{leaf}": "stem.{i}.{leaf}",
    **_BLOCK.within("layer1.{i}.", "layer1.{i}."),
    **_BLOCK.within("layer2.{i}.", "layer2.{i}."),
    **_stage("semantic.0", "layer3_semantic", "layer3_down_semantic", {"layer3_semantic": "norm3_semantic"}),
    **_stage("semantic.1", "layer4_semantic", "layer4_down_semantic", _pair("4")),
    **_stage("detail.0", "layer3_detail", "layer3_detail_conv", {"layer3_detail": "norm3_detail"}),
    **_stage("detail.1", "layer4_detail", "layer4_detail_conv", {"layer4_detail": "norm4_detail"}),
    "compression3.{i}.{leaf}": "compress.0.{i}.{leaf}",
    "compression4.{i}.{leaf}": "compress.1.{i}.{leaf}",
    **_PAGFM.within("fuse_sd_3.", "exchange.0."),
    **_PAGFM.within("fuse_sd_4.", "exchange.1."),
    **_BLOCK.within("layer5_detail_semantic.0.", "to_detail."),
}
_SEGMENTATION = Names({
    **_BRANCHES,
    **_stage("semantic.2", "layer5_semantic_seg", "layer5_down_semantic_seg", _pair("5", "_seg")),
    **_BLOCK.within("layer5_detail_boundary.0.", "to_boundary."),
    **_DLKPPM.within("spp.", "pyramid."),
    **_BGAF.within("dfm.", "fuse."),
    **_HEAD.within("head.", "head."),
    **_HEAD.within("seghead_ds.", "auxiliary_head."),
    **_HEAD.within("seghead_db.", "boundary_head."),
})  # fmt: skip
_CLASSIFICATION = Names({
    **_BRANCHES,
    **_stage("semantic.2", "layer5_semantic_cls", "layer5_down_semantic_cls", _pair("5", "_cls")),
    **_BLOCK.within("layer5_semantic_bn_cls.0.", "semantic.2.5."),
    "layer5_down.{i}.{leaf}": "down.{i}.{leaf}",
    "last_layer.{i}.{leaf}": "last.{i}.{leaf}",
    "head.{leaf}": "head.{leaf}",
})  # fmt: skip


def _convert_segmentation(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published files have `model.` before every name."""
    if all(name.startswith("model.") for name in state):
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    return _SEGMENTATION(state)


def _one_expansion(expand: Any) -> int:
    widths = {expand} if isinstance(expand, int) else set(expand)
    if len(widths) != 1:
        raise ValueError(f"mlp_expand must be the same for all stages, got {expand}")
    return widths.pop()


def _blocks(args: dict[str, Any]) -> Sequence[int]:
    blocks = args["n_blocks"]
    if not args["semantic_kernel_size"][0] and blocks[2] < 2:
        raise ValueError(f"a plain third stage has two blocks or more, got n_blocks {blocks}")
    return blocks


def _network(module: type[nn.Module], **own: str) -> Arguments:
    """What both networks have in common; what is not given is as in BEVANet-S."""
    return Arguments(
        module,
        {
            "planes": "planes",
            "semantic_kernel_size": "semantic_kernels",
            "detail_kernel_size": "detail_kernels",
            "mlp_expand": ("expand", _one_expansion),
            "num_classes": "num_classes",
            **own,
        },
        defaults={"semantic_kernel_size": (0, 35, 35), "n_blocks": (2, 2, 3, 3, 2)},
        derived={"blocks": _blocks},
    )


def _run_segmentation(module: BEVANet, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    logits, auxiliary, boundary = module.heads(inputs["x"])
    return {"logits": logits, "aux": auxiliary, "boundary": boundary}


PORTS = (
    AuthorsPort(
        "network",
        build=_network(BEVANet, ppm_planes="pyramid_channels", head_planes="head_channels"),
        convert=_convert_segmentation,
        run=_run_segmentation,
    ),
    AuthorsPort(
        "classifier",
        build=_network(BEVANetClassifier, last_planes="last_channels"),
        convert=_CLASSIFICATION,
        run=calls("x", gives="logits"),
    ),
    AuthorsPort(
        "sdlska",
        build=Arguments(SDLSKA, {"dim": "channels", "kernel_size": "kernel_size"}),
        convert=_SDLSKA,
        run=calls("x"),
    ),
    AuthorsPort("cks", build=Arguments(CKS, {"dim": "channels"}), convert=_CKS, run=calls("small", "big_h", "big_v")),
    AuthorsPort(
        "evan",
        build=Arguments(EVA, {"dim": "channels", "kernel_size": "kernel_size", "mlp_expand": "expand"}),
        convert=_EVA,
        run=calls("x"),
    ),
    AuthorsPort(
        "dlkppm",
        build=Arguments(DLKPPM, {"inplanes": "in_channels", "branch_planes": "channels", "outplanes": "out_channels"}),
        convert=_DLKPPM,
        run=calls("x"),
    ),
    AuthorsPort(
        "bgaf",
        build=Arguments(BGAF, {"in_channels": "channels", "out_channels": "out_channels"}),
        convert=_BGAF,
        run=calls("p", "i", "d"),
    ),
    AuthorsPort(
        "pagfm",
        build=Arguments(PagFM, {"in_channels": "channels", "mid_channels": "hidden"}),
        convert=_PAGFM,
        run=calls("x", "y"),
    ),
)
