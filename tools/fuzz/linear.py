"""Cases of `saccade.linear_attend`: decays of every kind, states handed on from chunk to chunk, and backward."""

from __future__ import annotations

from random import Random

import torch
from cases import DTYPES, LAYOUTS, Wrong, draw_length, hold, lay_out, native_code, tolerance
from plain import linear_attention
from torch import Tensor

import saccade
from saccade.ops.linear import LinearState

__all__ = ["run"]


def run(rng: Random) -> str:
    """One case; its description, or Wrong."""
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    dtype = DTYPES[rng.choice(("float32", "float32", "float64", "bfloat16"))]
    B, K = rng.choice((1, 2, 2, 3, 0)), rng.choice((1, 1, 2))
    H = K * rng.choice((1, 1, 3))
    N, D, E = draw_length(rng, 200), rng.choice((1, 2, 4, 8, 16, 20)), rng.choice((1, 3, 8, 16))
    causal = rng.random() < 0.8
    normalize = rng.random() < 0.3
    # where normalised, positive features: a denominator near zero would measure rounding alone
    q, k = (torch.randn(B, heads, N, D, generator=generator) for heads in (H, K))
    if normalize:
        q, k = q.abs() + 0.1, k.abs() + 0.1
    v = torch.randn(B, K, N, E, generator=generator)
    scale = rng.choice((None, None, 0.5, -1.0))
    kind = rng.choice(("none", "float", "head", "channel", "token", "token channel")) if causal else "none"
    shape = {"head": (H,), "channel": (H, D), "token": (B, H, N), "token channel": (B, H, N, D)}.get(kind)
    decay: float | Tensor | None = None
    if kind == "float":
        decay = rng.choice((1.0, 0.9, 0.3))
    elif shape is not None:
        low = rng.choice((0.0, 0.5, 0.9))
        decay = low + (1 - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
        decay = decay.clamp(min=1e-3).to(dtype if dtype != torch.bfloat16 else torch.float32)
    before = rng.random() < 0.3
    kv, z = (torch.randn(s, generator=generator).abs().double() for s in ((B, H, D, E), (B, H, D)))
    cuts = sorted({rng.randint(0, N) for _ in range(rng.choice((0, 0, 1, 3)))}) if causal else []
    size = rng.choice((None, None, 1, 16, 64)) if causal else None
    layouts = [rng.choice(LAYOUTS) for _ in "qkv"]
    learn, c_code = rng.random() < 0.6, rng.random() < 0.7
    text = (
        f"{dtype} B={B} H={H} K={K} N={N} D={D} E={E} causal={causal} normalize={normalize} scale={scale} decay={kind} "
        f"state={before} cuts={cuts} chunk_size={size} layouts={layouts} gradients={learn} native={c_code}"
    )
    q, k, v = (x.to(dtype) for x in (q, k, v))
    inputs = [lay_out(x, layout) for x, layout in zip((q, k, v), layouts)]
    truth = [x.double() for x in (q, k, v)]
    learned = isinstance(decay, Tensor)
    true_decay = decay.double() if isinstance(decay, Tensor) else decay
    if learn:
        for x in (*inputs, *truth, *([decay, true_decay] if learned else [])):
            x.requires_grad_()
    state = torch.cat([kv, z[..., None]], -1) if before else None
    if state is not None and not normalize:
        state[..., -1] = 0
    share = H // K
    expected, after, _ = linear_attention(
        truth[0] * (1.0 if scale is None or normalize else scale),
        truth[1].repeat_interleave(share, 1),
        truth[2].repeat_interleave(share, 1),
        _spread(true_decay, (B, H, N, D)),
        causal,
        normalize,
        state,
    )

    with native_code(c_code):
        handed: object = None
        if before:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            handed = LinearState(kv.to(wide), z.to(wide)) if normalize else kv.to(wide)
        outs = []
        for first, last in zip([0, *cuts], [*cuts, N]):
            part = slice(first, last)
            factors = decay[:, :, part] if isinstance(decay, Tensor) and decay.ndim > 2 else decay
            out, handed = saccade.linear_attend(
                *(x[:, :, part] for x in inputs),
                decay=factors,
                causal=causal,
                normalize=normalize,
                scale=scale,
                state=handed,
                return_state=True,
                chunk_size=size,
            )
            outs.append(out)
        out = torch.cat(outs, 2)
        if out.dtype != dtype:
            raise Wrong(f"{text}\noutput is {out.dtype}")
        bound = tolerance(dtype) * 2
        hold(text, "output", out, expected, bound)
        hold(text, "state", handed.kv if normalize else handed, after[..., :-1], bound)
        if normalize:
            hold(text, "normaliser's state", handed.z, after[..., -1], bound)
        if learn:
            weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64).to(dtype)
            wanted = [*inputs, *([decay] if learned else [])]
            ours = torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True)
            true = torch.autograd.grad(
                (expected * weight.double()).sum(), [*truth, *([true_decay] if learned else [])], allow_unused=True
            )
            for name, a, b in zip(("q", "k", "v", "decay"), ours, true):
                if b is None or not b.numel():
                    continue
                if a is None:
                    raise Wrong(f"{text}\nno gradient of {name}")
                hold(text, f"gradient of {name}", a, b, 8 * bound)
    return text


def _spread(decay: float | Tensor | None, shape: tuple[int, int, int, int]) -> Tensor | None:
    if decay is None:
        return None
    if not isinstance(decay, Tensor):
        return torch.full(shape, decay, dtype=torch.float64)
    if decay.ndim == 1:
        return decay[None, :, None, None].expand(shape)
    if decay.ndim == 2:
        return decay[None, :, None].expand(shape)
    return (decay[..., None] if decay.ndim == 3 else decay).expand(shape)
