"""Benchmarks at the size of a test: what they compare agrees, what they change is as before, a page is written."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from saccade.bench import records
from saccade.models.smaformer import modulator
from saccade.ops.attend import attend
from saccade.ops.native import build


def load(name: str) -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def dense() -> ModuleType:
    return load("dense")


def test_networks_are_plain_for_a_while(dense: ModuleType) -> None:
    before = build._outcome
    with dense.plainly():
        assert modulator.attend is dense.plain_attend
        assert build._outcome[0] is None
    assert modulator.attend is attend and build._outcome is before


def test_plain_attention_is_attention(dense: ModuleType) -> None:
    q, k, v = torch.randn(3, 1, 2, 7, 8).unbind()
    mask = torch.rand(1, 2, 7, 7) > 0.3
    mask[..., 0] = True
    for options in ({}, {"scale": 0.2}, {"mask": mask}):
        torch.testing.assert_close(dense.plain_attend(q, k, v, **options), attend(q, k, v, **options))


def test_a_network_against_itself_and_its_page(dense: ModuleType) -> None:
    case = dense.Network(48, inputs=dense.images(1, 1), large=56)
    row, large = dense.network_row("fsatfusion", case, quick=True), dense.memory_row("fsatfusion", case)
    assert row["speedup"] > 0 and large["bytes"] > 0 and row["shapes"] == "1x1x48x48, 1x1x48x48"
    kept = {"fsatfusion": records.stamp() | row, "memory of fsatfusion": records.stamp() | large}
    (verdict,) = dense.verdicts(kept)
    assert verdict.wanted == dense.LEAST and verdict.got == row["speedup"]
    page = records.page("Title", "command", "about", kept, ["others"], [verdict], dense.sections(kept))
    assert "| fsatfusion | 1x1x48x48, 1x1x48x48 |" in page and "Not measured in this record: others." in page


def test_the_slope_of_a_square_is_two(dense: ModuleType) -> None:
    assert dense.fit_power([1, 2, 4, 8], [3.0, 12.0, 48.0, 192.0]).exponent == pytest.approx(2.0)


@pytest.mark.parametrize("case", ["coarse matching", "global matching"])
def test_matching_against_the_matrix_and_its_page(case: str) -> None:
    geometry = load("geometry")
    row = geometry.CASES[case](True)
    assert row["speedup"] > 0 and row["bytes"] > 0 and row["cells"] == 12 * 16
    kept = {case: records.stamp() | row}
    speed, memory = geometry.verdicts(kept)
    assert speed.got == row["speedup"] and memory.met
    page = records.page("Title", "command", "about", kept, ["others"], [speed, memory], geometry.sections(kept))
    assert f"| {case} | 192 |" in page


def test_adem_vl_beside_cross_attention_and_its_page() -> None:
    benchmark = load("language_vision")
    row = benchmark.CASES["adem-vl"](True)
    assert row["kept_bytes"] * benchmark.BLOCKS == row["cross_kept_bytes"]
    kept = {"adem-vl": records.stamp() | row}
    fast, small, *_ = benchmark.verdicts(kept)
    assert fast.got == row["prompt_speedup"] and small.met
    assert "| prompt |" in records.page("Title", "command", "about", kept, [], [fast], benchmark.sections(kept))


def test_wrappers_beside_the_bare_model() -> None:
    """Quick, of a tiny model: figures of each case, and a page; what they are is no test's concern."""
    pytest.importorskip("transformers")
    bench = load("language_vision")
    names = ["token-compression", *(f"overhead of {name}" for name in bench.WRAPPERS)]
    kept = {name: records.stamp() | bench.CASES[name](True) for name in names}
    half = kept["token-compression"]["spatial 0.25"]
    assert half["bytes"] * (64 + 8) == half["plain_bytes"] * (16 + 8) and half["seconds"] > 0
    assert all(kept[name]["plain_seconds"] != 0 for name in names[1:])
    assert len(bench.verdicts(kept)) == 5
    page = records.page("Title", "command", "about", kept, [], bench.verdicts(kept), bench.sections(kept))
    assert "| cluster | 11% |" in page and "| carve |" in page


def test_what_looking_inside_costs() -> None:
    pytest.importorskip("transformers")
    bench = load("explain")
    kept = {name: records.stamp() | bench.CASES[name](True) for name in bench.CASES}
    assert kept["maps"]["seconds"] > 0 and set(kept["maps"]["maps"]) >= {"raw", "rollout", "gradient x attention"}
    assert kept["circuit"]["seconds"] > 0 and kept["circuit"]["layers"] == 2
    assert kept["tensorlens"]["error"] < 1e-4 and kept["tensorlens"]["one_bytes"][1] <= kept["tensorlens"]["bytes"][1]
    assert len(bench.verdicts(kept)) == 5
    page = records.page("Title", "command", "about", kept, [], bench.verdicts(kept), bench.sections(kept))
    assert "TensorLens" in page and "| 64 | 2 |" in page and "| rollout |" in page and "| 256 |" in page
    assert "| rollout |" in page and "| 256 |" in page


