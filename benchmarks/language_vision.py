"""Language and vision: what the parts bring beside what one has: `python benchmarks/language_vision.py [CASE ...]`.

- **dream**: SmolLM2-135M behind windows of text, greedy, with a draft that is trained here once, for minutes, and kept
  in the cache folder; against plain `generate` and transformers' prompt lookup in the same run. The tokens must be
  the same; the goal is 1.5 times plain decoding. What a pass of the target and a level of the draft cost is beside it.

Figures are kept with `--json FILE`, to which a later run of other cases adds; `--markdown FILE` writes them as a page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from saccade.bench import records
from saccade.bench.records import Kept, Verdict
from saccade.ops.measure import fastest
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


CASES: Mapping[str, Callable[[bool], dict[str, Any]]] = {"dream": dream_row}


def verdicts(kept: Kept) -> list[Verdict]:
    found = []
    if (row := kept.get("dream")) is not None:
        got, same = row["speedup"], row["same"]
        found.append(Verdict("DREAM on SmolLM2 against plain decoding:", DREAM_GOAL, got, got >= DREAM_GOAL))
        found.append(Verdict("its texts that are the same, a share of:", 1.0, same, same == 1.0))
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
