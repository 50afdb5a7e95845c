"""Half of a model's attention layers to another mechanism, in minutes: `python benchmarks/convert.py [CASE ...]`.

The model is SmolLM2-135M-Instruct. The half is those layers that it misses least one by one, found once, on the text
to learn from (Python's language reference, without a tenth). Each mechanism has five minutes on two cores, counted as
ten minutes of processor time, all threads together: first the layers imitate the old ones, then the whole model learns
from its former logits; nothing but the new layers changes, and no label of the text is learned from.

Perplexity is of 4,096 tokens of the other tenth in windows of 512, the length of training, and of 2,048. What the
mechanisms are told was chosen on 4,096 tokens before these, on which nothing is judged; rates of learning, by how
layers are imitated on windows of the text to learn from that were not learned from. Milliseconds and prefill are
of the processor, for 8,192 tokens of which the model says the last 16; the cache is all that is kept. What is regained
is the share of the rise of log-perplexity by leaving the layers out that the new layers undo.

Figures are kept with `--json FILE`, to which a later run of other cases adds; `--markdown FILE` writes them as a page.
Checkpoints lie in the cache folder: a run that was stopped goes on.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.bench import records
from saccade.bench.records import Kept, Verdict
from saccade.ops.autocast import quick as autocast
from saccade.ops.folder import cache_folder, write_text
from saccade.report.conversion import language_model
from saccade.train.conversion import convert, cost_of_leaving_out, perplexity
from saccade.train.data import text_bytes

MINUTES, THREADS = 5.0, 2
LENGTH, LONG, CONTEXT = 512, 2048, 8192
#: tokens of the text that is not learned from: the first, on which ways are chosen, and those behind them
CHOSEN, JUDGED = 4096, 4096
#: what each mechanism is told, of the part and of the training; NAtS' window and MoH's router are their papers' for
#: pretrained language models
WAYS: dict[str, dict[str, Any]] = {
    "moba": {"block_size": 64, "top_k": 4, "sinks": 4},
    "lightning": {"bias": True, "lr": 3e-3},
    "slay": {"variant": "hadamard", "lr": 1e-2},
    "nats": {"window": 256, "chunk_size": 1},
    "moh": {"router": "query-norm", "shared_heads": 4, "routed_heads": 3},
}
#: of a tiny model's parts
QUICK: dict[str, dict[str, Any]] = {
    "moba": {"block_size": 8},
    "nats": {"window": 8},
    "moh": {"shared_heads": 2, "routed_heads": 1},
}
#: of the loss by leaving the layers out
GOAL = 0.8
STATES = {
    "before": "as it was",
    "dropped": "half of the layers left out",
    "started": "untrained",
    "imitated": "after imitating layers",
    "after": "after learning from logits, too",
}


@cache
def subject(quick: bool) -> tuple[Any, Tensor, Tensor]:
    """The model, the text to learn from and the text to be judged on; a quick run's is tiny and has not learned."""
    if not quick:
        model, text, held_out = language_model("smollm2-135m", [], CHOSEN + JUDGED)
        return model, text, held_out[CHOSEN : CHOSEN + JUDGED]
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    text, held_out = (text_bytes(split)[:400].long() for split in ("train", "held-out"))
    return LlamaForCausalLM(config).eval(), text, held_out


@contextmanager
def kept_in(name: str, quick: bool) -> Iterator[Path]:
    """A folder that stays, but for a quick run."""
    if quick:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        folder = cache_folder() / "converted" / name
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


@cache
def order(quick: bool) -> list[str]:
    """The attention layers, the one that the model misses least first."""
    model, tokens, _ = subject(quick)
    with kept_in("layers", quick) as folder:
        file = folder / "left-out.json"
        if not file.exists():
            with autocast():
                costs = cost_of_leaving_out(model, tokens, 32 if quick else LENGTH)
            write_text(file, json.dumps(costs))
        costs = json.loads(file.read_text("utf-8"))
    return sorted(costs, key=costs.__getitem__)


def layers_row(quick: bool) -> dict[str, Any]:
    """Which layers, and what leaving out each one alone would cost."""
    ordered = order(quick)
    return {"order": ordered, "half": len(ordered) // 2}


def mechanism_row(slug: str, quick: bool) -> dict[str, Any]:
    model, tokens, held_out = subject(quick)
    layers = order(quick)[: len(order(quick)) // 2]
    sizes: dict[str, Any] = {"length": LENGTH, "context": CONTEXT, "minutes": THREADS * MINUTES}
    sizes["clock"] = time.process_time
    options = dict(WAYS[slug])
    if quick:
        sizes = {"length": 32, "context": 64, "steps": 4, "shown": False}
        options |= QUICK.get(slug, {})
    long = 64 if quick else LONG
    row: dict[str, Any] = {"long_before": perplexity(model, held_out, long)}
    with kept_in(slug, quick) as folder:
        report = convert(model, slug, tokens, layers=layers, held_out=held_out, folder=folder, **sizes, **options)
        report.save(folder)
    row["long_after"] = perplexity(model, held_out, long)
    subject.cache_clear()  # the model is changed
    told = report.as_dict()
    row |= {name: told[name] for name in ("arguments", "layers", *STATES, "steps", "seconds", "decoding")}
    return row | {"options": {name: str(value) for name, value in WAYS[slug].items()}, "regained": regained(row)}


def regained(row: dict[str, Any]) -> float | None:
    """The share of the rise of log-perplexity by leaving layers out that is undone; None where it does not rise."""
    rise = math.log(row["dropped"] / row["before"])
    return 1 - math.log(row["after"] / row["before"]) / rise if rise > 0 else None


CASES = {"layers": layers_row, **{slug: partial(mechanism_row, slug) for slug in WAYS}}


def verdicts(kept: Kept) -> list[Verdict]:
    return [
        Verdict(f"{slug}, share of the loss by leaving out that is regained:", GOAL, got, got >= GOAL)
        for slug in WAYS
        if (row := kept.get(slug)) is not None and (got := row["regained"]) is not None
    ]


def sections(kept: Kept) -> dict[str, list[str]]:
    found = {}
    for slug in WAYS:
        if (row := kept.get(slug)) is None:
            continue
        cost = dict(zip(("before", "after"), row["decoding"], strict=True))
        long = {"before": row["long_before"], "after": row["long_after"]}
        lines = []
        for state, words in STATES.items():
            cells = [f"{row[state]:.2f}", f"{long[state]:.2f}" if state in long else ""]
            spent = cost.get(state)
            cells += ["", "", ""] if spent is None else [
                f"{1e3 * spent['seconds']:.0f}", f"{spent['prefill']:.1f}", f"{spent['cache_bytes'] / 1e6:.1f}"
            ]  # fmt: skip
            lines.append([words, *cells])
        options = ", ".join(f"{name}={value}" for name, value in row["options"].items())
        columns = ["", "perplexity", "in long windows", "ms a token", "s prefill", "cache, MB"]
        found[f"{slug}{f' ({options})' if options else ''}: {row['steps']} steps"] = records.table(columns, lines)
    if (row := kept.get("layers")) is not None:
        numbers = [path.split(".")[2] for path in row["order"]]
        found["Layers, the least missed first"] = [
            f"Converted: {', '.join(numbers[: row['half']])}.",
            "",
            f"Left as they are: {', '.join(numbers[row['half'] :])}.",
        ]
    return found


if __name__ == "__main__":
    records.command(
        __doc__ or "",
        "Conversion of half a model's attention",
        "convert",
        CASES,
        verdicts,
        sections,
        quick="a tiny model that has not learned, few steps",
        page_name="{}",
    )
