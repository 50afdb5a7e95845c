"""How the distributions' authors' functions map to ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saccade.catalogue.ports import of_function
from saccade.ops.distributions import entmax, sparsemax


def _run(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    dim, found = args.get("dim", -1), {}
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "sparsemax": sparsemax,
        "entmax15": entmax,
        "entmax_alpha": partial(entmax, alpha=args["alpha"]),
    }
    for name, function in functions.items():
        with torch.enable_grad():
            scores = inputs["scores"].detach().clone().requires_grad_()
            weights = function(scores.movedim(dim, -1)).movedim(-1, dim)
            (found[f"{name}_grad"],) = torch.autograd.grad(weights, scores, inputs["cotangent"])
        found[name] = weights.detach()
    return found


PORTS = (of_function("distributions", _run),)
