"""The main job, at its smallest: every task, folders that go on, runs that are killed, and clear errors."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import saccade
from saccade.train import files, fingerprints, measures, runs
from saccade.train.data import generator_at
from saccade.train.entries import Entry, parse
from saccade.train.model import SequenceModel, first_names
from saccade.train.result import CompareResult, SeedRecord
from saccade.train.tasks import TASKS, Text

TINY = {
    "dim": 16, "batch": 4, "steps": 3, "evaluations": 2, "evaluation_size": 8, "lengths": (8, 16),
    "sweep_seconds": 0.01, "decode_tokens": 2, "map_length": 8, "checkpoint_seconds": 0.0,
}  # fmt: skip
TEXT = {**TINY, "length": 32}


class RunningMean(nn.Module):
    """The caller's own mechanism: the mean of all tokens so far; or, with `ahead`, of all tokens."""

    def __init__(self, dim: int, num_heads: int, causal: bool, ahead: bool = False) -> None:
        super().__init__()
        self.linear, self.ahead = nn.Linear(dim, dim), ahead

    def forward(self, x_BNC: Tensor) -> Tensor:
        count_N1 = torch.arange(1, x_BNC.shape[1] + 1, device=x_BNC.device)[:, None]
        mean_BNC = x_BNC.mean(1, keepdim=True).expand_as(x_BNC) if self.ahead else x_BNC.cumsum(1) / count_N1
        return self.linear(mean_BNC)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> CompareResult:
    folder = tmp_path_factory.mktemp("text")
    mechanisms = {"softmax": "softmax", "grouped": "softmax:num_kv_heads=2", "mine": RunningMean}
    return saccade.compare(mechanisms, task="text", seed=[0, 1], out=folder, **TEXT)


def test_a_comparison_measures_everything(text: CompareResult) -> None:
    assert [record.name for record in text.mechanisms] == ["softmax", "grouped", "mine"]
    assert text["grouped"].options == {"num_kv_heads": 2}
    assert text["grouped"].parameters < text["softmax"].parameters
    for record in text.mechanisms:
        assert [run.seed for run in record.runs] == [0, 1] and record.spread > 0
        assert 5 < record.quality < 9, "after three steps a byte still costs about eight bits"
        assert record.train_tokens_per_second > 0 and record.train_bytes > 4 * 4 * record.parameters
        assert [point.length for point in record.scaling] == [8, 16] and "bytes" in record.fits
        for run in record.runs:
            assert run.metrics["steps"] == 3 and run.metrics["tokens"] == 3 * 4 * 32
            assert [row["step"] for row in run.curve if "quality" in row] == [2, 3]
    softmax = text["softmax"]
    assert softmax.decode["tokens_per_second"] > 0
    # two layers keep keys and values of 16 channels in fp32: the prompt, four tokens to warm up, two measured
    assert softmax.decode["cache_bytes"] == 2 * 2 * 16 * 4 * (32 + 4 + 2)
    assert text["mine"].decode is None and any("no cache" in note for note in text["mine"].notes)
    assert not any(record.marks for record in text.mechanisms)


def test_the_maps_are_the_weights_of_the_trained_layers(text: CompareResult) -> None:
    maps = text["softmax"].maps
    assert list(maps) == ["layer 0", "layer 1"] and maps["layer 0"].shape == (4, 8, 8)
    assert abs(maps["layer 1"].sum(-1) - 1).max() < 1e-5 and not np.triu(maps["layer 1"], 1).any()
    assert text["mine"].maps == {} and any("no attention map" in note for note in text["mine"].notes)


