"""`saccade advise` on a saved model: reads its text with its tokenizer, writes a picture, prints code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from saccade.cli import main
from saccade.integrations.advise import Advice, Trial
from saccade.report.advice import plot


def tiny_model(folder: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"[UNK]": 0, **{word: i for i, word in enumerate(("the", "a", "of", "is", "to", "in"), 1)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_saved_model_and_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("the aim of a test is to be in the way " * 20)
    out = tmp_path / "out"
    arguments = ["advise", str(model), "--context", "48", "--data", str(text), "--mechanism", "window"]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--out", str(out), "--json"])
    assert done.value.code in (0, None)
    printed = json.loads(capsys.readouterr().out)
    assert printed["context"] == 48 and printed["trials"] and printed["warning"] == ""
    assert (out / "advice.png").stat().st_size > 1000 and json.loads((out / "advice.json").read_text())["frontier"]


@pytest.mark.parametrize("arguments", [(), ("model", "--shape", "1,2,8,4"), ("--shape", "1,2,8"), ("/no/such/model",)])
def test_bad_input(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["advise", *arguments])
    assert done.value.code == 2 and capsys.readouterr().err.startswith("saccade: ")


def test_the_picture_of_nothing_and_of_something() -> None:
    advice = Advice("a model", 64, 0.0, 1.0)
    assert plot(advice).axes
    advice.tolerance, advice.trials = 0.5, [Trial("window", {"left": 2}, 0.5, 2.0, 0.1, 0.5, 0.1)]
    assert any("window:left=2" in text.get_text() for text in plot(advice).axes[0].texts)
