"""Second lines of claims: on a tiny model of each kind, every part that fits; what they say, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from saccade import catalogue
from saccade.compress.token_compression import TokenCompression
from saccade.integrations.advise import Advice, Trial
from saccade.report import claims
from saccade.train import model_claims, models
from saccade.train.data import Retrieval
from saccade.train.lab import Lab
from saccade.train.model_claims import fitting, run_on_model, tokens_on

NAMES = [name for name, entry in models.MODELS.items() if entry.kind]


@pytest.mark.parametrize("name", NAMES)
def test_every_part_that_fits_runs(name: str) -> None:
    pytest.importorskip("transformers")
    for slug in fitting(name):
        found = run_on_model(slug, name, Lab(smoke=True))
        assert found.model == name and found.smoke and f"{slug} on {name}, 2048 tokens: smoke run" in found.text()
        assert found.measured["dense_ms"] > 0 and any("speedup_ratio" in each for each in found.measured)
        lost = "perplexity_rise_percent" if name == "smollm2-135m" else "deviation_percent"
        assert sum(lost in each for each in found.measured) == sum("speedup_ratio" in each for each in found.measured)
        assert claims.line(found.as_dict()) == f"{slug} on {name}, 2048 tokens"


def test_every_training_free_part_fits_a_model() -> None:
    fit = {slug for name in NAMES for slug in fitting(name)}
    free = {part.slug for part in catalogue.parts() if "training-free" in part.supports}
    # two are of models that see and read, and one looks inside
    assert free - fit == {"agla", "carve", "tensorlens"} and fit - free == {"window"}


def test_the_fastest_setting_within_the_tolerance_decides() -> None:
    def trial(speedup: float, perplexity: float, top_k: float) -> Trial:
        return Trial("spargeattn", {"top_k": top_k}, 1 / speedup, speedup, 0.0, 0.5, 0.0, perplexity=perplexity)

    advice = Advice("LlamaForCausalLM", 64, 0.01, 1.0, quality="perplexity")
    advice.perplexity = 10.0
    advice.trials = [trial(2.0, 11.0, 0.1), trial(1.5, 10.05, 0.5)]
    found = model_claims._result(advice, model_claims._decides(advice))
    assert found.holds and found.note == "spargeattn:top_k=0.5: 1.50 x as fast, loses 0.5%"
    assert found.measured["top_k=0.1: perplexity_rise_percent"] == pytest.approx(10)
    assert list(found.measured)[:3] == ["dense_ms", "dense_perplexity", "top_k=0.1: speedup_ratio"]
    # within the tolerance, and not fast enough
    advice.trials = [advice.trials[0], trial(1.05, 10.0, 0.7), trial(0.9, 9.0, 0.9)]
    found = model_claims._result(advice, model_claims._decides(advice))
    assert not found.holds and found.note == "none is; the nearest is spargeattn:top_k=0.7: 1.05 x as fast, loses 0.0%"
    advice.trials = advice.trials[:1]
    found = model_claims._result(advice, model_claims._decides(advice))
    assert not found.holds and "none is; the nearest is spargeattn:top_k=0.1: 2.00 x" in found.note


def test_retrieval_is_in_the_note(monkeypatch: pytest.MonkeyPatch, byte_tokenizer: Any) -> None:
    """Asked with dense attention, then at the setting that decides."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32,
        vocab_size=256, max_position_embeddings=1024,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    asked: list[str] = []

    def told(self: Retrieval, model: Any) -> float:
        asked.append(model.config._attn_implementation)
        return 1.0 if asked[-1] == "sdpa" else 0.5

    monkeypatch.setattr(Retrieval, "__call__", told)
    inputs = {"input_ids": torch.randint(256, (1, 500))}
    monkeypatch.setattr(model_claims, "carried", lambda name, context: (model, inputs, byte_tokenizer))
    monkeypatch.setattr(model_claims, "following", lambda *_: None)
    monkeypatch.setattr(Lab, "size", lambda self, full, smoke: smoke)
    found = run_on_model("moba", "smollm2-135m", Lab(), context=500)
    assert asked == ["sdpa"] * 2 + ["saccade_moba"] * 2
    assert "answered there: passkey 50% (dense 100%), multi-key 50% (dense 100%); the paper's claim is of" in found.note
    # of a cache: prompts are read with it
    found = run_on_model("a-vl", "smollm2-135m", Lab(), context=500)
    assert asked[4:] == ["sdpa"] * 2 and "answered there: passkey 0% (dense 100%)" in found.note


def test_what_is_dropped_costs_nothing_where_nothing_is_dropped() -> None:
    """Whole shares: clusters of one patch each give the model's own output."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, inputs = model_claims._tiny("vision")
    with torch.no_grad():
        dense = model(**inputs).last_hidden_state
        with model_claims._between_layers(model, TokenCompression(share=1.0)) as found:
            torch.testing.assert_close(model(**inputs).last_hidden_state, dense)
        assert found and torch.equal(model(**inputs).last_hidden_state, dense)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"on vit-s14 these are measured: .*; not 'moba'"):
        run_on_model("moba", "vit-s14", Lab(smoke=True))
    with pytest.raises(ValueError, match="claims are measured on vit-s14, smollm2-135m, minilm, not on saliency"):
        fitting("saliency")
    assert tokens_on("smollm2-135m", 77) == 77