def test_the_folder_holds_config_metrics_checkpoints_and_result(text: CompareResult) -> None:
    folder = text.folder
    lines = (folder / "softmax" / "seed-1" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == text["softmax"].runs[1].curve
    assert json.loads((folder / "config.json").read_text()) == text.config
    tensors, _ = files.read_tensors(folder / "mine" / "seed-0" / "checkpoint.safetensors")
    assert int(tensors["step"]) == 3 and "model.blocks.1.attention.linear.weight" in tensors
    loaded = CompareResult.load(folder)
    assert loaded.to_json() == text.to_json() and loaded["softmax"].maps.keys() == text["softmax"].maps.keys()
    assert not [path for path in folder.rglob("*") if path.suffix == ".part"]


def test_a_finished_folder_is_returned_and_another_comparison_refused(text: CompareResult) -> None:
    mechanisms = {"softmax": "softmax", "grouped": "softmax:num_kv_heads=2", "mine": RunningMean}
    before = {path: path.stat().st_mtime_ns for path in text.folder.rglob("*")}
    again = saccade.compare(mechanisms, task="text", seed=[0, 1], out=text.folder, **TEXT)
    assert again.to_json() == text.to_json()
    assert before == {path: path.stat().st_mtime_ns for path in text.folder.rglob("*")}
    with pytest.raises(ValueError, match=r"holds another comparison: settings\.dim is 16 there and 32 here"):
        saccade.compare(mechanisms, task="text", seed=[0, 1], out=text.folder, **{**TEXT, "dim": 32})
    with pytest.raises(ValueError, match=r"seeds is \[0, 1\] there and \[0\] here"):
        saccade.compare(mechanisms, task="text", out=text.folder, **TEXT)
    with pytest.raises(ValueError, match=r"mechanism grouped\.options\.num_kv_heads is 2 there and None here"):
        saccade.compare({"grouped": "softmax"}, task="text", seed=[0, 1], out=text.folder, **TEXT)
    part = saccade.compare(["softmax"], task="text", seed=[0, 1], out=text.folder, **TEXT)
    assert part.to_json() == text.to_json(), "what is asked for is there, with the rest"


def test_what_is_around_the_mechanism_starts_the_same() -> None:
    task = Text(Text.budgets["quick"].changed(TEXT), torch.device("cpu"))
    models = [task.model(mechanism, 0) for mechanism in parse({"a": "softmax", "b": RunningMean})]
    for name in ("embedding.weight", "blocks.1.mlp.fc1.weight", "head.weight"):
        first, second = (model.get_parameter(name) for model in models)
        assert torch.equal(first, second)
    other = task.model(parse(["softmax"])[0], 1)
    assert not torch.equal(other.get_parameter("head.weight"), models[0].get_parameter("head.weight"))


@pytest.mark.parametrize("name", ["recall", "listops", "digits"])
def test_the_sequence_tasks(name: str) -> None:
    sizes = {"recall": {"length": 16, "pairs": 3}, "listops": {"length": 16}, "digits": {}}[name]
    quick = {"lengths": (), "map_length": 0}
    result = saccade.compare({"softmax": "softmax", "mine": RunningMean}, task=name, **{**TINY, **sizes, **quick})
    assert result.folder is None and result.metric.name == "accuracy"
    assert all(0 <= record.quality <= 1 and not record.scaling for record in result.mechanisms)
    assert (result["softmax"].decode is not None) == (name == "recall")


def test_gates_and_fusion_are_compared_with_the_model_without() -> None:
    for task, slug, lengths in (("digits-cnn", "cbam", (16, 64)), ("paired", "bottleneck-fusion", (4, 8))):
        result = saccade.compare([slug], task=task, **{**TINY, "lengths": lengths, "layers": 1})
        assert [record.name for record in result.mechanisms] == ["none", slug]
        assert result[slug].parameters > result["none"].parameters
        assert not result["none"].scaling and [p.length for p in result[slug].scaling] == list(lengths)
        if task == "digits-cnn":
            assert result[slug].maps["block 0"].shape == (8, 8)


def test_a_missing_view_does_not_reach_the_fused_model() -> None:
    task = TASKS["paired"](TASKS["paired"].budgets["quick"].changed(TINY), torch.device("cpu"))
    for mechanism in parse(["none", "bottleneck-fusion"]):
        model = task.model(mechanism, 0).eval()
        a, b, present, _ = task.batch(0, 0)
        present = torch.tensor([[True, False]] * 4)
        with torch.no_grad():
            assert torch.allclose(model(a, b, present), model(a, torch.randn_like(b), present), atol=1e-6)
            assert not torch.allclose(model(a, b, present), model(torch.randn_like(a), b, present), atol=1e-6)


def test_a_mechanism_that_sees_the_future_is_judged_without_it() -> None:
    def ahead(dim: int, num_heads: int, causal: bool) -> nn.Module:
        return RunningMean(dim, num_heads, causal, ahead=True)

    record = saccade.compare({"ahead": ahead}, task="text", **TEXT)["ahead"]
    assert record.marks == ["future"] and "not causal" in record.notes[0] and "prefixes" in record.notes[0]
    run = record.runs[0]
    assert run.metrics["streamed"] == 0.0 and run.metrics["teacher_forced"] != run.quality


def test_quality_from_the_past_is_the_quality_of_a_causal_model() -> None:
    """By cache and by prefixes: a causal model must come out as it does with all tokens at once."""
    task = Text(Text.budgets["quick"].changed({**TEXT, "length": 16}), torch.device("cpu"))
    model = task.model(parse(["softmax"])[0], 0)
    assert isinstance(model, SequenceModel) and not runs.sees_future(task, model)
    streamed, how = runs.quality_from_the_past(task, model)
    assert how == 1.0 and streamed == pytest.approx(task.quality(model), abs=1e-5)
    own = task.model(Entry("mine", None, {}, RunningMean), 0)
    prefixes, how = runs.quality_from_the_past(task, own)  # sixteen prefixes of sixteen tokens: all
    assert how == 0.0 and prefixes == pytest.approx(task.quality(own), abs=1e-5)


@pytest.mark.parametrize("name", ["text", "recall"])
def test_generating_with_caches_is_generating_without(name: str) -> None:
    task = TASKS[name](TASKS[name].budgets["quick"].changed({**TEXT, "pairs": 3}), torch.device("cpu"))
    model = task.model(parse(["softmax"])[0], 0).eval()
    tokens = task.prompt(5)
    generated = model.generate(tokens, 6)
    for _ in range(6):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, tokens[:, 5:])
    with pytest.raises(ValueError, match="no cache"):
        task.model(Entry("mine", None, {}, RunningMean), 0).generate(tokens, 1)


