"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.names import Place, split
from saccade.catalogue.ports import Arguments, calls
from saccade.models.dfyp.network import DFYPModis, DFYPSentinel, VisionTransformer
from saccade.models.dfyp.operators import OPERATORS, BandGate, CropGate, YearRouter

_GATE = Names({"fc.0.weight": "mlp.fc1.weight", "fc.2.weight": "mlp.fc2.weight"})
_FIXED = {
    f"operators.{owner}.{kind}_{axis}": None
    for owner, kinds in (("sobel", ("sobel",)), ("scharr", ("scharr",)), ("learnable", ("sobel", "scharr")))
    for kind in kinds
    for axis in "xy"
}
_ROUTER = Names(
    {"operators.learnable.alpha": "operators.alpha", "operators.learnable.scale": "operators.scale", **_FIXED}
)
_TRANSFORMER = Names(
    {
        "cls_token": "class_token",
        "pos_embedding": "positions",
        **{f"to_patch_embedding.{i + 1}.{{leaf}}": f"embed.{i}.{{leaf}}" for i in range(3)},
        "transformer.layers.{i}.0.norm.{leaf}": "blocks.{i}.norm1.{leaf}",
        "transformer.layers.{i}.0.to_qkv.weight": split("blocks.{i}.attention.{part}_proj.weight", "q", "k", "v"),
        "transformer.layers.{i}.0.to_out.0.{leaf}": "blocks.{i}.attention.out_proj.{leaf}",
        "transformer.layers.{i}.1.net.0.{leaf}": "blocks.{i}.norm2.{leaf}",
        "transformer.layers.{i}.1.net.1.{leaf}": "blocks.{i}.mlp.fc1.{leaf}",
        "transformer.layers.{i}.1.net.4.{leaf}": "blocks.{i}.mlp.fc2.{leaf}",
        "transformer.norm.{leaf}": "norm.{leaf}",
        "mlp_head.{leaf}": "head.{leaf}",
    }
)
_BOTH: dict[str, Place] = {
    "a1": "cnn_weight",
    "a2": "transformer_weight",
    **_TRANSFORMER.within("vit_model.", "transformer."),
}
_SIZES = {"dim": "dim", "depth": "depth", "heads": "num_heads", "mlp_dim": "hidden"}


def _years(table: dict[Any, str]) -> dict[int, str]:
    return {int(year): operator for year, operator in table.items()}


def _pair(size: Any) -> tuple[int, int]:
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def _widths(*widths: int) -> Any:
    """The authors' are literals; the recordings have them divided by a number."""
    return lambda args: tuple(width // args.get("widths_divided_by", 1) for width in widths)


def _run_operators(module: YearRouter, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    x = inputs["x"]
    alone = {name: module.operators(x, torch.full((len(x),), i)) for i, name in enumerate(OPERATORS)}
    return {"routed": module(x, inputs["year"]), **alone}


def _run_modis(module: DFYPModis, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    gated = module.gate(inputs["x"])
    dense = module.dense[0](module.features(gated, inputs["year"]))
    return {"y": module(inputs["x"], inputs["year"]).values, "last_dense": dense}


PORTS = (
    AuthorsPort(
        "rca_max",
        build=Arguments(BandGate, {"channels": "channels", "reduction": "reduction"}, statistic="max"),
        convert=_GATE,
        run=calls("x"),
    ),
    AuthorsPort(
        "rca_avg",
        build=Arguments(
            BandGate,
            {"channels": "channels", "reduction": "reduction"},
            defaults={"reduction": 8},
            statistic="avg",
        ),
        convert=_GATE,
        run=calls("x"),
    ),
    AuthorsPort(
        "operators",
        build=Arguments(YearRouter, {"year_operator_map": ("years", _years), "default_operator": "default"}),
        convert=_ROUTER,
        run=_run_operators,
    ),
    AuthorsPort(
        "crop_gate",
        build=Arguments(CropGate, {"operator_type": "operator"}),
        convert=Names({"operator_weight": "weight", "{kind}.kernel_x": None, "{kind}.kernel_y": None}),
        run=calls("x"),
    ),
    AuthorsPort(
        "vit",
        build=Arguments(
            VisionTransformer,
            {
                **_SIZES,
                "image_size": ("size", _pair),
                "patch_size": "patch",
                "num_classes": "num_classes",
                "channels": "channels",
                "dim_head": "head_dim",
                "dropout": "dropout",
            },
        ),
        convert=_TRANSFORMER,
        run=calls("x"),
    ),
    AuthorsPort(
        "modis_network",
        build=Arguments(
            DFYPModis,
            {
                **_SIZES,
                "channels": "channels",
                "num_classes": "num_classes",
                "year_operator_map": ("years", _years),
                "default_operator": "default",
            },
            derived={
                "size": lambda args: (args.get("time", 32), args.get("num_bins", 32)),
                "widths": _widths(128, 256, 512),
                "dense": lambda args: _widths(2048)(args)[0],
            },
        ),
        convert=Names(
            {
                **_BOTH,
                **_GATE.within("se_block.", "gate."),
                **_ROUTER.within("cnn_model.operator_router.", "router."),
                "cnn_model.operator_weight": "operator_weight",
                "cnn_model.convblocks.{i}.conv.{leaf}": "convs.{i}.conv.{leaf}",
                "cnn_model.convblocks.{i}.batchnorm.{leaf}": "convs.{i}.norm.{leaf}",
                "cnn_model.dense_layers.{i}.{leaf}": "dense.{i}.{leaf}",
            }
        ),
        run=_run_modis,
    ),
    AuthorsPort(
        "sentinel_network",
        build=Arguments(
            DFYPSentinel,
            {
                **_SIZES,
                "out_dim": "num_classes",
                "batch_size": "chunk",
                "operator_type": "operator",
                "image_size": "image_size",
                "patch_size": "patch",
            },
            derived={"widths": _widths(32, 64, 128)},
        ),
        convert=Names(
            {
                **_BOTH,
                **_GATE.within("se.", "gate."),
                "cnn_model.operator_gate.operator_weight": "operator.weight",
                "cnn_model.operator_gate.{kind}.kernel_x": None,
                "cnn_model.operator_gate.{kind}.kernel_y": None,
                "cnn_model.cnn.{i}.{leaf}": "convs.{i}.{leaf}",
                "cnn_model.fusion.{i}.{leaf}": "dense.{i}.{leaf}",
            }
        ),
        run=calls("x", gives={"y": "values"}),
    ),
)
