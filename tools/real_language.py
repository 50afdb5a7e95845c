"""Sections of docs/real-models.md on language models: what of ours stands beside them, and what it finds in them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.explain.human_guided_patterns import (
    BoundaryClassifier,
    ProjectedLayers,
    injected,
    projected,
    relevance,
    segmentation,
)
from saccade.train import models
from saccade.train.lab import Lab


def paragraph_pairs(pairs: int, generator: torch.Generator, held_out: bool) -> tuple[list[str], list[str], Tensor]:
    """Ends and beginnings of paragraphs of Python's reference, and whether a new topic begins between them (B,).

    Half of them follow each other in one topic. A fifth of the topics is held out, whole; no paragraph is taken twice.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    texts = []
    for number, name in enumerate(sorted(topics)):
        paragraphs = [p for p in topics[name].split("\n\n") if len(p.split()) >= 20 and p not in seen]
        seen.update(paragraphs)
        if (number % 5 == 4) == held_out and len(paragraphs) > 2:
            texts.append(paragraphs)
    sizes = torch.tensor([len(paragraphs) - 1.0 for paragraphs in texts])
    lefts, rights = [], []
    label_B = torch.arange(pairs) % 2
    for label in label_B.tolist():
        here, there = torch.multinomial(sizes, 2, generator=generator).tolist()
        i, j = (int(torch.randint(len(texts[t]) - 1, (), generator=generator)) for t in (here, there))
        lefts.append(texts[here][i])
        rights.append(texts[there][j] if label else texts[here][i + 1])
    return lefts, rights, label_B


def patterns(lab: Lab) -> dict[str, Any]:
    """MiniLM says where a new topic begins: patterns found in its heads, and put into it.

    It is fine-tuned once; then the paper's patterns are looked for, and it is fine-tuned again as it is, with them in
    the heads where they were found, in four heads of every layer, and in projected layers, beside such without them.
    """
    side, steps, size = 24, lab.size(40, 1), lab.size(12, 2)
    encoder, tokenizer = models.load("minilm", fresh=True)
    encoder.requires_grad_(True)
    named = segmentation(tokenizer.sep_token_id)

    def inputs(lefts: list[str], rights: list[str]) -> dict[str, Tensor]:
        ids = [
            [tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"] for t in texts]
            for texts in (lefts, rights)
        ]
        rows = [
            [tokenizer.cls_token_id, *left[-side:], tokenizer.sep_token_id, *right[:side]]
            for left, right in zip(*ids, strict=True)
        ]
        longest = max(map(len, rows))
        return {
            "input_ids": torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        }

    lefts, rights, held_B = paragraph_pairs(lab.size(240, 8), lab.held_out(), True)
    held = [inputs(lefts[i : i + 50], rights[i : i + 50]) for i in range(0, len(lefts), 50)]

    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head, self.beside = encoder, BoundaryClassifier(384), nn.ModuleList()

        def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
            return self.head(self.encoder(**batch).last_hidden_state)

    def batches(seed: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            lefts, rights, label_B = paragraph_pairs(size, generator, False)
            yield inputs(lefts, rights), label_B

    def loss(model: nn.Module, batch: tuple[dict[str, Tensor], Tensor]) -> Tensor:
        return cast(Segmenter, model).head.loss(model(batch[0]), batch[1]).loss

    @torch.no_grad()
    def percent(model: nn.Module) -> float:
        model.eval()
        said = torch.cat([model(batch) for batch in held])
        return 100 * float(((said > 0) == held_B.bool()).float().mean())

    with lab.seeded():
        model = Segmenter()
    lab.train(model, batches(1), loss, 3 * steps // 2, lr=1e-4, description="MiniLM")
    found: dict[str, Any] = {"held-out pairs": len(held_B), "percent after fine-tuning": percent(model)}
    labels = {id(batch): part for batch, part in zip(held, held_B.split(50))}

    def errors(said: Any, batch: Mapping[str, Tensor]) -> Tensor:
        logits = model.head(said.last_hidden_state)
        return F.binary_cross_entropy_with_logits(logits, labels[id(batch)].float(), reduction="none")

    seen = relevance(encoder, held[:4], named, loss=errors)
    kept = seen.kept(alone=True)
    for p, name in enumerate(named):
        best = seen.relevance[..., p]
        found[f"relevance of {name}: mean of heads, best head, density"] = [
            float(best.mean()), float(best.max()), float(seen.density[p]),
        ]  # fmt: skip
        found[f"heads of {name} (layer.head)"] = [f"{layer}.{head}" for layer, head in kept.get(name, [])]
    state = copy.deepcopy(model.state_dict())
    with lab.seeded():
        plain, special = (ProjectedLayers.beside(encoder, 128, 4) for _ in range(2))
        special.load_state_dict(plain.state_dict())
    forms = {
        "as it is": nullcontext,
        "patterns where they were found": lambda: injected(encoder, named, heads=kept),
        "patterns in 4 of 12 heads": lambda: injected(encoder, named),
        "projected layers without patterns": lambda: projected(encoder, plain),
        "projected layers with patterns": lambda: projected(encoder, special, named),
    }
    beside = {"projected layers without patterns": plain, "projected layers with patterns": special}
    for name, form in forms.items():
        model.load_state_dict(state)
        model.beside = nn.ModuleList([beside[name]] if name in beside else [])
        with form():
            if "heads" in name or "found" in name:
                found[f"percent, {name}, at once"] = percent(model)
            lab.train(model, batches(2), loss, steps, lr=1e-4, description=name)
            found[f"percent, {name}, fine-tuned again"] = percent(model)
        model.beside = nn.ModuleList()
    return found