def test_decoding_that_no_two_passes_agree_on_was_not_measured(monkeypatch) -> None:
    task = Text(Text.budgets["quick"].changed(TEXT), torch.device("cpu"))
    model = task.model(parse(["softmax"])[0], 0)
    passes = iter([[9.0] * 4 + [1.0, 9.0, 2.0], [9.0] * 4 + [2.0, 1.0, 9.0], [9.0] * 4 + [9.0, 2.0, 1.0]])
    monkeypatch.setattr(measures, "_decoded", lambda *given: (next(passes), 64))
    assert measures.decoding(model, task.prompt(5), 3)["tokens_per_second"] == 1.0
    doubling = iter([[float(2**n)] * 7 for n in range(12)])
    monkeypatch.setattr(measures, "_decoded", lambda *given: (next(doubling), 64))
    assert measures.decoding(model, task.prompt(5), 3) is None and next(doubling)[0] == 2**9


def own_parts() -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    x = torch.randn(6, 8, 5, 16, generator=generator_at(0, 0))
    batches = [(part, part.mean((1, 2)).gt(0).long()) for part in x]
    return batches[:4], batches[4:]


class OwnModel(nn.Module):
    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer, self.head = mixer, nn.Linear(16, 2)

    def forward(self, x_BNC: Tensor) -> Tensor:
        return self.head(self.mixer(x_BNC).mean(1))


def test_the_callers_own_model_and_loader() -> None:
    train, held_out = own_parts()

    def model(part):
        return OwnModel(part(dim=16, num_heads=2))

    result = saccade.compare(["softmax", "softmax:rope=False"], data=train, held_out=held_out, model=model, steps=6)
    assert result.metric.name == "loss" and not result.metric.higher_is_better
    assert [run.metrics["tokens"] for run in result["softmax"].runs] == [6 * 8 * 5]
    whole = saccade.compare({"mine": lambda: OwnModel(nn.Linear(16, 16))}, data=lambda step: train[step % 4],
                            quality=lambda m: 0.5, steps=2)  # fmt: skip
    assert whole["mine"].quality == 0.5 and whole.metric.higher_is_better
    with pytest.raises(ValueError, match="must give its batches anew"):
        saccade.compare({"mine": nn.Identity}, data=iter(train))
    with pytest.raises(ValueError, match="own data need a model"):
        saccade.compare(["softmax"], data=train)
    with pytest.raises(ValueError, match="needs held_out= or quality="):
        saccade.compare(["softmax"], data=lambda step: train[0], model=model)
    with pytest.raises(ValueError, match="loss needs data="):
        saccade.compare(["softmax"], loss=lambda m, b: 0)


def network(width: int, scale: float) -> type[nn.Module]:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.head = nn.Linear(16, width), nn.Linear(width, 2)

        def forward(self, x_BNC: Tensor) -> Tensor:
            return self.head(scale * self.hidden(x_BNC).mean(1).relu())

    return Net


def test_a_folder_knows_the_callers_code_and_data(tmp_path) -> None:
    """Names say nothing: another class, another constant, other values are another comparison."""
    train, held_out = own_parts()
    given = {"data": train, "held_out": held_out, "steps": 4, "out": tmp_path}
    first = saccade.compare({"net": network(8, 1.0)}, **given)
    again = saccade.compare({"net": network(8, 1.0)}, **given)
    assert again.to_json() == first.to_json(), "the same code, compiled anew, is the same"
    for other, message in (
        ({"net": network(9, 1.0)}, "mechanism net.code.constructor"),
        ({"net": network(8, 2.0)}, "mechanism net.code.constructor"),
        ({"net": OwnModel}, "mechanism net.own"),
    ):
        with pytest.raises(ValueError, match=f"holds another comparison: {message}|^net: "):
            saccade.compare(other, **given)
    moved = [(x + 1, y) for x, y in train]
    for changed in ({"data": moved}, {"data": train[:3]}, {"held_out": moved[:2]}, {"data": lambda step: train[0]}):
        with pytest.raises(ValueError, match=r"holds another comparison: data\."):
            saccade.compare({"net": network(8, 1.0)}, **{**given, **changed})

    def loaders(shift: int) -> torch.utils.data.DataLoader:
        x, y = torch.cat([x for x, _ in train]) + shift, torch.cat([y for _, y in train])
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 8, shuffle=True)

    given |= {"out": tmp_path / "loaders", "data": loaders(0)}
    first = saccade.compare({"net": network(8, 1.0)}, **given)
    assert saccade.compare({"net": network(8, 1.0)}, **{**given, "data": loaders(0)}).to_json() == first.to_json()
    with pytest.raises(ValueError, match=r"data\.contents is .* there and .* here"):
        saccade.compare({"net": network(8, 1.0)}, **{**given, "data": loaders(1)})
    given |= {"out": tmp_path / "model"}
    saccade.compare(["softmax"], model=lambda part: OwnModel(part(dim=16, num_heads=2)), **given)
    with pytest.raises(ValueError, match=r"data\.model code is"):
        saccade.compare(["softmax"], model=lambda part: OwnModel(part(dim=16, num_heads=4)), **given)


