"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.attention.prism.operator import band_scores, prism_blocks
from saccade.catalogue.ports import of_function
from saccade.ops import masks
from saccade.ops.attend import attend


def _authors_options(args: dict[str, Any]) -> dict[str, Any]:
    names = (
        "block_size", "low_freq_dim", "high_freq_dim", "low_freq_threshold", "high_freq_threshold", "calibrate",
        "force_sink", "force_recent",
    )  # fmt: skip
    return {name: args[name] for name in names if args.get(name) is not None}


def _run_block_estimate(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    q, k = inputs["q"], inputs["k"]
    options = _authors_options(args)
    bands = band_scores(
        q, k, options.get("block_size", 128), options.get("low_freq_dim"), options.get("high_freq_dim"),
        None if options.get("calibrate", True) else (1.0, 1.0), None, None,
    )  # fmt: skip
    (high, high_share), (low, low_share) = bands
    return {
        "block_mask": prism_blocks(q, k, **options),
        "probs_high_then_low": torch.cat([high_share, low_share], 2),
        "temp_high": high,
        "temp_low": low,
    }


def _run_block_sparse_output(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    q, k, v, keep = (inputs[name] for name in ("q", "k", "v", "block_mask"))
    pattern = masks.blocks(keep.bool(), int(args.get("block_size", 128))) & masks.causal(k.shape[2] - q.shape[2])
    return {"out": attend(q, k, v, mask=pattern)}


PORTS = (
    of_function(
        "block_estimate",
        run=_run_block_estimate,
    ),
    of_function(
        "block_sparse_output",
        run=_run_block_sparse_output,
    ),
)
