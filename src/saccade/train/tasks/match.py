"""Which points of two images show the same? Photographs under homographies, and a stereo pair.

Shape letters: B pairs, H, W image, K matches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from saccade.extras import need
from saccade.models.matching import Matcher, MatchOutput
from saccade.ops.matching import pixel_grid
from saccade.train import data as sources
from saccade.train import models as pretrained
from saccade.train.data.pairs import stereo_pair, view_pairs
from saccade.train.metrics.matching import area_under_curve, corner_error, match_errors
from saccade.train.result import Metric
from saccade.train.tasks.network import SHOWN, NetworkTask, shown
from saccade.train.tasks.settings import Settings

#: photographs that are learned from, and those that are judged on
LEARN, JUDGE = ("astronaut", "chelsea", "coffee", "rocket"), ("camera", "coins")
#: pixels of error: of the areas under the curve, and of an outlier
AREAS, OUTLIER = (3, 5, 10), 3.0

#: points of both images of one pair (1, 1, H, W) each, and how sure they are
Matching = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Match(NetworkTask):
    """Windows of photographs, and the same under a homography, in other light, blurred and with noise (`view_pairs`).

    A network is a `Matcher` and has a loss of its own. Quality is the area under the curve of the corners' error up to
    10 pixels, on photographs that were not learned from; beside it those up to 3 and 5, `precision` (the share of
    matches within 3 pixels), `epe` (their mean error, of matches whose truth is known), `matches` of a pair, and
    `stereo_epe`, `stereo_outliers` (3 pixels) and `stereo_matches` on scikit-image's real stereo pair. The same figures
    of two baselines stand beside them, `sift_...` (scikit-image's SIFT with mutual nearest neighbours) and, where its
    package is installed, `lighterglue_...` (XFeat with LighterGlue, pretrained).

    Raises:
        ValueError: if the length is no square of a side of a multiple of 32 pixels.
        ImportError: if scikit-image is not installed.
    """

    name = "match"
    inputs = ("image0", "image1")
    metric = Metric("auc10", "AUC at 10 px", higher_is_better=True)
    multiple = 32
    least = 64
    budgets = {
        "quick": Settings(length=96**2, batch=4, steps=250, lr=2e-3, lengths=(4096, 9216, 36864), evaluation_size=24),
        "standard": Settings(
            length=128**2, batch=8, steps=2000, lr=1e-3, lengths=(4096, 16384, 65536), evaluation_size=48
        ),
        "long": Settings(
            length=192**2, batch=8, steps=10000, lr=1e-3, lengths=(4096, 16384, 65536), evaluation_size=48
        ),
    }

    @cached_property
    def photographs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Those that are learned from, and those that are judged on."""
        return sources.photographs(*LEARN, grey=True), sources.photographs(*JUDGE, grey=True)

    def drawn(self, count: int, generator: torch.Generator, judge: bool = False) -> tuple[Tensor, ...]:
        return view_pairs(self.photographs[judge], count, self.side, generator)

    def loss(self, model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        """The network's own."""
        assert isinstance(model, Matcher)
        return model.loss(*batch)

    @torch.no_grad()
    def figures(self, model: nn.Module, share: float = 1.0) -> dict[str, float]:
        """The figures of the network, and those of the baselines."""
        model.eval()

        def match(image0: Tensor, image1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            said: MatchOutput = model(image0, image1)
            return said.of(0)

        return self.measured(match, share) | self.baselines(share)

    @torch.no_grad()
    def measured(self, match: Matching, share: float = 1.0) -> dict[str, float]:
        """The figures of any matching.

        Args:
            match: of one pair.
            share: of the held-out pairs.
        """
        corners, errors = [], []
        for batch in self.held_out(share):
            for image0, image1, positions in zip(*batch):
                first, second, _ = match(image0[None], image1[None])
                corners.append(corner_error(first, second, positions[0]))
                errors.append(match_errors(first, second, positions[0]).cpu())
        left, right, positions = self.to_device(stereo_pair())
        first, second, _ = match(left, right)
        found = {f"auc{limit}": area_under_curve(corners, limit) for limit in AREAS}
        found |= _told(torch.cat(errors), "", len(errors))
        return found | _told(match_errors(first, second, positions[0, 0]).cpu(), "stereo_")

    def baselines(self, share: float = 1.0) -> dict[str, float]:
        """The figures of SIFT and, where it is installed, of XFeat with LighterGlue."""
        if share not in self._baselines:
            found = {f"sift_{name}": value for name, value in self.measured(sift, share).items()}
            if pretrained.installed("xfeat-lighterglue"):
                glue = pretrained.load("xfeat-lighterglue")
                measured = self.measured(lambda *pair: glue(*(image.cpu() for image in pair)), share)
                found |= {f"lighterglue_{name}": value for name, value in measured.items()}
            self._baselines[share] = found
        return self._baselines[share]

    @cached_property
    def _baselines(self) -> dict[float, dict[str, float]]:
        return {}

    def chance(self) -> float:
        """What points that stay where they are reach."""
        corners = []
        for batch in self.held_out():
            moved = batch[-1][:, 0] - pixel_grid(self.side, self.side, batch[-1]).view(self.side, self.side, 2)
            corners += moved[:, [0, 0, -1, -1], [0, -1, 0, -1]].norm(dim=-1).mean(1).tolist()
        return area_under_curve(corners, 10)

    @torch.no_grad()
    def pictures(self, model: nn.Module) -> dict[str, Tensor]:
        """Both images, and on the first the points that were matched: green within 3 pixels, red beyond."""
        image0, image1, positions = (x[:SHOWN] for x in next(self.held_out()))
        model.eval()
        drawn = image0.expand(-1, 3, -1, -1).clone()
        for image, first, second, truth in zip(drawn, *_by_pair(model(image0, image1), len(image0)), positions):
            right = match_errors(first, second, truth[0]) <= OUTLIER
            x, y = first.round().long().T
            x, y = x.clamp(0, self.side - 1), y.clamp(0, self.side - 1)
            image[:, y, x] = torch.stack([~right, right, torch.zeros_like(right)]).to(image)
        return {"image0": shown(image0), "image1": shown(image1), "matches": shown(drawn)}


def sift(image0: Tensor, image1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """scikit-image's SIFT, mutual nearest neighbours with Lowe's ratio; points (x, y), the nearest first.

    Args:
        image0, image1: one pair, (1, 1, H, W).

    Raises:
        ImportError: if scikit-image is not installed.
    """
    feature = need("skimage.feature", "the baseline of matching")
    found = []
    for image in (image0, image1):
        extractor = feature.SIFT()
        try:
            extractor.detect_and_extract(image[0, 0].double().cpu().numpy())
        except RuntimeError:  # an image without points
            return image0.new_zeros(0, 2), image0.new_zeros(0, 2), image0.new_zeros(0)
        found.append((torch.as_tensor(extractor.positions.copy()).float().flip(1), extractor.descriptors))
    pairs = torch.as_tensor(feature.match_descriptors(found[0][1], found[1][1], cross_check=True, max_ratio=0.8))
    first, second = (points[pairs[:, i].long()].to(image0.device) for i, (points, _) in enumerate(found))
    return first, second, first.new_ones(len(first))


def _told(errors_K: Tensor, name: str, pairs: int = 1) -> dict[str, float]:
    """Errors of all matches as figures; without a match whose truth is known, none is right and the error infinite."""
    known = errors_K[errors_K.isfinite()]
    within = float((known <= OUTLIER).float().mean()) if len(known) else 0.0
    shares = {f"{name}outliers": 1 - within} if name else {"precision": within}
    epe = float(known.mean()) if len(known) else float("inf")
    return {**shares, f"{name}epe": epe, f"{name}matches": len(errors_K) / pairs}


def _by_pair(said: MatchOutput, pairs: int) -> tuple[list[Tensor], list[Tensor]]:
    found = [said.of(pair) for pair in range(pairs)]
    return [each[0] for each in found], [each[1] for each in found]