def test_two_mechanisms_get_the_same_batches_of_a_loader() -> None:
    seen: list[float] = []
    items = torch.arange(12)[:, None].float()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(items, items[:, 0].long()), 4, shuffle=True)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if model.training and torch.is_grad_enabled():
            seen.append(float(batch[0].sum() + 1000 * (batch[0] * torch.arange(4)[:, None]).sum()))
        return model(batch[0]).square().mean()

    saccade.compare({"a": lambda: nn.Linear(1, 1), "b": lambda: nn.Linear(1, 1)}, data=loader, loss=loss, steps=7)
    assert seen[:4] == seen[4:8] and seen[8:11] == seen[11:14] and len(set(seen[:4])) > 1


def test_a_shuffling_loader_gives_the_same_batches_when_resumed() -> None:
    from saccade.train.tasks import Own

    items = torch.arange(12)[:, None].float()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(items, items[:, 0].long()), 4, shuffle=True)

    def batches(steps: range) -> list[list[float]]:
        task = Own(Own.budgets["quick"], torch.device("cpu"), loader, None, None, None, None, None)
        return [task.batch(3, step)[0][:, 0].tolist() for step in steps]

    whole = batches(range(8))
    assert sorted(whole[0] + whole[1] + whole[2]) == items[:, 0].tolist() and whole[:3] != whole[3:6]
    torch.manual_seed(1234)
    assert batches(range(5, 8)) == whole[5:]


SMALL = {**TEXT, "lengths": (), "map_length": 0, "decode_tokens": 0}


class Slow(RunningMean):
    def forward(self, x_BNC: Tensor) -> Tensor:
        time.sleep(0.02)
        return super().forward(x_BNC)


def test_seconds_as_budget_are_shared_out_by_steps(tmp_path) -> None:
    sizes = {name: value for name, value in SMALL.items() if name != "steps"}
    result = saccade.compare({"mine": RunningMean, "slow": Slow}, budget=0.3, out=tmp_path, **sizes)
    steps = json.loads((tmp_path / "steps.json").read_text())["steps"]
    assert result["mine"].steps == result["slow"].steps == steps >= 1 and result.config["budget"] == "0.3 s"
    assert all(row["steps"] == steps for row in result.rows())
    more = saccade.compare({"late": "softmax"}, budget=0.3, out=tmp_path, **sizes)
    assert [record.steps for record in more.mechanisms] == [steps] * 3
    (tmp_path / "steps.json").write_text('{"steps": -1}')
    (tmp_path / "result.json").unlink()
    with pytest.raises(ValueError, match=r"steps\.json is damaged \(steps is -1\)"):
        saccade.compare({"late": "softmax"}, budget=0.3, out=tmp_path, **sizes)


def test_runs_take_turns_and_compute_what_they_compute_alone(tmp_path) -> None:
    class Noisy(RunningMean):
        def forward(self, x_BNC: Tensor) -> Tensor:
            return torch.nn.functional.dropout(super().forward(x_BNC), 0.5, self.training)

    task = Text(Text.budgets["quick"].changed({**SMALL, "steps": 10}), torch.device("cpu"))
    mechanisms = parse({"noisy": Noisy, "softmax": "softmax"})
    alone = [runs.train_run(task, entry, 0, 10, tmp_path / "alone" / entry.name) for entry in mechanisms]
    seen: list[tuple[str, int]] = []
    both = [runs.Run(task, entry, 0, 10, tmp_path / "both" / entry.name) for entry in mechanisms]
    assert runs.take_turns(both, lambda run: seen.append((run.mechanism.name, run.step))) == {}
    assert [run.record.quality for run in both] == [record.quality for record in alone]
    assert [name for name, _ in seen[:12]] == ["noisy"] * 4 + ["softmax"] * 4 + ["noisy"] * 4
    assert [row["loss"] for row in both[0].record.curve] == [row["loss"] for row in alone[0].curve]


