"""Matching and flow against the plain forms and against kornia: `python benchmarks/geometry.py [--quick] [CASE ...]`.

- **loftr beside kornia**: kornia's LoFTR at 640 x 480 with the same weights, fp32, in inference, proved equal first; as
  built and with norms folded into the convolutions; the goal is 1.3 x of the best. Random weights find no match above
  the usual threshold, so that nobody pays for the fine stage; **with matches** the threshold is zero and the second
  image is the first one, moved.
- **unimatch**: GMFlow at 640 x 480 against itself with every softmax over pixels written by its matrix, proved equal
  first; at least 1.0 x.
- **loftr at 1080p**, **unimatch at 1080p**: the peak of extra tensors on two images of 1920 x 1080 (1088 for UniMatch).
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
from unittest.mock import patch

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


def kornia_row(quick: bool, matched: bool = False) -> dict[str, Any]:
    import kornia.feature
    from kornia.feature.loftr.loftr import default_cfg

    from saccade.models.loftr import LoFTR

    torch.manual_seed(0)
    threshold = 0.0 if matched else default_cfg["match_coarse"]["thr"]
    config = default_cfg | {"match_coarse": default_cfg["match_coarse"] | {"thr": threshold}}
    theirs = kornia.feature.LoFTR(pretrained=None, config=config).eval()
    ours = LoFTR.from_kornia(theirs, first_release=True, threshold=threshold)
    height, width = (96, 128) if quick else (480, 640)
    images = torch.rand(2, 1, 1, height, width)
    if matched:
        images[1] = images[0].roll(16, 3)
    folded = copy.deepcopy(ours).fuse()

    def call(model: nn.Module, of_kornia: bool = False) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad():
                return model({"image0": images[0], "image1": images[1]}) if of_kornia else model(*images)

        return run

    calls = {"kornia": call(theirs, True), "seconds": call(ours), "folded": call(folded)}
    expected = calls["kornia"]()
    there = {tuple(a.tolist()): b for a, b in zip(expected["keypoints0"], expected["keypoints1"])}
    for name in ("seconds", "folded"):
        found = calls[name]()
        both = [
            (b, there[key]) for a, b in zip(found.keypoints0, found.keypoints1) if (key := tuple(a.tolist())) in there
        ]
        # of equal weights few pairs are best by a hair in one of the two only
        assert len(both) >= 0.98 * max(len(there), len(found.keypoints0)), (len(both), len(there))
        for ours_at, theirs_at in both:
            torch.testing.assert_close(ours_at, theirs_at, atol=0.05, rtol=0)
    times = fastest(*calls.values(), repeats=2 if quick else 5, budget=40.0)
    row: dict[str, Any] = dict(zip(calls, times, strict=True))
    gains = {"folded": row["kornia"] / row["folded"], "speedup": row["kornia"] / row["seconds"]}
    return row | gains | {"matches": len(there)}


def unimatch_row(quick: bool) -> dict[str, Any]:
    from saccade.models.unimatch import UniMatch

    torch.manual_seed(0)
    model = UniMatch().eval()
    images = 255 * torch.rand(2, 1, 3, *((64, 96) if quick else (480, 640)))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v

    def run() -> Tensor:
        with torch.no_grad():
            return model(*images).flow

    def plain() -> Tensor:
        room = "saccade.models.unimatch"
        with (
            patch(f"{room}.matching.attend", attend),
            patch(f"{room}.transformer.attend", attend),
            patch(f"{room}.matching.expected_positions", attend),
        ):
            return run()

    torch.testing.assert_close(run(), plain(), atol=1e-2, rtol=1e-3)
    seconds, plain_seconds = fastest(run, plain, repeats=2 if quick else 5, budget=40.0)
    return {"seconds": seconds, "plain_seconds": plain_seconds, "speedup": plain_seconds / seconds}


def large_row(model: nn.Module, channels: int, size: tuple[int, int]) -> dict[str, Any]:
    torch.manual_seed(0)
    images = torch.rand(2, 1, channels, *size)

    def run() -> object:
        with torch.no_grad():
            return model.eval()(*images)

    size_bytes, seconds = once(run)
    return {"bytes": size_bytes, "seconds": seconds}


def large_loftr(quick: bool) -> dict[str, Any]:
    from saccade.models.loftr import LoFTR

    return large_row(LoFTR().eval().fuse(), 1, (96, 128) if quick else (1080, 1920))


def large_unimatch(quick: bool) -> dict[str, Any]:
    from saccade.models.unimatch import UniMatch

    return large_row(UniMatch(), 3, (64, 96) if quick else (1088, 1920))


CASES: Mapping[str, Callable[[bool], dict[str, Any]]] = {
    "coarse matching": lambda quick: matching_row(coarse, plain_coarse, 256, quick, False),
    "global matching": lambda quick: matching_row(everywhere, plain_everywhere, 128, quick, True),
    "loftr beside kornia": kornia_row,
    "loftr beside kornia, matches": lambda quick: kornia_row(quick, matched=True),
    "unimatch": unimatch_row,
    "loftr at 1080p": large_loftr,
    "unimatch at 1080p": large_unimatch,
}


def verdicts(kept: Kept) -> list[Verdict]:
    found = []
    for case in ("coarse matching", "global matching"):
        if (row := kept.get(case)) is not None:
            got = row["speedup"]
            found.append(Verdict(f"{case} at 480p, against the matrix:", PLAIN, got, got >= PLAIN))
            got = row["bytes"] / MB
            found.append(Verdict(f"{case} at 1080p, MB:", BYTES / MB, got, got <= BYTES / MB, ceiling=True))
    for case in ("loftr beside kornia", "loftr beside kornia, matches"):
        if (row := kept.get(case)) is not None:
            got = max(row["speedup"], row["folded"])
            words = f"LoFTR at 640 x 480 against kornia's, {row['matches']} matches, the best form:"
            found.append(Verdict(words, KORNIA, got, got >= KORNIA))
    if (row := kept.get("unimatch")) is not None:
        got = row["speedup"]
        found.append(Verdict("UniMatch at 640 x 480, against the matrices:", PLAIN, got, got >= PLAIN))
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
    rows = [
        [f"{row['matches']}", f"{1e3 * row['kornia']:.0f}", *(f"{row[name]:.2f} x" for name in ("speedup", "folded"))]
        for case in ("loftr beside kornia", "loftr beside kornia, matches")
        if (row := kept.get(case)) is not None
    ]
    if rows:
        found["LoFTR, 640 x 480"] = records.table(["matches", "kornia's ms", "ours", "folded"], rows, left=0)
    if (row := kept.get("unimatch")) is not None:
        cells = [f"{1e3 * row['seconds']:.0f}", f"{1e3 * row['plain_seconds']:.0f}", f"{row['speedup']:.2f}"]
        found["UniMatch, 640 x 480"] = records.table(["ms", "by matrices, ms", "times as fast"], [cells], left=0)
    rows = [
        [case.split()[0], f"{row['bytes'] / MB:,.0f}", f"{row['seconds']:.1f}"]
        for case in ("loftr at 1080p", "unimatch at 1080p")
        if (row := kept.get(case)) is not None
    ]
    if rows:
        found["Networks on 1920 x 1080"] = records.table(["", "extra memory, MB", "s"], rows)
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
