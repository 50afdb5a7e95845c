"""`saccade advise` on a saved model: reads its text with its tokenizer, writes a picture, prints code."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from saccade.cli import main
from saccade.integrations.advise import Advice, Trial, advise, positions
from saccade.integrations.advise.benches import ModelBench
from saccade.report.advice import UNFINISHED, plot, read_advice, sample_model, write_advice
from saccade.train.resumable import Resumable

Model = Callable[..., Path]


def test_a_saved_model_and_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model: Model) -> None:
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
    assert "no tokens for digits" in printed["skipped"]["retrieval"]
    assert (out / "advice.png").stat().st_size > 1000 and json.loads((out / "advice.json").read_text())["frontier"]


def test_what_was_interrupted_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    model, text, out = tiny_model(tmp_path / "model"), tmp_path / "text.txt", tmp_path / "out"
    text.write_text("the aim of a test is to be in the way " * 20)
    arguments = ["advise", str(model), "--context", "48", "--data", str(text), "--mechanism", "window"]
    arguments += ["--tolerance", "9", "--repeats", "1", "--json", "--out", str(out)]
    counted: list[str] = []
    last = ""

    def counting(name: str) -> None:
        whole = getattr(ModelBench, name)

        def counted_call(self: ModelBench, *given: Any, **named: Any) -> Any:
            if name == last and name in counted:
                raise KeyboardInterrupt
            counted.append(name)
            return whole(self, *given, **named)

        monkeypatch.setattr(ModelBench, name, counted_call)

    def run(code: int) -> list[str]:
        counted.clear()
        with pytest.raises(SystemExit) as done:
            main(arguments)
        assert (done.value.code or 0) == code
        return counted.copy()

    for name in ("measure", "closely"):
        counting(name)
    assert {"measure", "closely"} == set(run(0)) and not (out / UNFINISHED).exists()
    (out / "advice.json").unlink()
    for last in ("measure", "closely"):  # is interrupted when it is called again
        assert run(130)[-1] == last and not (out / "advice.json").exists()
        kept = {
            each["seconds"]: Trial.read(each)
            for piece in Resumable(out / UNFINISHED, {}).found.values()
            if isinstance(piece, list)
            for each in piece
        }
        last = ""
        with pytest.raises(SystemExit) as done:
            main([*arguments, "--seed", "7"])
        assert done.value.code == 2 and "seed was 0 and is 7" in capsys.readouterr().err.splitlines()[-1]
        again = run(0)
        found = {trial.seconds: trial for trial in read_advice(out / "advice.json").trials}
        assert again.count("measure") == len(found) - len(kept) and kept.keys() <= found.keys()
        assert all(found[seconds].deviation == trial.deviation for seconds, trial in kept.items())
        assert not (out / UNFINISHED).exists()
        (out / "advice.json").unlink()


def test_retrieval_beside_perplexity(
    tmp_path: Path, byte_tokenizer: Any, capsys: pytest.CaptureFixture[str], tiny_model: Model
) -> None:
    model = tiny_model(tmp_path / "model", vocab_size=256)
    byte_tokenizer.save_pretrained(model)
    arguments = ["advise", str(model), "--context", "400", "--mechanism", "window", "--tolerance", "9", "--json"]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--keep-retrieval"])
    assert done.value.code in (0, None)
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["probes"]) == {"passkey", "multi-key"} and printed["decode_rate"] > 0 and not printed["skipped"]
    frontier = [trial for trial in printed["trials"] if trial["probes"]]
    assert frontier and all(set(trial["probes"]) == set(printed["probes"]) for trial in frontier)
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--retrieval", "0"])
    assert json.loads(capsys.readouterr().out)["probes"] == {}
    assert "must not be negative, got -1" in refusal(capsys, *arguments[1:], "--retrieval", "-1")
    assert "--keep-retrieval needs a model, and prompts" in refusal(
        capsys, *arguments[1:], "--retrieval", "0", "--keep-retrieval"
    )
    with pytest.raises(SystemExit) as done:  # the weights are loaded by then
        main(["advise", str(model), "--context", "40", *arguments[4:], "--keep-retrieval"])
    assert done.value.code == 2 and "context must be at least" in capsys.readouterr().err.splitlines()[-1]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as done:
        main(["advise", *arguments])
    said = capsys.readouterr().err
    assert done.value.code == 2 and said.count("\n") == 1 and said.startswith("saccade: "), said
    return said


def test_what_can_be_refused_is_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_model: Model
) -> None:
    monkeypatch.chdir(tmp_path)
    model = str(tiny_model(tmp_path / "model"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    capsys.readouterr()
    (tmp_path / "model" / "model.safetensors").unlink()  # to load it would fail
    short = tmp_path / "short.txt"
    short.write_text("the aim is")
    assert "positions (2048), got 5000" in refusal(capsys, model, "--context", "5000")
    assert "no data file" in refusal(capsys, model, "--data", "nothing.txt")
    assert "did you mean 'moba'" in refusal(capsys, model, "--mechanism", "moab")
    assert "at least 64 tokens, got 3" in refusal(capsys, model, "--context", "64", "--data", str(short))
    assert "tolerance" in refusal(capsys, model, "--tolerance", "-1")
    assert "context must be positive" in refusal(capsys, model, "--context", "0")
    assert "no folder at ./elsewhere" in refusal(capsys, "./elsewhere")
    assert "no folder at elsewhere/model, and no model of that name" in refusal(capsys, "elsewhere/model")
    assert "is a file" in refusal(capsys, str(short))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).unlink()
    assert "has no tokenizer" in refusal(capsys, model)
    (tmp_path / "model" / "config.json").write_text("{}")
    assert "cannot be read as a transformers model" in refusal(capsys, model)
    (tmp_path / "model" / "config.json").unlink()
    assert "has no config.json" in refusal(capsys, model)


def test_a_model_with_fewer_positions_than_asked_for() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.RobertaConfig(vocab_size=9, max_position_embeddings=34, pad_token_id=1, **sizes)
    model = transformers.RobertaModel(config).eval()
    assert positions(config) == 32
    model(torch.full((1, 32), 5))  # as many as it says
    for asked in ({"context": 33}, {"inputs": torch.full((1, 33), 5)}):
        with pytest.raises(ValueError, match=r"positions \(32\), got 33"):
            advise(model, **asked)


@pytest.mark.parametrize("arguments", [(), ("model", "--shape", "1,2,8,4"), ("--shape", "1,2,8"), ("/no/such/model",)])
def test_bad_input(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["advise", *arguments])
    assert done.value.code == 2 and capsys.readouterr().err.startswith("saccade: ")


def test_what_a_folder_has_of_other_settings_stays(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")

    def measured(left: int, context: int = 64, tolerance: float = 0.5) -> Advice:
        trial = Trial("window", {"left": left}, 0.5, 2.0 + left, 0.1, 0.5, 0.1, dense_layers=(1,))
        return Advice("a model", context, tolerance, 1.0, [trial], skipped={"moba": "why"})

    def found() -> Advice:
        return read_advice(tmp_path / "advice.json")

    write_advice(measured(2), tmp_path)
    assert found() == measured(2) and (tmp_path / "settings.json").exists()
    write_advice(measured(3), tmp_path)
    assert found().trials == measured(2).trials + measured(3).trials
    write_advice(measured(3, tolerance=0.0), tmp_path)
    assert len(found().trials) == 2 and not (tmp_path / "settings.json").exists()
    write_advice(measured(4, context=128), tmp_path)
    assert found() == measured(4, context=128)
    write_advice(replace(measured(5, context=128), fingerprint="a"), tmp_path)
    assert len(found().trials) == 2
    write_advice(replace(measured(6, context=128), fingerprint="b"), tmp_path)  # another model of the same class
    assert found().trials == measured(6, context=128).trials
    (tmp_path / "advice.json").write_text("[]")
    with pytest.raises(ValueError, match="is no advice"):
        write_advice(measured(2), tmp_path)


def test_the_picture_of_nothing_and_of_something() -> None:
    advice = Advice("a model", 64, 0.0, 1.0)
    assert plot(advice).axes
    advice.tolerance, advice.trials = 0.5, [Trial("window", {"left": 2}, 0.5, 2.0, 0.1, 0.5, 0.1)]
    labels = [
        artist.texts for artist in plot(advice).findobj() if hasattr(artist, "texts") and hasattr(artist, "boxes")
    ]
    assert labels == [["window:left=2"]]


@pytest.mark.parametrize("silent", [False, True], ids=["refuses", "says nothing"])
def test_a_name_without_a_network(
    silent: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_model: Model
) -> None:
    """Refused without a second attempt; what was fetched before is found."""
    pytest.importorskip("transformers")
    import huggingface_hub

    def sleep(_: float) -> None:
        raise AssertionError("waits for a network")

    with socket.socket() as hub:
        hub.bind(("127.0.0.1", 0))
        if silent:
            hub.listen()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{hub.getsockname()[1]}")
        monkeypatch.setattr("saccade.report.pretrained.PATIENCE", 0.2)
        monkeypatch.setattr("time.sleep", sleep)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        assert "the network gives no answer" in refusal(capsys, "nosuchmodel")

        kept = tmp_path / "models--a--model"
        tiny_model(kept / "snapshots" / "0")
        (kept / "refs").mkdir()
        (kept / "refs" / "main").write_text("0")
        model, inputs, _ = sample_model("a/model", None, 8)
    assert model.config.model_type == "llama" and inputs["input_ids"].shape == (1, 8)
