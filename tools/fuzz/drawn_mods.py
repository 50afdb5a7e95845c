"""Named modifications of scores drawn at random, each with the plain formula that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import log
from random import Random
from typing import Any

import torch
from torch import Tensor

from saccade import score_mods

__all__ = ["DrawnMod", "draw_mod"]


@dataclass
class DrawnMod:
    """The modification, the formula with double-precision tensors of its own, and both of them's tensors."""

    mod: Any
    plain: Callable[..., Tensor]
    text: str
    tensors: list[Tensor] = field(default_factory=list)
    truth: list[Tensor] = field(default_factory=list)


def draw_mod(
    rng: Random, generator: torch.Generator, B: int, H: int, N: int, M: int, dtype: torch.dtype, depth: int = 1
) -> DrawnMod:
    """A modification for these sizes."""
    kind = rng.choice(("alibi", "soft_cap", "relative_bias", "bucketed_bias", "bias") + ("compose",) * depth)
    if kind == "compose":
        first, then = (draw_mod(rng, generator, B, H, N, M, dtype, depth - 1) for _ in range(2))
        return DrawnMod(
            score_mods.compose(first.mod, then.mod),
            lambda s, *at: then.plain(first.plain(s, *at), *at),
            f"compose({first.text}, {then.text})",
            first.tensors + then.tensors,
            first.truth + then.truth,
        )
    if kind == "soft_cap":
        cap = rng.choice((0.5, 3.0, 50.0))
        return DrawnMod(score_mods.soft_cap(cap), lambda s, *at: cap * torch.tanh(s / cap), f"soft_cap({cap})")
    heads = rng.choice((1, H))
    if kind == "alibi":
        ours, true = _table(rng, generator, (H,), dtype)
        symmetric = rng.random() < 0.5
        mod = score_mods.alibi(ours, symmetric=symmetric)

        def plain(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s + 0 * b + true[h] * (-(j - i).abs() if symmetric else j - i)

        return DrawnMod(mod, plain, f"alibi(symmetric={symmetric})", [ours], [true])
    if kind == "relative_bias":
        reach = rng.choice((0, 1, 5, 64))
        ours, true = _table(rng, generator, (heads, 2 * reach + 1), dtype)

        def plain(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s + true[h % heads, (j - i).clamp(-reach, reach) + reach]

        return DrawnMod(score_mods.relative_bias(ours), plain, f"relative_bias({heads}, {reach})", [ours], [true])
    if kind == "bucketed_bias":
        both, most = rng.random() < 0.5, rng.choice((20, 128))
        ours, true = _table(rng, generator, (heads, 16), dtype)
        bucket = torch.tensor([_bucket(d, 16, most, both) for d in range(-N - M - 1, N + M + 2)])

        def plain(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s + true[h % heads, bucket[j - i + N + M + 1]]

        mod = score_mods.bucketed_bias(ours, max_distance=most, bidirectional=both)
        return DrawnMod(mod, plain, f"bucketed_bias({heads}, {most}, {both})", [ours], [true])
    shape = (rng.choice((1, max(B, 1))), heads, rng.choice((1, max(N, 1), N + 3)), max(M, 1) + rng.choice((0, 2)))
    ours, true = _table(rng, generator, shape, dtype)

    def plain(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s + true[b % shape[0], h % heads, i % shape[2] if shape[2] > 1 else i * 0, j]

    return DrawnMod(score_mods.bias(ours), plain, f"bias{shape}", [ours], [true])


def _table(
    rng: Random, generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Small numbers, as they are in the inputs' dtype, and the same in double precision."""
    learn = rng.random() < 0.5
    ours = (0.3 * torch.randn(shape, generator=generator)).to(dtype)
    return ours.clone().requires_grad_(learn), ours.double().requires_grad_(learn)


def _bucket(distance: int, buckets: int, most: int, both: bool) -> int:
    """T5's bucket of j - i."""
    after = 0
    if both:
        buckets //= 2
        after, distance = (buckets if distance > 0 else 0), abs(distance)
    else:
        distance = max(0, -distance)
    exact = buckets // 2
    if distance < exact:
        return after + distance
    far = exact + int(log(distance / exact) / log(most / exact) * (buckets - exact) + 1e-9)
    return after + min(far, buckets - 1)
