"""Write the scaling model into docs/parallel.md, from the plan that the tests hold against counted bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import saccade
from saccade import masks
from saccade.attention.moba import moba_attend
from saccade.ops.neighbours import with_neighbours
from saccade.ops.partitions import window_attend
from saccade.ops.planning import Parts

PAGE = Path(__file__).parent.parent / "docs" / "parallel.md"

#: a layer of a model of 8 billion parameters; tokens of a map's row
HEADS, KEY_HEADS, WIDTH, ROW = 32, 8, 128, 1024

TOKENS = {"1 M": 2**20, "10 M": 10 * 2**20}
RANKS = (8, 64, 1024)

MOBA = {"block_size": 512, "top_k": 8}


def of(function: Callable[..., Any], **options: Any) -> Callable[..., Parts]:
    """The forecast of a function of queries, keys and values."""
    return partial(saccade.parallel.plan, function, **options)


def windows(q: Tensor, k: Tensor, v: Tensor, **dealt: Any) -> Parts:
    """Of 16 x 16 tokens, shifted by half, on a map of rows of 1,024."""
    size = q.shape[2] // ROW, ROW
    return saccade.parallel.plan(window_attend, q, k, v, size, 16, 8, **dealt)


def convolution(q: Tensor, k: Tensor, v: Tensor, **dealt: Any) -> Parts:
    """Along the sequence, of 4 taps, of all channels."""
    channels = HEADS * WIDTH
    taps = torch.nn.Conv1d(channels, channels, 4, groups=channels, device=q.device, dtype=q.dtype)
    x = torch.empty(1, channels, q.shape[2], device=q.device, dtype=q.dtype)
    return saccade.parallel.plan(with_neighbours, taps, x, 3, dim=2, **dealt)


#: what is attended -> its forecast for queries, keys and values, and how the sequence is dealt
CASES: dict[str, tuple[Callable[..., Parts], dict[str, Any]]] = {
    "dense, causal": (of(saccade.attend, mask=masks.causal()), {}),
    "dense, causal, head-tail": (of(saccade.attend, mask=masks.causal()), {"balance": "head-tail"}),
    "dense, both ways": (of(saccade.attend), {}),
    "window of 4,096": (of(saccade.attend, mask=masks.window(4095)), {}),
    "window of 4,096 and 4 sinks": (of(saccade.attend, mask=masks.window(4095, sinks=4)), {}),
    "linear, a decay a head": (of(saccade.linear_attend, decay=0.99), {}),
    "MoBA, 8 blocks of 512, at most": (of(moba_attend, **MOBA), {"unit": MOBA["block_size"]}),
    "shifted windows of 16 x 16 on a map": (windows, {"unit": ROW}),
    "convolution of 4 taps": (convolution, {}),
}


def rows() -> list[str]:
    """A line of the table for each case, length and number of ranks."""
    found = [
        "| attention | tokens | ranks | path | TFLOPs a rank | sent | received | balance |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (forecast, dealt) in CASES.items():
        for said, n in TOKENS.items():
            q, k = (
                torch.empty(1, heads, n, WIDTH, dtype=torch.bfloat16, device="meta") for heads in (HEADS, KEY_HEADS)
            )
            for ranks in RANKS:
                parts = forecast(q, k, k, mesh=ranks, **dealt)
                work, sent, received = (
                    max(getattr(share, what) for share in parts.shares) for what in ("flops", "sent", "received")
                )
                found.append(
                    f"| {name} | {said} | {ranks:,} | {parts.path} | {_teras(work)} | {_bytes(sent)} | "
                    f"{_bytes(received)} | {parts.balance:.0%} |"
                )
                print(found[-1], flush=True)
    return found


def _teras(work: int) -> str:
    count = work / 1e12
    return f"{count:,.1f}" if count >= 0.1 else f"{count:.1g}"


def _bytes(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.3g} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:,.1f} GiB"


def main() -> None:
    before, rest = PAGE.read_text(encoding="utf-8").split("<!-- model: written by tools/parallel.py -->")
    after = rest.split("<!-- end of model -->")[1]
    table = "\n".join(rows())
    PAGE.write_text(
        f"{before}<!-- model: written by tools/parallel.py -->\n{table}\n<!-- end of model -->{after}", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
