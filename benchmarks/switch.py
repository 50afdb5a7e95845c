"""What `switch` to "softmax" costs a whole model: `python benchmarks/switch.py [--quick]`.

A model of SmolLM2-135M's width with random weights, on torch's SDPA and inside `saccade.switch(model, "softmax")`, in
turns; the median of the ratios of neighbours counts. The goal: at most 1.01.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import saccade

GOAL = 1.01


def smollm(layers: int = 8) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=512, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def cases(model: LlamaForCausalLM) -> dict[str, Callable[[], object]]:
    def prefill(tokens: int) -> Callable[[], object]:
        ids = torch.randint(512, (1, tokens), generator=torch.Generator().manual_seed(0))
        return lambda: model(ids, use_cache=False)

    def decode(tokens: int) -> Callable[[], object]:
        ids = torch.randint(512, (1, tokens), generator=torch.Generator().manual_seed(0))
        cache = model(ids, use_cache=True).past_key_values

        def step() -> None:
            model(ids[:, :1], past_key_values=cache, use_cache=True)
            cache.crop(-1)

        return step

    return {
        "prefill of 128 tokens": prefill(128),
        "prefill of 1,024 tokens": prefill(1024),
        "a token after 512": decode(512),
    }


def ratios(model: Any, call: Callable[[], object], seconds: float) -> list[float]:
    """(switched / plain) of neighbouring turns."""

    def timed(inside: AbstractContextManager[object]) -> float:
        with inside:
            start = perf_counter()
            for _ in range(calls):
                call()
            return (perf_counter() - start) / calls

    calls = 1
    timed(nullcontext())
    calls = max(1, round(0.05 / timed(nullcontext())))
    found, end = [], perf_counter() + seconds
    while perf_counter() < end or len(found) < 5:
        switched = timed(saccade.switch(model, "softmax"))
        found.append(switched / timed(nullcontext()))
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    model = smollm()
    table = Table("case", "switched / plain", "middle half", "goal")
    figures = {}
    for name, call in cases(model).items():
        found = sorted(ratios(model, call, 2.0 if arguments.quick else 12.0))
        low, middle, high = found[len(found) // 4], median(found), found[3 * len(found) // 4]
        figures[name] = middle
        table.add_row(name, f"{middle:.3f}", f"{low:.3f} to {high:.3f}", "met" if middle <= GOAL else f"{GOAL}")
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
