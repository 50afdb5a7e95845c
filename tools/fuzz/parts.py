"""Cases of the sequence parts: what comes later, what is padding, other rows and the layout must not change a token."""

from __future__ import annotations

from functools import cache
from random import Random

import torch
from cases import LAYOUTS, Wrong, hold, lay_out, native_code
from torch import Tensor, nn

from saccade import catalogue

__all__ = ["run"]

BOUND = 2e-5


@cache
def _slugs() -> list[str]:
    """Those that take tokens alone, any number of them."""
    sequence = [part.slug for part in catalogue.select(kind="sequence")]
    return [slug for slug in sequence if catalogue.part(slug).inputs is None]


@cache
def _built(slug: str, causal: bool) -> nn.Module:
    part = catalogue.part(slug)
    torch.manual_seed(0)
    arguments = dict(part.example)
    if "causal" in part.supports:
        arguments["causal"] = causal
    module = catalogue.create(slug, **arguments)
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return module.eval().requires_grad_(False)


def run(rng: Random) -> str:
    """One case; its description, or Wrong."""
    slug = rng.choice(_slugs())
    part = catalogue.part(slug)
    causal = "causal" in part.supports and ("bidirectional" not in part.supports or rng.random() < 0.6)
    module = _built(slug, causal)
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    B, N = rng.choice((1, 2, 3)), rng.randint(1, 32)
    x = torch.randn(B, N, part.example["dim"], generator=generator)
    checks = ["layout", "rows"]
    checks += ["future"] * ("causal" in part.supports and causal)
    checks += ["padding", "padding"] * ("padding" in part.supports)
    checks += ["decoding", "decoding"] * ("decoding" in part.supports and causal)
    check = rng.choice(checks)
    c_code = rng.random() < 0.7
    text = f"{slug} causal={causal} B={B} N={N} check={check} native={c_code}"
    with torch.no_grad(), native_code(c_code):
        return _CHECKS[check](text, module, x, rng, generator)


def _layout(text: str, module: nn.Module, x: Tensor, rng: Random, generator: torch.Generator) -> str:
    kind = rng.choice([kind for kind in LAYOUTS if kind != "tokens first"])
    hold(f"{text} {kind}", "output", module(lay_out(x, kind)), module(x), BOUND)
    return text


def _rows(text: str, module: nn.Module, x: Tensor, rng: Random, generator: torch.Generator) -> str:
    one = rng.randrange(x.shape[0])
    hold(text, f"row {one}", module(x)[one : one + 1], module(x[one : one + 1]), BOUND)
    return text


def _future(text: str, module: nn.Module, x: Tensor, rng: Random, generator: torch.Generator) -> str:
    first = rng.randint(0, x.shape[1])
    changed = x.clone()
    changed[:, first:] = torch.randn(changed[:, first:].shape, generator=generator) * 10
    hold(f"{text} from {first}", "an earlier token", module(changed)[:, :first], module(x)[:, :first], BOUND)
    return text


def _padding(text: str, module: nn.Module, x: Tensor, rng: Random, generator: torch.Generator) -> str:
    B, N, _ = x.shape
    kind = rng.choice(("end", "start", "holes", "whole rows"))
    length = torch.randint(0, N + 1, (B, 1), generator=generator)
    real = {
        "end": torch.arange(N) < length,
        "start": torch.arange(N) >= length,
        "holes": torch.rand(B, N, generator=generator) < 0.7,
        "whole rows": (torch.rand(B, 1, generator=generator) < 0.5).expand(B, N),
    }[kind]
    changed = torch.where(real[..., None], x, 100 * torch.randn(x.shape, generator=generator))
    ours, expected = module(changed, mask=real), module(x, mask=real)
    text = f"{text} {kind} lengths={length.flatten().tolist()}"
    if not ours.isfinite().all():
        raise Wrong(f"{text}\nthe output is not finite")
    hold(text, "a real token", ours * real[..., None], expected * real[..., None], BOUND)
    return text


def _decoding(text: str, module: nn.Module, x: Tensor, rng: Random, generator: torch.Generator) -> str:
    B, N, _ = x.shape
    cuts = sorted(rng.randint(0, N) for _ in range(rng.randint(0, 6)))
    text = f"{text} cuts={cuts}"
    cache = module.new_cache(B)
    pieces = [module(x[:, a:b], cache=cache) for a, b in zip([0, *cuts], [*cuts, N])]
    hold(text, "output", torch.cat(pieces, 1), module(x), BOUND)
    if cache.length != N:
        raise Wrong(f"{text}\nthe cache says {cache.length} tokens")
    return text


_CHECKS = {"layout": _layout, "rows": _rows, "future": _future, "padding": _padding, "decoding": _decoding}
