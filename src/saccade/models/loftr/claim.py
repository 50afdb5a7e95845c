"""The paper's claim at laptop size: photographs under homographies, with the transformer and without."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch

from saccade.catalogue import Claim, ClaimResult
from saccade.models.loftr.network import LoFTR

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial


def _claim(lab: Lab) -> ClaimResult:
    """A small LoFTR with its coarse layers and without, on the task of matching; equal steps."""
    task = lab.task("match")
    share = lab.size(1.0, 0.01)

    def measure(trial: Trial) -> dict[str, float]:
        model = cast(LoFTR, trial.model)
        errors = []
        for image0, image1, positions in task.held_out(share):
            said = model(image0, image1)
            assert said.coarse0 is not None and said.coarse1 is not None
            x, y = said.coarse0.long().unbind(1)
            truth = positions[said.batch_indexes, 0, y, x]
            found = torch.stack([(points - truth).norm(dim=1) for points in (said.coarse1, said.keypoints1)], 1)
            errors.append(found[(truth / 8 - said.coarse1 / 8).abs().amax(1) < 0.75])  # of cells that are right
        of_right = torch.cat(errors)
        coarse, fine = of_right.mean(0).tolist() if len(of_right) else (0.0, 0.0)
        figures = task.measured(lambda *pair: model(*pair).of(0), share)
        kept = {name: figures[name] for name in ("auc10", "precision", "matches")}
        return kept | {"coarse_px": coarse, "fine_px": fine}

    sizes: dict[str, Any] = {
        "widths": lab.size((16, 24, 32), (4, 6, 8)), "num_heads": lab.size(4, 2), "fine_heads": lab.size(4, 2),
        "border": 0,
    }  # fmt: skip
    forms = {
        "with": partial(LoFTR, **sizes, layers=("self", "cross") * lab.size(2, 1)),
        "without": partial(LoFTR, **sizes, layers=()),
    }
    measured = lab.forms(
        forms,
        lambda generator: task.drawn(lab.size(4, 1), generator),
        measure,
        200, loss=task.loss, lr=3e-3,
    ).means("{form}_{figure}")  # fmt: skip
    return ClaimResult(
        measured,
        holds=measured["with_auc10"] > measured["without_auc10"]
        and measured["with_fine_px"] < measured["with_coarse_px"],
        note="one seed; windows of photographs under homographies, in other light; errors in px of the right cells",
    )


CLAIM = Claim(
    paper="features that depend on both images match where a detector finds nothing; windows refine to sub-pixel",
    expected="corners are nearer to the truth with the transformer (area under the curve), and refinement helps",
    run=_claim,
)
