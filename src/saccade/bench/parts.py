"""Speed and memory of parts against the plain alternative, in one run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from saccade import catalogue
from saccade.bench.machine import matmul_rate
from saccade.ops.measure import cost

#: seconds that one measurement may take before longer lengths are left out
PATIENCE = 20.0


@dataclass(frozen=True)
class Row:
    """One part at one length: times in seconds, memory in bytes, `speedup` against the baseline's same column."""

    slug: str
    length: int
    forward: float
    backward: float
    memory: int
    tokens_per_second: float
    matmul_share: float
    speedup: float

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
    above 1 means faster than any dense attention can be. A mechanism whose last length took longer than 20 seconds is
    not measured at longer ones.

    Raises:
        ValueError: if a name is unknown, no sequence mechanism, or an argument is wrong.
    """
    if not slugs or not lengths:
        raise ValueError("bench needs at least one mechanism and one length")
    if min(lengths) < 1 or dim < 1 or batch < 1:
        raise ValueError(f"lengths, dim and batch must be positive, got {list(lengths)}, {dim} and {batch}")
    for slug in slugs:
        if catalogue.part(slug).kind != "sequence":
            raise ValueError(f"bench measures sequence mechanisms; {slug!r} is a {catalogue.part(slug).kind}")
    order = ["softmax", *(slug for slug in slugs if slug != "softmax")]
    rate = matmul_rate()
    tired: set[str] = set()
    for length in sorted(lengths):
        baseline = 0.0
        for slug in order:
            if slug in tired:
                continue
            torch.manual_seed(seed)
            causal = bool({"causal", "teacher-forced"} & set(catalogue.part(slug).supports))
            module = catalogue.create(slug, dim=dim, num_heads=num_heads, **({"causal": True} if causal else {}))
            module = module.to(dtype)
            x = torch.randn(batch, length, dim, dtype=dtype)
            forward, both, memory = cost(module, (x,))
            if slug == "softmax":
                baseline = both
            dense_flops = 3 * batch * (8 * length * dim**2 + 2 * length**2 * dim)
            yield Row(
                slug=slug,
                length=length,
                forward=forward,
                backward=both - forward,
                memory=memory,
                tokens_per_second=batch * length / both,
                matmul_share=dense_flops / both / rate,
                speedup=baseline / both,
            )
            if both > PATIENCE:
                tired.add(slug)
