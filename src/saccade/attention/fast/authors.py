"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from saccade.attention.fast.operator import Normalization, fastmax_attend
from saccade.catalogue.ports import of_function


def _run_experiments(module: nn.Module, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    q, k, v = (inputs[name] for name in "qkv")
    forms: dict[str, Normalization] = {"norm0": "plain", "norm1": "centered"}
    return {
        f"p{degree}.{'causal' if causal else 'full'}.{name}": fastmax_attend(
            q,
            k,
            v,
            degree=degree,
            causal=causal,
            normalization=form,
            temperature=args.get("denum_term", 8.0) if form == "plain" else None,
        )
        for degree in (1, 2)
        for causal in (False, True)
        for name, form in forms.items()
    }


def _run_library(module: nn.Module, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    q, k, v = (inputs[name] for name in "qkv")
    normalized = bool(args.get("normalize", 0))
    return {
        f"p{degree}.{'causal' if causal else 'full'}": fastmax_attend(
            q,
            k,
            v,
            degree=degree,
            causal=causal,
            normalization="limited" if normalized else "plain",
            # without normalisation the library has x = q . k
            temperature=None if normalized else q.shape[-1] ** -0.5,
            coefficients=(args.get("a0", 1.0), args.get("a1", 1.0), args.get("a2", 0.5)),
            limit=args.get("lim", 1.0),
        )
        for degree in (1, 2)
        for causal in (False, True)
    }


PORTS = (
    of_function("fastmax", run=_run_experiments),
    of_function("fastmax_limit", run=_run_library),
)
