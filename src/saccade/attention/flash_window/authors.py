"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.attention.flash_window.layer import FlashWindowAttention, flash_window_attend
from saccade.catalogue import AuthorsPort


def _run_core(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("q", "k", "v", "bias") if name in inputs}
    with torch.enable_grad():
        out = flash_window_attend(leaves["q"], leaves["k"], leaves["v"], leaves.get("bias"), scale=args.get("scale_qk"))
        outputs = {"out": out.detach()}
        if "grad_out" in inputs:
            gradients = torch.autograd.grad(out, list(leaves.values()), inputs["grad_out"])
            outputs |= {f"grad_{name}": gradient for name, gradient in zip(leaves, gradients)}
    return outputs


def _build_authors(args: dict[str, Any]) -> nn.Module:
    return FlashWindowAttention(
        args["dim"],
        args["num_heads"],
        window_size=args["window_size"],
        scale=args.get("qk_scale"),
        qkv_bias=args.get("qkv_bias", True),
        proj_drop=args.get("proj_drop", 0.0),
    )


def _run_authors(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    outputs = {"out": module(inputs["x"])}
    if "mask" in inputs:
        outputs["out_masked"] = module(inputs["x"], mask=inputs["mask"])
    return outputs


PORTS = (
    AuthorsPort(
        module="window_attention_core",
        build=lambda args: nn.Identity(),
        convert=lambda state: state,
        run=_run_core,
    ),
    AuthorsPort(
        module="window_attention",
        build=_build_authors,
        convert=lambda state: {k: x for k, x in state.items() if k != "relative_position_index"},
        run=_run_authors,
    ),
)
