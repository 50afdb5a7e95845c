"""How the authors' functions map to ours: they take the weights of a whole model, with norms folded, and one score."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments
from saccade.explain.sparse_attention_decomposition.decomposition import SparseAttentionDecomposition, projected


def _run(module: SparseAttentionDecomposition, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    layer, head, source, destination = (int(inputs[name]) for name in ("layer", "head", "src_token", "dest_token"))
    x_ND = inputs["X"]
    found = module(x_ND, inputs["z"], inputs["ln_scale"].flatten(), layer, head, destination, source)
    u, v = (each[:, found.used] for each in (found.u, found.v))
    removed = [
        x_ND[place] - projected(each, found.used, x_ND[place])
        for each, place in ((found.u, destination), (found.v, source))
    ]
    return {
        "omega": found.omega,
        "singular_values": found.sigma,
        "score_unscaled": found.score,
        "products_by_sv": found.terms,
        "svs_used": torch.tensor([k for k in found.order().tolist() if found.used[k]]),
        "contrib_src": found.source,
        "contrib_dest": found.destination,
        "P_u": u @ u.mT,
        "P_v": v @ v.mT,
        "X_dest_removed": removed[0],
        "X_src_removed": removed[1],
    }


PORTS = (
    AuthorsPort(
        "decomposition",
        build=Arguments(
            SparseAttentionDecomposition,
            {
                "n_layers": "num_layers",
                "n_heads": "num_heads",
                "d_model": "dim",
                "d_head": "head_dim",
                "perc_contrib_thresh": "share",
            },
            bias_each=True,
        ),
        convert=Names({"W_Q": "query", "W_K": "key", "W_O": "out", "b_Q": "query_bias", "b_K": "key_bias"}),
        run=_run,
    ),
)
