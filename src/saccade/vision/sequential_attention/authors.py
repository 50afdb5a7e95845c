"""How the authors' module maps to ours: a row of calls, each at its progress with its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments
from saccade.vision.sequential_attention.gate import SequentialAttention


class _Calls(nn.Module):
    """Nothing that a state dict holds: the recording has its own logits for every call."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments


_BUILD = Arguments(
    _Calls,
    {
        "num_candidates": "channels",
        "num_candidates_to_select": "select",
        "num_candidates_to_select_per_step": "per_step",
        "start_percentage": "start",
        "stop_percentage": "stop",
        "reset_weights": "reset",
    },
    timing="released",
)


@torch.no_grad()
def _run(calls: _Calls, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    module = SequentialAttention(**calls.arguments)
    found: dict[str, list[Tensor]] = {"mask": [], "selected": [], "attention_weights_after": []}
    rows = zip(inputs["attention_weights"], inputs["reset_draws"], inputs["training_percentage"].tolist(), strict=True)
    for logits_d, draws_d, progress in rows:
        module.logits.copy_(logits_d)
        module.advance(progress, draws_d)
        found["mask"].append(module.mask())
        found["selected"].append(module.selected.float())
        found["attention_weights_after"].append(module.logits.clone())
    return {name: torch.stack(values) for name, values in found.items()}


PORTS = (
    AuthorsPort(
        "sequential_attention",
        build=_BUILD,
        convert=Names({}),
        run=_run,
    ),
)
