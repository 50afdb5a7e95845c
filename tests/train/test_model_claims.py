"""Second lines of claims: on a tiny model of each kind, every part that fits; what they say, and what is refused."""

from __future__ import annotations

import pytest

from saccade import catalogue
from saccade.integrations.advise import Advice, Trial
from saccade.report import claims
from saccade.train import model_claims, models
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
    found = model_claims._result(advice)
    assert found.holds and found.note == "spargeattn:top_k=0.5: 1.50 x as fast, loses 0.5%"
    assert found.measured["top_k=0.1: perplexity_rise_percent"] == pytest.approx(10)
    assert list(found.measured)[:3] == ["dense_ms", "dense_perplexity", "top_k=0.1: speedup_ratio"]
    advice.trials = advice.trials[:1]
    found = model_claims._result(advice)
    assert not found.holds and "none is; spargeattn:top_k=0.1" in found.note


def test_what_is_dropped_costs_nothing_where_nothing_is_dropped() -> None:
    """Whole shares: clusters of one patch each give the model's own output."""
    pytest.importorskip("transformers")
    import torch

    from saccade.compress.token_compression import TokenCompression

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
