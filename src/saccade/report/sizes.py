"""The published sizes of complete networks: the paper's parameters and FLOPs beside those of our modules."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from saccade import catalogue
from saccade.catalogue import Published


@dataclass(frozen=True)
class Size:
    """One published size, counted.

    Attributes:
        parameters: of our module, in millions.
        flops: multiply-adds of our module on the published inputs, in thousand millions.
    """

    slug: str
    published: Published
    parameters: float
    flops: float

    @property
    def error(self) -> float:
        """The larger deviation of the two from what the paper's table has of them, as a share; 0 of nothing."""
        pairs = ((self.parameters, self.published.parameters), (self.flops, self.published.flops))
        return max((abs(ours / theirs - 1) for ours, theirs in pairs if theirs is not None), default=0.0)


@lru_cache(maxsize=256)
def count(slug: str, name: str) -> Size:
    """Count one size, on the meta device: nothing is allocated or computed."""
    from torch.utils.flop_counter import FlopCounterMode

    part = catalogue.part(slug)
    published = next(size for size in part.published if size.name == name)
    assert part.build is not None
    with torch.device("meta"):
        model = part.build(**published.arguments).eval()
        inputs = part.kind.sized(published)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    parameters = sum(p.numel() for p in model.parameters())
    return Size(slug, published, parameters / 1e6, counter.get_total_flops() / 2e9)


def page() -> str:
    """All published sizes as a page of Markdown, written by `make readme`."""
    lines = [
        "# Published sizes",
        "",
        "Written by `make readme`; nothing here is typed by hand. Parameters in millions, FLOPs in thousand millions",
        "of multiply-adds at the paper's resolution (our count: convolutions and matrix products, on the meta device).",
        "A test holds each to its tolerance, 1 % where no other is given.",
        "",
        "| part | size | parameters, paper | ours | FLOPs, paper | ours | off by | remark |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for summary in catalogue.parts():
        if not summary.kind.published:
            continue
        for published in catalogue.part(summary.slug).published:
            size = count(summary.slug, published.name)
            known = [published.parameters, published.flops]
            parameters, flops = ("" if figure is None else f"{figure:g}" for figure in known)
            off = "" if known == [None, None] else f"{size.error:.1%}"
            lines.append(
                f"| `{summary.slug}` | {published.name} | {parameters} | {size.parameters:.2f} | {flops} | "
                f"{size.flops:.2f} | {off} | {published.note} |"
            )
    return "\n".join(lines) + "\n"