def test_a_mechanism_is_added_to_a_finished_folder(tmp_path) -> None:
    first = saccade.compare({"mine": RunningMean, "softmax": "softmax"}, out=tmp_path, **SMALL)
    kept = (tmp_path / "mine" / "seed-0" / "final.json").stat().st_mtime_ns
    both = saccade.compare(["lightning"], out=tmp_path, **SMALL)
    assert [record.name for record in both.mechanisms] == ["mine", "softmax", "lightning"]
    assert both["mine"] == first["mine"] and kept == (tmp_path / "mine" / "seed-0" / "final.json").stat().st_mtime_ns
    assert json.loads((tmp_path / "config.json").read_text()) == both.config == CompareResult.load(tmp_path).config
    # stopped while the third was added: the result of two is not the answer
    (tmp_path / "lightning" / "measures.json").unlink()
    first.save(tmp_path)
    assert [r.name for r in saccade.compare(["softmax"], out=tmp_path, **SMALL).mechanisms] == [
        "mine", "softmax", "lightning",
    ]  # fmt: skip
    (tmp_path / "mine" / "seed-0" / "final.json").unlink()
    first.save(tmp_path)
    with pytest.raises(ValueError, match="unfinished runs of 'mine', a constructor of yours: give it here too"):
        saccade.compare(["softmax"], out=tmp_path, **SMALL)


def test_a_folder_is_for_one_run_at_a_time(tmp_path) -> None:
    with files.locked(tmp_path), pytest.raises(OSError, match=rf"in use by another run \(process {os.getpid()}\)"):
        saccade.compare({"mine": RunningMean}, out=tmp_path, **SMALL)
    assert saccade.compare({"mine": RunningMean}, out=tmp_path, **SMALL).folder == tmp_path
    with files.locked(tmp_path):  # what is finished may be read all the same
        assert saccade.compare({"mine": RunningMean}, out=tmp_path, **SMALL)["mine"].steps == 3
    code = "import sys, time; from pathlib import Path; from saccade.train.files import locked\n"
    code += "with locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"
    with pytest.raises(OSError, match=f"process {holder.pid}"), files.locked(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with files.locked(tmp_path):
        pass


def test_random_state_of_the_caller_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    saccade.compare({"mine": RunningMean}, **{**TEXT, "lengths": (), "map_length": 0})
    assert torch.equal(torch.rand(3), expected)


INTERRUPTED = """
import json, sys, torch, saccade
torch.set_num_threads(1)
saccade.compare(json.loads(sys.argv[3]), task="text", out=sys.argv[1], **json.loads(sys.argv[2]))
"""


def test_killed_runs_end_with_the_metrics_of_those_that_were_not(tmp_path) -> None:
    """Two mechanisms in turns, one with random numbers of its own; killed twice, once with lines after a checkpoint."""
    sizes = {**SMALL, "steps": 80, "evaluations": 20}
    mechanisms = ["softmax", "fast:dropout=0.3"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = saccade.compare(mechanisms, out=tmp_path / "whole", **sizes)
        killed = tmp_path / "killed"
        metrics = [killed / files.folder_name(name) / "seed-0" / "metrics.jsonl" for name in mechanisms]
        for lines in (6, 14):
            command = [sys.executable, "-c", INTERRUPTED, str(killed), json.dumps(sizes), json.dumps(mechanisms)]
            process = subprocess.Popen(command)
            until = time.monotonic() + 120
            while time.monotonic() < until:
                if metrics[0].is_file() and len(metrics[0].read_bytes().splitlines()) >= lines:
                    break
                assert process.poll() is None, "the run ended before it could be killed"
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not (metrics[1].parent / "final.json").is_file(), "both are on their way"
        assert all((path.parent / "checkpoint.safetensors").is_file() for path in metrics)
        # what was logged after the checkpoint, and a line that was cut off, must not be there twice
        with metrics[0].open("a") as file:
            file.write('{"step": 399, "tokens": 1, "seconds": 1, "loss": 0.1, "lr": 0.1}\n{"step": 4')
        resumed = saccade.compare(mechanisms, out=killed, **sizes)
    finally:
        torch.set_num_threads(threads)

    def timeless(run: SeedRecord) -> list[dict[str, float]]:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in run.curve]

    for name in mechanisms:
        first, second = (found[name].runs[0] for found in (whole, resumed))
        assert first.quality == second.quality and timeless(first) == timeless(second)
        path = Path(files.folder_name(name)) / "seed-0" / "checkpoint.safetensors"
        ends = [files.read_tensors(found.folder / path)[0] for found in (whole, resumed)]
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0] if key != "history.seconds")


def test_a_run_stopped_under_the_first_names_of_its_tensors_goes_on(tmp_path) -> None:
    task = Text(Text.budgets["quick"].changed(TEXT), torch.device("cpu"))
    mine, folder = parse({"mine": RunningMean})[0], tmp_path / "stopped"
    whole = runs.train_run(task, mine, 0, 6, tmp_path / "whole")
    stopped = runs.Run(task, mine, 0, 6, folder)
    stopped.advance(3)
    runs.save_checkpoint(stopped.training, stopped.losses, stopped.times, folder)
    tensors, _ = files.read_tensors(folder / "checkpoint.safetensors")
    first = {f"model.{name}": f"model.{old}" for name, old in first_names(stopped.model).items()}
    assert first["model.blocks.1.mlp.fc2.bias"] == "model.blocks.1.mlp.down.bias" and len(first) == 2 * (2 + 4)
    assert first["model.blocks.0.attention.linear.weight"] == "model.blocks.0.mixer.linear.weight"
    old = {first.get(name, name): tensor for name, tensor in tensors.items()}
    files.write_tensors(folder / "checkpoint.safetensors", old, {"step": "3"})
    assert runs.Run(task, mine, 0, 6, folder).step == 3
    assert runs.train_run(task, mine, 0, 6, folder).quality == whole.quality
    # a folder also knows the caller's networks by the names of their tensors
    network = SequenceModel(lambda layer: nn.Linear(8, 8), vocab=5, dim=8, layers=2)
    assert fingerprints.network(network)["parameters"] == "fe7839a5042279e1"


