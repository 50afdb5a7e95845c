"""The paper's claim at laptop size: blobs on textures that were not trained on, found on a frozen random CLIP."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from saccade.catalogue import Claim, ClaimResult
from saccade.extras import need
from saccade.models.zsad_codesign.losses import anomaly_loss
from saccade.models.zsad_codesign.network import ACDCLIP

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

_SIDE, _PATCH = 48, 4
#: sentences of both states, as numbers; 9 ends each
_SENTENCES = torch.tensor([[[1, 2, 3, 9], [1, 4, 3, 9]], [[1, 5, 3, 9], [1, 6, 3, 9]]])


def textures(count: int, generator: Generator, unseen: bool = False) -> tuple[Tensor, Tensor]:
    """Noisy stripes (B, 3, 48, 48), on half of which a blob takes most of them away, and where (B, 48, 48).

    Args:
        count: B.
        generator: of all that is random.
        unseen: of widths of stripes that the others have not.
    """
    angle_B = torch.pi * torch.rand(count, generator=generator)
    rate_B = 0.9 + 0.5 * torch.rand(count, generator=generator) + (0.5 if unseen else 0)
    at = torch.arange(_SIDE).float()
    along_BHW = angle_B.cos()[:, None, None] * at[:, None] + angle_B.sin()[:, None, None] * at
    phase_B11 = 2 * torch.pi * torch.rand(count, 1, 1, generator=generator)
    image_BHW = (rate_B[:, None, None] * along_BHW + phase_B11).sin()
    middle_B2 = 8 + (_SIDE - 16) * torch.rand(count, 2, generator=generator)
    radius_B = 4 + 4 * torch.rand(count, generator=generator)
    square_BHW = (at[:, None] - middle_B2[:, :1, None]).square() + (at - middle_B2[:, 1:, None]).square()
    there_B = (torch.rand(count, generator=generator) < 0.5).float()
    mask_BHW = (square_BHW < radius_B.square()[:, None, None]).float() * there_B[:, None, None]
    image_BHW = image_BHW * (1 - 0.7 * mask_BHW)
    image = image_BHW[:, None] + 0.5 * torch.randn(count, 3, _SIDE, _SIDE, generator=generator)
    return image, mask_BHW


def _network(form: str, width: int) -> ACDCLIP:
    kernels: dict[str, Any] = {"conv_lora": (3, 5), "lora": (1,), "none": (1,)}
    model = ACDCLIP(
        image_size=_SIDE, patch=_PATCH, dim=width, depth=4, num_heads=2, text_dim=width, text_depth=4, text_heads=2,
        vocabulary=10, context=4, levels=2, head_dim=32, rank=8, conv_rank=8, kernels=kernels[form],
        weight=0.0 if form == "none" else 0.2,
    )  # fmt: skip
    if form == "none":
        for side in (model.image_side, model.text_side):
            side.weights.requires_grad_(False)
    return model


def _loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return anomaly_loss(model(batch[0], _SENTENCES), batch[1].amax((1, 2)), batch[1]).loss


def _claim(lab: Lab) -> ClaimResult:
    """AUROC of pixels and of images on unseen textures: with Conv-LoRA, with LoRA, with heads alone; two seeds."""
    area = need("sklearn.metrics", "the area under the ROC curve").roc_auc_score
    image, mask = textures(lab.size(200, 8), lab.held_out(), unseen=True)

    def measure(trial: Trial) -> dict[str, float]:
        with torch.no_grad():
            said = trial.model(image, _SENTENCES)
            scores = trial.model.scores(said)  # type: ignore[operator]
        small, truth = (F.avg_pool2d(x, 2).flatten() for x in (said.logits, mask[:, None]))
        return {
            "pixel_auroc_percent": 100 * area((truth > 0.5).numpy(), small.numpy()),
            "image_auroc_percent": 100 * area(mask.flatten(1).amax(1).numpy(), scores.numpy()),
        }

    width = lab.size(32, 8)
    trials = lab.forms(
        {form: partial(_network, form, width) for form in ("conv_lora", "lora", "none")},
        lambda generator: textures(lab.size(16, 4), generator),
        measure,
        150, loss=_loss, lr=3e-3, seeds=2,
    )  # fmt: skip
    measured = trials.means() | trials.spreads("{form}_{figure}_spread", "pixel_auroc_percent")
    conv, low, none = (measured[f"{form}_pixel_auroc_percent"] for form in ("conv_lora", "lora", "none"))
    return ClaimResult(measured, holds=conv > low > none, note="means of two seeds; the frozen CLIP is random")


CLAIM = Claim(
    paper="superior accuracy and robustness on twelve industrial and medical benchmarks without examples (no figures "
    "at hand)",
    expected="blobs on unseen textures: pixels are told apart better (AUROC) with Conv-LoRA than with LoRA, and with "
    "that than by heads on a frozen CLIP",
    run=_claim,
)
