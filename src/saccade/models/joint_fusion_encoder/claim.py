"""The paper's claim at laptop size: where picture and request must be understood together, late fusion falls behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saccade.catalogue import Claim, ClaimResult
from saccade.models.joint_fusion_encoder.baselines import LateFusion
from saccade.models.joint_fusion_encoder.network import JointFusionEncoder

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial


def _claim(lab: Lab) -> ClaimResult:
    """Recall of requests and of descriptions: one sequence, the sum of two towers' vectors, two blocks over both."""
    task = lab.task("retrieve")
    given = task.arguments(None)
    sizes: dict[str, Any] = {
        **given, "dim": 64, "depth": 2, "num_heads": 4, "patch": 8, "vision_dim": 64, "vision_depth": 2,
        "vision_heads": 4,
    }  # fmt: skip

    def measure(trial: Trial) -> dict[str, float]:
        figures = task.figures(trial.model)
        return {"recall1": figures["recall1"], "ndcg": figures["ndcg"], "text_recall1": figures["text_recall1"]}

    trials = lab.forms(
        {
            "joint": lambda: JointFusionEncoder(**sizes, hidden=128, embed_dim=32),
            "score_fusion": lambda: LateFusion("score", **sizes, embed_dim=64),
            "feature_fusion": lambda: LateFusion("feature", **sizes, embed_dim=64),
        },
        lambda generator: task.to_device(task.drawn(lab.size(32, 2), generator)),
        measure,
        400, loss=task.loss, lr=2e-3, task="retrieve",
    )  # fmt: skip
    measured = {"chance_recall1": task.chance(), **trials.means()}
    return ClaimResult(
        measured,
        holds=measured["joint_recall1"] > measured["score_fusion_recall1"],
        note="one seed; of the same widths and depths, not the same parameters",
    )


CLAIM = Claim(
    paper="moderate gains over two towers and late fusion in single- and cross-modal retrieval, prominent ones where "
    "modalities must be fused (figures not read)",
    expected="pictures of things: recall@1 of requests is higher jointly than by score fusion",
    run=_claim,
)
