"""For pretrained language models: held-out English, and questions about something that was said long before.

| name | what stands in the text | what is asked |
|---|---|---|
| `passkey` | one number, at a depth | that number |
| `multi-key` | numbers of several animals, the one that is asked for at a depth | that of one animal |

Around them stands English from Python's own language reference. An answer counts where each of its tokens is the
model's likeliest one, those before it given (teacher forcing): greedy decoding would say the same answer then, and not
otherwise, as long as the model decodes by the attention by which it reads.

Shape letters: N tokens of a prompt with its answer, A tokens of the answer, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saccade.train.data.text import read_files, sentences, text_bytes

#: where in the text a question's answer stands: 0 its beginning, 1 its end
DEPTHS = (0.1, 0.5, 0.9)

#: numbers that stand in the text, of each kind of prompt
KEYS = (1, 4)

#: who has a number
_COLOURS = ("amber", "blue", "crimson", "golden", "green", "grey", "orange", "purple", "silver", "white")
_ANIMALS = ("badger", "crane", "dolphin", "falcon", "fox", "heron", "lynx", "otter", "raven", "tortoise")

#: bytes of a text that a token has at most, to read no more than is needed
_BYTES = 32


def english(path: str | Path | None = None) -> str:
    """A text to measure perplexity on: the held-out part of Python's language reference, the other part behind it.

    Args:
        path: a file to read in its place, such as an RFC.

    Raises:
        ValueError: if the file is empty or no text.
        OSError: if it cannot be read.
    """
    if path is not None:
        return bytes(read_files([path], least=1).tolist()).decode("utf-8", "replace")
    return "\n\n".join(bytes(text_bytes(split).tolist()).decode() for split in ("held-out", "train"))


def english_tokens(tokenizer: Any, count: int, path: str | Path | None = None) -> Tensor:
    """The first tokens of `english`, (count,).

    Args:
        tokenizer: of transformers.
        count: how many.
        path: as in `english`.

    Raises:
        ValueError: if the text has fewer.
        OSError: if the file cannot be read.
    """
    (ids,) = _encoded(tokenizer, [english(path)[: _BYTES * count]])
    if len(ids) < count:
        raise ValueError(f"the text must have at least {count} tokens, got {len(ids)}; give a longer one")
    return torch.tensor(ids[:count])


@dataclass(frozen=True)
class Prompt:
    """A text with a question at its end, and the answer.

    Attributes:
        ids_N: all tokens, the answer's last.
        asked: the first token of the question.
        answered: the first token of the answer.
        depth: where in the text the answer stood, 0 to 1.
    """

    ids_N: Tensor
    asked: int
    answered: int
    depth: float

    @property
    def answer_tokens(self) -> int:
        """A."""
        return len(self.ids_N) - self.answered

    def told(self, logits_AV: Tensor) -> bool:
        """Whether every token of the answer is the likeliest.

        Args:
            logits_AV: for the answer's tokens.
        """
        return bool((logits_AV.argmax(-1).cpu() == self.ids_N[self.answered :]).all())


@dataclass(frozen=True)
class Retrieval:
    """Prompts of one kind; called with a model, it says how many of them the model answers.

    Attributes:
        name: "passkey" or "multi-key".
        prompts: all of one length.
    """

    name: str
    prompts: tuple[Prompt, ...]

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> float:
        """The share of the prompts whose answer a causal language model tells, a pass for each.

        Args:
            model: of transformers; as it attends at the moment.
        """
        known = inspect.signature(model.forward).parameters
        device = next(model.parameters()).device
        right = 0
        for prompt in self.prompts:
            call: dict[str, Any] = {"use_cache": False, "logits_to_keep": prompt.answer_tokens + 1}
            call = {name: value for name, value in call.items() if name in known}
            logits_NV = model(input_ids=prompt.ids_N[None].to(device), **call).logits[0]
            right += prompt.told(logits_NV[-1 - prompt.answer_tokens : -1])
        return right / len(self.prompts)


def retrieval(
    tokenizer: Any, context: int, *, keys: int = 1, depths: Sequence[float] = DEPTHS, each: int = 1, seed: int = 0
) -> Retrieval:
    """Prompts of `context` tokens that ask for a number of five digits: `passkey` with one, `multi-key` with several.

    Args:
        tokenizer: of transformers.
        context: N, tokens of a prompt with its answer.
        keys: numbers that stand in the text, 1 to 10.
        depths: where the one stands that is asked for; the others stand anywhere.
        each: prompts for each depth.
        seed: the same gives the same prompts.

    Raises:
        ValueError: if the context is too short, a number is out of range, or the tokenizer has no tokens for digits.
    """
    if not 1 <= keys <= len(_ANIMALS):
        raise ValueError(f"keys must be 1 to {len(_ANIMALS)}, got {keys}")
    if each < 1 or not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths must be of 0 to 1, with at least one prompt for each, got {depths} and {each}")
    generator = torch.Generator().manual_seed(seed)
    filler = _encoded(tokenizer, [f" {sentence}" for topic in sentences("train") for sentence in topic])
    prompts = [_prompt(tokenizer, context, keys, depth, filler, generator) for depth in depths for _ in range(each)]
    return Retrieval("passkey" if keys == 1 else "multi-key", tuple(prompts))


def _prompt(
    tokenizer: Any, context: int, keys: int, depth: float, filler: list[list[int]], generator: torch.Generator
) -> Prompt:
    numbers = [str(10000 + int(x)) for x in torch.randint(90000, (keys,), generator=generator)]
    owners = ["the pass key"]
    if keys > 1:
        orders = [torch.randperm(len(names), generator=generator).tolist() for names in (_COLOURS, _ANIMALS)]
        owners = [f"the number of the {_COLOURS[i]} {_ANIMALS[j]}" for i, j in zip(*orders)][:keys]
    said = [f"\n\nRemember: {owner} is {number}.\n\n" for owner, number in zip(owners, numbers)]
    question = f"\n\nWhat is {owners[0]}? {owners[0].capitalize()} is"
    *needles, asked, answer = _encoded(tokenizer, [*said, question, f" {numbers[0]}"])
    unknown = getattr(tokenizer, "unk_token_id", None)
    if not answer or (unknown is not None and unknown in answer):
        raise ValueError("the tokenizer has no tokens for digits: numbers cannot be asked for")
    first = _beginning(tokenizer)
    room = context - len(first) - len(asked) - len(answer) - sum(map(len, needles))
    if room < 0:
        raise ValueError(f"the context must be at least {context - room} tokens for {keys} numbers, got {context}")
    text = _sentences(filler, room, int(torch.randint(len(filler), (), generator=generator)))
    places = [depth, *torch.rand(keys - 1, generator=generator).tolist()]
    ids = [*first, *_with_needles(text, needles, places)]
    whole = torch.tensor([*ids, *asked, *answer])
    return Prompt(whole, len(ids), len(ids) + len(asked), depth)


def _sentences(filler: list[list[int]], room: int, start: int) -> list[list[int]]:
    """Sentences of `room` tokens in all, from one on; what is over is missing at the beginning of the first."""
    found: list[list[int]] = []
    while room > 0:
        found.append(filler[(start + len(found)) % len(filler)])
        room -= len(found[-1])
    while room < 0:
        cut = min(-room, len(found[0]))
        found[0], room = found[0][cut:], room + cut
        if not found[0]:
            found.pop(0)
    return found


def _with_needles(text: list[list[int]], needles: list[list[int]], places: list[float]) -> list[int]:
    """The sentences, each needle between two of them, nearest to its place."""
    ends = torch.tensor([0, *map(len, text)]).cumsum(0)
    gaps = [int((ends - place * ends[-1]).abs().argmin()) for place in places]
    ids: list[int] = []
    for gap in range(len(text) + 1):
        ids += [token for needle, where in zip(needles, gaps) if where == gap for token in needle]
        ids += text[gap] if gap < len(text) else []
    return ids


def _beginning(tokenizer: Any) -> list[int]:
    """The token with which the tokenizer lets each text begin, if it does."""
    first: list[int] = tokenizer("a")["input_ids"][:1]
    return first if first == [getattr(tokenizer, "bos_token_id", None)] else []


def _encoded(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
