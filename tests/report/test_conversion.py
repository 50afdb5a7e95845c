"""`saccade convert` on a saved model: what it writes is read again, what it cannot do is said in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import saccade
from saccade.cli import main


def test_a_saved_model_is_converted_and_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model: Callable[[Path], Path]
) -> None:
    folder, text, out = tiny_model(tmp_path / "model"), tmp_path / "text.txt", tmp_path / "out"
    text.write_text("the aim of a test is to be in the way " * 40)
    arguments = [
        "convert", str(folder), "moba:block_size=4,top_k=2", "--data", str(text), "--minutes", "0.002", "--length", "8",
        "--context", "24", "--out", str(out),
    ]  # fmt: skip

    def run(*more: str) -> str:
        with pytest.raises(SystemExit) as done:
            main([*arguments, *more])
        assert done.value.code in (0, None)
        return capsys.readouterr().out

    said = json.loads(run("--json"))
    assert said["slug"] == "moba" and said["layers"] == ["model.layers.0.self_attn"] and said["steps"] > 0
    assert said["after"] > 1 and said["decoding"][1]["tokens"] == 24
    assert json.loads((out / "conversion.json").read_text()) == said
    table = run()  # nothing is trained again
    assert "as it was" in table and f"after {said['steps']} steps" in table and "cache, MB" in table
    import transformers

    model, ids = transformers.LlamaForCausalLM.from_pretrained(folder).eval(), torch.arange(12)[None] % 7
    before = model(ids).logits
    assert saccade.load_converted(model, out) == said["layers"]
    assert not torch.equal(model(ids).logits, before)
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--seed", "1"])
    err = capsys.readouterr().err
    assert (
        done.value.code == 2 and "was begun otherwise (seed was 0 and is 1): delete it, or give another folder" in err
    )


def test_what_cannot_be_done(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tiny_model: Callable[[Path], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, short = str(tiny_model(tmp_path / "model")), tmp_path / "short.txt"
    short.write_text("the aim of a test")
    for words, arguments in (
        ("Missing option '--out'", (folder, "moba")),
        ("'mosa' or 'moba'", (folder, "moab", "--out", "out")),
        ("has no option", (folder, "moba:blocks=3", "--out", "out")),
        ("no folder at ./nowhere", ("./nowhere", "moba", "--out", "out")),
        (
            "the text to learn from must have at least 512 tokens",
            (folder, "moba", "--out", "out", "--data", str(short)),
        ),
        ("no layer is 7", (folder, "moba", "--out", "out", "--layers", "0,7")),
        ("must be causal and decode", (folder, "mra", "--out", "out", "--layers", "0")),
        ("vit-s14 is no language model that writes text", ("vit-s14", "moba", "--out", "out")),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main(["convert", *arguments])
        said = capsys.readouterr().err.splitlines()[-1]  # transformers has a bar of its own
        assert done.value.code == 2 and said.startswith("saccade: ") and words in said
