"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.attention.mra.operator import mra_attend
from saccade.catalogue import AuthorsPort
from saccade.catalogue.ports import of_function


def _run_authors(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    """The authors' call: q, k, v (B, H, L, D) or (B H, L, D), mask (B, L) of 0 and 1."""
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    flat = q.ndim == 3
    if flat:
        q, k, v = q[:, None], k[:, None], v[:, None]
    mask = inputs.get("mask")
    out, chosen = mra_attend(
        q,
        k,
        v,
        resolutions=(int(args.get("block_size", 32)), 1),
        num_blocks=int(args["num_blocks"]),
        mode=args.get("approx_mode", "full"),
        first_blocks=int(args.get("initial_prior_first_n_blocks", 0)),
        diagonal_blocks=int(args.get("initial_prior_diagonal_n_blocks", 0)),
        mask=None if mask is None else mask > 0.5,
        released_ranking=True,
        return_map=True,
    )
    return {"out": out[:, 0], "fine_blocks": chosen[:, 0]} if flat else {"out": out, "fine_blocks": chosen}


def _ports() -> tuple[AuthorsPort, ...]:
    return tuple(
        of_function(name, run=_run_authors
        )
        for name in ("mra2_full", "mra2_sparse")
    )  # fmt: skip


PORTS = _ports()
