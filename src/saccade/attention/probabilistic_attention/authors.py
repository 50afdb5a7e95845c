"""How the authors' layer maps to ours: it has no weights, and its channels stand before its tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.attention.probabilistic_attention.operator import (
    Annotations,
    Mixture,
    RelativePositions,
    probabilistic_attend,
)
from saccade.catalogue.ports import of_function


def _theirs(x_BHNE: Tensor, offsets_BHNE: Tensor | None) -> Tensor:
    """Channels before tokens; where there are offsets, channel after channel of values and offsets in turn."""
    out = x_BHNE.mT
    return out if offsets_BHNE is None else torch.stack([out, offsets_BHNE.mT], 3).flatten(2, 3)


def _annotations(fixed: Tensor, width: int) -> Annotations:
    """v_fixed is values, learnt offsets (where there are any), and the indicator."""
    offsets = fixed[:, :, width : 2 * width].mT if fixed.shape[2] > 2 * width else None
    return Annotations(fixed[:, :, :width].mT, fixed[:, :, -1] != 0, offsets)


def _run(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    """The outputs that a recording's inputs are for. With precisions of each unit the authors' layer can neither adapt
    keys nor hold values by a prior, so that nothing of it is recorded."""
    q, zeta, mu = (inputs[name].mT for name in ("q", "zeta", "mu"))
    alpha, beta = inputs["alpha"], inputs["beta"]
    first = inputs["v_init"].mT if "v_init" in inputs else None
    lambdas = [inputs[name].mT if name in inputs else None for name in ("zeta_prior_precision", "mu_prior_precision")]
    fixed = _annotations(inputs["v_fixed"], mu.shape[-1]) if "v_fixed" in inputs else None
    r_q, r_k, r_v = (
        inputs[name].permute(1, 2, 0) if name in inputs else None for name in ("q_pos_emb", "zeta_pos_emb", "v_pos_emb")
    )
    keys_adapt, prior_holds = not alpha.ndim, not beta.ndim
    outputs: dict[str, Tensor] = {}

    def put(name: str, *, beta: float | Tensor = beta, **options: Any) -> None:
        mixture = {k: options.pop(k) for k in ("log_prior", "magnitude_priors", "positions") if k in options}
        found = probabilistic_attend(q, zeta, mu, Mixture(alpha, beta, **mixture), **options)
        outputs[name] = _theirs(found.out, found.offsets)

    put("dot_product_case", beta=0.0)
    put("map_magnitude_priors", initial=first)
    put("map_no_priors", magnitude_priors=False)
    if "pi" in inputs:
        put("map_pi", log_prior=inputs["pi"].log(), initial=first)
    if "nonzero_wts_mask" in inputs:
        put("map_masked", mask=inputs["nonzero_wts_mask"].bool()[None, None])
    if keys_adapt:
        put("key_adapt_no_prior_2it", initial=first, key_iterations=2)
        if lambdas[0] is not None:
            put("key_adapt_prior_3it", key_iterations=3, key_precision=lambdas[0])
    if fixed is not None:
        # the recording of unequal precisions was made with a first guess
        guess = None if prior_holds else first
        put("value_prop_no_prior_1it", initial=guess, annotations=fixed, value_iterations=1)
        if prior_holds and lambdas[1] is not None:
            values: dict[str, Any] = {"annotations": fixed, "value_iterations": 2, "value_precision": lambdas[1]}
            put("value_prop_prior_2it", initial=guess, **values)
            if keys_adapt and lambdas[0] is not None:
                put("both_prior", initial=first, key_iterations=1, key_precision=lambdas[0], **values)
    if r_q is not None and r_k is not None:
        put("position_qk_no_priors", magnitude_priors=False, positions=RelativePositions(r_q, r_k))
        if r_v is not None:
            put("position_qkv", positions=RelativePositions(r_q, r_k, r_v))
    return outputs


PORTS = (of_function("probabilistic_attention", run=_run),)
