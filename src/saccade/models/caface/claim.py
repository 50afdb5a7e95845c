"""The paper's claim at laptop size: clusters by style beat the mean of the features, the more images the more."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from saccade.catalogue import Claim, ClaimResult
from saccade.models.caface.aggregator import ClusterAggregate
from saccade.models.caface.losses import training_loss

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

#: channels of a feature and of the statistics; deviations of the noise on a good and a bad image, over the centre's
_DIM, _STYLE, _GOOD, _BAD = 32, 8, 0.2, 3.0


def _people(count: int, images: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Features, statistics of a style that tells how much noise there is, and centres of unit length."""
    centre_BC = F.normalize(torch.randn(count, _DIM, generator=generator), dim=-1)
    bad_BN = torch.rand(count, images, generator=generator) < 0.5
    sigma_BN1 = torch.where(bad_BN, _BAD, _GOOD)[..., None] / _DIM**0.5
    features = centre_BC[:, None] + sigma_BN1 * torch.randn(count, images, _DIM, generator=generator)
    features = features / torch.linalg.vector_norm(features, dim=-1, keepdim=True)  # else the length would tell
    statistics = 0.3 * torch.randn(count, images, _STYLE, 2, generator=generator)
    return features, statistics + bad_BN[..., None, None], centre_BC


def _claim(lab: Lab) -> ClaimResult:
    """Half of a person's images are noise, and the style tells which; templates of 4, 8 and 32 images, and the mean.

    New people are judged on. Then the 32 images come in batches of 8, forwards and backwards.
    """
    features, statistics, centre = _people(lab.size(256, 8), 32, lab.held_out())

    def near(template: Tensor) -> float:
        return float(F.cosine_similarity(template, centre, dim=-1).mean())

    def measure(trial: Trial) -> dict[str, float]:
        model = cast(ClusterAggregate, trial.model)
        found = {f"cosine_{n}": near(model(features[:, :n], statistics[:, :n])) for n in (4, 8, 32)}
        templates = []
        batches = list(zip(features.split(8, 1), statistics.split(8, 1)))
        for order in (batches, batches[::-1]):
            summary = None
            for each in order:
                summary = model.summarise(*each, summary=summary)
            assert summary is not None
            templates.append(model.template(summary))
        off = (templates[0] - templates[1]).abs().max() / templates[0].abs().max()
        return {**found, "cosine_32_in_batches": near(templates[0]), "order_of_batches_off": float(off)}

    trials = lab.forms(
        {"caface": lambda: ClusterAggregate(_DIM, _STYLE, style_dim=16, norm_dim=16, num_heads=4, depth=1)},
        lambda generator: _people(32, 16, generator),
        measure,
        200, loss=lambda model, batch: training_loss(cast(ClusterAggregate, model), *batch), lr=3e-3, seeds=2,
    )  # fmt: skip
    measured = {
        **trials.means(),
        **{f"mean_cosine_{n}": near(features[:, :n].mean(1)) for n in (4, 8, 32)},
    }
    rises = measured["caface_cosine_4"] < measured["caface_cosine_8"] < measured["caface_cosine_32"]
    beats = all(measured[f"caface_cosine_{n}"] > measured[f"mean_cosine_{n}"] for n in (4, 8, 32))
    return ClaimResult(measured, holds=rises and beats and measured["caface_order_of_batches_off"] < 1e-5)


CLAIM = Claim(
    paper="better than averaging and than attention or recurrent fusion on large sets of low quality (IJB-S)",
    expected="templates lie nearer to a person's true centre than the mean of the features, rise with the number of "
    "images, and are the same in any order of batches",
    run=_claim,
)
