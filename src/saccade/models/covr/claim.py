"""The paper's claim at laptop size: what is asked for is found by picture, description and request together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from saccade.catalogue import Claim, ClaimResult
from saccade.models.covr.network import CoVR
from saccade.models.embedding import EmbeddingOutput

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial


class _Partial(CoVR):
    """A query without the picture or the request, and so without a description; targets and captions are as ever."""

    left_out = ""

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        description_ids: Tensor | None = None,
        description_mask: Tensor | None = None,
    ) -> EmbeddingOutput:
        if pixel_values is not None and input_ids is not None:
            if self.left_out == "picture":
                pixel_values = None
            if self.left_out == "request":
                input_ids = attention_mask = None
            description_ids = description_mask = None
        return super().forward(pixel_values, input_ids, attention_mask, description_ids, description_mask)


def _claim(lab: Lab) -> ClaimResult:
    """Recall of the whole network, and of those that are never given the picture or the request."""
    task = lab.task("retrieve")
    sizes: dict[str, Any] = {
        **task.arguments(None), "vision_dim": 64, "vision_depth": 2, "vision_heads": 4, "patch": 8, "dim": 64,
        "depth": 2, "num_heads": 4, "hidden": 128, "embed_dim": 32, "encode_token": None, "drop": 0.0, "frozen": False,
    }  # fmt: skip

    def without(what: str) -> CoVR:
        model = _Partial(**sizes)
        model.left_out = what
        return model

    trials = lab.forms(
        {
            "whole": lambda: CoVR(**sizes),
            "text_only": lambda: without("picture"),
            "picture_only": lambda: without("request"),
        },
        lambda generator: task.to_device(task.drawn(lab.size(32, 2), generator)),
        lambda trial: _figures(task, trial),
        400, loss=task.loss, lr=2e-3, task="retrieve",
    )  # fmt: skip
    measured = {"chance_recall1": task.chance(), **trials.means()}
    others = max(measured["text_only_recall1"], measured["picture_only_recall1"])
    return ClaimResult(
        measured,
        holds=measured["whole_recall1"] > others,
        note="one seed; the description says of the reference nothing that the picture does not show",
    )


def _figures(task: Any, trial: Trial) -> dict[str, float]:
    return {name: value for name, value in task.figures(trial.model).items() if name in ("recall1", "ndcg")}


CLAIM = Claim(
    paper="71.3 % recall@1 on Dense-WebVid-CoVR with picture and text, 3.4 points above the best before",
    expected="pictures of things: recall@1 of picture and request is above that of either alone",
    run=_claim,
)
