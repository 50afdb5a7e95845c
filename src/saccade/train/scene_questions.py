"""What the small vision-language model is asked, and how it answers: scenes over photographs, questions, a score.

Shape letters: B scenes, T tokens of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from saccade.train.data.described import COLOUR_NAMES, THINGS, WORDS, Described, described, sentence
from saccade.train.data.pictures import photographs

__all__ = ["DESCRIBE", "IMAGE", "SIDE", "answers", "prompt", "scenes", "score"]

#: pixels of an image's side
SIDE = 112
#: the token that stands for an image in a text
IMAGE = "<image>"
#: the question of a caption
DESCRIBE = "What is in the picture?"
#: photographs behind what is learned from, and what is judged on
LEARN, JUDGE = ("chelsea", "coffee", "rocket"), ("astronaut",)


def prompt(question: str = DESCRIBE) -> str:
    """The text to which the model answers; the processor puts an image in the place of `IMAGE`."""
    return f"{IMAGE}\nQuestion: {question}\nAnswer:"


def scenes(count: int, generator: torch.Generator, *, judge: bool = False) -> Described:
    """Scenes over photographs; of those that are judged on, photographs and digits are others."""
    behind = photographs(*(JUDGE if judge else LEARN))
    return described(count, SIDE, generator, judge=judge, photographs=behind)


def answers(words_T: Sequence[int], choice: int = 0) -> tuple[str, str]:
    """A question on a scene and its answer.

    Args:
        words_T: its caption, by number.
        choice: any number: 0, 1, 2 modulo 5 describe, 3 asks for a colour, 4 whether there is a thing.
    """
    words = sentence(words_T).split()
    named = [(words[i], words[i + 1]) for i, word in enumerate(words[:-1]) if word in COLOUR_NAMES]
    colour, thing = named[choice // 5 % len(named)]
    others = {other for _, other in named}
    if choice % 5 == 3 and len(others) == len(named):
        return f"What colour {'are' if thing in _MANY else 'is'} the {thing}?", colour
    if choice % 5 == 4:
        is_there = choice // 10 % 2 == 0
        if not is_there:
            absent = [each for each in THINGS if not any(other in (each, _MANY_OF[each]) for other in others)]
            thing = absent[choice // 20 % len(absent)]
        asked = next((one for one, many in _MANY_OF.items() if many == thing), thing)
        return f"Is there a {asked}?", "yes" if is_there else "no"
    return DESCRIBE, " ".join(words)


_MANY_OF = dict(zip(THINGS, WORDS[-len(THINGS) :], strict=True))
_MANY = set(_MANY_OF.values())


@torch.no_grad()
def score(model: Any, processor: Any, count: int = 40, seed: int = 10**6, batch: int = 20) -> dict[str, float]:
    """How many of held-out scenes are described in the right words, and the share of right answers to other questions.

    Args:
        model, processor: of `assemble`.
        count: scenes.
        seed: of them.
        batch: scenes at once.
    """
    found: dict[str, list[bool]] = {"described": [], "colour": [], "presence": []}
    asked = scenes(count, torch.Generator().manual_seed(seed), judge=True)
    pictures = [(255 * image.movedim(0, -1)).round().byte().numpy() for image in asked.images]
    for kind, choice in (("described", 0), ("colour", 3), ("presence", 4)):
        pairs = [answers(words, choice + 5 * number) for number, words in enumerate(asked.captions.tolist())]
        kept = [i for i, (question, _) in enumerate(pairs) if kind == "described" or question != DESCRIBE]
        for start in range(0, len(kept), batch):
            some = kept[start : start + batch]
            inputs = processor(
                images=[pictures[i] for i in some], text=[prompt(pairs[i][0]) for i in some], padding=True,
                return_tensors="pt",
            )  # fmt: skip
            said = model.generate(**inputs, max_new_tokens=14, do_sample=False)
            texts = processor.tokenizer.batch_decode(said[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            found[kind] += [text.strip() == pairs[i][1] for i, text in zip(some, texts, strict=True)]
    return {kind: sum(right) / len(right) for kind, right in found.items() if right}
