"""The paper's claim as an experiment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.extras import need
from saccade.models.han.network import HAN, psnr

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab


def _photographs(factor: int) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """(small, large) pairs of skimage's photographs, to learn from and to be judged on; values in [0, 1]."""
    data = need("skimage.data", "the claim of han")

    def pair(image: Any) -> tuple[Tensor, Tensor]:
        large = torch.as_tensor(image[..., :3].copy()).permute(2, 0, 1)[None] / 255
        large = large[..., : large.shape[2] // factor * factor, : large.shape[3] // factor * factor]
        small = F.interpolate(large, scale_factor=1 / factor, mode="bicubic", antialias=True).clamp(0, 1)
        return small, large

    return [pair(data.chelsea()), pair(data.coffee()), pair(data.rocket())], [pair(data.astronaut())]


def _claim(lab: Lab) -> ClaimResult:
    """Photographs at twice their size: bicubic, the trunk alone, with LAM and CSAM; two seeds, equal budget."""
    learn, judge = _photographs(2)
    side = lab.size(24, 8)

    def patches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)

        def upto(n: int) -> int:
            return int(torch.randint(n, (1,), generator=generator))

        while True:
            chosen = []
            for _ in range(lab.size(8, 2)):
                small, large = learn[upto(len(learn))]
                top, left = upto(small.shape[2] - side), upto(small.shape[3] - side)
                pair = (
                    small[0, :, top : top + side, left : left + side],
                    large[0, :, 2 * top : 2 * (top + side), 2 * left : 2 * (left + side)],
                )
                chosen.append(pair)
            yield torch.stack([p[0] for p in chosen]), torch.stack([p[1] for p in chosen])

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]).image - batch[1]).abs().mean()

    def quality(image: Tensor, truth: Tensor) -> float:
        return psnr(image.clamp(0, 1), truth, border=2).item()

    (small, large), *_ = judge
    if lab.smoke:
        small, large = small[..., :16, :16], large[..., :32, :32]
    bicubic = F.interpolate(small, scale_factor=2, mode="bicubic")
    measured = {"bicubic_psnr_db": quality(bicubic, large)}
    sizes: dict[str, Any] = {"groups": 2, "blocks": 2, "channels": lab.size(16, 4), "reduction": 4, "value_range": 1.0}
    for name, parts in {
        "trunk": {"layer_attention": False, "channel_spatial": False},
        "han": {},
    }.items():
        found, gammas = [], []
        for seed in range(lab.seed, lab.seed + 2):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = HAN(2, **sizes, **parts)
            lab.train(model, patches(seed), loss, 200, lr=2e-3, description=f"{name}, seed {seed}")
            with torch.no_grad():
                found.append(quality(model.eval()(small).image, large))
            gammas += [p.abs().item() for n, p in model.named_parameters() if n.endswith("gamma")]
        measured[f"{name}_psnr_db"] = sum(found) / len(found)
        measured[f"{name}_psnr_spread_db"] = max(found) - min(found)
        if gammas:
            measured["largest_gamma"] = max(gammas)
    gain = measured["han_psnr_db"] - measured["trunk_psnr_db"]
    return ClaimResult(
        {**measured, "gain_over_trunk_db": gain},
        holds=gain > 0 and measured["han_psnr_db"] > measured["bicubic_psnr_db"],
    )


CLAIM = Claim(
    paper="LAM and CSAM add 0.2 dB over the residual-channel-attention trunk (Manga109, four times the size)",
    expected="a tiny HAN beats bicubic, and its own trunk, on a photograph it has not seen, at twice the size",
    run=_claim,
)