def test_what_wrappers_do_to_a_model_that_sees() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("skimage")
    bench = load("seeing")
    kept = {name: records.stamp() | case(True) for name, case in bench.CASES.items()}
    assert all(0 <= kept[name][kind] <= 1 for name in ("bare", "agla", "carve") for kind in bench.KINDS)
    assert kept["agla"]["positions"] > 0 and kept["token-compression"].keys() >= {"cluster 0.5", "cluster 0.25"}
    assert kept["dream"]["with features: same"] == kept["dream"]["without: same"] == 1.0
    page = records.page("Title", "command", "about", kept, [], bench.verdicts(kept), bench.sections(kept))
    assert "| agla |" in page and "| cluster 0.5 |" in page and "| without |" in page


def test_the_table_of_a_device_at_a_tiny_size(tmp_path: Path) -> None:
    bench = load("device")
    size = ["--lengths", "64,160", "--heads", "2", "--width", "16"]
    assert bench.main(["--device", "cpu", *size, "--only", "table", "--out", str(tmp_path)]) == 0
    kept = json.loads((tmp_path / "speed-cpu.json").read_text("utf-8"))
    assert kept.keys() == {"peak", *(f"{name}, {tokens}" for name in bench.CASES for tokens in (64, 160))}
    for name in bench.CASES:
        row = kept[f"{name}, 160"]
        assert min(row[way][figure] for way in ("saccade", "flash") for figure in ("forward", "both")) > 0
        assert row["forward_bytes"] * row["saccade"]["forward"] == pytest.approx(4 * 2 * 160 * 2 * 16)
        assert "refused" in row["flex"]
    causal = 2 * 160 * 161 / 2 * 4 * 16  # the window is wider than the sequence
    assert kept["window, 160"]["forward_flops"] * kept["window, 160"]["saccade"]["forward"] == pytest.approx(causal)
    page = (tmp_path / "speed-cpu.md").read_text("utf-8")
    assert "| moba |" in page and "measured here" in page and "- lightning, flex: no softmax" in page


def test_a_spent_clock_leaves_the_table_out_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = load("device")
    assert (
        bench.main(
            ["window", "--device", "cpu", "--lengths", "8", "--minutes", "0", "--only", "table", "--out", str(tmp_path)]
        )
        == 0
    )
    assert "window, 8, saccade: no time left" in capsys.readouterr().out
    assert "Not measured in this record: block-sparse, 8; window, 8" in (tmp_path / "speed-cpu.md").read_text("utf-8")


def test_a_measurement_that_fails_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load("device")
    size, log = bench.Size(8, 1, 16, torch.device("cpu")), tmp_path / "table.txt"
    apart = bench.Bench(log)
    try:
        found = apart.measure("no such case", size, "flash", 100)
        assert found == {"tokens": 8, "heads": 1, "width": 16, "flash": {"refused": "KeyError: 'no such case'"}}
        assert "Traceback" in log.read_text("utf-8") and apart.process is None
        assert apart.measure("window", size, "flash", 0.0)["flash"] == {"refused": "stopped after 0 s"}
        assert apart.measure("window", size, "flash", 100)["flash"]["both"] > 0
        first = apart.process
        assert apart.measure("moba", size, "saccade", 100)["both_flops"] > 0 and apart.process is first
        apart.close()
        (tmp_path / "dies.py").write_text("raise SystemExit(3)")
        monkeypatch.setattr(bench, "__file__", str(tmp_path / "dies.py"))
        assert apart.measure("window", size, "flash", 100)["flash"] == {"refused": "its process ended with 3"}
    finally:
        apart.close()


def test_how_the_tests_on_a_device_went(tmp_path: Path) -> None:
    bench = load("device")
    done = bench.run_tests("cpu", tmp_path / "log.txt", 100, ["tests/ops/test_devices.py", "-k", "wkv and float64"])
    assert done["whole"] and (done["passed"], done["failed"], done["failures"]) == (2, 0, []), done
    kept = {"tests": records.stamp() | done | {"failed": 1, "failures": ["tests/a.py::test_x"], "whole": False}}
    assert not bench.verdicts(kept)[0].met and "cut off" in bench.sections(kept)["Tests"][0]


