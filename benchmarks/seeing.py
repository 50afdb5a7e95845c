"""What wrappers do to a vision-language model that sees: `python benchmarks/seeing.py [CASE ...]`.

The model is `saccade.train.vision_language.small`: SmolLM2-135M and a ViT-S/14, joined and trained here once (an
hour of one thread on a busy machine), and kept in the cache folder. It is asked about generated scenes that it has not
seen, over another photograph and with other digits: to describe them (right when each word is), for a colour, and
whether a thing is there.

- **bare**: the model alone.
- **agla**: the second view keeps what is like the words of the question, by the model's own projector.
- **carve**: a first pass decides where to look again.
- **token-compression**: all 16 tokens of an image, and half and a quarter of them, by each method.
- **dream**: a draft that reads the model's features is trained on what it says of other scenes; tokens a pass.

Figures are kept with `--json FILE`, to which a later run of other cases adds; `--markdown FILE` writes them as a page.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from saccade.models.dream import DreamDraft, Sample, dream, fit_draft, record
from saccade.models.images import normalised
from saccade.train import scene_questions, vision_language
from saccade.train.data.described import WORDS
from saccade.train.drafts import LESSON, draft_arguments, giving_attentions, start_as
from saccade.train.tiny import blind

#: scenes that are judged, and in a quick run
COUNT, FEW = 100, 2
SHARES = (0.5, 0.25)
METHODS = ("cluster", "spatial", "saliency", "random")
KINDS = ("described", "colour", "presence")
#: of the draft: texts, and steps of its training
TEXTS, STEPS, ROWS = 480, 300, 16


@cache
def model(quick: bool) -> tuple[Any, Any]:
    """The model and its processor; a quick run's has not learned anything."""
    return blind() if quick else vision_language.small()


