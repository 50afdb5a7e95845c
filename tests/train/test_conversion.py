"""Layers of a language model become another mechanism: they learn, decode, go on where they were, are kept."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import saccade
from saccade.integrations import converted
from saccade.layers.attention_interface import attention_layers
from saccade.train import conversion
from saccade.train.conversion import convert, cost_of_leaving_out, perplexity
from saccade.train.imitation import Teacher, fit_outputs, layers_loss

transformers = pytest.importorskip("transformers")
TOKENS = torch.arange(600) * 7 % 23 % 11
LONG = TOKENS.repeat(10)


def model(**settings: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None, bos_token_id=None, initializer_range=0.2, **settings,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


#: a test's training: few steps of short windows
FEW: dict[str, Any] = {"steps": 6, "length": 8, "batch": 1, "shown": False, "lr": 1e-2, "layers": [1, 3]}


def test_a_mechanism_that_is_the_same_is_the_same() -> None:
    network, ids = model(), TOKENS[None, :24]
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    expected = [network(ids).logits, network(ids, attention_mask=mask).logits[:, 5:]]
    said = network.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0)
    report = convert(network, "softmax", TOKENS, **FEW | {"lr": 0.0, "lr_whole": 0.0}, held_out=TOKENS, context=40)
    got = [network(ids).logits, network(ids, attention_mask=mask).logits[:, 5:]]
    assert report.layers == ["model.layers.1.self_attn", "model.layers.3.self_attn"] and not report.anew
    for a, b in zip(got, expected, strict=True):  # what was kept to be learned from, in bfloat16, is not exact
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)
    again = network.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0)
    assert torch.equal(again, said)
    assert report.before == pytest.approx(report.started, rel=1e-4) == pytest.approx(report.after, rel=1e-2)
    assert report.dropped != pytest.approx(report.before, rel=1e-3)
    old, new = report.decoding
    assert (old.tokens, old.cache_bytes) == (40, 4 * 40 * 2 * 2 * 4 * 4) and min(old.seconds, new.prefill) > 0
    assert new.cache_bytes == old.cache_bytes + 2 * 40 * 4  # keys and values are the part's own, and markers beside
    assert "left out" in str(report) and "ms a token after 40" in str(report)


@pytest.mark.parametrize(("slug", "arguments"), [("lightning", {}), ("moba", {"block_size": 4, "top_k": 2})])
def test_new_layers_learn_what_the_old_ones_did(slug: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    network, ids = model(), TOKENS[None, :20]
    before = {name: x.clone() for name, x in network.named_parameters() if ".self_attn." not in name}
    report = saccade.convert(
        network, slug, TOKENS, layers=[0, -1], steps=30, lr=1e-2, length=16, batch=2, whole=0.2, shown=False,
        **arguments,
    )  # fmt: skip
    as_it_was = model()
    old = converted.chosen_layers(as_it_was, [0, -1])
    teacher = Teacher(as_it_was, old, TOKENS, 16)
    torch.manual_seed(0)
    untrained = {path: converted.part_for(slug, layer, **arguments)[0] for path, layer in old.items()}
    trained: Any = {path: network.get_submodule(path).part for path in old}
    with torch.no_grad():
        assert layers_loss(trained, teacher, teacher.first()) < 0.9 * layers_loss(untrained, teacher, teacher.first())
    assert report.steps == len(report.losses) == 30 and report.losses[-1] < report.losses[24]
    assert all(torch.equal(dict(network.named_parameters())[name], x) for name, x in before.items())
    with torch.no_grad():
        whole, pieces, cache = network(ids).logits, [], transformers.DynamicCache()
        for start, stop in ((0, 9), (9, 10), (10, 20)):
            pieces.append(network(ids[:, start:stop], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-4, rtol=1e-4)
    assert cache.layers[0].keys.nbytes == 40 and cache.get_seq_length() == 20
    report.save(tmp_path / "kept")
    fresh = model()
    assert saccade.load_converted(fresh, tmp_path / "kept") == report.layers
    with torch.no_grad():
        torch.testing.assert_close(fresh(ids).logits, whole, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="takes no beam search"):
        network.generate(ids.expand(2, -1), num_beams=3, max_new_tokens=12, do_sample=False, pad_token_id=0)
    cache.crop(-3)
    with pytest.raises(ValueError, match="caches that are shortened, as by"):
        network(ids[:, :1], past_key_values=cache)
    (tmp_path / "kept" / "saccade_convert.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no converted layers"):
        converted.load_converted(model(), tmp_path / "kept")


@pytest.mark.parametrize("stage", ["layers_loss", "logits_loss"])
def test_what_was_interrupted_goes_on(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "_SAVE_EVERY", -1.0)
    whole, stopped, network = model(), model(), model()
    expected = convert(whole, "lightning", TOKENS, folder=tmp_path / "a", **FEW, held_out=TOKENS[:99])
    loss, calls = getattr(conversion, stage), []

    def dies(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss(*given)

    with monkeypatch.context() as patched:
        patched.setattr(conversion, stage, dies)
        with pytest.raises(KeyboardInterrupt):
            convert(stopped, "lightning", TOKENS, folder=tmp_path / "b", **FEW, held_out=TOKENS[:99])
    report = convert(network, "lightning", TOKENS, folder=tmp_path / "b", **FEW, held_out=TOKENS[:99])
    assert report.losses == expected.losses and len(report.losses) == report.steps == 6
    assert (report.started, report.imitated, report.after) == (expected.started, expected.imitated, expected.after)
    for a, b in zip(network.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    with monkeypatch.context() as patched:  # whatever is done is not done again
        patched.setattr(conversion, "perplexity", None)
        assert convert(model(), "lightning", TOKENS, folder=tmp_path / "b", **FEW, held_out=TOKENS[:99]).steps == 6
    for change in ({"steps": 7}, {"layers": [1]}, {"form": "gated"}, {"data": TOKENS[1:]}, {"seed": 1}):
        data, options = change.get("data", TOKENS), {**FEW, "held_out": TOKENS[:99], **change}
        options.pop("data", None)
        words = "arguments was" if "form" in change else f"{next(iter(change))} was"
        with pytest.raises(ValueError, match=f"was begun otherwise .{words}"):
            convert(model(), "lightning", data, folder=tmp_path / "b", **options)  # type: ignore[arg-type]


def test_the_layers_that_the_model_misses_least() -> None:
    network = model()
    with torch.no_grad():
        network.model.layers[2].self_attn.o_proj.weight.zero_()
    costs = cost_of_leaving_out(network, TOKENS, 16)
    assert list(costs) == list(attention_layers(network)) and min(costs, key=costs.__getitem__).endswith("2.self_attn")
    report = convert(network, "softmax", TOKENS, **FEW | {"layers": 0.25})
    assert report.layers == ["model.layers.2.self_attn"]


def test_projections_that_find_no_place_are_named() -> None:
    layer = model().model.layers[0].self_attn
    part, anew = converted.part_for("lightning", layer, form="gated")
    assert not anew and torch.equal(part.q_proj.weight, layer.q_proj.weight)  # type: ignore[union-attr]
    twice = layer.k_proj.weight.unflatten(0, (2, 1, 4)).expand(2, 2, 4, 16).flatten(0, 2)
    assert torch.equal(part.k_proj.weight, twice)  # type: ignore[union-attr]
    part, anew = converted.part_for("lightning", layer, bias=True)
    fused = part.qkvu_proj.weight  # type: ignore[union-attr]
    assert not anew and torch.equal(fused[:16], layer.q_proj.weight) and torch.equal(fused[16:32], twice)
    assert (part.qkvu_proj.bias == torch.arange(64).div(48).floor()).all()  # type: ignore[union-attr]  # an open gate
    theta = part.lrpe.theta  # type: ignore[union-attr]  # turned as the layer's rotary positions are
    assert torch.equal(theta, torch.tensor([1.0, 0.01, 1.0, 0.01]).expand(4, 1, 4))
    biased = saccade.create("softmax", dim=16, num_heads=4, causal=True, qkv_bias=True)
    part, anew = converted.part_for("lightning", biased)
    assert anew == ["q_proj", "k_proj", "v_proj"]  # which have biases, and there is no place for these
    assert torch.equal(part.out_proj.weight, biased.out_proj.weight)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="lightning has no place for any projection"):
        converted.part_for("lightning", layer, form="gated", hidden_dim=32)
    report = conversion.Conversion("lightning", {}, ["a"], anew)
    assert "begun anew, without the old layers': q_proj, k_proj, v_proj" in report.table()


def test_old_layers_are_seen_once_and_projections_are_fitted() -> None:
    network = model()
    old = converted.chosen_layers(network, [1, 3])
    teacher, calls = Teacher(network, old, TOKENS, 16), []
    network.model.register_forward_hook(lambda *given: calls.append(1))
    parts = {path: converted.part_for("moba", layer, block_size=4)[0] for path, layer in old.items()}
    for part in parts.values():
        part.out_proj.weight.data.normal_()  # type: ignore[union-attr, operator]
    worst = float(layers_loss(parts, teacher, [0, 1, 2]).detach())
    assert fit_outputs(parts, teacher, [0, 1, 2]) == list(old)
    assert float(layers_loss(parts, teacher, [0, 1, 2]).detach()) < 0.1 * worst and len(calls) == 1
    teacher = Teacher(network, old, TOKENS, 16, memory=0)
    again = [teacher.layers([0])[path] for path in old for _ in range(2)]
    assert len(calls) == 1 + 2 + 4 and all(torch.equal(a, b) for a, b in zip(again[0], again[1], strict=True))
    assert (
        teacher.plain
        and max(teacher.chosen(0, 200)) == 23
        and 23 < max(teacher.chosen(1, 200)) < len(teacher.windows_WN)
    )


def test_minutes_end_and_bad_arguments_are_named() -> None:
    ticks = iter(range(100))
    sizes: dict[str, Any] = {"length": 8, "batch": 1, "shown": False, "layers": [1]}
    report = convert(model(), "moba", TOKENS, minutes=0.1, clock=lambda: next(ticks), block_size=4, **sizes)
    assert (report.steps, report.seconds) == (6, 6.0)  # a second each, of a tenth of a minute
    for words, slug, options in (
        ("either minutes or steps", "moba", {}),
        ("either minutes or steps", "moba", {"steps": 1, "minutes": 1.0}),
        ("whole of 0 to 1", "moba", {"steps": 1, "whole": 2.0}),
        ("must be integers", "moba", {"steps": 1.5}),
        ("must be integers", "moba", {"steps": 1, "length": 8.5}),
        ("lr and lr_whole not negative", "moba", {"steps": 1, "lr": -1.0}),
        ("model's positions", "moba", {"steps": 1, "length": 3000, "data": LONG}),
        ("data must be a tensor of tokens", "moba", {"steps": 1, "data": TOKENS.tolist()}),
        ("held_out must be a tensor of tokens", "moba", {"steps": 1, "length": 8, "held_out": TOKENS.float()}),
        ("tokens from 0 to 12, and the model knows 0 to 11", "moba", {"steps": 1, "data": (TOKENS * 2).clamp(max=12)}),
        ("layers must name one", "moba", {"steps": 1, "length": 8, "layers": []}),
        ("layers must name one", "moba", {"steps": 1, "length": 8, "layers": None}),
        ("data must be at least 700 tokens", "moba", {"steps": 1, "length": 700}),
        ("data must be at least 900 tokens", "moba", {"steps": 1, "length": 8, "context": 900}),
        ("layers must be a share", "moba", {"steps": 1, "layers": 1.5}),
        ("layers must be a list", "moba", {"steps": 1, "layers": 3}),
        (
            "context must be above 16 and at most the model's positions, 2048",
            "moba",
            {"steps": 1, "length": 8, "context": 5000, "data": LONG},
        ),
        ("must be causal and decode", "mra", {"steps": 1, "length": 8}),
        ("what JSON can hold", "lightning", {"steps": 1, "length": 8, "slopes": torch.ones(4)}),
        ("no layer is 9", "moba", {"steps": 1, "layers": [9]}),
    ):
        with pytest.raises(ValueError, match=words):
            convert(model(), slug, **{"data": TOKENS, **options})
    with pytest.raises(ValueError, match="float16 do not train"):
        convert(model().half(), "moba", TOKENS, steps=1, length=8)
    with pytest.raises(ValueError, match="BertModel is no language model"):
        bert = transformers.BertConfig(vocab_size=12, hidden_size=16, num_attention_heads=2, intermediate_size=8)
        convert(transformers.BertModel(bert), "softmax", TOKENS, steps=1, length=8)
    network = model()
    convert(network, "moba", TOKENS, steps=1, block_size=4, **sizes)
    with pytest.raises(ValueError, match="padding alone"):
        network(TOKENS[None, :4], attention_mask=torch.ones(1, 1, 4, 4).tril().bool())
    assert perplexity(network, TOKENS, 16, 2) > 1


def test_who_was_interrupted_has_the_model_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = FEW | {"folder": tmp_path}
    straight = model()
    convert(straight, "moba", TOKENS, block_size=4, **FEW)
    network, said = model(), model()(TOKENS[None, :8]).logits
    hooks = dict(network.model._forward_pre_hooks)
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "logits_loss", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(network, "moba", TOKENS, block_size=4, **sizes)
    assert torch.equal(network(TOKENS[None, :8]).logits, said) and dict(network.model._forward_pre_hooks) == hooks
    convert(network, "moba", TOKENS, block_size=4, **sizes)  # the same call on the same model goes on
    assert torch.equal(network(TOKENS[None, :8]).logits, straight(TOKENS[None, :8]).logits)


def test_a_converted_model_is_copied_pickled_switched_and_compressed(tmp_path: Path) -> None:
    network, ids = model().double(), TOKENS[None, :20]
    report = convert(network, "lightning", TOKENS, **FEW)
    assert list(attention_layers(network)) == ["model.layers.0.self_attn", "model.layers.2.self_attn"]
    with torch.no_grad():
        said = network.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        for again in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            assert torch.equal(again.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), said)
        with saccade.compressed(network, "window", 64) as cache:
            out = network.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(out, said) and [x is None for x in cache.lengths] == [False, True, False, True]
        with saccade.switch(network, "window", left=64, report=True) as told:
            network(ids)
        assert [layer.calls for layer in told.layers] == [1, 1]
    report.save(tmp_path)
    (tmp_path / "saccade_convert.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="is damaged"):
        saccade.load_converted(model(), tmp_path)


@pytest.mark.parametrize("slug", ["moba", "lightning"])
def test_padding_and_packed_rows_are_known_however_they_are_said(slug: str) -> None:
    network, ids = model(), TOKENS[None, :20].repeat(2, 1)
    convert(network, slug, TOKENS, **FEW, **({"block_size": 4, "top_k": 2} if slug == "moba" else {}))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad():
        said = network.model(ids, attention_mask=mask)[0]
        assert torch.equal(network.model(ids, mask)[0], said)
        places = torch.cat([torch.arange(12), torch.arange(8)])[None]
        packed = {"position_ids": places, "use_cache": False}
        if slug == "moba":
            apart = torch.cat([network(ids[:, :12]).logits, network(ids[:, 12:]).logits], 1)
            torch.testing.assert_close(network(ids, **packed).logits, apart, atol=1e-5, rtol=1e-4)
        else:
            with pytest.raises(ValueError, match="packed sequences"):
                network(ids, **packed)
        network(ids, position_ids=torch.arange(20)[None])


def test_several_conversions_of_a_model_are_kept_together(tmp_path: Path) -> None:
    network, ids = model().train(), TOKENS[None, :20]
    network.lm_head.requires_grad_(False)
    first = convert(network, "lightning", TOKENS, **FEW)
    second = convert(network, "moba", TOKENS, block_size=4, top_k=2, **FEW | {"layers": [0]})
    frozen = [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
    assert frozen == ["lm_head.weight"] and all(module.training for module in network.modules())
    network.eval()
    second.save(tmp_path)
    again = model()
    assert sorted(saccade.load_converted(again, tmp_path)) == sorted([*first.layers, *second.layers])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, network(ids).logits)
    assert not any(module.training for module in again.modules())
    with pytest.raises(ValueError, match="static caches"):
        network.generate(ids, max_new_tokens=3, cache_implementation="static", pad_token_id=0)
    with pytest.raises(ValueError, match="was converted before: give the model as it was"):
        saccade.load_converted(again, tmp_path)
    with pytest.raises(ValueError, match="no layer is"):
        convert(network.train(), "moba", TOKENS, **FEW | {"layers": ["nothing"]})
    assert network.training and sum(not p.requires_grad for p in network.parameters()) == 1


def test_what_was_kept_when_all_layers_were_alike_is_read(tmp_path: Path) -> None:
    network = model()
    report = convert(network, "moba", TOKENS, block_size=4, **FEW)
    report.save(tmp_path)
    record = {"mechanism": "moba", "arguments": {"block_size": 4}, "layers": report.layers}
    (tmp_path / "saccade_convert.json").write_text(json.dumps(record))
    again = model()
    saccade.load_converted(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(TOKENS[None, :20]).logits, network(TOKENS[None, :20]).logits)
