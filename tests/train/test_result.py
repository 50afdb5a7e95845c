"""The result object: ranking, table, sentences, and JSON there and back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from saccade import catalogue
from saccade.train.files import folder_name, write_tensors
from saccade.train.result import CompareResult, MechanismRecord, Metric, SeedRecord
from saccade.train.scaling import Fit, ScalingPoint

BITS = Metric("bits_per_byte", "bits per byte", higher_is_better=False)


def record(
    name: str, *qualities: float, speed: float = 1000.0, exponent: float = 1.0, **more: object
) -> MechanismRecord:
    runs = [SeedRecord(seed, quality, {"tokens_per_second": speed}) for seed, quality in enumerate(qualities)]
    points = [ScalingPoint(n, 1e-6 * n, 3e-6 * n**exponent, 100 * n) for n in (64, 128)]
    return MechanismRecord(
        name, name, runs=runs, scaling=points, fits={"seconds": Fit(exponent, 3e-6, 1.0, 64)}, **more
    )


def result(*records: MechanismRecord, metric: Metric = BITS) -> CompareResult:
    config = {"task": "text", "budget": "quick", "seeds": [0]}
    return CompareResult(config, {"cores": 2}, metric, list(records))


def test_ranking_follows_the_metric() -> None:
    records = record("a", 2.5), record("b", 2.1), record("c", 2.9)
    assert [r.name for r in result(*records).ranked] == ["b", "a", "c"]
    accuracy = Metric("accuracy", "accuracy", higher_is_better=True)
    assert [r.name for r in result(*records, metric=accuracy).ranked] == ["c", "a", "b"]
    assert [row["mechanism"] for row in result(*records).rows()] == ["b", "a", "c"]
    assert result(*records)["c"].quality == 2.9
    with pytest.raises(KeyError, match="not compared"):
        result(*records)["d"]


def test_several_seeds_have_a_mean_and_a_spread() -> None:
    several = record("a", 2.0, 2.2, 2.4)
    assert several.quality == pytest.approx(2.2) and several.spread == pytest.approx(0.2)
    assert record("a", 2.0).spread is None
    assert "2.200 ± 0.200" in result(several).table()


def test_the_table_shows_what_was_measured_and_dashes_for_the_rest() -> None:
    decoding = {"tokens_per_second": 321.0, "prompt": 8.0, "tokens": 4.0, "cache_bytes": 64.0}
    table = result(
        record("fast", 2.0, decode=decoding, train_bytes=3 * 2**20, parameters=12345),
        record("sees", 1.0, marks=["future"], notes=["is not causal [really]"]),
    ).table(width=120)
    rows = {line.split()[0]: line for line in table.splitlines()}
    assert "321" in rows["fast"] and "3.0 MB" in rows["fast"] and "12,345" in rows["fast"]
    assert "1.000 *" in rows["sees"] and " - " in rows["sees"]
    assert "sees: is not causal [really]" in table
    assert max(map(len, table.splitlines())) <= 120


def test_the_answer_does_not_tell_apart_what_the_seeds_do_not() -> None:
    clear = " ".join(result(record("a", 2.0, speed=10.0), record("b", 3.0, speed=20.0, exponent=2.0)).answer())
    assert "Best quality: a, 2.000 bits per byte." in clear and "differ" not in clear
    assert "Trains fastest here: b, 20 tokens/s (2.0 x the slowest)" in clear
    assert "slowest with length: a, N^1.00; fastest: b, N^2.00" in clear
    single = " ".join(result(record("a", 2.0), record("b", 2.01)).answer())
    assert "b differs from it by less than 1 %, which one seed cannot tell apart" in single
    within = " ".join(result(record("a", 2.0, 2.4), record("b", 2.1, 2.5)).answer())
    assert "b differs from it within the spread of the seeds" in within
    beyond = " ".join(result(record("a", 2.0, 2.01), record("b", 2.1, 2.11)).answer())
    assert "differs" not in beyond


def with_steps(name: str, quality: float, steps: int, waited: float | None = None) -> MechanismRecord:
    found = record(name, quality)
    found.runs[0].metrics |= {"steps": float(steps)} | ({} if waited is None else {"waited": waited})
    return found


def test_what_was_hardly_trained_or_guesses_ranks_nothing() -> None:
    accuracy = Metric("accuracy", "accuracy", higher_is_better=True, chance=0.12)
    records = [with_steps("few", 0.9, 19), with_steps("guesses", 0.12, 200), with_steps("b", 0.5, 200)]
    found = result(*records, with_steps("a", 0.7, 200), metric=accuracy)
    found.config["least_steps"] = 100
    assert [r.name for r in found.ranked] == ["a", "b", "few", "guesses"]
    assert [row["doubt"] for row in found.rows()] == ["", "", "hardly trained", "at chance"]
    assert [row["steps"] for row in found.rows()] == [200, 200, 19, 200]
    said = " ".join(found.answer())
    assert "Best quality: a, 70.0% accuracy." in said
    assert "Hardly trained, so not ranked: few (19 steps, where at least 100 are needed)" in said
    assert "At chance, so not ranked: guesses (guessing reaches 12.0% accuracy)." in said
    table = found.table(width=200)
    assert "steps" in table and "90.0% (hardly trained)" in table and "12.0% (at chance)" in table
    nothing = result(with_steps("few", 0.9, 1), with_steps("fewer", 0.8, 2), metric=accuracy)
    nothing.config["least_steps"] = 100
    assert nothing.answer()[0].startswith("Hardly trained, so not ranked: few and fewer (1 to 2 steps")
    assert not any("Best" in sentence or "Trains fastest" in sentence for sentence in nothing.answer())


def test_a_busy_machine_is_named() -> None:
    assert result(with_steps("a", 2.0, 200, waited=0.04)).waited == 0.04
    assert not any("busy" in sentence for sentence in result(with_steps("a", 2.0, 200, waited=0.04)).answer())
    assert any(
        "busy: others had the processor up to 45% of the time" in sentence
        for sentence in result(with_steps("a", 2.0, 9, waited=0.45)).answer()
    )


def test_reprs_are_one_short_line() -> None:
    found = result(record("a", 2.0), record("b", 2.1, 2.2))
    assert repr(found) == "CompareResult(text, budget quick, 1 seed: a 2.000, b 2.150 bits per byte)"
    assert repr(found["b"]) == "MechanismRecord('b', quality 2.15, 2 seeds)"
    part = repr(catalogue.part("moba"))
    assert part.startswith("Part('moba', sequence: ") and len(part) < 200


def test_json_there_and_back_with_maps(tmp_path) -> None:
    maps = {"layer 0": np.eye(3, dtype=np.float32)[None]}
    original = result(record("moba:top_k=2", 2.0, 2.1, maps=maps, supports=("causal",)), record("b", 3.0))
    original.save(tmp_path)
    path = tmp_path / "maps" / f"{folder_name('moba:top_k=2')}.safetensors"
    write_tensors(path, {name: torch.tensor(array) for name, array in maps.items()})
    loaded = CompareResult.load(tmp_path)
    assert loaded.to_json() == original.to_json()
    assert loaded.mechanisms[1] == original.mechanisms[1]
    assert np.array_equal(loaded["moba:top_k=2"].maps["layer 0"], maps["layer 0"])
    assert loaded.table() == original.table()


def test_figures_that_are_not_finite_are_null_in_json() -> None:
    data = json.loads(result(record("a", float("inf"))).to_json())
    assert data["mechanisms"][0]["runs"][0]["quality"] is None


def broken(**changes: object) -> str:
    data = json.loads(result(record("a", 2.0)).to_json())
    data["mechanisms"][0] |= changes.pop("mechanism", {})
    return json.dumps(data | changes)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"format": 2}', '{"format": 99}', "\xff", "[" * 100_000, broken(metric=3), broken(mechanisms=[]),
     broken(config=1), broken(mechanism={"runs": 3}), broken(mechanism={"runs": [{"seed": "x"}]}),
     broken(mechanism={"name": 3}), broken(mechanism={"parameters": "x"}), broken(mechanism={"notes": [3]}),
     broken(failed=3)],
)  # fmt: skip
def test_a_file_that_is_no_result_is_a_value_error(tmp_path, content: str) -> None:
    (tmp_path / "result.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"result\.json"):
        CompareResult.load(tmp_path)


def test_a_folder_without_a_result_is_an_os_error(tmp_path) -> None:
    with pytest.raises(OSError, match="no finished comparison"):
        CompareResult.load(tmp_path)


def test_the_figure_has_four_panels_and_can_be_saved(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    figure = result(record("a", 2.0), record("b", 3.0, 3.1)).plot(tmp_path / "summary.png")
    assert len(figure.axes) == 4
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")
