"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.attention.flash_window.layer import FlashWindowAttention, flash_window_attend
from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments, of_function


def _run_core(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("q", "k", "v", "bias") if name in inputs}
    with torch.enable_grad():
        out = flash_window_attend(leaves["q"], leaves["k"], leaves["v"], leaves.get("bias"), scale=args.get("scale_qk"))
        outputs = {"out": out.detach()}
        if "grad_out" in inputs:
            gradients = torch.autograd.grad(out, list(leaves.values()), inputs["grad_out"])
            outputs |= {f"grad_{name}": gradient for name, gradient in zip(leaves, gradients)}
    return outputs


_BUILD = Arguments(
    FlashWindowAttention,
    {
        "dim": "dim",
        "num_heads": "num_heads",
        "window_size": "window_size",
        "qk_scale": "scale",
        "qkv_bias": "qkv_bias",
        "proj_drop": "proj_drop",
    },
    needed=("num_heads", "window_size"),
)
_NAMES = Names({"relative_position_index": None, "{name*}": "{name}"})


def _run_authors(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    outputs = {"out": module(inputs["x"])}
    if "mask" in inputs:
        outputs["out_masked"] = module(inputs["x"], mask=inputs["mask"])
    return outputs


PORTS = (
    of_function(
        "window_attention_core",
        run=_run_core,
    ),
    AuthorsPort(
        module="window_attention",
        build=_BUILD,
        convert=_NAMES,
        run=_run_authors,
    ),
)
