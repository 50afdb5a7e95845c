"""The paper's claim at laptop size: a photograph in coloured haze, with and without the colour attention."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.models.mcaf_net.network import MCAFNet

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial


def _psnr(image: Tensor, clear: Tensor) -> float:
    return float((-10 * (image - clear).square().mean((1, 2, 3)).log10()).mean())


def _colour_error(image: Tensor, clear: Tensor) -> float:
    """The mean angle between colours, in degrees."""
    cosine = F.cosine_similarity(image + 1e-3, clear + 1e-3, dim=1).clamp(-1, 1)
    return float(torch.rad2deg(cosine.acos()).mean())


def _claim(lab: Lab) -> ClaimResult:
    """Windows of photographs in haze: as they are, dehazed with colour attention, and without; two seeds.

    Learned is the left three quarters of each photograph, judged the rest.
    """
    images = lab.data.photographs("astronaut", "chelsea", "coffee", "rocket")
    edges = [image.shape[2] * 3 // 4 for image in images]
    learn = [(image[..., :edge],) for image, edge in zip(images, edges)]
    judge = [(image[..., edge:],) for image, edge in zip(images, edges)]
    side = lab.size(32, 8)

    def hazy(pictures: list[tuple[Tensor]], count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        (clear,) = lab.data.crops(pictures, count, side, generator)
        return lab.data.hazy(clear, generator).image, clear

    given, clear = hazy(judge, lab.size(64, 2), lab.held_out())

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]).image - batch[1]).abs().mean()

    def measure(trial: Trial) -> dict[str, float]:
        image = trial.model(given).image.clamp(0, 1)
        return {"psnr_db": _psnr(image, clear), "colour_error_degrees": _colour_error(image, clear)}

    sizes: dict[str, Any] = {
        "widths": (8, 16, 16, 16, 8), "depths": (1, 1, 1, 1, 1), "key_stride": 4, "colour_heads": False
    }  # fmt: skip
    trials = lab.forms(
        {"mcaf": partial(MCAFNet, **sizes), "plain": partial(MCAFNet, **sizes, colour_attention=False)},
        lambda generator: hazy(learn, lab.size(8, 2), generator),
        measure,
        300, loss=loss, lr=3e-3, seeds=2,
    )  # fmt: skip
    measured = {
        "hazy_psnr_db": _psnr(given, clear),
        "hazy_colour_error_degrees": _colour_error(given, clear),
        **trials.means("{form}_{figure}"),
        **trials.spreads("{form}_{figure}_spread", "psnr_db"),
    }
    gain = measured["mcaf_psnr_db"] - measured["hazy_psnr_db"]
    return ClaimResult(
        {**measured, "gain_over_haze_db": gain},
        holds=gain > 2 and measured["mcaf_colour_error_degrees"] < measured["plain_colour_error_degrees"],
    )


CLAIM = Claim(
    paper="best on real remote-sensing haze; the colour attention keeps the colours true (no figures in the abstract)",
    expected="a tiny network gains more than 2 dB over hazy photographs, with a smaller colour error than without "
    "the colour attention",
    run=_claim,
)
