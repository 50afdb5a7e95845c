"""Questions about something that was said long before: what stands in the text, at which length, and who answers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from saccade.train.data import Prompt, Retrieval, english, english_tokens, retrieval, text_bytes


class Oracle(nn.Module):
    """Tells every token of the prompts that it knows; from `wrong` of them on, the last one is another."""

    def __init__(self, prompts: tuple[Prompt, ...], right: int) -> None:
        super().__init__()
        self.asked, self.right = 0, right
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0) -> Any:
        logits_BNV = one_hot(input_ids.roll(-1, 1), 256).float()
        if self.asked >= self.right:
            logits_BNV[0, -2] = -logits_BNV[0, -2]
        self.asked += 1
        return SimpleNamespace(logits=logits_BNV[:, -logits_to_keep:])


def said(tokenizer: Any, ids: Tensor) -> str:
    return str(tokenizer.decode(ids.tolist()))


@pytest.mark.parametrize("keys", [1, 4])
def test_the_answer_stands_where_it_should(byte_tokenizer: Any, keys: int) -> None:
    found = retrieval(byte_tokenizer, 1500, keys=keys, depths=(0.0, 0.3, 1.0), each=2, seed=3)
    assert found.name == ("passkey" if keys == 1 else "multi-key") and len(found.prompts) == 6
    for prompt in found.prompts:
        assert len(prompt.ids_N) == 1500 and prompt.answer_tokens == 6
        text, question = (
            said(byte_tokenizer, prompt.ids_N[: prompt.asked]),
            prompt.ids_N[prompt.asked : prompt.answered],
        )
        answer = said(byte_tokenizer, prompt.ids_N[prompt.answered :]).strip()
        owner = said(byte_tokenizer, question).split("? ")[1].removesuffix(" is").lower()
        needle = f"Remember: {owner} is {answer}."
        assert text.count(needle) == 1 and text.count("Remember: ") == keys
        # between two sentences, so not further off than the longest one
        assert abs(text.index(needle) - prompt.depth * len(text)) < 250 + 60 * keys
        assert answer.isdecimal() and len(answer) == 5
    again = retrieval(byte_tokenizer, 1500, keys=keys, depths=(0.0, 0.3, 1.0), each=2, seed=3)
    assert all(torch.equal(a.ids_N, b.ids_N) for a, b in zip(found.prompts, again.prompts, strict=True))
    assert not torch.equal(found.prompts[0].ids_N, found.prompts[1].ids_N)


@pytest.mark.parametrize("context", [150, 201, 20011])
def test_any_length_is_met(byte_tokenizer: Any, context: int) -> None:
    (prompt,) = retrieval(byte_tokenizer, context, depths=(0.5,)).prompts
    assert len(prompt.ids_N) == context


@pytest.mark.parametrize("right", [0, 2, 3])
def test_an_answer_counts_where_each_token_is_the_likeliest(byte_tokenizer: Any, right: int) -> None:
    found = retrieval(byte_tokenizer, 300)
    assert found(Oracle(found.prompts, right)) == right / 3


def test_what_counts_is_what_greedy_decoding_says() -> None:
    """On a model that has been trained to count on: its own greedy answers are told, others are not."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.5, eos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    start = torch.randint(32, (1, 20))
    own = model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    other = own.clone()
    other[0, -2] = (other[0, -2] + 1) % 32
    prompts = tuple(Prompt(ids[0], 18, 20, 0.5) for ids in (own, other))
    assert Retrieval("mine", prompts)(model) == 0.5


def test_a_tokenizer_that_begins_a_text_by_a_token(byte_tokenizer: Any) -> None:
    byte_tokenizer.bos_token = "!"
    plain = retrieval(byte_tokenizer, 400).prompts[0].ids_N
    assert plain[0] != byte_tokenizer.bos_token_id  # it has one, and does not begin by it

    class Beginning:
        bos_token_id, unk_token_id = 7, None

        def __call__(self, texts: Any, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, Any]:
            ids = byte_tokenizer(texts)["input_ids"]
            return {"input_ids": [7, *ids] if add_special_tokens else ids}

    first = retrieval(Beginning(), 400).prompts[0].ids_N
    assert first[0] == 7 and len(first) == 400


def test_the_text(byte_tokenizer: Any, tmp_path: Path) -> None:
    assert english().startswith(bytes(text_bytes("held-out")[:500].tolist()).decode())
    ids = english_tokens(byte_tokenizer, 77)
    assert ids.shape == (77,) and said(byte_tokenizer, ids) == english()[:77]
    (tmp_path / "rfc.txt").write_text("Network Working Group")
    assert said(byte_tokenizer, english_tokens(byte_tokenizer, 21, tmp_path / "rfc.txt")) == "Network Working Group"
    with pytest.raises(ValueError, match="at least 22 tokens, got 21"):
        english_tokens(byte_tokenizer, 22, tmp_path / "rfc.txt")
    with pytest.raises(FileNotFoundError, match="no data file"):
        english(tmp_path / "nothing")


def test_refusals(byte_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"context must be at least \d+ tokens for 4 numbers, got 100"):
        retrieval(byte_tokenizer, 100, keys=4)
    with pytest.raises(ValueError, match="keys must be 1 to 10, got 11"):
        retrieval(byte_tokenizer, 1000, keys=11)
    for wrong in ({"depths": ()}, {"depths": (1.5,)}, {"each": 0}):
        with pytest.raises(ValueError, match="depths must be of 0 to 1"):
            retrieval(byte_tokenizer, 1000, **wrong)

    class Wordless:
        unk_token_id = 0

        def __call__(self, texts: list[str], **options: Any) -> dict[str, Any]:
            return {"input_ids": [[0] for _ in texts]}

    with pytest.raises(ValueError, match="no tokens for digits"):
        retrieval(Wordless(), 1000)
