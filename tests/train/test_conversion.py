"""Layers of a language model become another mechanism: they learn, decode, go on where they were, are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import saccade
from saccade.integrations import converted
from saccade.train import conversion
from saccade.train.conversion import convert, perplexity

transformers = pytest.importorskip("transformers")
TOKENS = torch.arange(600) * 7 % 23 % 11


def model(**settings: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None, bos_token_id=None, initializer_range=0.2, **settings,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_a_mechanism_that_is_the_same_is_the_same() -> None:
    network, ids = model(), TOKENS[None, :24]
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    expected = [network(ids).logits, network(ids, attention_mask=mask).logits[:, 5:]]
    said = network.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0)
    report = convert(network, "softmax", TOKENS, steps=1, lr=0.0, length=16, batch=1, held_out=TOKENS, shown=False)
    got = [network(ids).logits, network(ids, attention_mask=mask).logits[:, 5:]]
    assert report.layers == ["model.layers.1.self_attn", "model.layers.3.self_attn"]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    again = network.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0)
    assert torch.equal(again, said)
    assert report.before == pytest.approx(report.started, rel=1e-4) == pytest.approx(report.after, rel=1e-4)
    assert report.dropped != pytest.approx(report.before, rel=1e-3) and "left out" in str(report)


@pytest.mark.parametrize(("slug", "arguments"), [("lightning", {}), ("moba", {"block_size": 4, "top_k": 2})])
def test_new_layers_learn_what_the_old_ones_did(slug: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    network, ids = model(), TOKENS[None, :20]
    before = {name: x.clone() for name, x in network.named_parameters() if ".self_attn." not in name}
    report = saccade.convert(
        network, slug, TOKENS, layers=[0, -1], steps=30, lr=1e-2, length=16, batch=2, whole=0.2, shown=False,
        **arguments,
    )  # fmt: skip
    assert report.steps == 30 and sum(report.losses[20:24]) < sum(report.losses[:4])
    assert all(torch.equal(dict(network.named_parameters())[name], x) for name, x in before.items())
    with torch.no_grad():
        whole, pieces, cache = network(ids).logits, [], transformers.DynamicCache()
        for start, stop in ((0, 9), (9, 10), (10, 20)):
            pieces.append(network(ids[:, start:stop], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-4, rtol=1e-4)
    assert cache.layers[0].keys.nbytes == 40 and cache.get_seq_length() == 20
    report.save(tmp_path / "kept")
    fresh = model()
    assert converted.load(fresh, tmp_path / "kept") == report.layers
    with torch.no_grad():
        torch.testing.assert_close(fresh(ids).logits, whole, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="takes no beam search"):
        network.generate(ids.expand(2, -1), num_beams=3, max_new_tokens=12, do_sample=False, pad_token_id=0)
    cache.crop(-3)
    with pytest.raises(ValueError, match="caches that are shortened, as by"):
        network(ids[:, :1], past_key_values=cache)
    (tmp_path / "kept" / "saccade_convert.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no converted layers"):
        converted.load(model(), tmp_path / "kept")


def test_what_was_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "_EVERY", -1.0)
    sizes: dict[str, Any] = {"steps": 6, "length": 8, "batch": 1, "shown": False, "lr": 1e-2}
    whole, stopped, network = model(), model(), model()
    expected = convert(whole, "lightning", TOKENS, folder=tmp_path / "a", **sizes)
    loss, calls = conversion._Distillation.layers_loss, []

    def dies(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss(*given)

    monkeypatch.setattr(conversion._Distillation, "layers_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        convert(stopped, "lightning", TOKENS, folder=tmp_path / "b", **sizes)
    report = convert(network, "lightning", TOKENS, folder=tmp_path / "b", **sizes)
    assert report.steps == expected.steps == 6 and len(report.losses) == 4
    for a, b in zip(network.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert convert(model(), "lightning", TOKENS, folder=tmp_path / "b", **sizes).losses == []


def test_minutes_end_and_bad_arguments_are_named() -> None:
    report = convert(model(), "moba", TOKENS, minutes=0.005, length=8, batch=1, shown=False, block_size=4)
    assert report.steps >= 1 and report.seconds >= 0.3
    for words, slug, options in (
        ("either minutes or steps", "moba", {}),
        ("either minutes or steps", "moba", {"steps": 1, "minutes": 1.0}),
        ("whole must be", "moba", {"steps": 1, "whole": 2.0}),
        ("data must be more than 700 tokens", "moba", {"steps": 1, "length": 700}),
        ("must be causal and decode", "mra", {"steps": 1}),
        ("no layer is 9", "moba", {"steps": 1, "layers": [9]}),
    ):
        with pytest.raises(ValueError, match=words):
            convert(model(), slug, TOKENS, **options)
    network = model()
    convert(network, "moba", TOKENS, steps=1, length=8, batch=1, shown=False, block_size=4)
    with pytest.raises(ValueError, match="padding alone"):
        network(TOKENS[None, :4], attention_mask=torch.ones(1, 1, 4, 4).tril().bool())
    assert perplexity(network, TOKENS, 16, 2) > 1
