"""Advice: what is measured, what is on the frontier, what is recommended, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from saccade import attend, masks, switch
from saccade.integrations.advise import Advice, Trial, advise, advising, benches, blending, trials
from saccade.integrations.mechanisms import MECHANISMS
from saccade.ops.measure import processor_time


def trial(speedup: float, deviation: float, **options: object) -> Trial:
    return Trial("window", options, 1 / speedup, speedup, deviation, 0.5, deviation)


def test_frontier_and_recommendation() -> None:
    advice = Advice("a model", 64, 0.1, 1.0)
    advice.trials = [trial(4, 0.5, left=1), trial(3, 0.05, left=2), trial(2, 0.06, left=3), trial(0.9, 0.0, left=4)]
    assert [t.options["left"] for t in advice.frontier] == [1, 2, 4]
    assert advice.best is not None and advice.best.options == {"left": 2}
    assert advice.code() == 'with saccade.switch(model, "window", left=2):'
    assert advice.code() in advice.table() and "window:left=2, 3.00 x as fast" in advice.table()
    advice.trials.append(trial(9, float("nan"), left=5))  # hides no other, though it is the fastest
    assert [t.options["left"] for t in advice.frontier] == [1, 2, 4] and advice.best.options == {"left": 2}
    advice.trials.pop()
    advice.tolerance = 0.01
    assert advice.best is None and "keep" in advice.table()
    assert json.loads(json.dumps(advice.as_dict()))["recommendation"] is None


def test_settings_are_valid_at_any_length() -> None:
    for n in (1, 7, 100, 4096):
        for entry, options in trials(n):
            entry.check(options)
    assert {entry.slug for entry, _ in trials(64)} == set(MECHANISMS) - {"softmax"}


def test_on_a_model() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
        )
    ).train()
    ids = torch.randint(11, (1, 80))
    asked: list[str] = []
    advice = advise(
        model,
        context=64,
        inputs=ids,
        mechanisms=["moba", "window"],
        repeats=1,
        on_trial=asked.append,
        partly=0,
        tolerance=9.0,
    )
    assert model.training and model.config._attn_implementation == "sdpa"
    assert (
        advice.context == 64
        and len(asked) == len(advice.trials) + 1 + len(advice.frontier)
        and not advice.skipped
        and not advice.warning
    )
    by_name = {t.name: t for t in advice.trials}
    assert all(t.agreement is not None and 0 < t.density <= 1 for t in advice.trials)
    # more keys, smaller deviation; the deviation is that of the output under `switch`
    assert by_name["window:left=32"].deviation < by_name["window:left=2"].deviation
    everything = advise(model, context=8, inputs=ids, mechanisms=["moba"], repeats=1, partly=0).trials[-1]
    assert everything.density == 1.0 and everything.deviation < 1e-5
    assert "random" in advise(model, context=8, mechanisms=["window"], repeats=1).warning
    at_the_end = advise(model, context=2048, mechanisms=["window"], repeats=1)  # as many as it has positions
    assert at_the_end.decode_rate is not None and "tokens/s" in at_the_end.table()


def test_on_an_image_model_the_context_is_counted() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval()
    image = torch.rand(1, 3, 70, 56)  # not the pretrained size: positions are interpolated
    advice = advise(model, inputs={"pixel_values": image}, mechanisms=["window", "mra"], repeats=1, partly=0)
    assert advice.context == 1 + 5 * 4 and advice.perplexity is None and advice.quality == "deviation"
    assert not advice.skipped and {t.slug for t in advice.trials} == {"window", "mra"}
    assert all(trial.deviation > 0 and len(trial.layers) == 2 for trial in advice.trials if trial.density < 1)
    assert advice.clock == "wall" and " of the processor" not in advice.table()
    with processor_time():
        timed = advise(model, inputs={"pixel_values": image}, mechanisms=["window"], repeats=1, partly=0)
    assert timed.clock == "processor" and " ms of the processor" in timed.table()
    with pytest.raises(ValueError, match="an image has those of its size"):
        advise(model, context=8, inputs={"pixel_values": image})


def test_what_cannot_run_says_why() -> None:
    transformers = pytest.importorskip("transformers")
    encoder = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    advice = advise(encoder, inputs=torch.randint(11, (1, 32)), mechanisms=["moba", "window"], repeats=1)
    assert "bidirectional" in advice.skipped["moba"] and {t.slug for t in advice.trials} == {"window"}
    assert "not here: moba" in advice.table()


def test_on_shapes() -> None:
    advice = advise((1, 4, 2, 96, 8), mechanisms=["spargeattn", "moba"], repeats=1)
    assert {t.slug for t in advice.trials} == {"spargeattn", "moba"} and advice.context == 96
    q = torch.randn(1, 2, 32, 8)
    given = advise((1,), inputs=(q, q, q), causal=False, mechanisms=["moba", "window"], repeats=1)
    assert "not defined" in given.skipped["moba"] and not given.warning
    best = Advice("shapes", 32, 9.0, 1.0, on_model=False, trials=[trial(2, 0.1, left=3)])
    assert best.code().endswith("window_attend(q, k, v, left=3, sinks=4, causal=True)")


@pytest.mark.parametrize(
    ("slug", "causal"),
    [("window", True), ("window", False), ("moba", True), ("spargeattn", True), ("prism", True), ("mra", False)],
)
def test_the_line_for_shapes_computes_what_was_measured(slug: str, causal: bool) -> None:
    q, k, v = torch.randn(1, 4, 300, 16), torch.randn(1, 2, 300, 16), torch.randn(1, 2, 300, 16)
    advice = advise((1,), inputs=(q, k, v), causal=causal, mechanisms=[slug], repeats=1, tolerance=9.0)
    exact = attend(q, k, v, mask=masks.causal() if causal else None)
    assert advice.trials
    for each in advice.trials:
        line = replace(advice, trials=[replace(each, speedup=2.0)]).code()
        names: dict[str, torch.Tensor] = {"q": q, "k": k, "v": v}
        exec(line.replace("; ", "; out = "), names)
        assert float((names["out"] - exact).abs().sum() / exact.abs().sum()) == pytest.approx(each.deviation, abs=1e-6)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="tolerance"):
        advise((1, 1, 8, 4), tolerance=-1)
    with pytest.raises(ValueError, match="mechanisms must be a list of names, got 'moba'"):
        advise((1, 1, 8, 4), mechanisms="moba")
    with pytest.raises(ValueError, match="shapes must be"):
        advise((1, 8, 4))
    with pytest.raises(ValueError, match="cannot replace"):
        advise((1, 1, 8, 4), mechanisms=["nothing"])
    with pytest.raises(ValueError, match="fewer than 9"):
        advise((1,), inputs=[torch.randn(1, 1, 8, 4)] * 3, context=9)
    with pytest.raises(ValueError, match="context length"):
        advise(torch.nn.Linear(2, 2))
    model, ids = language_model()
    with pytest.raises(ValueError, match="at least one token"):
        advise(model, inputs=ids[:, :0])
    model.model.layers[0].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="LlamaForCausalLM gives NaN on these inputs, with its own attention"):
        advise(model, inputs=ids, mechanisms=["window"])


def test_causal_settings_are_tried_with_the_first_tokens_and_without() -> None:
    told = [options for _, options in trials(64, ["window"], causal=True)]
    assert told == [
        each for options in [o for _, o in trials(64, ["window"])] for each in (options, options | {"sinks": 0})
    ]
    assert not any("sinks" in options for _, options in trials(64, ["mra"], causal=True))


def language_model() -> tuple[torch.nn.Module, torch.Tensor]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config).eval(), torch.randint(20, (1, 48))


def test_the_tolerance_may_be_of_perplexity_and_settings_are_shared(tmp_path: Path) -> None:
    model, ids = language_model()
    advice = advise(model, inputs=ids, mechanisms=["window"], repeats=1, quality="perplexity", tolerance=9.0, partly=0)
    with torch.no_grad():
        expected = float(model(ids, labels=ids).loss.exp())
    assert advice.perplexity == pytest.approx(expected, rel=1e-4)
    assert all(trial.perplexity for trial in advice.trials) and "perplexity" in advice.table()
    advice.trials = [replace(trial, speedup=2.0 + i) for i, trial in enumerate(advice.trials)]
    best = advice.best
    assert best is not None and advice.loss(best) == best.perplexity / advice.perplexity - 1 <= 9.0
    advice.save(tmp_path / "settings.json")
    with torch.no_grad():
        with switch(model, settings=tmp_path / "settings.json") as report:
            shared = model(ids).logits
        with switch(model, best.slug, **best.options):
            assert torch.equal(model(ids).logits, shared)
    assert report.slug == best.slug
    (tmp_path / "other.json").write_text("[]")
    for wrong, words in (
        ({"slug": "window", "settings": tmp_path / "settings.json"}, "not both"),
        ({"settings": tmp_path / "settings.json", "left": 3}, "not both"),
        ({}, "not both"),
        ({"settings": tmp_path / "other.json"}, "holds no settings"),
    ):
        with pytest.raises(ValueError, match=words):
            switch(model, **wrong)
    advice.tolerance = -1.0
    with pytest.raises(ValueError, match="nothing is recommended"):
        advice.save(tmp_path / "none.json")
    with pytest.raises(ValueError, match="perplexity is of causal language models"):
        advise((1, 1, 8, 4), quality="perplexity", mechanisms=["window"])
    with pytest.raises(ValueError, match="quality must be"):
        advise((1, 1, 8, 4), quality="speed")
    assert advise(model, inputs=ids, mechanisms=["window"], repeats=1).quality == "deviation"


@pytest.mark.parametrize(("slug", "per_head"), [("window", False), ("spargeattn", True)])
def test_settings_for_each_layer_or_head_within_the_tolerance(slug: str, per_head: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=4
    )
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(20, (1, 96))
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 20  # so that heads look at little, and differ
        layer.self_attn.k_proj.weight.data *= 20
    plain = advise(model, inputs=ids, mechanisms=[slug], repeats=1, partly=0, quality="deviation")
    worst = max(trial.deviation for trial in plain.trials)
    told = dict(inputs=ids, mechanisms=[slug], repeats=1, tolerance=worst / 2, quality="deviation")
    advice = advise(model, partly=1, **told)
    (blended,) = [trial for trial in advice.trials if trial.layer_options]
    assert blended.deviation <= worst / 2 and blended.density < 1
    fast = replace(advice, trials=[replace(blended, speedup=2.0)])
    assert f"for each {'head' if per_head else 'layer'}" in blended.name and "settings=path" in fast.code()
    own = [options for options in blended.layer_options.values()]
    if per_head:
        (name,) = {name for options in own for name in options} & {"top_k", "cdf_threshold"}
        assert any(len(set(options[name])) > 1 for options in own) and all(len(o[name]) == 4 for o in own)
        # nothing of the same density among what was tried in all heads alike deviates less
        rivals = [t for t in plain.trials if t.density <= blended.density]
        assert all(t.deviation > blended.deviation for t in rivals)
    fast.save(tmp_path / "settings.json")
    with torch.no_grad(), switch(model, settings=tmp_path / "settings.json", dense_layers=[0], report=True) as report:
        model(ids)
    assert report.layers and all(layer.layer for layer in report.layers)
    with torch.no_grad(), switch(model, settings=tmp_path / "settings.json", report=True) as report:
        out = model(ids).logits
    dense = model(ids).logits
    assert ((out - dense).abs().sum() / dense.abs().sum()).item() == pytest.approx(blended.deviation, rel=1e-4)
    assert {row.name: row.relative_error for row in report.layers} == pytest.approx(blended.layers)
    config.num_hidden_layers = 5
    deeper = transformers.LlamaForCausalLM(config)
    with pytest.raises(ValueError, match="settings for each of 4 attention layers, and this model has 5"):
        switch(deeper, settings=tmp_path / "settings.json")
    with pytest.raises(ValueError, match="partly must not be negative"):
        advise(model, inputs=ids, partly=-1)


def test_probes_are_asked_and_may_have_to_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = language_model()
    dense = model(ids).logits
    switched = lambda: "saccade" in model.config._attn_implementation  # noqa: E731
    monkeypatch.setattr(benches.ModelBench, "_seconds", lambda _: 0.5 if switched() else 1.0)

    def same(network: torch.nn.Module) -> float:
        assert network is model and not network.training
        return float(torch.allclose(network(ids).logits, dense, atol=1e-5))

    asked: dict[str, Any] = {"inputs": ids, "mechanisms": ["window"], "repeats": 1, "tolerance": 9.0, "partly": 0}
    free = advise(model, **asked, probes={"same": same})
    by_name = {trial.name: trial for trial in free.trials}
    assert free.probes == {"same": 1.0} and free.best is not None and free.best.probes == {"same": 0.0}
    assert all(trial.probes and trial.decode_rate for trial in free.frontier)
    assert free.peak_bytes and all(trial.peak_bytes for trial in free.frontier) and " MiB" in free.table()
    assert "with dense attention: same 100%, decoding" in free.table()
    # a window of all tokens is dense attention, and the only setting that keeps the probe
    monkeypatch.setattr(advising, "trials", lambda *_: [(MECHANISMS["window"], {"left": left}) for left in (2, 9, 48)])
    held = advise(model, **asked, probes={"same": same}, keep_probes=True)
    assert held.best is not None and held.best.options == {"left": 48} and held.best.probes == {"same": 1.0}
    assert "and no fall of same: window:left=48" in held.table() and json.loads(json.dumps(held.as_dict()))
    held.save(tmp_path / "settings.json")
    assert json.loads((tmp_path / "settings.json").read_text())["measured"]["probes"] == {"same": 1.0}
    assert len(by_name) == len(free.trials)
    for wrong in ({"keep_probes": True}, {"decode_tokens": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            advise(model, **asked, **wrong)
    with pytest.raises(ValueError, match="probes are functions of a model"):
        advise((1, 1, 8, 4), probes={"same": same})
    unasked = advise(model, **asked, decode_tokens=0)
    assert unasked.decode_rate is None and all(trial.decode_rate is None for trial in unasked.trials)


def test_a_blend_takes_what_costs_least() -> None:
    entry = MECHANISMS["spargeattn"]
    heads = lambda *rows: {"a": rows, "b": ((9.0, 9.0), rows[1])}  # noqa: E731
    tried = [
        Trial("spargeattn", {"top_k": share, "block_q": 8}, 1.0, 1.0, 0.0, 0.0, 0.0, heads=heads(errors, (share,) * 2))
        for share, errors in ((0.25, (0.01, 0.5)), (0.5, (0.01, 0.1)))
    ]
    (choices,) = blending.families(entry, [*tried, replace(tried[0], dense_layers=("a",))])
    # 0.25 and 0.5 for the heads of a, which stands for (0.25 + 0.5 + 1 + 1) / 4
    blend = choices.blend(0.70)
    assert blend.options == {"block_q": 8} and blend.dense_layers == ("b",)
    assert blend.layer_options == {"a": {"top_k": (0.25, 0.5)}}
    assert choices.least == 0.25 and choices.blend(0.25).layer_options["b"] == {"top_k": (0.25, 0.25)}
    assert choices.density(0.0) == 1.0 and choices.density((0.01 + 0.1) / 2) == pytest.approx(0.6875)


def test_perplexity_is_of_what_is_judged() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(20, (2, 1, 40))
    told: dict[str, Any] = dict(mechanisms=["window"], repeats=1, partly=0, tolerance=9.0)
    both = [advise(model, inputs=ids[0], judged=ids[i], **told) for i in range(2)]
    with torch.no_grad():
        expected = [model(row, labels=row).loss.exp().item() for row in ids]
    assert [advice.perplexity for advice in both] == pytest.approx(expected)
    assert [t.deviation for t in both[0].trials] == pytest.approx([t.deviation for t in both[1].trials])
    with pytest.raises(ValueError, match="fewer than 40"):
        advise(model, context=40, inputs=ids[0], judged=ids[1][:, :20], mechanisms=["window"])


def test_settings_without_the_first_tokens_are_left_when_one_lost_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = language_model()
    model.model.layers[0].self_attn.k_proj.weight.data *= 50
    monkeypatch.setattr(benches.ModelBench, "_seconds", lambda _: 1.0)
    told: dict[str, Any] = dict(inputs=ids, mechanisms=["window"], repeats=1, partly=0, decode_tokens=0)
    everything = advise(model, **told, tolerance=1e9)  # nothing loses too much
    by_name = {trial.name: trial.deviation for trial in everything.trials}
    first = everything.trials[0].name
    assert len(by_name) == len(trials(48, ["window"], causal=True)) and not everything.skipped
    strict = advise(model, **told, tolerance=0.0)
    if by_name[f"{first},sinks=0"] > by_name[first]:
        assert set(strict.skipped) == {"window without sinks"} and "no faster" in strict.table()
        assert sum(trial.options.get("sinks") == 0 for trial in strict.trials) == 1
    else:
        pytest.fail("the first tokens should matter to this model")


def test_settings_without_the_first_tokens_are_left_when_they_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = language_model()
    monkeypatch.setattr(benches.ModelBench, "_seconds", lambda _: 1.0)
    # Prism keeps the first block by itself
    found = advise(model, inputs=ids, mechanisms=["prism"], repeats=1, partly=0, decode_tokens=0, tolerance=1e9)
    assert set(found.skipped) == {"prism without sinks"} and "lost as much" in found.table()
    assert sum(trial.options.get("sinks") == 0 for trial in found.trials) == 1
