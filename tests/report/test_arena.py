"""`saccade compare --task compress`: on a saved model, with a page, a table in Markdown and curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from saccade.cli import main
from saccade.train.arena import sizes
from saccade.train.arena.curves import PANELS


def called(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(["compare", *arguments])
    return int(done.value.code or 0)


def test_the_command(
    tmp_path: Path, byte_tokenizer: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=512,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("Network Working Group. " * 40)
    monkeypatch.setitem(sizes.BUDGETS, "quick", sizes.Sizes(length=400, new=4, depths=(0.5,), shares=(0.5, 0.25)))
    out = tmp_path / "run"
    asked = ["window", "random:seed=3", "--task", "compress", "--model", str(tmp_path / "model"), "--out", str(out)]
    assert called(*asked, "--data", str(tmp_path / "text.txt"), "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in printed["rows"]] == ["full", *["window"] * 2, *["random:seed=3"] * 2]
    assert called(*asked, "--data", str(tmp_path / "text.txt")) == 0
    said = capsys.readouterr().out
    assert "At 0.25 of the tokens" in said and f"report: {out / 'report.html'}" in said
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") == 2 * len(PANELS) and "Which cache?" in page and 'src="http' not in page
    assert (out / "table.md").read_text().count("\n| ") == 5
    for wrong, words in (
        (["--seeds", "2"], "one seed"),
        (["--data", "a.txt", "--data", "b.txt"], "one text file"),
        (["--budget", "3"], "budget of task compress must be"),
    ):
        assert called(*asked, *wrong) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert called("moba", "--model", "smollm2") == 2
    assert "--model is for task compress, got task 'text'" in capsys.readouterr().err
