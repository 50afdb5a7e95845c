"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments
from saccade.layers.patches import PatchMerging
from saccade.models.sum.blocks import Expand, VSSBlock
from saccade.models.sum.network import SUM

_BLOCK = Names({
    "ln_1.{leaf}": "norm.{leaf}",
    "self_attention.in_proj.weight": "scan.in_proj.weight",
    "self_attention.conv2d.{leaf}": "scan.conv.{leaf}",
    "self_attention.x_proj_weight": "scan.read_proj",
    "self_attention.dt_projs_weight": "scan.step_proj",
    "self_attention.dt_projs_bias": "scan.step_bias",
    "self_attention.A_logs": "scan.log_decay",
    "self_attention.Ds": "scan.skip",
    "self_attention.out_norm.{leaf}": "scan.norm.{leaf}",
    "self_attention.out_proj.weight": "scan.out_proj.weight",
    "condition": "prompts",
    "mlp.{i}.{leaf}": "mlp.{i}.{leaf}",
})  # fmt: skip
_NETWORK = Names({
    "patch_embed.{rest*}": "patch_embed.{rest}",
    **_BLOCK.within("layers.{s}.blocks.{b}.", "encoder.{s}.{b}."),
    "layers.{s}.downsample.{rest*}": "merges.{s}.{rest}",
    **_BLOCK.within("layers_up.{s}.blocks.{b}.", "decoder.{s}.{b}."),
    "layers_up.{s}.upsample.{rest*}": lambda found: f"expands.{int(found['s']) - 1}.{found['rest']}",
    "final_up.{rest*}": "last_expand.{rest}",
    "final_conv.{leaf}": "head.{leaf}",
})  # fmt: skip


def _run_block(module: VSSBlock, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    x, scan = inputs["input"], module.scan
    if module.prompts is None:
        return {"output": module(x), "plain_ss2d": scan(x)}
    condition = inputs["condition"].argmax(1)
    all_of_them = module.modulation(torch.arange(len(module.prompts)))
    return {
        "output": module(x, condition),
        "plain_ss2d": scan(x),
        "modulation": torch.cat(all_of_them, 1)[:, :, 0, 0],
    }


def _resampling(args: dict[str, Any]) -> nn.Module:
    dim = args["dim"]
    return nn.ModuleDict({"merge": PatchMerging(dim), "expand": Expand(2 * dim), "final": Expand(dim, 4)})


def _run_resampling(module: nn.ModuleDict, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    x = inputs["merge"]
    even = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]  # the authors leave out an odd line, ours fills it up
    return {
        "merge": module["merge"](even.permute(0, 3, 1, 2)).permute(0, 2, 3, 1),
        "expand": module["expand"](inputs["expand"]),
        "final": module["final"](inputs["final"]),
    }


def _run_network(module: SUM, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    said = module(inputs["x"], inputs["condition"])
    assert said.logits is not None
    return {"logits": said.logits[:, None], "saliency": said.heatmap[:, None]}


PORTS = (
    AuthorsPort(
        "cvss_block",
        build=Arguments(
            VSSBlock,
            {
                "hidden_dim": "dim",
                "d_state": "states",
                "drop_path": "drop_path",
                "modulation_divided_by": ("prompt_dim", lambda divisor: 128 // divisor),
            },
            derived={"conditions": lambda args: args.get("condition_size", 4) if args.get("use_modulation") else 0},
        ),
        convert=_BLOCK,
        run=_run_block,
    ),
    AuthorsPort(
        "resampling",
        build=_resampling,
        convert=Names({"{module}.{part}.{leaf}": "{module}.{part}.{leaf}"}),
        run=_run_resampling,
    ),
    AuthorsPort(
        "network",
        build=Arguments(
            SUM,
            {
                "dims": "dims",
                "depths": "depths",
                "depths_decoder": "decoder_depths",
                "d_state": "states",
                "drop_path_rate": "drop_path",
                "input_channels": "in_channels",
                "modulation_divided_by": ("prompt_dim", lambda divisor: 128 // divisor),
            },
            defaults={"depths": [2, 2, 9, 2], "depths_decoder": [2, 9, 2, 2], "drop_path_rate": 0.2},
        ),
        convert=Names(_NETWORK.within("salu_mamba.", "")),
        run=_run_network,
    ),
)
