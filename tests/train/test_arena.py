"""The task of caches: what is measured equals what the model says, and nothing that was measured is lost."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from saccade.train.arena import ArenaResult, Contestant, Sizes, arena, measuring, running
from saccade.train.arena.contestants import parse
from saccade.train.data import Prompt

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {"length": 400, "new": 6, "depths": (0.2, 0.8), "shares": (1.0, 0.25)}


class TakesHalf:
    """A press as kvpress has them: the latest part of keys and values stays."""

    compression_ratio = 0.0

    def compress(
        self, module: Any, hidden_states: Any, keys: torch.Tensor, values: torch.Tensor, attentions: Any, kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first = int(self.compression_ratio * keys.shape[2])
        return keys[:, :, first:], values[:, :, first:]


@pytest.fixture
def pair(byte_tokenizer: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval(), byte_tokenizer


def test_a_text_is_told_as_the_model_tells_it(pair: Any) -> None:
    model, ids = pair[0], torch.randint(256, (40,))
    found = measuring.measure_text(model, partial(Contestant("full", "full").opened, model, None), ids, 7)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, 32:-1], ids[33:])
    assert found["loss"] == pytest.approx(float(expected), rel=1e-5)
    keys_and_values = 2 * 2 * 2 * 8 * 4  # layers, both, heads, channels, bytes
    # held after reading; pages are not filled to their end
    assert 33 * keys_and_values <= found["bytes"] <= 48 * keys_and_values + 4096
    assert found["first"] > 0 and found["rate"] > 0 and found["bytes_after"] >= found["bytes"]


@pytest.mark.parametrize("later", [False, True])
def test_an_answer_is_what_greedy_decoding_says_through_the_cache(pair: Any, later: bool) -> None:
    model, ids = pair[0], torch.randint(256, (60,))
    opened = partial(Contestant("window", "window", {"sinks": 2}).opened, model, 0.25)
    with torch.no_grad(), opened() as cache:
        split = 50 if later else 55
        logits = model(ids[None, :split], past_key_values=cache).logits
        for place in range(split, 60):
            if place >= 55:
                ids[place] = logits[0, -1].argmax()
            logits = model(ids[None, place : place + 1], past_key_values=cache).logits
    own, other = Prompt(ids, 50, 55, 0.5), Prompt(torch.cat([ids[:-1], (ids[-1:] + 1) % 256]), 50, 55, 0.5)
    assert measuring.measure_prompt(model, opened, own, later=later) == {"right": 1.0}
    assert measuring.measure_prompt(model, opened, other, later=later) == {"right": 0.0}


def test_the_whole(pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = arena(["window:sinks=2", "a-vl"], pair, out=tmp_path / "run", progress=False, **SIZES)
    assert [(row.name, row.share) for row in result.rows] == [
        ("full", None), ("window:sinks=2", 1.0), ("window:sinks=2", 0.25), ("a-vl", 1.0), ("a-vl", 0.25),
    ]  # fmt: skip
    rows = {(row.name, row.share): row for row in result.rows}
    full, whole, part = rows["full", None], rows["window:sinks=2", 1.0], rows["window:sinks=2", 0.25]
    assert whole.perplexity == pytest.approx(full.perplexity, rel=1e-4) and not result.failed
    assert part.perplexity != pytest.approx(full.perplexity, rel=1e-4) and part.bytes < 0.35 * full.bytes
    for text in (result.table(width=200), result.markdown()):
        assert all(f"{row.perplexity:.3f}" in text for row in result.rows) and "asked later" in text
    assert result.markdown().startswith("| cache | share |") and "At 0.25 of the tokens" in result.answer()[0]
    again = ArenaResult.load(tmp_path / "run")
    assert again.rows == result.rows and again.config == result.config and "compress" in again.to_json()

    # what is there is not measured again, and more is added to it
    asked: list[str] = []
    text, prompt = running.measure_text, running.measure_prompt
    monkeypatch.setattr(running, "measure_text", lambda *a, **k: asked.append("text") or text(*a, **k))
    monkeypatch.setattr(running, "measure_prompt", lambda *a, **k: asked.append("prompt") or prompt(*a, **k))
    assert arena(["window:sinks=2"], pair, out=tmp_path / "run", progress=False, **SIZES).rows == result.rows
    assert not asked
    more = arena({"half": TakesHalf()}, pair, out=tmp_path / "run", progress=False, **SIZES)
    assert {row.name for row in more.rows} == {"full", "half", "window:sinks=2", "a-vl"} and len(asked) == 2 * 7
    assert {(row.name, row.share): row for row in more.rows} | rows == {(row.name, row.share): row for row in more.rows}
    shares = arena(["a-vl"], pair, out=tmp_path / "run", progress=False, **{**SIZES, "shares": (0.5, 0.25)})
    assert len(asked) == 3 * 7 and [row.share for row in shares.rows if row.name == "a-vl"] == [0.5, 0.25]

    other = {**SIZES, "new": 7}
    with pytest.raises(ValueError, match=r"holds another comparison \(its settings\)"):
        arena(["a-vl"], pair, out=tmp_path / "run", progress=False, **other)
    with pytest.raises(ValueError, match="another cache of that name"):
        arena({"half": "window"}, pair, out=tmp_path / "run", progress=False, **SIZES)


def test_without_prompts(pair: Any, tmp_path: Path) -> None:
    """Perplexity, bytes and speed alone."""
    asked = {name: value for name, value in SIZES.items() if name != "shares"}
    result = arena(["window"], pair, "long:each=0,texts=1,shares=(0.5,)", out=tmp_path, progress=False, **asked)
    assert [row.passkey for row in result.rows] == [None, None] and result.config["budget"] == "long"
    assert result.config["settings"]["texts"] == 1 and ArenaResult.load(tmp_path).rows == result.rows
    said = result.table(width=200)
    assert "passkey" not in said + result.markdown() and "prompts" not in said + " ".join(result.answer())
    assert len(result.plot().subfigs) == 3
    for wrong, words in (("long:each=some", "each must be an int"), ("long:of=3", "no setting of task compress is")):
        with pytest.raises(ValueError, match=words):
            arena(["window"], pair, wrong, progress=False)


def test_who_was_interrupted_goes_on_at_the_next_piece(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = 0
    prompt = running.measure_prompt

    def counted(*args: Any, **options: Any) -> dict[str, float]:
        nonlocal measured
        measured += 1
        if measured == 5:
            raise KeyboardInterrupt
        return prompt(*args, **options)

    monkeypatch.setattr(running, "measure_prompt", counted)
    with pytest.raises(KeyboardInterrupt):
        arena(["full"], pair, out=tmp_path, progress=False, **SIZES)
    file = tmp_path / "full" / "pieces.jsonl"
    kept = file.read_text()
    assert kept.count("\n") == 5  # a text, and four prompts
    file.write_text(kept + '{"share": null, "pie')  # killed while it wrote
    result = arena(["full"], pair, out=tmp_path, progress=False, **SIZES)
    assert measured == 7 and len(result.rows) == 1 and file.read_text().startswith(kept)
    (tmp_path / "full" / "pieces.jsonl").write_text('{"share": 1}\n')
    with pytest.raises(ValueError, match=r"pieces\.jsonl, line 1, is damaged"):
        arena(["full"], pair, out=tmp_path, progress=False, **SIZES)


def test_one_that_cannot_run_says_why_and_the_others_do(pair: Any) -> None:
    class Broken(TakesHalf):
        def compress(self, *args: Any) -> Any:
            raise ValueError("no\nkeys")

    result = arena({"broken": Broken()}, pair, progress=False, **SIZES)
    assert result.failed == {"broken at 1": "no keys", "broken at 0.25": "no keys"} and result.names == ["full"]
    assert "broken at 1: no keys" in result.table() and result.folder is None


def test_the_names() -> None:
    first, second = parse(["heavy-hitters:recent=0.25,least=0.2"])
    assert first == Contestant("full", "full") and not first.takes_share and second.takes_share
    assert second.options == {"recent": 0.25, "least": 0.2} and second.policy == "heavy-hitters"
    assert [each.name for each in parse({"a": "full"})] == ["full", "a"] and len(parse("full")) == 1
    assert "compression_ratio" not in Contestant("x", TakesHalf()).as_config()["policy"]
    for wrong, words in (
        ([], "at least one cache"),
        (["windw"], "did you mean 'window'"),
        (["window:sink=3"], "window has the options"),
        (["window:sinks=many"], "window: sinks must be"),
        (["window:sinks=-1"], "sinks must be a number of tokens"),
        (["nats"], "NAtS learns its roles"),
        (["a-vl:rate=2.0"], "rate"),
        (["window", "window"], "comes twice"),
        ({"full": "window"}, "comes twice"),
        (["norm"], "did you mean 'key-norm'"),
        ({"a": 3}, "a policy by name, a Policy or a press, got int"),
    ):
        with pytest.raises(ValueError, match=words):
            parse(wrong)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lengths": 3}, "no setting of task compress is called 'lengths'"),
        ({"new": 1}, "new must be an integer of at least 2"),
        ({"new": 512}, r"new must be below length \(512\)"),
        ({"shares": ()}, "shares must be above 0"),
        ({"shares": (0.0,)}, "shares must be above 0"),
        ({"depths": (2.0,)}, "depths must be from 0 to 1"),
        ({"each": True}, "each must be an integer"),
    ],
)
def test_sizes(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sizes().changed(changes)


def test_refusals(pair: Any, tmp_path: Path) -> None:
    for asked, words in (
        ({"budget": "60"}, "budget of task compress must be"),
        ({"length": 600}, r"positions \(512\), got 600"),
        ({"model": str(tmp_path / "none")}, "no folder at"),
        ({"model": "vit-s14"}, "vit-s14 is no language model"),
        ({"model": (torch.nn.Linear(2, 2), None)}, "Linear has no cache"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            arena(["window"], asked.pop("model", pair), progress=False, **asked)
    (tmp_path / "other.txt").write_text("x")
    with pytest.raises(ValueError, match="holds other files"):
        arena(["window"], pair, out=tmp_path, progress=False, **SIZES)
    with pytest.raises(FileNotFoundError, match="no finished comparison"):
        ArenaResult.load(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps({"format": 1, "config": {"task": "text"}}))
    with pytest.raises(ValueError, match="is not a comparison of caches"):
        ArenaResult.load(tmp_path)
