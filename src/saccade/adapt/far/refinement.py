"""Localized Refinement: the attention map of a concept's word lies on the concept's region.

Shape letters: B batch, H heads, P pixels of a map, T words of the prompt, J subjects, C channels, K
words of a subject, X those of all subjects, h, w height and width of a map or a mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.objective import Objective

#: of the loss
FORMS = ("mse", "balanced_l1", "leakage")
#: its weight lambda, where none is given
WEIGHTS = {"mse": 0.01, "balanced_l1": 1e-3, "leakage": 0.01}
_EPS, _LEAST = 1e-5, 1e-6


def grid_of(pixels: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of a map of so many pixels, in the proportions of a mask.

    Args:
        pixels: P.
        height, width: of the mask.

    Raises:
        ValueError: if there is no such map.
    """
    h = round(math.sqrt(pixels * height / width))
    if h < 1 or h * (pixels // max(1, h)) != pixels or abs(pixels / h / h - width / height) > width / height / h:
        raise ValueError(f"a map must have the proportions of its masks ({height} x {width}), got {pixels} pixels")
    return h, pixels // h


def words_of(map_BHPT: Tensor, tokens_BJ: Tensor) -> Tensor:
    """What each subject's word receives, (B, H, P, J).

    Args:
        map_BHPT: cross attention, after the softmax.
        tokens_BJ: the place of its word; (B, J, K) of several words, whose maps are averaged, -1 where there are fewer.
    """
    places_BJK = tokens_BJ if tokens_BJ.ndim == 3 else tokens_BJ[..., None]
    B, J, K = places_BJK.shape
    index_BHPX = places_BJK.clamp(min=0).view(B, 1, 1, J * K).expand(-1, *map_BHPT.shape[1:3], -1)
    found_BHPJK = map_BHPT.gather(3, index_BHPX).unflatten(3, (J, K))
    there_BJK = (places_BJK >= 0).to(map_BHPT.dtype)
    share_BJK = there_BJK / there_BJK.sum(2, keepdim=True).clamp(min=1)
    return (found_BHPJK * share_BJK[:, None, None]).sum(4)


def balanced_l1(
    map_BHPT: Tensor, masks_BJhw: Tensor, tokens_BJ: Tensor, valid_BJ: Tensor, *, normalise: bool = False
) -> Tensor:
    """Attention outside of the region less attention inside, of one layer, FastComposer's: a scalar in [-1, 1].

        l = sum a (1 - M) / sum (1 - M) - sum a M / sum M,     each head's mean over subjects, then over batch and heads

    Args:
        map_BHPT: cross attention of a layer.
        masks_BJhw: M; scaled to the map with antialiasing.
        tokens_BJ: see `words_of`.
        valid_BJ: 1 for subjects that count.
        normalise: each head's map is divided by its maximum.
    """
    a_BHPJ = words_of(map_BHPT, tokens_BJ)
    grid = grid_of(map_BHPT.shape[2], *masks_BJhw.shape[2:])
    inside_B1PJ = F.interpolate(masks_BJhw, grid, mode="bilinear", antialias=True).flatten(2).mT[:, None]
    if normalise:
        a_BHPJ = a_BHPJ / (a_BHPJ.amax(2, keepdim=True) + _EPS)
    outside_B1PJ = 1 - inside_B1PJ
    out_BHJ = (a_BHPJ * outside_B1PJ).sum(2) / (outside_B1PJ.sum(2) + _EPS)
    in_BHJ = (a_BHPJ * inside_B1PJ).sum(2) / (inside_B1PJ.sum(2) + _EPS)
    valid_B1J = valid_BJ[:, None]
    return (((out_BHJ - in_BHJ) * valid_B1J).sum(2) / (valid_B1J.sum(2) + _EPS)).mean()


def region_maps(maps: Sequence[Tensor], masks_BJhw: Tensor, tokens_BJ: Tensor) -> tuple[Tensor, Tensor]:
    """a and M, (B, J, P): the mean over layers and heads, divided by its maximum, and the masks at its size.

    Args:
        maps: cross attention (B, H, P, T) of each layer; of one size.
        masks_BJhw, tokens_BJ: as in `balanced_l1`; masks are scaled to the nearest pixel.

    Raises:
        ValueError: if layers differ in their pixels.
    """
    sizes = {x.shape[2] for x in maps}
    if len(sizes) != 1:
        raise ValueError(f"layers whose maps are averaged must have one size, got {sorted(sizes)} pixels")
    mean_BPJ = torch.stack([words_of(x, tokens_BJ).mean(1) for x in maps]).mean(0)
    a_BJP = (mean_BPJ / mean_BPJ.amax(1, keepdim=True).clamp(min=_LEAST)).mT
    grid = grid_of(a_BJP.shape[2], *masks_BJhw.shape[2:])
    return a_BJP, F.interpolate(masks_BJhw, grid, mode="nearest").flatten(2)


def refinement(
    maps: Sequence[Tensor],
    masks_BJhw: Tensor,
    tokens_BJ: Tensor,
    valid_BJ: Tensor | None = None,
    *,
    form: str = "mse",
    normalise: bool = False,
) -> Tensor:
    """L_LR, a scalar.

        mse          sum_j mean_p (M_j - a_j)^2,           a the mean over layers and heads, over its maximum
        balanced_l1  see `balanced_l1`, the mean over layers
        leakage      sum_j of the mean of a_j over the other subjects' regions, its own left out

    `mse` and `leakage` are the mean over images in which a subject counts.

    Args:
        maps: cross attention (B, H, P, T) of each layer, after the softmax.
        masks_BJhw: M, the region of each subject, 0 or 1.
        tokens_BJ: the place of its word in the prompt; see `words_of`.
        valid_BJ: which subjects count; all where None. None of an image without masks, or whose prompt was dropped.
        form: as above.
        normalise: of `balanced_l1`.

    Raises:
        ValueError: if shapes do not fit, or there is no such form.
    """
    _check(maps, masks_BJhw, tokens_BJ, form)
    masks_BJhw = masks_BJhw.to(maps[0].dtype)
    valid_BJ = masks_BJhw.new_ones(masks_BJhw.shape[:2]) if valid_BJ is None else valid_BJ.to(masks_BJhw.dtype)
    if form == "balanced_l1":
        return torch.stack([balanced_l1(x, masks_BJhw, tokens_BJ, valid_BJ, normalise=normalise) for x in maps]).mean()
    a_BJP, inside_BJP = region_maps(maps, masks_BJhw, tokens_BJ)
    if form == "mse":
        loss_BJ = (inside_BJP - a_BJP).square().mean(2)
    else:
        counted_BJP = inside_BJP * valid_BJ[..., None]
        others_BJP = (counted_BJP.sum(1, keepdim=True) - counted_BJP).clamp(0, 1) * (1 - inside_BJP)
        loss_BJ = (a_BJP * others_BJP).sum(2) / others_BJP.sum(2).clamp(min=1)
    return (loss_BJ * valid_BJ).sum() / valid_BJ.amax(1).sum().clamp(min=1)


class FaR(nn.Module):
    """L = L_dm + prior_weight L_prior + weight L_LR.

    Args:
        form: of L_LR, one of `FORMS`.
        weight: lambda; the form's own of `WEIGHTS` where None. 0 is plain joint fine-tuning.
        prior_weight: lambda_p.
        masked: what a subject does not cover does not count in L_dm.
        normalise: of `balanced_l1`.

    Raises:
        ValueError: if there is no such form, or a weight is negative.
    """

    def __init__(
        self,
        form: str = "mse",
        *,
        weight: float | None = None,
        prior_weight: float = 1.0,
        masked: bool = False,
        normalise: bool = False,
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        self.form, self.weight, self.prior_weight = form, WEIGHTS[form] if weight is None else weight, prior_weight
        if min(self.weight, prior_weight) < 0:
            raise ValueError(f"weights must not be negative, got {self.weight} and {prior_weight}")
        self.masked, self.normalise = masked, normalise

    def forward(
        self,
        predicted: Tensor,
        target: Tensor,
        maps: Sequence[Tensor],
        masks_BJhw: Tensor,
        tokens_BJ: Tensor,
        valid_BJ: Tensor | None = None,
        prior_B: Tensor | None = None,
    ) -> Objective:
        """
        Args:
            predicted: what the network says of a noisy latent, (B, C, height, width).
            target: the noise, or the velocity.
            maps, masks_BJhw, tokens_BJ, valid_BJ: see `refinement`.
            prior_B: True for images of a class alone, in which no subject counts.

        Raises:
            ValueError: if shapes do not fit.
        """
        if predicted.shape != target.shape or predicted.ndim != 4:
            raise ValueError(
                f"predicted must be of the target's shape {tuple(target.shape)}, got {tuple(predicted.shape)}"
            )
        _check(maps, masks_BJhw, tokens_BJ, self.form)
        prior_B = torch.zeros(len(predicted), dtype=torch.bool, device=predicted.device) if prior_B is None else prior_B
        own_B = ~prior_B
        valid_BJ = torch.ones_like(masks_BJhw[:, :, 0, 0]) if valid_BJ is None else valid_BJ.to(masks_BJhw.dtype)
        valid_BJ = valid_BJ * own_B[:, None]
        error_BChw = (target - predicted).square()
        if self.masked:
            covered_B1hw = (masks_BJhw * valid_BJ[..., None, None]).amax(1, keepdim=True).to(error_BChw.dtype)
            covered_B1hw = F.interpolate(covered_B1hw, error_BChw.shape[2:], mode="nearest")
            error_BChw = torch.where(prior_B[:, None, None, None], error_BChw, error_BChw * covered_B1hw)
        error_B = error_BChw.mean((1, 2, 3))
        terms = {"diffusion": _mean(error_B, own_B), "prior": _mean(error_B, prior_B)}
        terms["refinement"] = refinement(
            maps, masks_BJhw, tokens_BJ, valid_BJ, form=self.form, normalise=self.normalise
        )
        loss = terms["diffusion"] + self.prior_weight * terms["prior"] + self.weight * terms["refinement"]
        return Objective(loss, terms)


def _mean(x_B: Tensor, among_B: Tensor) -> Tensor:
    """0 where there is nothing among them."""
    among_B = among_B.to(x_B.dtype)
    return (x_B * among_B).sum() / among_B.sum().clamp(min=1)


def _check(maps: Sequence[Tensor], masks_BJhw: Tensor, tokens_BJ: Tensor, form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if not maps or any(x.ndim != 4 for x in maps):
        raise ValueError("maps must be cross attention (batch, heads, pixels, words) of a layer at least")
    if masks_BJhw.ndim != 4 or tokens_BJ.shape[:2] != masks_BJhw.shape[:2] or len(maps[0]) != len(masks_BJhw):
        raise ValueError(
            f"masks must be (batch, subjects, height, width) and tokens (batch, subjects), got "
            f"{tuple(masks_BJhw.shape)} and {tuple(tokens_BJ.shape)} for {len(maps[0])} maps"
        )
