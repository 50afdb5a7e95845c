"""Reading a prompt and saying tokens after it: those of `generate`, with padding, and with a cache of one's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from saccade.integrations.decoding import can_decode, decoding

transformers = pytest.importorskip("transformers")


def language_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.5, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("padded", [0, 5])
def test_the_tokens_are_those_of_generate(padded: int) -> None:
    model, ids = language_model(), torch.randint(20, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, :padded] = 0
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)[:, 12:]
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    if not padded:
        inputs = {"input_ids": ids}
    cache = transformers.DynamicCache()
    for given in (None, cache):
        found = decoding(model, inputs, 5, given)
        assert torch.equal(found.tokens_BT, expected) and found.first > 0 and found.rate > 0
        assert found.cache.get_seq_length() == 12 + 5
    assert cache.get_seq_length() == 17


def test_refusals() -> None:
    with pytest.raises(ValueError, match="new must be at least 1, got 0"):
        decoding(language_model(), {"input_ids": torch.zeros(1, 2, dtype=torch.long)}, 0)
    assert not can_decode(torch.nn.Linear(2, 2)) and can_decode(language_model())
    with pytest.raises(ValueError, match="Linear has no cache"):
        decoding(torch.nn.Linear(2, 2), {})
