"""captum's and transformer-lens's words mean here what they mean there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import saccade

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[3, 4, 5, 6]])


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, vocab_size=20, num_key_value_heads=2, max_position_embeddings=16)
    ).eval()


def test_attribute_is_one_map_of_explain() -> None:
    model = llama()
    found = saccade.explain.Attribution(model, "rollout").attribute({"input_ids": IDS}, target=(2, 7))
    whole = saccade.explain(model, {"input_ids": IDS}, (2, 7), methods=["rollout"], faithful=False)
    assert found.shape == (1, 4) and torch.equal(found[0], whole.maps["rollout"])


def test_a_cache_of_attention_by_name() -> None:
    model = llama()
    said, cache = saccade.explain.run_with_cache(model, input_ids=IDS)
    torch.testing.assert_close(said.logits, model(IDS).logits, atol=1e-5, rtol=1e-4)
    pattern = cache["pattern", 1]
    assert pattern.shape == (1, 4, 4, 4) and torch.equal(pattern, cache["blocks.1.attn.hook_pattern"])
    torch.testing.assert_close(pattern.sum(-1), torch.ones(1, 4, 4))
    assert cache["q", 0].shape == (1, 4, 4, 4) and cache["k", 0].shape == (1, 4, 2, 4)
    value = cache["v", 1].repeat_interleave(2, 2)
    torch.testing.assert_close(cache["z", 1], torch.einsum("bhnm,bmhe->bnhe", pattern, value), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cache["blocks.0.attn.hook_attn_scores"].softmax(-1), cache["pattern", 0])
    with saccade.explain.recorded(model) as recording:
        model(IDS)
    torch.testing.assert_close(recording["pattern", 1], pattern)


def test_refusals() -> None:
    _, cache = saccade.explain.run_with_cache(llama(), IDS)
    for name, message in (
        (("pattern", 2), "0 calls of layer 2"),
        (("mlp", 0), "a layer has q"),
        ("q", "no name such as"),
    ):
        with pytest.raises(KeyError, match=message):
            cache[name]
    with pytest.raises(AttributeError, match="nothing"):
        saccade.explain.nothing  # noqa: B018