@pytest.mark.slow
@pytest.mark.parametrize("cores", [1, 4])
def test_what_a_test_does_to_its_process_or_device_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    """One that fails, two that end their processes, one of which passes first, one that hangs, and a file that cannot
    be read; each of the others runs once."""
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser):\n    parser.addoption('--device')\n")
    (tmp_path / "test_broken.py").write_text("import not_installed\n")
    (tmp_path / "test_some.py").write_text(
        """
import os, pathlib, sys, time, pytest
from types import SimpleNamespace

@pytest.fixture(autouse=True)
def once(request):
    (pathlib.Path(__file__).parent / f"ran {request.node.name}").touch(exist_ok=False)

def ruined():
    raise RuntimeError("CUDA error: an illegal memory access was encountered\\nand more")

def test_first(): pass
def test_fails(): assert False
def test_ruins():
    sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True, synchronize=ruined))
def test_second(): pass
def test_ends(): os._exit(3)
def test_hangs(): time.sleep(1000)
def test_third(): pytest.skip("not here")
def test_fourth(): pass
"""
    )
    bench = load("device")
    import device_tests

    monkeypatch.setattr(device_tests, "STALLED", 8.0)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)  # with workers, where xdist is installed, or without
    heard: list[dict[str, int]] = []
    done = bench.run_tests("cpu", tmp_path / "log.txt", 200, [str(tmp_path)], told=heard.append)
    assert done["whole"] and (done["passed"], done["skipped"], done["failed"]) == (3, 1, 5), done
    here = [failure.rpartition("::")[2] for failure in done["failures"]]
    assert here[1].startswith("test_ends: its process ended") and here[2] == "test_fails"
    assert here[3:] == [
        "test_hangs: stopped after 8 s without a word",
        "test_ruins: left the device in ruins: CUDA error: an illegal memory access was encountered",
    ]
    assert "test_broken" in here[0] and heard and not any(counts["whole"] for counts in heard)


@pytest.mark.slow
def test_tests_that_never_end_are_cut_off(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser):\n    parser.addoption('--device')\n")
    (tmp_path / "test_long.py").write_text("import time\ndef test_first(): pass\ndef test_long(): time.sleep(1000)\n")
    done = load("device").run_tests("cpu", tmp_path / "log.txt", 15, [str(tmp_path)])
    assert (done["whole"], done["ended"]) == (False, "their time was spent") and done["seconds"] < 40
    assert (done["passed"], done["failed"]) == (1, 0)


def test_what_was_measured_before_a_measurement_hung_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward is done, then nothing comes any more; the same at a longer length is not tried."""
    bench = load("device")
    (tmp_path / "hangs.py").write_text(
        "import sys, time\n"
        "from multiprocessing.connection import Connection\n"
        "pipe = Connection(int(sys.argv[2]))\n"
        "pipe.recv()\n"
        "pipe.send(({'saccade': {'forward': 2.0}, 'forward_flops': 1e9, 'forward_bytes': 1e9}, None, True))\n"
        "time.sleep(1000)\n"
    )
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "hangs.py"))
    monkeypatch.setattr(bench, "LONGEST", 5.0)
    monkeypatch.setattr(bench, "ROUNDS", (("saccade",),))
    given = ["window", "--device", "cpu", "--lengths", "8,16", "--only", "table", "--out", str(tmp_path)]
    assert bench.main(given) == 0
    kept = json.loads((tmp_path / "speed-cpu.json").read_text("utf-8"))
    assert kept["window, 8"]["saccade"] == {"forward": 2.0, "refused": "stopped after 5 s"}
    assert "window, 16" not in kept and kept["peak"]["refused"] == "stopped after 5 s"
    page = (tmp_path / "speed-cpu.md").read_text("utf-8")
    assert "| 2000.00 | 0.00 |" in page and "- window, 8, saccade: stopped after 5 s" in page


def test_a_card_is_known_by_its_name() -> None:
    bench = load("device")
    named = {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA H100 PCIe": "H100 PCIe", "NVIDIA L40S": "L40S", "NVIDIA L4": "L4"}
    assert {name: bench.card(name) for name in named} == named
    assert bench.card("NVIDIA A10") is None and all(flops > 0 < moved for flops, moved, _ in bench.PEAKS.values())


def test_what_conversion_costs_and_gives() -> None:
    pytest.importorskip("transformers")
    bench = load("convert")
    kept = {name: records.stamp() | case(True) for name, case in bench.CASES.items()}
    assert kept["layers"]["half"] == 2 and len(kept["layers"]["order"]) == 4
    for slug in bench.WAYS:
        row = kept[slug]
        assert row["steps"] == 4 and row["layers"] == sorted(kept["layers"]["order"][:2])
        assert all(row[state] > 1 for state in bench.STATES) and row["dropped"] != row["before"]
        old, new = row["decoding"]
        assert old["tokens"] == 64 and min(old["seconds"], new["seconds"], old["prefill"]) > 0
    # four layers of 2 key heads of 4 channels in float32; of two, states (8, 4) of 4 heads, and 4 bytes a token
    half = 2 * 2 * 2 * 4 * 4 * 64
    assert kept["lightning"]["decoding"][0]["cache_bytes"] == 2 * half
    assert kept["lightning"]["decoding"][1]["cache_bytes"] == half + 2 * 4 * 8 * 4 * 4 + 2 * 4 * 64
    page = records.page("Title", "command", "about", kept, [], bench.verdicts(kept), bench.sections(kept))
    assert "| untrained |" in page and page.count("| half of the layers left out |") == len(bench.WAYS)
