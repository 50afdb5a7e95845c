"""Language and vision: what the parts bring beside what one has: `python benchmarks/language_vision.py [CASE ...]`.

- **dream**: SmolLM2-135M behind windows of text, greedy, with a draft that is trained here once, for minutes, and kept
  in the cache folder; against plain `generate` and transformers' prompt lookup in the same run. The tokens must be
  the same; the goal is 1.5 times plain decoding. What a pass of the target and a level of the draft cost is beside it.
- **token-compression**: a LLaVA with SmolLM2-135M's blocks and 24 x 24 visual tokens, random weights, batch 1, with and
  without the wrapper: time to the first token and bytes of keys and values at 11 % and 25 % of the tokens, for each
  method. The goals at 11 % with clusters: the first token at least 3 times as soon, at most a fifth of the bytes.
- **overhead of a wrapper**: that model's time for each further token, and what a wrapper adds once to a call. AGLA runs
  the model twice: at most 2.3 of it; CARVE and token compression nothing: at most 1.1.

- **adem-vl**: its fusion beside a cross-attention of the same width, for a prompt and for one token that is decoded
  (keys and values of both kept): at least as fast, with less memory. What is kept of an image is for all blocks.

Figures are kept with `--json FILE`, to which a later run of other cases adds; `--markdown FILE` writes them as a page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from saccade.adapt.agla import agla
from saccade.adapt.carve import carve
from saccade.bench import records
from saccade.bench.records import Kept, Verdict
from saccade.compress.token_compression import token_compression
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.models.adem_vl import VisualMemory, silu_fusion
from saccade.ops.attend import attend
from saccade.ops.measure import fastest, peak_bytes
from saccade.train.lab import Lab
from saccade.train.tiny import Prompted, tiny

#: of plain decoding
DREAM_GOAL = 1.5
#: tokens of a pass of the target
PASSES = (1, 4, 8, 16)
#: of a LLaVA's decoder, as SmolLM2-135M's
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
}
#: of keys and values, of the time to the first token, and of the time of a token
BYTES, SOONER, OVERHEAD = 0.2, 3.0, {"agla": 2.3, "carve": 1.1, "token-compression": 1.1}
SHARES = (0.11, 0.25)
METHODS = ("cluster", "merging", "pool", "spatial", "saliency")
MIB = 2**20


@torch.no_grad()
def dream_row(quick: bool) -> dict[str, Any]:
    task = Lab().task("speculate")
    draft = task.trained(50 if quick else 1200)
    row: dict[str, Any] = task.figures(draft)
    model = task.target.model
    ids = task.prompts()[:1]

    def target(tokens: int) -> Callable[[], object]:
        past = model(ids, use_cache=True).past_key_values
        new = ids[:, :1].expand(1, tokens)

        def run() -> None:
            model(input_ids=new, past_key_values=past, use_cache=True)
            past.crop(-tokens)

        return run

    draft = task.drafter(draft).draft
    cache, head = draft.new_cache(), model.get_output_embeddings().weight[task.target.vocabulary]
    embeds = model.get_input_embeddings()(ids)
    draft(embeds, embeds[:, 1:], cache=cache)

    def level() -> None:
        (draft(embeds[:, :3], embeds[:, :3], cache=cache).hidden[0] @ head.T).topk(3)
        cache.crop(ids.shape[1])

    *passes, row["level_seconds"] = fastest(*map(target, PASSES), level, repeats=3 if quick else 20, budget=5.0)
    row["pass_seconds"] = passes
    return row


#: of ADEM-VL's comparison: width and heads of the language model, tokens of the image, blocks
WIDTH, HEADS, SEEN, BLOCKS = 1024, 16, 320, 32


@torch.no_grad()
def adem_row(quick: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    patches = torch.randn(1, SEEN, WIDTH)
    cross = SoftmaxAttention(WIDTH, HEADS, rope=False)
    memory = VisualMemory(torch.nn.functional.silu(patches), patches)
    row: dict[str, Any] = {"parameters": 0, "cross_parameters": sum(p.numel() for p in cross.parameters())}
    k, v = (cross.split_heads(layer(patches), HEADS) for layer in (cross.k_proj, cross.v_proj))

    def prompt(text: Tensor) -> Tensor:
        return cross(text, patches)

    def step(text: Tensor) -> Tensor:
        """With its keys and values kept, as decoding has them."""
        return cross.out(attend(cross.split_heads(cross.q_proj(text), HEADS), k, v))

    for name, tokens, theirs in (("prompt", 128 if quick else 512, prompt), ("step", 1, step)):
        text = torch.randn(1, tokens, WIDTH)
        calls = partial(silu_fusion, text, memory), partial(theirs, text)
        for call in calls:
            call()
        seconds, cross_seconds = fastest(*calls, repeats=3 if quick else 30, budget=4.0)
        row |= {f"{name}_seconds": seconds, f"{name}_cross_seconds": cross_seconds}
        row[f"{name}_speedup"] = cross_seconds / seconds
        row |= {f"{name}_bytes": peak_bytes(calls[0]), f"{name}_cross_bytes": peak_bytes(calls[1])}
    row["kept_bytes"] = memory.key_BSD.nbytes + memory.value_BSD.nbytes
    row["cross_kept_bytes"] = BLOCKS * (k.nbytes + v.nbytes)
    return row


# ---------------------------------------------------------------------------- wrappers around a vision-language model


@cache
def llava(quick: bool) -> Prompted:
    return tiny("llava", side=8 if quick else 24, **({} if quick else SMOLLM2))


def generates(prompted: Prompted, tokens: int, wrap: Callable[[], AbstractContextManager[Any]]) -> Callable[[], Tensor]:
    """One prompt, and so many tokens, greedy."""
    inputs = {name: x[:1] for name, x in prompted.inputs.items()}

    def run() -> Tensor:
        with wrap():
            return prompted.model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

    return run


def compression_row(quick: bool) -> dict[str, Any]:
    prompted = llava(quick)
    bare = generates(prompted, 1, nullcontext)
    row: dict[str, Any] = {"tokens": prompted.inputs["input_ids"].shape[1], "visual": prompted.visual}
    for share in SHARES:
        for method in METHODS:
            wrap = partial(token_compression, prompted.model, share=share, method=method)
            with wrap() as report:
                generates(prompted, 1, nullcontext)()
            plain, ours = fastest(bare, generates(prompted, 1, wrap), repeats=2 if quick else 5, budget=20.0)
            row[f"{method} {share}"] = {
                "seconds": ours,
                "plain_seconds": plain,
                "speedup": plain / ours,
                "bytes": report.cache_bytes,
                "plain_bytes": report.full_cache_bytes,
            }
    return row


def brightest(images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """A matcher that costs nothing: the overhead is the wrapper's own."""
    cor = torch.nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 24)[:, 0]
    return cor, torch.ones(len(images))


