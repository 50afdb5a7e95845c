"""Write the scaling model into docs/parallel.md, from the plan that the tests hold against counted bytes."""

from __future__ import annotations

from pathlib import Path

import torch

import saccade
from saccade import masks
from saccade.ops.masks import Mask

PAGE = Path(__file__).parent.parent / "docs" / "parallel.md"

#: a layer of a model of 8 billion parameters
HEADS, KEY_HEADS, WIDTH = 32, 8, 128

TOKENS = {"1 M": 2**20, "10 M": 10 * 2**20}
RANKS = (8, 64, 1024)

#: what is attended -> its mask, and how the sequence is dealt
CASES: dict[str, tuple[Mask | None, str]] = {
    "dense, causal": (masks.causal(), "contiguous"),
    "dense, causal, head-tail": (masks.causal(), "head-tail"),
    "dense, both ways": (None, "contiguous"),
    "window of 4,096": (masks.window(4095), "contiguous"),
    "window of 4,096 and 4 sinks": (masks.window(4095, sinks=4), "contiguous"),
}


def rows() -> list[str]:
    """A line of the table for each case, length and number of ranks."""
    found = [
        "| attention | tokens | ranks | path | TFLOPs a rank | sent | received | balance |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (mask, balance) in CASES.items():
        for said, n in TOKENS.items():
            q, k = (
                torch.empty(1, heads, n, WIDTH, dtype=torch.bfloat16, device="meta") for heads in (HEADS, KEY_HEADS)
            )
            for ranks in RANKS:
                parts = saccade.plan(q, k, k, mask=mask, mesh=ranks, balance=balance).parts
                assert parts is not None
                work, sent, received = (
                    max(getattr(share, what) for share in parts.shares) for what in ("flops", "sent", "received")
                )
                found.append(
                    f"| {name} | {said} | {ranks:,} | {parts.path} | {work / 1e12:,.1f} | {_bytes(sent)} | "
                    f"{_bytes(received)} | {parts.balance:.0%} |"
                )
                print(found[-1], flush=True)
    return found


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
