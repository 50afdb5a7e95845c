"""The paper's claim on maps of a known correspondence: the style is the content's regions in another order."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.catalogue import Claim, ClaimResult
from saccade.models.stya2k.attention import mvn
from saccade.ops.attend import attend
from saccade.ops.keywise import block, choose_regions, distributed_attention, progressive_attention, unblock

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab

_REGION, _HEADS = 8, 8


def _all_to_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What A2K stands in for: each position attends to all of the other map."""
    heads = (x.flatten(2).unflatten(1, (_HEADS, -1)).mT for x in (q, k, v))
    return attend(*heads, scale=1.0)


def _keywise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    options = {"region": _REGION, "num_heads": _HEADS}
    return distributed_attention(q, k, v, **options) + progressive_attention(q, k, v, **options)[0]


def _claim(lab: Lab) -> ClaimResult:
    """Features of a photograph with noise beside those without, in permuted regions: where do positions look?"""
    generator = lab.generator()
    (photograph,) = lab.data.photographs("astronaut")
    side = lab.size(64, 16)
    image = F.interpolate(photograph[None], (2 * side, 2 * side), mode="bilinear", antialias=True)
    weight = torch.randn(32, 3, 5, 5, generator=generator)
    clean = mvn(F.conv2d(image, weight, padding=2, stride=2))
    order = torch.randperm((side // _REGION) ** 2, generator=generator)
    style = unblock(block(clean, _REGION)[:, :, order], _REGION, (side, side))
    home = torch.argsort(order)  # where each region of the content lies in the style
    measured: dict[str, float] = {}
    for noise in (0.0, 0.5, 1.0):
        content = mvn(clean + noise * torch.randn(clean.shape, generator=generator))
        # the norm of a feature would decide, not what it says
        q, k = F.normalize(content, dim=1), F.normalize(style, dim=1)
        found = choose_regions(q, k, region=_REGION)[0, 0]
        best = (q.flatten(2).mT @ k.flatten(2)).argmax(-1).view(1, 1, side, side)
        rows, columns = best // side // _REGION, best % side // _REGION
        regions_nr = block((rows * (side // _REGION) + columns).float(), _REGION)[0, 0]
        one = (regions_nr == regions_nr[:, :1]).all(1)
        measured[f"regions_found_percent_at_noise_{noise:g}"] = 100 * (found == home).float().mean().item()
        measured[f"all_to_all_one_region_percent_at_noise_{noise:g}"] = 100 * one.float().mean().item()
    width = lab.size(256, 16)
    maps = torch.randn(3, 1, width, side, side, generator=generator) / 4
    with torch.no_grad():
        times = [lab.seconds(partial(function, *maps), 5) for function in (_all_to_all, _keywise)]
    measured["all_to_all_seconds"], measured["keywise_seconds"] = times
    measured["speed_over_all_to_all"] = times[0] / times[1]
    home_share, one_share = (
        measured[f"{name}_percent_at_noise_1"] for name in ("regions_found", "all_to_all_one_region")
    )
    return ClaimResult(measured, holds=home_share > 90 and one_share < 50)


CLAIM = Claim(
    paper="matching regions instead of positions keeps semantic structure and gives consistent patterns of style, "
    "where all-to-all matching distorts them",
    expected="progressive attention finds most permuted regions again under noise as strong as the features, each with "
    "one match, where the best matches of a region's positions are scattered; and it costs less",
    run=_claim,
)
