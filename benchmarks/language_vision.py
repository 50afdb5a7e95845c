"""Language and vision: what the parts bring beside what one has: `python benchmarks/language_vision.py [CASE ...]`.

- **dream**: SmolLM2-135M behind windows of text, greedy, with a draft that is trained here once, for minutes, and kept
  in the cache folder; against plain `generate` and transformers' prompt lookup in the same run. The tokens must be
  the same; the goal is 1.5 times plain decoding. What a pass of the target and a level of the draft cost is beside it.

- **adem-vl**: its fusion beside a cross-attention of the same width, for a prompt and for one token that is decoded
  (keys and values of both kept): at least as fast, with less memory. What is kept of an image is for all blocks.

Figures are kept with `--json FILE`, to which a later run of other cases adds; `--markdown FILE` writes them as a page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saccade.bench import records
from saccade.bench.records import Kept, Verdict
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.models.adem_vl import VisualMemory, silu_fusion
from saccade.ops.attend import attend
from saccade.ops.measure import fastest, peak_bytes
from saccade.train.lab import Lab

#: of plain decoding
DREAM_GOAL = 1.5
#: tokens of a pass of the target
PASSES = (1, 4, 8, 16)


@torch.no_grad()
def dream_row(quick: bool) -> dict[str, Any]:
    task = Lab().task("speculate")
    draft = task.trained(50 if quick else 600)
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


CASES: Mapping[str, Callable[[bool], dict[str, Any]]] = {"dream": dream_row, "adem-vl": adem_row}


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
                "prompt lookup",
                "ms of a level",
                "of a pass",
            ],
            [
                [
                    f"{row['accepted_length']:.2f}",
                    *(f"{row[name]:.1f}" for name in ("tokens_per_second", "plain_tokens_per_second")),
                    *(f"{row[name]:.2f}" for name in ("speedup", "lookup_speedup")),
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
    return found


if __name__ == "__main__":
    records.command(
        __doc__ or "",
        "Speed of language and vision",
        "language_vision",
        CASES,
        verdicts,
        sections,
        quick="few repeats",
    )
