"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.attention.attention_engine.operator import Identity, relu_attend, retention_attend, sigmoid_attend
from saccade.catalogue.ports import of_function
from saccade.ops import masks
from saccade.ops.attend import attend


def _run_authors(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    causal = masks.causal() if args.get("causal", True) else None
    relu_mask = masks.causal() if args.get("relu_causal", False) else None
    softmax, lse = attend(q, k, v, mask=causal, scale=args.get("scale_softmax"), return_lse=True)
    decay = inputs["retention.decay_mask"]
    size = attend(
        q, k, torch.ones_like(v[..., :1]), mask=causal, normalize=Identity(),
        score_mod=lambda s, b, h, i, j: (s * decay[b if decay.shape[0] > 1 else b * 0, h, i, j]).abs(),
    )  # fmt: skip
    return {
        "softmax.out": softmax,
        "softmax.lse": lse,
        "sigmoid.out": sigmoid_attend(q, k, v, inputs["sigmoid.bias"], mask=causal),
        "relu.out": relu_attend(q, k, v, mask=relu_mask, scale=args.get("relu_scale")),
        "retention.out": retention_attend(q, k, v, decay, causal=causal is not None),
        "retention.r": size[..., 0].clamp(min=1.0),
    }


PORTS = (of_function("parallel_variants", run=_run_authors),)
