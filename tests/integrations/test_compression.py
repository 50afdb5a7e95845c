"""A-VL's cache inside transformers models: generation, beams, our own decoder, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from saccade import catalogue
from saccade.compress.a_vl import AVLDecoder

transformers = pytest.importorskip("transformers")

from saccade.integrations.compression import compressed  # noqa: E402

IMAGE = (3, 20)


def llava(**text: Any) -> Any:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, **text}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=20, patch_size=4),
        text_config=transformers.LlamaConfig(**text, num_key_value_heads=2, vocab_size=50, rms_norm_eps=1e-5),
        image_token_id=49,
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


def asked(B: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.cat([torch.arange(1, 4), torch.full((25,), 49), torch.arange(4, 12)])[None].repeat(B, 1)
    return {"input_ids": ids, "pixel_values": torch.randn(B, 3, 20, 20), "attention_mask": torch.ones_like(ids)}


def test_generates_in_a_llava_model() -> None:
    model, inputs = llava(), asked(2)
    how = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        plain = model.generate(**inputs, **how, eos_token_id=-1, pad_token_id=0)
        with compressed(model, inputs["input_ids"], rate=None, text_rate=None) as cache:
            ours = model.generate(**inputs, **how, eos_token_id=-1, pad_token_id=0, past_key_values=cache)
        torch.testing.assert_close(torch.stack(ours.logits), torch.stack(plain.logits), atol=1e-5, rtol=1e-4)
        full = cache.nbytes
        with compressed(model, inputs["input_ids"], prefill_rate=0.3, prefill_layer=2, text_init=2) as cache:
            ours = model.generate(**inputs, **how, eos_token_id=-1, pad_token_id=0, past_key_values=cache)
        assert ours.sequences.shape == (2, 48) and torch.stack(ours.logits).isfinite().all()
        text = round(0.6 * 19)
        assert cache.kept == [3 + 12 + text] * 4 and cache.dropped == [47 - 15 - text] * 4
        assert cache.nbytes < 0.7 * full and cache.get_seq_length() == 47
        after = model.generate(**inputs, **how, eos_token_id=-1, pad_token_id=0)
        assert torch.equal(after.sequences, plain.sequences)


@pytest.mark.parametrize("prefill_rate", [None, 0.3])
def test_transformers_llama_equals_our_decoder(prefill_rate: float | None) -> None:
    policy: dict[str, Any] = {"rate": 0.5, "compute_rate": 0.8, "update_interval": 2, "text_init": 3}
    policy |= {"prefill_rate": prefill_rate, "prefill_layer": 2}
    theirs = llava().model.language_model
    ours = AVLDecoder(24, 32, 4, 4, num_kv_heads=2, **policy)
    state = {name: x for name, x in theirs.state_dict().items() if not name.startswith("embed_tokens")}
    ours.load_state_dict(catalogue.port("a-vl", "full").convert(state))
    x = torch.randn(1, 40, 24)
    image = torch.zeros(1, 33, dtype=torch.bool)
    image[:, 3:23] = True
    with torch.no_grad(), compressed(theirs, image, **policy) as cache:
        mine = ours.new_cache(IMAGE)
        for piece in x.split([33, 1, 1, 1, 1, 1, 2], 1):
            got = theirs(inputs_embeds=piece, past_key_values=cache, use_cache=True).last_hidden_state
            torch.testing.assert_close(got, ours(piece, mine), atol=1e-5, rtol=1e-4)
        assert cache.kept == mine.kept
        cache.reset()
        again = theirs(inputs_embeds=x[:, :33], past_key_values=cache, use_cache=True).last_hidden_state
        torch.testing.assert_close(again, ours(x[:, :33], ours.new_cache(IMAGE)), atol=1e-5, rtol=1e-4)


def test_beams_take_their_cache_along() -> None:
    model, inputs = llava(), asked()
    how = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    with torch.no_grad():
        plain = model.generate(**inputs, **how)
        with compressed(model, inputs["input_ids"], rate=None, text_rate=None) as cache:
            assert torch.equal(model.generate(**inputs, **how, past_key_values=cache), plain)


def test_refusals() -> None:
    model, inputs = llava(), asked()
    with pytest.raises(ValueError, match="not 'rates'"), compressed(model, inputs["input_ids"], rates=0.5):
        pass
    inputs["attention_mask"][0, 0] = 0
    with compressed(model, inputs["input_ids"]) as cache, torch.no_grad():
        with pytest.raises(ValueError, match="no padding"):
            model(**inputs, past_key_values=cache)
        with pytest.raises(ValueError, match="past_key_values=cache"):
            model(**{**inputs, "attention_mask": None}, use_cache=False)