def test_a_damaged_checkpoint_is_named(tmp_path) -> None:
    run = tmp_path / "softmax" / "seed-0"
    run.mkdir(parents=True)
    (run / "checkpoint.safetensors").write_bytes(b"\x80\x04cos\nsystem\n(S'echo hacked'\ntR.")
    task = Text(Text.budgets["quick"].changed(TEXT), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged"):
        runs.train_run(task, parse(["softmax"])[0], 0, 3, run)


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path, monkeypatch) -> None:
    files.write_bytes(tmp_path / "there", b"old")
    real = os.fsync

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"^cannot write .*there: No space left on device$"):
        files.write_bytes(tmp_path / "there", b"new")
    with pytest.raises(OSError, match="No space left"):
        saccade.compare({"mine": RunningMean}, out=tmp_path / "run", **TEXT)
    monkeypatch.setattr(os, "fsync", real)
    assert (tmp_path / "there").read_bytes() == b"old"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["there"]


def test_a_folder_that_cannot_be_used_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot make the folder"):
        saccade.compare({"mine": RunningMean}, out=tmp_path / "file" / "run", **TEXT)
    with pytest.raises(ValueError, match="holds other files and no comparison"):
        saccade.compare({"mine": RunningMean}, out=tmp_path, **TEXT)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        saccade.compare({"mine": RunningMean}, out=tmp_path / "damaged", **TEXT)


def test_a_mechanism_that_fails_says_so_before_anything_is_written(tmp_path) -> None:
    class Broken(RunningMean):
        def forward(self, x_BNC: Tensor) -> Tensor:
            return super().forward(x_BNC)[:, :-1]

    with pytest.raises(ValueError, match=r"^broken: The size of tensor"):
        saccade.compare({"mine": RunningMean, "broken": Broken}, out=tmp_path / "run", **TEXT)
    assert not (tmp_path / "run" / "config.json").exists() and not (tmp_path / "run" / "mine").exists()


class Endless(RunningMean):
    def forward(self, x_BNC: Tensor) -> Tensor:
        return super().forward(x_BNC) * float("inf")


def test_a_loss_that_is_not_finite_names_the_mechanism_and_spares_the_others(tmp_path) -> None:
    with pytest.raises(ValueError, match="endless, seed 0: the loss became nan at step 1 of 3"):
        saccade.compare({"endless": Endless}, **SMALL)
    both = {"endless": Endless, "mine": RunningMean}
    result = saccade.compare(both, out=tmp_path, seed=[0, 1], **SMALL)
    assert [record.name for record in result.mechanisms] == ["mine"] and list(result.failed) == ["endless"]
    assert "the loss became nan" in result.failed["endless"] and "endless: " in result.table()
    assert any("Not trained: endless, seed 0: the loss became nan" in sentence for sentence in result.answer())
    assert saccade.compare(both, out=tmp_path, seed=[0, 1], **SMALL).failed == result.failed


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", '{"step": "x"}', "line 1: tokens is missing"),
        ("metrics.jsonl", '{"step": "x", "tokens": 1, "seconds": 1, "loss": 1, "lr": 1}', "step is 'x'"),
        ("metrics.jsonl", '{"step": -1, "tokens": 1, "seconds": 1, "loss": 1, "lr": 1}', "step is -1 after 0"),
        ("metrics.jsonl", '{"step": 1, "tokens": 1, "seconds": [], "loss": 1, "lr": 1}', r"seconds is \[\]"),
        ("metrics.jsonl", "[1]", r"\[1\] is no object"),
        ("final.json", "[]", r"\[\] is no object"),
        ("final.json", '{"seed": "0", "quality": 1.0}', "seed is '0'"),
        ("final.json", '{"seed": 0, "quality": true}', "quality is True"),
        ("final.json", '{"seed": 0, "quality": 1.0, "metrics": {"steps": "3"}}', "metrics is"),
        ("final.json", '{"seed": 0, "quality": 1.0, "curve": [{"step": null}]}', "curve is"),
        ("final.json", '{"seed": 0}', "quality is missing"),
        ("final.json", '{"seed": 0, "quality": 1.0, "colour": 1}', "'colour' is unknown"),
        ("final.json", '{"seed": 0, "quality": 1.0, "metrics": {"steps": 1e9}}', "seed 0 and 1e"),
        ("final.json", "[" * 100_000, "damaged"),
    ],
)
def test_files_of_a_run_with_wrong_contents_are_refused_in_one_line(
    tmp_path, file: str, content: str, message: str
) -> None:
    (tmp_path / file).write_text(content + "\n")
    task = Text(Text.budgets["quick"].changed(SMALL), torch.device("cpu"))
    with pytest.raises(ValueError, match=message) as error:
        runs.Run(task, parse({"mine": RunningMean})[0], 0, 3, tmp_path)
    assert file in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("step", [10**9, -1, 2, 4])
