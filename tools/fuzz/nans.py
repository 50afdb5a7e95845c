"""Cases of NaN in `saccade.attend`: it reaches the queries that attend to it, and no other."""

from __future__ import annotations

from random import Random

import torch
from cases import Skip, Wrong, draw_length, native_code
from drawn_masks import draw_mask

import saccade

__all__ = ["run"]


def run(rng: Random) -> str:
    """One case; its description, or Wrong."""
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    dtype = rng.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16))
    B, H = rng.choice((1, 2)), rng.choice((1, 2))
    N, M = max(1, draw_length(rng, 200)), max(1, draw_length(rng, 200))
    if rng.random() < 0.5:
        M = N
    D = rng.choice((4, 16, 17, 64))
    q, k, v = (torch.randn(B, H, n, D, generator=generator).to(dtype) for n in (N, M, M))
    drawn = draw_mask(rng, generator, B, H, N, M) if rng.random() < 0.7 else None
    name, where = rng.choice("qkv"), rng.randrange(1 << 20)
    target = {"q": q, "k": k, "v": v}[name]
    b, h, place = where % B, where // B % H, where // 4 % target.shape[2]
    target[b, h, place, where % D] = torch.nan
    backend = rng.choice((None, None, "sdpa", "blocksparse", "stream"))
    c_code, grads = rng.random() < 0.7, rng.random() < 0.4
    text = (
        f"{dtype} B={B} H={H} N={N} M={M} D={D} mask={drawn and drawn.text} NaN in {name}[{b}, {h}, {place}] "
        f"backend={backend} native={c_code} gradients={grads}"
    )
    allowed = torch.ones(B, H, N, M, dtype=torch.bool) if drawn is None else drawn.allowed.expand(B, H, N, M)
    touched = torch.zeros(B, H, N, dtype=torch.bool)
    touched[b, h] = (torch.arange(N) == place) & allowed[b, h].any(-1) if name == "q" else allowed[b, h, :, place]
    clean = target.clone()
    clean[b, h, place, where % D] = 0.5
    sound = {"q": q, "k": k, "v": v, name: clean}
    with native_code(c_code):
        try:
            mask = drawn and drawn.mask
            inputs = [x.requires_grad_(grads) for x in (q, k, v)]
            out = saccade.attend(*inputs, mask=mask, backend=backend).detach()
            expected = saccade.attend(sound["q"], sound["k"], sound["v"], mask=mask, backend="reference")
        except ValueError as error:
            if backend is not None:
                raise Skip(str(error)) from error
            raise Wrong(f"{text}\nrefused: {error}") from error
    odd = out.isnan().any(-1)
    if bool((odd & ~touched).any()):
        raise Wrong(f"{text}\n{int((odd & ~touched).sum())} rows are NaN that do not attend to it")
    if bool((touched & ~odd).any()):
        raise Wrong(f"{text}\n{int((touched & ~odd).sum())} rows that attend to it are not NaN")
    error = (out - expected.detach())[~touched].abs()
    if error.numel() and float(error.max()) > 0.1:
        raise Wrong(f"{text}\nother rows are off by {float(error.max()):.2e}")
    return text
