"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names, laid, split
from saccade.catalogue.ports import Arguments, Late, calls
from saccade.models.mcaf_net.block import MultiBranchBlock
from saccade.models.mcaf_net.colour import ColourAttention
from saccade.models.mcaf_net.fusion import AttentionFusion
from saccade.models.mcaf_net.network import MCAFNet

_BLOCK = Names(
    {
        "hw": "plane",
        "ch": laid("row", lambda grid: grid[0]),
        "cw": laid("column", lambda grid: grid[0]),
        "weight_generator.1.{leaf}": "weigh.{leaf}",
        "conv_hw.{leaf}": "plane_conv.{leaf}",
        "conv_ch.{leaf}": "row_conv.{leaf}",
        "conv_cw.{leaf}": "column_conv.{leaf}",
        "conv_4.{leaf}": "point_conv.{leaf}",
        "mlp.{i}.{leaf}": "mix.{i}.{leaf}",
        "norm1.{leaf}": "norm1.{leaf}",
        "norm2.{leaf}": "norm2.{leaf}",
    }
)
_COLOUR = Names(
    {
        "alpha": "alpha",
        "qk_pre.{leaf}": "to_colours.{leaf}",
        "qk_post.0.{leaf}": "colour_norm.{leaf}",
        "qk_post.1.{leaf}": "qk.{leaf}",
        "v.0.{leaf}": "v_norm.{leaf}",
        "v.1.{leaf}": "v.{leaf}",
        "conv.{leaf}": "local.{leaf}",
        "norm.{leaf}": "norm.{leaf}",
        "proj.{i}.{leaf}": "mix.{i}.{leaf}",
        "color_correction.{leaf}": "correct.{leaf}",
        "proj_head.{i}.{leaf}": "projection.{i}.{leaf}",
    }
)
_FUSION = Names(
    {
        "conv1.{leaf}": "q_conv.{leaf}",
        "conv2.{leaf}": "k_conv.{leaf}",
        "conv3.{leaf}": "v_conv.{leaf}",
        "cross_attn.in_proj_weight": split("{part}_proj.weight", "q", "k", "v"),
        "cross_attn.in_proj_bias": split("{part}_proj.bias", "q", "k", "v"),
        "cross_attn.out_proj.{leaf}": "out_proj.{leaf}",
        "fusion_conv.{leaf}": "fuse.{leaf}",
        "residual_conv.{leaf}": "shortcut.{leaf}",
    }
)


def _numbered(theirs: str, ours: str, count: int) -> dict[str, str]:
    """Modules that they number from 1 and we from 0."""
    return {theirs.format(n=n + 1): ours.format(n=n) for n in range(count)}


def _network() -> Names:
    table: dict[str, Any] = {
        "patch_embed.proj.{leaf}": "embed.{leaf}",
        "patch_unembed.proj.0.{leaf}": "head.{leaf}",
    }
    for theirs, ours in _numbered("patch_merge{n}.proj", "down.{n}", 2).items():
        table[f"{theirs}.{{leaf}}"] = f"{ours}.{{leaf}}"
    for theirs, ours in _numbered("patch_split{n}.proj.0", "up.{n}", 2).items():
        table[f"{theirs}.{{leaf}}"] = f"{ours}.{{leaf}}"
    for theirs, ours in _numbered("layer{n}.blocks.", "stages.{n}.", 5).items():
        table |= _BLOCK.within(f"{theirs}{{b}}.", f"{ours}{{b}}.")
    for theirs, ours in _numbered("csam{n}.", "colour.{n}.", 2).items():
        table |= _COLOUR.within(theirs, ours)
    for theirs, ours in _numbered("fusion{n}.", "fuse.{n}.", 2).items():
        table |= _FUSION.within(theirs, ours)
    return Names(table)


_build = Arguments(MCAFNet, {"embed_dims": "widths", "depths": "depths"})


def _made(args: dict[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """Files may lack the colour heads, on which the image does not depend: the network then has none."""
    return MCAFNet(**_build.ours(args), colour_heads=any(".correct." in name for name in state))


def _colour(module: str) -> AuthorsPort:
    return AuthorsPort(
        module,
        build=Arguments(ColourAttention, {"dim": "channels", "up_scale": "scale"}),
        convert=_COLOUR,
        run=calls("x", gives={"y": "features", "fake": "image", "anchor": "anchor"}),
    )


PORTS = (
    AuthorsPort(
        "mfiba",
        build=Arguments(MultiBranchBlock, {"dim": "channels", "x": "height", "y": "width"}),
        convert=_BLOCK,
        run=calls("x"),
    ),
    _colour("csam_up1"),
    _colour("csam_up2"),
    AuthorsPort(
        "mfafm",
        build=Arguments(AttentionFusion, {"in_channels": "in_channels", "out_channels": "out_channels"}),
        convert=_FUSION,
        run=calls("x", "skip1", "skip2"),
    ),
    AuthorsPort(
        "model",
        build=lambda args: Late(_made, args),
        convert=_network(),
        run=calls("x", gives={"y": "image"}),
    ),
)
