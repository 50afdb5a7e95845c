"""Cases of `saccade.attend`: any shapes, layouts, dtypes, masks, scores, normalisers, scales, paths; and backward."""

from __future__ import annotations

from random import Random

import torch
from cases import DTYPES, LAYOUTS, Skip, Wrong, draw_length, hold, lay_out, native_code, tolerance
from drawn_masks import draw_mask
from drawn_mods import draw_mod
from plain import attention
from torch import Tensor

import saccade

__all__ = ["run"]


def _alibi(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s - 0.05 * (h + 1) * (i - j).abs()


def _soft_cap(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return 3 * torch.tanh(s / 3)


def _table(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    table = torch.linspace(-1, 1, 37, dtype=s.dtype)
    return s + table[(i * 5 + j * 3 + h) % 37]


def _product(q: Tensor, k: Tensor) -> Tensor:
    return torch.tanh(q @ k.mT)


def _distance(q: Tensor, k: Tensor) -> Tensor:
    return -((q[..., :, None, :] - k[..., None, :, :]).square().sum(-1) + 1e-2).sqrt()


def run(rng: Random) -> str:
    """One case; its description, or Wrong."""
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    dtype = DTYPES[rng.choice(("float32", "float32", "float32", "float64", "bfloat16", "float16"))]
    B = rng.choice((1, 1, 2, 3, 0)) if rng.random() < 0.3 else rng.choice((1, 2))
    K = rng.choice((1, 1, 2, 3))
    H = K * rng.choice((1, 1, 2, 4))
    N = draw_length(rng)
    M = N if rng.random() < 0.6 else draw_length(rng)
    D = rng.choice((1, 2, 3, 8, 16, 17, 32, 64, 80))
    E = D if rng.random() < 0.7 else rng.choice((1, 4, 16, 33))
    q, k, v = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((B, H, N, D), (B, K, M, D), (B, K, M, E))
    )
    text = f"{dtype} B={B} H={H} K={K} N={N} M={M} D={D} E={E}"
    options: dict[str, object] = {}
    drawn = None
    if rng.random() < 0.8:
        drawn = draw_mask(rng, generator, B, H, N, M)
        options["mask"] = drawn.mask
        text += f" mask={drawn.text}"
        if rng.random() < 0.2:  # as a tensor
            options["mask"] = (
                drawn.allowed.expand(max(drawn.allowed.shape[0], 1) if drawn.allowed.ndim == 4 else 1, -1, N, M)
                if drawn.allowed.ndim == 4
                else drawn.allowed
            )
            text += " (a tensor)"
    if rng.random() < 0.3:
        options["scale"] = rng.choice((0.0, -0.3, 1.0, 0.05))
    if rng.random() < 0.12:
        options["score"] = rng.choice((_product, _distance))
    mod, plain_mod = None, None
    if rng.random() < 0.1:
        options["score_mod"] = plain_mod = rng.choice((_alibi, _soft_cap, _table))
    elif rng.random() < 0.2:
        mod = draw_mod(rng, generator, B, H, N, M, dtype)
        options["score_mod"], plain_mod = mod.mod, mod.plain
    if rng.random() < 0.2:
        options["normalize"] = rng.choice(("sigmoid", "relu", "abs-sum"))
    wants_lse = "normalize" not in options and rng.random() < 0.4
    if rng.random() < 0.4:
        options["backend"] = rng.choice(("reference", "sdpa", "blocksparse", "stream"))
    if rng.random() < 0.2:
        options["memory_mb"] = rng.choice((0.5, 2.0))
    layouts = [rng.choice(LAYOUTS) for _ in "qkv"]
    learned = [rng.random() < 0.7 for _ in "qkv"] if rng.random() < 0.7 else [False] * 3
    c_code = rng.random() < 0.7
    shown = {key: getattr(value, "__name__", value) for key, value in options.items() if key != "mask"}
    if mod is not None:
        shown["score_mod"] = mod.text
    text += f" {shown} lse={wants_lse} layouts={layouts} gradients={learned} native={c_code}"

    inputs = [lay_out(x, kind) for x, kind in zip((q, k, v), layouts)]
    for x, learn in zip(inputs, learned):
        x.requires_grad_(learn)
    truth = [x.detach().double().requires_grad_(learn) for x, learn in zip((q, k, v), learned)]
    scale = options.get("scale", 1.0 if "score" in options else D**-0.5)
    rest = {key: options[key] for key in ("normalize", "score") if key in options}
    rest["score_mod"] = plain_mod
    expected, expected_lse = attention(*truth, None if drawn is None else drawn.allowed, scale, **rest)

    with native_code(c_code):
        try:
            answer = saccade.attend(*inputs, **options, return_lse=wants_lse)
        except ValueError as error:
            if "backend" in options:
                raise Skip(str(error)) from error
            raise Wrong(f"{text}\nrefused: {error}") from error
        out, lse = answer if wants_lse else (answer, None)
        if out.dtype != dtype:
            raise Wrong(f"{text}\noutput is {out.dtype}")
        bound = tolerance(dtype)
        hold(text, "output", out, expected, bound)
        if lse is not None:
            hold(text, "lse", lse, expected_lse, bound)
        tables = [(x, t) for x, t in zip(mod.tensors, mod.truth) if x.requires_grad] if mod else []
        wanted = [(name, x, t) for name, x, t, learn in zip("qkv", inputs, truth, learned) if learn]
        wanted += [(f"table {i}", x, t) for i, (x, t) in enumerate(tables)]
        if wanted and out.numel():
            weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64).to(dtype)
            loss, true_loss = (out * weight).sum(), (expected * weight.double()).sum()
            if lse is not None and rng.random() < 0.5:
                weight_lse = torch.randn(expected_lse.shape, generator=generator, dtype=torch.float64)
                seen = expected_lse.detach() != -torch.inf
                loss = loss + (lse.masked_fill(~seen, 0.0) * weight_lse.to(lse.dtype)).sum()
                true_loss = true_loss + (expected_lse.masked_fill(~seen, 0.0) * weight_lse).sum()
            kinks = options.get("normalize") in ("relu", "abs-sum") and dtype in (torch.float16, torch.bfloat16)
            ours = torch.autograd.grad(loss, [x for _, x, _ in wanted], allow_unused=True)
            true = torch.autograd.grad(true_loss, [t for _, _, t in wanted], allow_unused=True)
            for (name, _, _), a, b in zip(wanted, ours, true):
                if a is None and b is not None and b.numel() and float(b.abs().max()) > 0:
                    raise Wrong(f"{text}\nno gradient of {name}")
                if a is not None and b is not None and not kinks:
                    # a table's gradient is a sum over all pairs, times their distances in ALiBi, that cancel
                    floor = float(N + M + 1) if name.startswith("table") else 1.0
                    hold(text, f"gradient of {name}", a, b, 4 * bound, floor)
    return text
