"""Speed and memory of parts against the plain alternative, in one run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

from saccade import catalogue
from saccade.bench.machine import matmul_rate
from saccade.ops.measure import Cost, Watch, costs

#: seconds that one measurement may take before longer lengths are left out
PATIENCE = 20.0


@dataclass(frozen=True)
class Row:
    """One part at one length: times in seconds, memory in bytes, `speedup` against the baseline's same column.

    `backward` is None where it was not measurable: where forward and backward took no longer than forward alone.
    `waited` is the share of the time in which others had the processor (see `saccade.ops.measure.Watch`).
    """

    slug: str
    length: int
    forward: float
    backward: float | None
    memory: int
    tokens_per_second: float
    matmul_share: float
    speedup: float
    waited: float | None = None

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def measure(
    slugs: Sequence[str],
    *,
    lengths: Sequence[int] = (512, 2048, 8192),
    dim: int = 256,
    num_heads: int = 4,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Iterator[Row]:
    """Each sequence mechanism at each length, after `softmax` (torch's fused SDPA) at the same length.

    `matmul_share` is the rate at which the *dense* layer's FLOPs would have been done, over the machine's matmul rate:
    above 1 means faster than any dense attention can be. The mechanisms of a length are measured in turns, so that a
    disturbance of the machine meets all of them, and the fastest calls count. A mechanism whose last length took longer
    than 20 seconds, or that takes no longer sequences, is not measured at longer ones.

    Raises:
        ValueError: if a name is unknown, no sequence mechanism, or an argument is wrong.
    """
    if not slugs or not lengths:
        raise ValueError("bench needs at least one mechanism and one length")
    if min(lengths) < 1 or dim < 1 or batch < 1:
        raise ValueError(f"lengths, dim and batch must be positive, got {list(lengths)}, {dim} and {batch}")
    for slug in slugs:
        if catalogue.part(slug).kind.baseline is None:
            raise ValueError(f"bench measures sequence mechanisms; {slug!r} is {catalogue.part(slug).kind.words}")
    order = ["softmax", *(slug for slug in slugs if slug != "softmax")]
    rate = matmul_rate()
    tired: set[str] = set()
    for length in sorted(lengths):
        awake = [slug for slug in order if slug not in tired]
        x = torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
        with Watch() as watch:
            taken = costs([(_module(slug, length, dim, num_heads, dtype, seed), (x,)) for slug in awake])
        found = dict(zip(awake, taken))
        for slug, cost in found.items():
            if not isinstance(cost, Cost):
                if slug == "softmax" or length == min(lengths):
                    raise ValueError(f"{slug} at length {length}: {cost}")
                tired.add(slug)
                continue
            if cost.both > PATIENCE:
                tired.add(slug)
            dense_flops = 3 * batch * (8 * length * dim**2 + 2 * length**2 * dim)
            baseline = found.get("softmax")
            yield Row(
                slug=slug,
                length=length,
                forward=cost.forward,
                backward=cost.backward,
                memory=cost.memory,
                tokens_per_second=batch * length / cost.both,
                matmul_share=dense_flops / cost.both / rate,
                speedup=baseline.both / cost.both if isinstance(baseline, Cost) else math.nan,
                waited=watch.waited,
            )


def _module(slug: str, length: int, dim: int, num_heads: int, dtype: torch.dtype, seed: int) -> nn.Module:
    part = catalogue.part(slug)
    arguments = {} if part.at_length is None else part.at_length(length)
    for direction in part.kind.directions(part)[:1]:
        arguments |= direction
    torch.manual_seed(seed)
    return catalogue.create(slug, dim=dim, num_heads=num_heads, **arguments).to(dtype)