WRAPPERS: Mapping[str, Callable[[Prompted], AbstractContextManager[Any]]] = {
    "agla": lambda prompted: agla(prompted.model, prompted.processor, brightest),
    "carve": lambda prompted: carve(prompted.model, prompted.processor, max_new_tokens=4),
    "token-compression": lambda prompted: token_compression(prompted.model, share=0.11),
}


def overhead_row(name: str, quick: bool) -> dict[str, Any]:
    """Of a token: the time of many less that of one, shared out."""
    prompted, more = llava(quick), 4 if quick else 16
    wrap = partial(WRAPPERS[name], prompted)
    forms = [generates(prompted, tokens, form) for form in (nullcontext, wrap) for tokens in (1, 1 + more)]
    one, many, ours_one, ours_many = fastest(*forms, repeats=2 if quick else 5, budget=40.0)
    plain, ours = (many - one) / more, (ours_many - ours_one) / more
    return {"seconds": ours, "plain_seconds": plain, "ratio": ours / plain, "once_seconds": ours_one - one}


# ---------------------------------------------------------------------------- the record


CASES: Mapping[str, Callable[[bool], dict[str, Any]]] = {
    "dream": dream_row,
    "adem-vl": adem_row,
    "token-compression": compression_row,
    **{f"overhead of {name}": partial(overhead_row, name) for name in WRAPPERS},
}


