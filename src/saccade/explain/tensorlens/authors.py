"""How what is recorded maps to ours: of the authors' code nothing is, but of the rollout that they compare with."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.catalogue.ports import of_function
from saccade.explain.maps import rollout
from saccade.explain.recording import AttentionRecord


class _Given(AttentionRecord):
    """A layer whose attention is given, rows of any sum."""

    def __init__(self, attention_BHLL: Tensor) -> None:
        nothing = attention_BHLL[..., :0]
        super().__init__("", 0, None, nothing, nothing, nothing, None, 1.0, None, nothing)
        self.attention_BHLL = attention_BHLL

    def weights(self, **chosen: Any) -> Tensor:
        return self.attention_BHLL


def _run(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    records = [_Given(each) for each in inputs["attention"]]
    return {"rollout": rollout(records), "rollout_from_1": rollout(records, start=1)}


PORTS = (of_function("rollout_baseline", run=_run),)
