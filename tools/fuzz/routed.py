"""Cases of attention by chosen blocks: `routed_attend` and `moba_attend` against the definition on full matrices."""

from __future__ import annotations

from random import Random

import torch
from cases import DTYPES, LAYOUTS, hold, lay_out, native_code, tolerance
from plain import attention

from saccade.attention.moba import moba_attend
from saccade.ops.routed import routed_attend

__all__ = ["run"]


def run(rng: Random) -> str:
    """One case; its description, or Wrong."""
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    dtype = DTYPES[rng.choice(("float32", "float32", "float64", "bfloat16"))]
    B, K = rng.choice((1, 2, 3)), rng.choice((1, 1, 2))
    H = K * rng.choice((1, 1, 2, 3))
    D, E = rng.choice((1, 4, 8, 16, 32, 33)), rng.choice((1, 8, 16, 40))
    size, blocks = rng.choice((1, 2, 8, 16, 32, 64)), rng.randint(1, 9)
    moba = rng.random() < 0.5
    N = M = size * blocks
    if moba:
        N = M = rng.randint(1, M)
    q, k, v = (torch.randn(s, generator=generator).to(dtype) for s in ((B, H, N, D), (B, K, M, D), (B, K, M, E)))
    scale = rng.choice((None, None, 0.0, -0.4, 1.0))
    layouts = [rng.choice(LAYOUTS) for _ in "qkv"]
    learn, c_code = rng.random() < 0.7, rng.random() < 0.6
    j = rng.randint(1, blocks + 1)
    text = (
        f"{'moba' if moba else 'routed'} {dtype} B={B} H={H} K={K} N={N} M={M} D={D} E={E} size={size} j={j} "
        f"scale={scale} layouts={layouts} gradients={learn} native={c_code}"
    )
    own_N = torch.arange(N) // size
    block_n = torch.arange(blocks)
    if moba:
        n = -(-M // size)
        means = torch.stack([part.float().mean(2) for part in k.split(size, 2)], 2).repeat_interleave(H // K, 1)
        gate = (q.float() @ means.mT).masked_fill(torch.arange(n) > own_N[:, None], -torch.inf)
        gate = gate.masked_fill(torch.arange(n) == own_N[:, None], torch.inf)
        order = gate.sort(-1, descending=True).values
        keep = min(j, n)
        # which of two equal blocks is taken is nobody's business: such cases are not compared
        near = order[..., keep - 1] - order[..., keep] if keep < n else torch.ones(())
        if bool(((near.abs() < 1e-4) & order[..., keep].isfinite()).any()) if keep < n else False:
            return text + " (a tie)"
        chosen = torch.zeros_like(gate, dtype=torch.bool).scatter_(-1, gate.topk(keep, -1).indices, True)
        allowed = chosen.repeat_interleave(size, -1)[..., :M].tril()
    else:
        chosen = torch.rand(B, H, N, blocks, generator=generator) < rng.choice((0.2, 0.6))
        chosen &= block_n < own_N[:, None]
        own = rng.random() < 0.7
        picks = torch.where(chosen, block_n, -1).sort(-1, descending=True).values
        allowed = chosen.repeat_interleave(size, -1)
        if own:
            i = torch.arange(N)
            allowed = allowed | ((own_N[:, None] == own_N) & (i <= i[:, None]))
        text += f" own={own}"
    inputs = [lay_out(x, layout).requires_grad_(learn) for x, layout in zip((q, k, v), layouts)]
    truth = [x.double().requires_grad_(learn) for x in (q, k, v)]
    expected, expected_lse = attention(*truth, allowed, D**-0.5 if scale is None else scale)
    bound = tolerance(dtype)
    with native_code(c_code):
        if moba:
            out = moba_attend(*inputs, block_size=size, top_k=j, scale=scale)
        else:
            out, lse = routed_attend(*inputs, picks, size, scale=scale, own=own)
            hold(text, "lse", lse, expected_lse, bound)
        hold(text, "output", out, expected, bound)
        if learn:
            weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64).to(dtype)
            ours = torch.autograd.grad((out * weight).sum(), inputs)
            true = torch.autograd.grad((expected * weight.double()).sum(), truth)
            for name, a, b in zip("qkv", ours, true):
                hold(text, f"gradient of {name}", a, b, 4 * bound)
    return text
