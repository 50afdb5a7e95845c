"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.attention.nats.operator import GLOBAL, end_index, lifetimes, nats_attend
from saccade.catalogue.ports import of_function
from saccade.ops.heads import repeat_heads


def _run_authors(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    """The authors' kernel: heads first, one-hot roles per chunk."""
    q, k, v, roles = (inputs[name] for name in ("q", "k", "v", "roles"))
    options: dict[str, Any] = {"window": int(args["local_seq_max_length"])}
    options["chunk_size"] = int(args.get("nats_chunk_size", 1))
    N, group = q.shape[2], q.shape[1] // k.shape[1]
    until = lifetimes(roles.argmax(-1), N, **options).clamp(max=N - 1)
    ended = torch.zeros(*until.shape[:2], N + 1, dtype=torch.int32, device=q.device)
    ended.scatter_add_(2, until + 1, torch.ones_like(until, dtype=torch.int32))
    seen = torch.arange(1, N + 1, device=q.device) - ended[..., :N].cumsum(-1)
    return {
        "out": nats_attend(q, k, v, roles, **options),
        "end_index": end_index(roles[..., GLOBAL] > 0),
        "keys_per_query": repeat_heads(seen[..., None], k.shape[1] * group)[..., 0].to(torch.int32),
    }


PORTS = (of_function("nats_attention", run=_run_authors),)