def test_a_checkpoint_of_an_absurd_step_is_refused(tmp_path, step: int) -> None:
    task = Text(Text.budgets["quick"].changed(SMALL), torch.device("cpu"))
    run = runs.Run(task, parse({"mine": RunningMean})[0], 0, 3, tmp_path)
    run.advance(1)
    runs.save_checkpoint(run.training, run.losses, run.times, tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    files.write_tensors(path, files.read_tensors(path)[0] | {"step": torch.tensor(step)})
    with pytest.raises(
        ValueError, match=r"cannot go on from .*checkpoint\.safetensors: (step must be|it has 1 losses)"
    ):
        runs.Run(task, parse({"mine": RunningMean})[0], 0, 3, tmp_path)


def test_what_was_measured_is_returned_where_it_cannot_be_kept(tmp_path, monkeypatch) -> None:
    real = os.replace

    def full(source: str, target: Path) -> None:
        if Path(target).name in ("measures.json", "result.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    result = saccade.compare({"mine": RunningMean}, out=tmp_path, **SMALL)
    assert result["mine"].parameters > 0 and len(result.unkept) == 2
    assert "not kept: cannot write" in result.table() and "No space left on device" in result.table()
    monkeypatch.undo()
    assert saccade.compare({"mine": RunningMean}, out=tmp_path, **SMALL)["mine"].runs == result["mine"].runs


@pytest.mark.parametrize(
    ("mechanisms", "arguments", "message"),
    [
        ([], {}, "at least one mechanism"),
        (["softmax", "softmax"], {}, "comes twice"),
        (["sofmax"], {}, "did you mean 'softmax'"),
        (["softmax:heads"], {}, "options must be name=value"),
        (["softmax:colour=3"], {}, "softmax has no option 'colour'"),
        (["softmax:head_dims=3"], {}, "did you mean 'head_dim'"),
        (["softmax:rope=maybe"], {}, "softmax: rope must be True or False, got 'maybe'"),
        (["softmax:rope=1,rope=0"], {}, "'rope' comes twice"),
        (["moba:block_size=x"], {}, "moba: block_size must be an int, got 'x'"),
        (["moba:top_k=2.5"], {}, "moba: top_k must be an int, got '2.5'"),
        (["slay:variant=ancor"], {}, "slay: variant must be 'anchor', .*, got 'ancor'; did you mean 'anchor'"),
        (["none:x=1"], {"task": "digits-cnn"}, "'none' leaves the mechanism out and has no options"),
        (["softmax"], {"task": "txt"}, "task must be one of text, recall"),
        (["heavy-hitters"], {"task": "compress"}, "compares caches, not parts"),
        (["softmax"], {"budget": "fast"}, "budget must be quick, standard, long or a positive number"),
        (["softmax"], {"budget": -3}, "budget must be"),
        (["softmax"], {"seed": -1}, "seed must be"),
        (["softmax"], {"seed": [1, 1]}, "seeds must differ"),
        (["softmax"], {"seed": []}, "seed must be"),
        (["softmax"], {"width": 3}, "no setting is called 'width'"),
        (["softmax"], {"dim": 0}, "dim must be an integer of at least 1"),
        (["softmax"], {"lengths": (8, 4)}, "ascending"),
        (["softmax"], {"lengths": 64}, "lengths must be positive integers in ascending order, got 64"),
        (["softmax"], {"lr": 0}, "lr must be a number above 0"),
        (["softmax"], {"task": "recall", "data": ["x"]}, "data files are for task 'text' or 'click'"),
        (["softmax"], {"task": "recall", "pairs": 50}, "length must be at least"),
        (["softmax"], {"length": 10**6}, "the data must have at least"),
        (["cbam"], {}, "'cbam' is a feature-map gate, but task 'text' needs a sequence mechanism; fitting: .*softmax"),
        (["softmax"], {"task": "digits-cnn"}, "needs a feature-map gate; fitting: .*cbam"),
        (["none"], {}, "no baseline without a mechanism"),
        (["softmax"], {"device": "gpu"}, "device 'gpu' cannot be used here"),
        (["softmax"], {"device": "meta"}, "device 'meta' cannot be used here"),
        pytest.param(
            ["softmax"],
            {"device": "cuda"},
            "device 'cuda' cannot be used here .*leave it out",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        ({"mine": 3}, {}, "must be a slug or a constructor, got int"),
    ],
)
def test_bad_requests_are_one_line(mechanisms: object, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        saccade.compare(mechanisms, **arguments)
    assert "\n" not in str(error.value)


def test_user_files_are_the_text(tmp_path) -> None:
    path = tmp_path / "own.txt"
    path.write_bytes(b"abab" * 2000)
    sizes = {**TEXT, "steps": 40, "lr": 1e-2, "lengths": (), "map_length": 0, "decode_tokens": 0}
    result = saccade.compare({"mine": RunningMean}, data=[path], out=tmp_path / "run", **sizes)
    assert result["mine"].quality < 1.5, "two letters are soon known"
    assert result.config["data"][0]["file"] == str(path)
    path.write_bytes(b"abba" * 2000)
    with pytest.raises(ValueError, match=r"data is .* there and"):
        saccade.compare({"mine": RunningMean}, data=[path], out=tmp_path / "run", **sizes)


def test_data_that_are_no_text_are_refused_before_anything_else(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"\x7fELF\0" * 3000)
    for name, message in (
        ("missing", "no data file"),
        ("pipe", "no regular file"),
        ("", "is a folder"),
        ("empty", "is empty"),
        ("binary", "is no text"),
    ):
        with pytest.raises((OSError, ValueError), match=message) as error:
            saccade.compare(["softmax"], data=[tmp_path / name], out=tmp_path / "run")
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    with pytest.raises(OSError, match="no regular file"):
        saccade.compare(["softmax"], data="/dev/zero")


def test_names_that_look_alike_have_folders_of_their_own(tmp_path) -> None:
    pairs = [("a b", "a-b"), ("x:a=1", "x:a=-1"), ("A", "a"), ("..", "."), ("q" * 300, "q" * 301), ("result.json", "")]
    for pair in pairs:
        names = [files.folder_name(name) for name in pair]
        assert len({name.lower() for name in names}) == 2 and all(len(name) < 100 for name in names)
        assert all("/" not in name and name not in ("", ".", "..", "config.json", "result.json") for name in names)
    names = {"a b": "softmax", "a-b": "softmax:num_kv_heads=2", "A-b": RunningMean}
    result = saccade.compare(names, out=tmp_path, **{**TEXT, "lengths": ()})
    assert len({record.parameters for record in result.mechanisms}) == 3
    assert len({record.quality for record in result.mechanisms}) == 3
    loaded = CompareResult.load(tmp_path)
    for name in ("a b", "a-b"):
        assert np.array_equal(loaded[name].maps["layer 0"], result[name].maps["layer 0"])
    assert not np.array_equal(loaded["a b"].maps["layer 0"], loaded["a-b"].maps["layer 0"])


def test_a_folder_of_another_definition_is_not_taken_over(tmp_path) -> None:
    sizes = SMALL
    saccade.compare({"mine": "softmax"}, out=tmp_path / "a", **sizes)
    saccade.compare({"mine": "softmax:num_kv_heads=2"}, out=tmp_path / "b", **sizes)
    (tmp_path / "b" / "result.json").unlink()
    shutil.rmtree(tmp_path / "b" / "mine")
    shutil.copytree(tmp_path / "a" / "mine", tmp_path / "b" / "mine")
    with pytest.raises(ValueError, match=r"another mechanism: mechanism\.options\.num_kv_heads is None there and 2"):
        saccade.compare({"mine": "softmax:num_kv_heads=2"}, out=tmp_path / "b", **sizes)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("softmax:rope=false", {"rope": False}),
        ("softmax:rope=True, qkv_bias=off", {"rope": True, "qkv_bias": False}),
        ("softmax:rope=0,num_kv_heads=1", {"rope": False, "num_kv_heads": 1}),
        ("softmax:num_kv_heads=none,rope_base=1e4", {"num_kv_heads": None, "rope_base": 1e4}),
        ("adaptive-filter:rotation=none", {"rotation": "none"}),
        ("mega:position=none,norm=rms", {"position": None, "norm": "rms"}),
        ("layerwise-shortcuts:depths=all", {"depths": "all"}),
        ("neighborhood:kernel_size=(3, 5),dilation=[1,2]", {"kernel_size": (3, 5), "dilation": [1, 2]}),
        ("cbam:pool_types=('avg',)", {"pool_types": ("avg",)}),
    ],
)
def test_options_are_read_as_their_types(text: str, options: dict[str, object]) -> None:
    (found,) = parse([text])
    assert found.options == options
    assert [type(value) for value in found.options.values()] == [type(value) for value in options.values()]


def test_what_a_killed_run_was_writing_is_swept(tmp_path: Path) -> None:
    quick = {**TEXT, "lengths": (), "map_length": 0}
    saccade.compare(["softmax"], task="text", out=tmp_path, **quick)
    (tmp_path / "result.json").unlink()
    draft = tmp_path / "softmax" / ".checkpoint.safetensors.x.part"
    draft.touch()
    saccade.compare(["softmax"], task="text", out=tmp_path, **quick)
    assert not draft.exists() and (tmp_path / "result.json").is_file()
