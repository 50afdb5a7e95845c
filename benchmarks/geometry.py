"""Matching and flow against the plain forms and against kornia: `python benchmarks/geometry.py [--quick] [CASE ...]`.

- **loftr beside kornia**: kornia's LoFTR at 640 x 480 with the same weights, fp32, in inference, proved equal first; as
  built, with norms folded into the convolutions, and with channels last; the goal is 1.3 x of the best.
- **loftr at 1080p**: the peak of extra tensors on two images of 1920 x 1080.
- **coarse matching**: LoFTR's, of 256 channels: mutual best pairs of a dual softmax, streamed, against the matrix of
  all pairs; at 480p (60 x 80 cells at 1/8) at least 1.0 x, at 1080p (135 x 240) in less than 400 MB.
- **global matching**: UniMatch's, of 128 channels: expected positions under a softmax over all pairs; alike.

Figures are kept with `--json FILE`, to which a later run of other cases adds; `--markdown FILE` writes them as a page.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saccade.bench import records
from saccade.bench.records import Kept, Verdict
from saccade.ops.matching import dual_softmax, expected_positions, pixel_grid
from saccade.ops.measure import fastest, peak_bytes

KORNIA, PLAIN, BYTES = 1.3, 1.0, 400e6
#: grids of cells at 1/8 of 640 x 480 and of 1920 x 1080
SMALL, LARGE = (60, 80), (135, 240)
THRESHOLD, TEMPERATURE = 0.2, 0.1
MB = 1e6


def features(grid: tuple[int, int], channels: int) -> tuple[Tensor, Tensor]:
    """Those of one image, and the same elsewhere with noise: most have a match."""
    torch.manual_seed(0)
    f0 = torch.randn(1, grid[0] * grid[1], channels)
    return f0, f0[:, torch.randperm(f0.shape[1])] + 0.3 * torch.randn_like(f0)


def coarse(f0: Tensor, f1: Tensor) -> tuple[Tensor, ...]:
    return dual_softmax(f0, f1, scale=1 / (f0.shape[2] * TEMPERATURE)).mutual(THRESHOLD)


def plain_coarse(f0: Tensor, f1: Tensor) -> tuple[Tensor, ...]:
    """By the matrix of all pairs."""
    scores = f0 @ f1.mT / (f0.shape[2] * TEMPERATURE)
    share = scores.softmax(1) * scores.softmax(2)
    best = (share > THRESHOLD) & (share == share.amax(2, keepdim=True)) & (share == share.amax(1, keepdim=True))
    found, column = best.max(2)
    batch, row = found.nonzero().unbind(1)
    return batch, row, column[batch, row], share[batch, row, column[batch, row]]


def everywhere(f0: Tensor, f1: Tensor, grid: tuple[int, int]) -> tuple[Tensor]:
    return (expected_positions(f0, f1, pixel_grid(*grid, f0)),)


def plain_everywhere(f0: Tensor, f1: Tensor, grid: tuple[int, int]) -> tuple[Tensor]:
    """By the matrix of all pairs."""
    return ((f0 @ f1.mT * f0.shape[2] ** -0.5).softmax(2) @ pixel_grid(*grid, f0),)


def matching_row(
    ours: Callable[..., tuple[Tensor, ...]], plain: Callable[..., tuple[Tensor, ...]], channels: int, quick: bool,
    gridded: bool,
) -> dict[str, Any]:  # fmt: skip
    small, large = ((12, 16), (24, 32)) if quick else (SMALL, LARGE)

    def call(function: Callable[..., tuple[Tensor, ...]], grid: tuple[int, int]) -> Callable[[], tuple[Tensor, ...]]:
        given = (*features(grid, channels), *([grid] if gridded else []))

        def run() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return function(*given)

        return run

    pair = call(ours, small), call(plain, small)
    for found, expected in zip(pair[0](), pair[1](), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-3)
    row: dict[str, Any] = {"cells": small[0] * small[1], "large_cells": large[0] * large[1]}
    row["seconds"], row["plain_seconds"] = fastest(*pair, repeats=2 if quick else 8, budget=20.0)
    row["speedup"] = row["plain_seconds"] / row["seconds"]
    row["bytes"], row["large_seconds"] = once(call(ours, large))
    row["plain_bytes_of_a_matrix"] = 4 * row["large_cells"] ** 2
    return row


def once(run: Callable[[], object]) -> tuple[int, float]:
    """Peak of the extra tensors of a call that takes long, and its seconds, the profiler's included."""
    begin = time.perf_counter()
    return peak_bytes(run), time.perf_counter() - begin


