"""How it is trained: the image's cross entropy, and focal and Dice losses of the map.

Adam, text adapters at 5e-4, image adapters at 1e-3, each times 0.9 an epoch; batches of 6, 20 epochs; gradients of the
mixing weights alone are cut at norm 1 (`groups`). CLIP is frozen.

Shape letters: B batch, H, W image, N pixels, K = 2 states.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.layers.objective import Objective
from saccade.models.segmentation import Saliency
from saccade.models.zsad_codesign.network import ACDCLIP

_EPS = 1e-5


def focal(shares_BKHW: Tensor, mask_BHW: Tensor, gamma: float = 2.0) -> Tensor:
    """The mean of -(1 - p)^gamma log p, with p the probability of the state that is true.

    Args:
        shares_BKHW: probabilities of both states.
        mask_BHW: 1 where something is wrong.
        gamma: power.
    """
    truth_BKHW = torch.stack([1 - mask_BHW, mask_BHW], 1).clamp(_EPS, 1 - _EPS)
    p_BHW = (truth_BKHW * shares_BKHW).sum(1) + _EPS
    return (-((1 - p_BHW) ** gamma) * p_BHW.log()).mean()


def dice(share_BHW: Tensor, mask_BHW: Tensor, smooth: float = 1.0) -> Tensor:
    """1 less the mean over images of (2 sum p y + s) / (sum p + sum y + s).

    Args:
        share_BHW: p.
        mask_BHW: y.
        smooth: s.
    """
    p_BN, y_BN = share_BHW.flatten(1), mask_BHW.flatten(1)
    return 1 - ((2 * (p_BN * y_BN).sum(1) + smooth) / (p_BN.sum(1) + y_BN.sum(1) + smooth)).mean()


def map_loss(shares_BKHW: Tensor, mask_BHW: Tensor) -> Objective:
    """Focal loss and the Dice losses of both states.

    Args:
        shares_BKHW: probabilities of both states, at the image's size, not blurred.
        mask_BHW: 1 where something is wrong.
    """
    mask_BHW = mask_BHW.to(shares_BKHW.dtype)
    terms = {
        "focal": focal(shares_BKHW, mask_BHW),
        "normal": dice(shares_BKHW[:, 0], 1 - mask_BHW),
        "abnormal": dice(shares_BKHW[:, 1], mask_BHW),
    }
    return Objective(torch.stack(list(terms.values())).sum(), terms)


def anomaly_loss(output: Saliency, label_B: Tensor, mask_BHW: Tensor) -> Objective:
    """The image's cross entropy and `map_loss`.

    Args:
        output: of the network in training.
        label_B: 1 where something is wrong with the image.
        mask_BHW: where.

    Raises:
        ValueError: if the output has no scores.
    """
    if output.score is None:
        raise ValueError("output must have the scores of ACDCLIP")
    whole = F.nll_loss(torch.stack([1 - output.score, output.score], 1).clamp(min=1e-12).log(), label_B.long())
    abnormal_BHW = output.logits[:, 0].sigmoid()
    loss, terms = map_loss(torch.stack([1 - abnormal_BHW, abnormal_BHW], 1), mask_BHW)
    return Objective(whole + loss, {"image": whole, **terms})


def groups(model: ACDCLIP, image_lr: float = 1e-3, text_lr: float = 5e-4) -> list[dict[str, Any]]:
    """What is trained, for an optimiser.

    Args:
        model: whose towers are left out.
        image_lr, text_lr: rates of the two sides.
    """
    image = [*model.image_side.parameters(), *model.gateway.parameters()]
    return [{"params": image, "lr": image_lr}, {"params": list(model.text_side.parameters()), "lr": text_lr}]


def cut(model: ACDCLIP, norm: float = 1.0) -> None:
    """Cut the gradient of the mixing weights, as the authors do before a step.

    Args:
        model: after the backward pass.
        norm: of all these weights' gradients together, at most.
    """
    torch.nn.utils.clip_grad_norm_([*model.image_side.weights, *model.text_side.weights], norm)