class WordMatcher:
    """How much each token of an image is like the nearest of the words in a question that name something.

    Args:
        model, processor: of the vision-language model, whose projector puts tokens near words.
    """

    size = scene_questions.SIDE

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.table = model, model.get_input_embeddings().weight.detach()
        self.spelled = {
            word: processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in WORDS[8:]
        }

    def __call__(self, images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        pixels = normalised(images, 3)
        tokens_IKD = torch.stack(list(self.model.get_image_features(pixel_values=pixels).pooler_output))
        found = []
        for tokens_KD, text in zip(tokens_IKD, prompts, strict=True):
            asked = [ids for word, ids in self.spelled.items() if word in text.replace("?", " ").split()]
            words_WD = torch.stack([self.table[ids].mean(0) for ids in asked or self.spelled.values()])
            found.append(torch.cosine_similarity(tokens_KD[:, None], words_WD, dim=-1).amax(1).clamp(min=0))
        like_IK = torch.stack(found)
        return like_IK.unflatten(1, (vision_language.TOKENS, -1)), like_IK.amax(1)


def wrapped(name: str, quick: bool) -> AbstractContextManager[Any]:
    network, processor = model(quick)
    if name == "agla":
        return agla(network, processor, WordMatcher(network, processor))
    return carve(network, processor, max_new_tokens=4) if name == "carve" else nullcontext()


@torch.no_grad()
def seen_row(name: str, quick: bool) -> dict[str, Any]:
    network, processor = model(quick)
    with giving_attentions(network) if name == "carve" else nullcontext(), wrapped(name, quick) as report:
        row: dict[str, Any] = scene_questions.score(network, processor, FEW if quick else COUNT)
    if name == "agla":
        row["changed"], row["positions"] = report.changed, report.positions
    return row


@torch.no_grad()
def compression_row(quick: bool) -> dict[str, Any]:
    network, processor = model(quick)
    row: dict[str, Any] = {}
    for method in METHODS[:1] if quick else METHODS:
        for share in SHARES:
            with token_compression(network, share=share, method=method):
                row[f"{method} {share}"] = scene_questions.score(network, processor, FEW if quick else COUNT // 2)
    return row


def dream_row(quick: bool) -> dict[str, Any]:
    """Tokens a pass behind images that the draft has not seen, with features and without."""
    network, processor = model(quick)
    texts, steps = (4, 2) if quick else (TEXTS, STEPS)
    torch.manual_seed(0)
    draft = start_as(DreamDraft(**draft_arguments(network), strict=True), network)
    generator = torch.Generator().manual_seed(1)
    samples = [_said(network, processor, min(ROWS, texts), generator) for _ in range(max(1, texts // ROWS))]
    order = torch.randint(len(samples), (steps,), generator=generator).tolist()
    fit_draft(
        draft, network, (samples[number] for number in order), lr=1e-3, warmup=min(20, steps), steps=steps,
        **LESSON,
    )  # fmt: skip
    row: dict[str, Any] = {}
    for name in ("with features", "without"):
        if name == "without":
            torch.nn.init.zeros_(draft.features.cross_attn_attn_gate)
        wrapper, same = dream(network, draft, total_tokens=8, depth=3, top_k=2), []
        for inputs in _asked(processor, 2 if quick else 40, torch.Generator().manual_seed(2), judge=True):
            plain = network.generate(**inputs, max_new_tokens=14, do_sample=False)
            with wrapper as report:
                same.append(torch.equal(network.generate(**inputs, max_new_tokens=14, do_sample=False), plain))
            row[f"{name}: tokens"] = row.get(f"{name}: tokens", 0) + report.tokens
            row[f"{name}: passes"] = row.get(f"{name}: passes", 0) + report.rounds
        row[f"{name}: same"] = sum(same) / len(same)
    return row


def _asked(processor: Any, count: int, generator: torch.Generator, *, judge: bool = False, rows: int = 1) -> list[Any]:
    """Inputs that ask for a description, so many scenes at once."""
    images = scene_questions.scenes(count, generator, judge=judge).images
    pictures = [(255 * image.movedim(0, -1)).round().byte().numpy() for image in images]
    text = [scene_questions.prompt()] * rows
    return [processor(images=pictures[i : i + rows], text=text, return_tensors="pt") for i in range(0, count, rows)]


@torch.no_grad()
def _said(network: Any, processor: Any, count: int, generator: torch.Generator) -> Sample:
    """What the model says of scenes, and its features."""
    (inputs,) = _asked(processor, count, generator, rows=count)
    ids = network.generate(**inputs, max_new_tokens=10, min_new_tokens=10, do_sample=False)
    learned = torch.zeros(ids.shape, dtype=torch.bool)
    learned[:, inputs["input_ids"].shape[1] - 1 :] = True
    with giving_attentions(network):
        return record(network, learned, input_ids=ids, pixel_values=inputs["pixel_values"])


CASES = {
    **{name: partial(seen_row, name) for name in ("bare", "agla", "carve")},
    "token-compression": compression_row,
    "dream": dream_row,
}


def verdicts(kept: Kept) -> list[Verdict]:
    found = []
    if (row := kept.get("bare")) is not None:
        found += [Verdict(f"the bare model, {kind}:", 0.75, row[kind], row[kind] >= 0.75) for kind in KINDS]
    if (row := kept.get("dream")) is not None:
        same = row["with features: same"]
        found.append(Verdict("texts of DREAM that are the model's own:", 1.0, same, same == 1.0))
    return found


def _line(name: str, row: Mapping[str, Any]) -> list[str]:
    return [name, *(f"{row[kind]:.1%}" for kind in KINDS)]


def sections(kept: Kept) -> dict[str, list[str]]:
    found = {}
    columns = ["", "described", "colour", "presence"]
    if lines := [_line(name, kept[name]) for name in ("bare", "agla", "carve") if name in kept]:
        found["Right answers"] = records.table(columns, lines)
    if (row := kept.get("token-compression")) is not None:
        lines = [_line(name, row[name]) for name in row if name.partition(" ")[0] in METHODS]
        found["Right answers from fewer tokens of the image"] = records.table(columns, lines)
    if (row := kept.get("dream")) is not None:
        lines = [
            [name, f"{row[f'{name}: tokens'] / row[f'{name}: passes']:.2f}", f"{row[f'{name}: same']:.0%}"]
            for name in ("with features", "without")
        ]
        found["DREAM"] = records.table(["draft", "tokens a pass", "the same texts"], lines)
    return found


if __name__ == "__main__":
    records.command(
        __doc__ or "",
        "What wrappers do to a model that sees",
        "seeing",
        CASES,
        verdicts,
        sections,
        quick="few scenes, and a tiny model that has not learned",
        page_name="{}",
    )