def kornia_row(quick: bool) -> dict[str, Any]:
    import kornia.feature

    from saccade.models.loftr import LoFTR

    torch.manual_seed(0)
    theirs = kornia.feature.LoFTR(pretrained=None).eval()
    ours = LoFTR.from_kornia(theirs, first_release=True)
    height, width = (96, 128) if quick else (480, 640)
    images = torch.rand(2, 1, 1, height, width)
    folded = copy.deepcopy(ours).fuse()
    last = copy.deepcopy(folded).to(memory_format=torch.channels_last)

    def call(model: nn.Module, of_kornia: bool = False) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad():
                return model({"image0": images[0], "image1": images[1]}) if of_kornia else model(*images)

        return run

    calls = {"kornia": call(theirs, True), "seconds": call(ours), "folded": call(folded), "channels-last": call(last)}
    expected = calls["kornia"]()
    for name in ("seconds", "folded", "channels-last"):
        found = calls[name]()
        assert len(found.confidence) == len(expected["confidence"])
        torch.testing.assert_close(found.keypoints1, expected["keypoints1"], atol=0.05, rtol=0)
    times = fastest(*calls.values(), repeats=2 if quick else 5, budget=40.0)
    row: dict[str, Any] = dict(zip(calls, times, strict=True))
    gains = {name: row["kornia"] / row[name] for name in ("folded", "channels-last")}
    return row | gains | {"speedup": row["kornia"] / row["seconds"], "matches": len(expected["confidence"])}


def large_row(quick: bool) -> dict[str, Any]:
    from saccade.models.loftr import LoFTR

    torch.manual_seed(0)
    model = LoFTR().eval().fuse()
    images = torch.rand(2, 1, 1, *((96, 128) if quick else (1080, 1920)))

    def run() -> None:
        with torch.no_grad():
            model(*images)

    return dict(zip(("bytes", "seconds"), once(run)))


CASES: Mapping[str, Callable[[bool], dict[str, Any]]] = {
    "coarse matching": lambda quick: matching_row(coarse, plain_coarse, 256, quick, False),
    "global matching": lambda quick: matching_row(everywhere, plain_everywhere, 128, quick, True),
    "loftr beside kornia": kornia_row,
    "loftr at 1080p": large_row,
}


def verdicts(kept: Kept) -> list[Verdict]:
    found = []
    for case in ("coarse matching", "global matching"):
        if (row := kept.get(case)) is not None:
            got = row["speedup"]
            found.append(Verdict(f"{case} at 480p, against the matrix:", PLAIN, got, got >= PLAIN))
            got = row["bytes"] / MB
            found.append(Verdict(f"{case} at 1080p, MB:", BYTES / MB, got, got <= BYTES / MB, ceiling=True))
    if (row := kept.get("loftr beside kornia")) is not None:
        got = max(row["speedup"], row["folded"], row["channels-last"])
        found.append(Verdict("LoFTR at 640 x 480 against kornia's, the best form:", KORNIA, got, got >= KORNIA))
    return found


def sections(kept: Kept) -> dict[str, list[str]]:
    found = {}
    rows = [
        [
            case, f"{row['cells']:,}", f"{1e3 * row['seconds']:.0f}", f"{1e3 * row['plain_seconds']:.0f}",
            f"{row['speedup']:.2f}", f"{row['large_cells']:,}", f"{row['large_seconds']:.1f}",
            f"{row['bytes'] / MB:,.0f}", f"{row['plain_bytes_of_a_matrix'] / MB:,.0f}",
        ]
        for case in ("coarse matching", "global matching")
        if (row := kept.get(case)) is not None
    ]  # fmt: skip
    if rows:
        columns = [
            "", "cells", "ms", "by the matrix, ms", "times as fast", "cells", "s", "MB", "one matrix of all pairs, MB",
        ]  # fmt: skip
        found["Matching of all cells"] = records.table(columns, rows)
    if (row := kept.get("loftr beside kornia")) is not None:
        found["LoFTR, 640 x 480"] = records.table(
            ["kornia's ms", "ours", "folded", "folded, channels last", "matches"],
            [
                [
                    f"{1e3 * row['kornia']:.0f}",
                    *(f"{row[name]:.2f} x" for name in ("speedup", "folded", "channels-last")),
                    f"{row['matches']}",
                ]
            ],
        )
    if (row := kept.get("loftr at 1080p")) is not None:
        found["LoFTR, 1920 x 1080"] = records.table(
            ["extra memory, MB", "s"], [[f"{row['bytes'] / MB:,.0f}", f"{row['seconds']:.1f}"]], left=0
        )
    return found


if __name__ == "__main__":
    records.command(
        __doc__ or "",
        "Speed of matching",
        "geometry",
        CASES,
        verdicts,
        sections,
        quick="small images, few repeats",
    )