def verdicts(kept: Kept) -> list[Verdict]:
    found = []
    if (row := kept.get("dream")) is not None:
        got, same = row["speedup"], row["same"]
        found.append(Verdict("DREAM on SmolLM2 against plain decoding:", DREAM_GOAL, got, got >= DREAM_GOAL))
        found.append(Verdict("its texts that are the same, a share of:", 1.0, same, same == 1.0))
    if (row := kept.get("adem-vl")) is not None:
        for name, words in (("prompt", "a prompt"), ("step", "a token")):
            got = row[f"{name}_speedup"]
            found.append(Verdict(f"ADEM-VL's fusion beside cross-attention, {words}:", 1.0, got, got >= 1.0))
            share = row[f"{name}_bytes"] / row[f"{name}_cross_bytes"]
            found.append(Verdict(f"its memory, {words}, a share of:", 1.0, share, share < 1.0, ceiling=True))
    if (row := kept.get("token-compression")) is not None:
        ours = row[f"cluster {SHARES[0]}"]
        got, less = ours["speedup"], ours["bytes"] / ours["plain_bytes"]
        found.append(Verdict("the first token, with clusters of 11 %, sooner by:", SOONER, got, got >= SOONER))
        found.append(Verdict("bytes of keys and values, of all:", BYTES, less, less <= BYTES, ceiling=True))
    for name, most in OVERHEAD.items():
        if (row := kept.get(f"overhead of {name}")) is not None:
            got = row["ratio"]
            found.append(Verdict(f"a token under {name}, of the bare time:", most, got, got <= most, ceiling=True))
    return found


def sections(kept: Kept) -> dict[str, list[str]]:
    found = {}
    if (row := kept.get("dream")) is not None:
        found["DREAM on SmolLM2-135M"] = records.table(
            [
                "tokens a pass",
                "tokens a second",
                "plain",
                "times as fast",
                "as generate without packed weights",
                "prompt lookup",
                "ms of a level",
                "of a pass",
            ],
            [
                [
                    f"{row['accepted_length']:.2f}",
                    *(f"{row[name]:.1f}" for name in ("tokens_per_second", "plain_tokens_per_second")),
                    *(f"{row[name]:.2f}" for name in ("speedup", "speedup_over_usual", "lookup_speedup")),
                    f"{1e3 * row['level_seconds']:.1f}",
                    ", ".join(f"{1e3 * s:.0f} ({n})" for n, s in zip(PASSES, row["pass_seconds"])),
                ]
            ],
            left=0,
        )
    if (row := kept.get("adem-vl")) is not None:
        found[f"ADEM-VL's fusion, width {WIDTH}, {SEEN} tokens of an image"] = records.table(
            [
                "",
                "ms",
                "cross-attention, ms",
                "times as fast",
                "MiB",
                "cross-attention, MiB",
                "kept of an image, MiB",
                "parameters of a block",
            ],
            [
                [
                    words,
                    *(f"{1e3 * row[f'{name}{of}_seconds']:.2f}" for of in ("", "_cross")),
                    f"{row[f'{name}_speedup']:.2f}",
                    *(f"{row[f'{name}{of}_bytes'] / 2**20:.2f}" for of in ("", "_cross")),
                    " and ".join(f"{row[f'{of}kept_bytes'] / 2**20:.1f}" for of in ("", "cross_")),
                    f"{row['parameters']} and {row['cross_parameters'] / 1e6:.1f} M",
                ]
                for name, words in (("prompt", "prompt"), ("step", "token"))
            ],
        )
    if (row := kept.get("token-compression")) is not None:
        heading = f"Token compression, a prompt of {row['tokens']} tokens, {row['visual']} of them an image's"
        lines = [
            [
                method,
                f"{share:.0%}",
                *(f"{1e3 * one[n]:.0f}" for n in ("seconds", "plain_seconds")),
                f"{one['speedup']:.2f}",
                *(f"{one[n] / MIB:.1f}" for n in ("bytes", "plain_bytes")),
            ]
            for method in METHODS
            for share in SHARES
            for one in (row[f"{method} {share}"],)
        ]
        columns = ["method", "share", "first token, ms", "with all, ms", "times as soon", "KV, MiB", "with all, MiB"]
        found[heading] = records.table(columns, lines)
    rows = [(name, kept[f"overhead of {name}"]) for name in WRAPPERS if f"overhead of {name}" in kept]
    if rows:
        found["What wrappers cost"] = records.table(
            ["wrapper", "ms a token", "bare, ms", "of it", "once a call, ms"],
            [
                [
                    name,
                    *(f"{1e3 * row[n]:.1f}" for n in ("seconds", "plain_seconds")),
                    f"{row['ratio']:.2f}",
                    f"{1e3 * row['once_seconds']:.0f}",
                ]
                for name, row in rows
            ],
        )
    return found


if __name__ == "__main__":
    records.command(
        __doc__ or "",
        "Speed of language and vision",
        "language_vision",
        CASES,
        verdicts,
        sections,
        quick="few repeats, and a tiny model under wrappers",
    )
