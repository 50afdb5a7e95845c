"""Cases of mask objects: what they allow, their block maps, their text, against the bool tensor they stand for."""

from __future__ import annotations

from math import ceil
from random import Random

import torch
from cases import Wrong, draw_length
from drawn_masks import draw_mask

from saccade.ops.masks import EMPTY, FULL

__all__ = ["run"]


def run(rng: Random) -> str:
    """One case; its description, or Wrong."""
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    B, H = rng.choice((1, 2, 3)), rng.choice((1, 2))
    N = draw_length(rng, 150)
    M = N if rng.random() < 0.6 else draw_length(rng, 150)
    drawn = draw_mask(rng, generator, B, H, N, M, depth=3)
    size = rng.choice((1, 2, 7, 16, 64)), rng.choice((1, 3, 16, 33, 64))
    text = f"N={N} M={M} blocks={size} mask={drawn.text}"
    mask = drawn.mask
    allowed = (
        drawn.allowed.expand(*(1,) * (4 - drawn.allowed.ndim), *drawn.allowed.shape[-2:])
        if drawn.allowed.ndim < 4
        else drawn.allowed
    )
    dense = mask.dense(N, M)
    if not torch.equal(*torch.broadcast_tensors(dense, allowed)):
        raise Wrong(f"{text}\ndense() differs in {int((dense ^ allowed).sum())} pairs")
    states = mask.block_map(N, M, size)
    if states.shape[2:] != (ceil(N / size[0]), ceil(M / size[1])):
        raise Wrong(f"{text}\nblock map is {tuple(states.shape)}")
    wide = states.repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)[..., :N, :M]
    wide, allowed = torch.broadcast_tensors(wide, allowed)
    if bool((allowed & (wide == EMPTY)).any()):
        raise Wrong(f"{text}\na block that allows pairs is called empty")
    if bool((~allowed & (wide == FULL)).any()):
        raise Wrong(f"{text}\na block that forbids pairs is called full")
    if not repr(mask) or (N and M and not mask.picture(N, M)):
        raise Wrong(f"{text}\nno text")
    limits = mask.key_limits()
    if limits is not None and N and M:
        born, until = limits
        i = torch.arange(N)[:, None]
        seen = (i >= born[..., None, :]) & (i <= until[..., None, :])
        seen, allowed = torch.broadcast_tensors(seen, allowed)
        if not torch.equal(seen, allowed):
            raise Wrong(f"{text}\nkey limits say something else")
    density = mask.density(N, M, 1) if N and M else 0.0
    share = float(allowed.float().mean()) if allowed.numel() else 0.0
    if density < share - 1e-6 or density > 1 + 1e-9:
        raise Wrong(f"{text}\ndensity {density}, though {share} of the pairs are allowed")
    return text
