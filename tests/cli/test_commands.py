from __future__ import annotations

import io
import json
import re
import subprocess
import sys

import pytest

from saccade.cli import main
from saccade.train.tasks import Text


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(exit_.value.code or 0), out, err


def test_list_knows_every_paper(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "list", "--json")
    rows = json.loads(out)
    assert code == 0 and len(rows) == 120
    assert {"moba", "softmax"} <= {row["slug"] for row in rows}


def test_list_filters(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "list", "--kind", "gate", "--json")
    assert "cbam" in {row["slug"] for row in json.loads(out)}
    assert {row["kind"] for row in json.loads(out)} == {"gate"}
    code, out, _ = run(capsys, "list", "--taxonomy", "--ready")
    assert code == 0 and "softm" in out
    _, out, _ = run(capsys, "list", "--family", "sparse", "--json")
    assert {row["family"] for row in json.loads(out)} == {"sequence: sparse"}
    _, out, _ = run(capsys, "list", "--family", "baseline")
    assert "softmax" in out and "moba" not in out
    code, out, _ = run(capsys, "list", "--tree")
    assert code == 0 and "- moba" in out
    _, out, _ = run(capsys, "list", "--tree", "--json")
    assert {"moba"} <= {slug for row in json.loads(out) for slug in row["parts"]}


def test_show_ready_and_planned(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "show", "cbam", "--no-cost", "--json")
    card = json.loads(out)
    assert card["state"] == "ready" and card["invariants"] and card["equal to the authors' code"]
    code, out, _ = run(capsys, "show", "loftr")
    assert code == 0 and "2104.00680" in out


def test_plan_reads_masks_without_running_them(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "--shape", "1,4,4096,64", "--mask", "causal & window(256)", "--json")
    forecast = json.loads(out)
    assert code == 0 and 0 < forecast["density"] < 0.2 and forecast["backend"] == "blocksparse"
    code, out, _ = run(capsys, "plan", "--mask", "neighborhood((64, 64), 13)", "--picture")
    assert (code == 0 and "#" in out.replace("#", "", 0)) or "+" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("lst",),
        ("list", "--knd", "gate"),
        ("show",),
        ("plan", "--keys", "many"),
        ("show", "sofmax"),
        ("list", "--family", "no such family"),
        ("list", "--kind", "foo"),
        ("list", "--supports", "everything"),
        ("plan", "--shape", "1,2"),
        ("plan", "--mask", "__import__('os').system('true')"),
        ("plan", "--mask", "causal &"),
        ("plan", "--mask", "causl"),
        ("plan", "--mask", "window('a')"),
        ("plan", "--mask", "window(1.5)"),
        ("plan", "--mask", "window(3, foo=2)"),
        ("plan", "--mask", "causal(offset=2**9)"),
        ("plan", "--mask", "prefix(4, 5, 6)"),
        ("plan", "--mask", "neighborhood(8)"),
        ("plan", "--mask", "neighborhood((), ())"),
        ("plan", "--mask", "~" * 20_000 + "causal"),
        ("plan", "--mask", "~" * 900 + "causal("),
        ("plan", "--keys", "-3"),
        ("plan", "--kv-heads", "0"),
        ("plan", "--kv-heads", "3"),
        ("plan", "--shape", "99999,99999,99999,99999"),
        ("plan", "--device", "mps"),
        ("plan", "--dtype", "int7"),
        ("plan", "--normalize", "hardmax"),
        ("plan", "--backend", "magic"),
        ("bench", "cbam"),
        ("bench", "softmax", "--lengths", "0"),
        ("claim",),
        ("claim", "softmax", "--all"),
        ("claim", "--missing"),
        ("claim", "softmax", "--smoke", "--out", "somewhere"),
        ("claim", "--long"),
        ("claim", "moba", "--model", "smollm2", "--long"),
        ("claim", "moba", "--model", "no-such-model"),
        ("claim", "moba", "--model", "vit-s14"),
        ("claim", "lightning", "--model", "smollm2"),
        ("compare", "softmax", "--task", "nonsense"),
        ("compare", "no-such-part"),
        ("compare", "softmax:no_such_option=1"),
        ("compare", "moba:block_size=small"),
        ("gallery", "cbam:no_such_option=1"),
        ("insert", ".", "--gate", "cbam:no_such_option=1", "--after", "x"),
        ("insert", ".", "--gate", "moba", "--after", "x"),
        ("advise", "--shape", "1,2,64,8", "--mechanism", "mobba"),
        ("compare", "cbam", "--task", "text"),
        ("compare", "softmax", "--budget", "soon"),
        ("compare", "softmax", "--data", "/no/such/file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str], tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert not any("no_such_option" in argument for argument in arguments) or "has no option" in err
    assert err.startswith("saccade: ") and err.count("\n") == 1 and "Traceback" not in err
    assert not re.search(r"\w*Error: |ast\.|__init__|positional argument", err.partition("takes")[0]), err
    assert not list(tmp_path.rglob("*.html"))


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="did you mean 'softmax'"):
        main(["show", "sofmax", "--debug"])


@pytest.mark.parametrize(
    "arguments", [("list", "--taxonomy", "--ready"), ("list", "--supports", "decoding"), ("show", "moba", "--no-cost")]
)
@pytest.mark.parametrize("columns", ["30", "60", "80", "200"])
def test_names_are_whole_at_any_width(
    arguments: tuple[str, ...], columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    _, out, _ = run(capsys, *arguments)
    wanted = {"moba", "2502.13189"} | ({"grouped-heads"} if "show" in arguments else {"neighborhood", "a-vl"})
    assert wanted <= set(out.split()) and "…" not in out
    assert max(map(len, out.splitlines())) <= max(int(columns), 80)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("list", "--tree"),
        ("show", "fast", "--no-cost"),
        ("plan", "--shape", "1,1,64,8", "--mask", "causal", "--picture"),
        ("show", "日本"),
    ],
)
def test_no_encoding_of_the_output_ends_a_command(
    arguments: tuple[str, ...], encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    texts = [stream.buffer.getvalue().decode(encoding) for stream in streams if not stream.flush()]
    assert exit_.value.code == (2 if "日本" in arguments else 0) and "Unicode" not in "".join(texts)
    assert texts[1].count("\n") == 1 if exit_.value.code else texts[0]


def test_bench_measures(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "bench", "softmax", "--lengths", "32,64", "--dim", "32", "--json")
    rows = json.loads(out)["rows"]
    assert code == 0 and [row["length"] for row in rows] == [32, 64]
    assert all(row["forward"] > 0 and row["memory"] > 0 for row in rows)


def test_module_runs_as_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "saccade", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("saccade ")


def test_several_data_files_may_follow_one_option(tmp_path) -> None:
    from saccade.cli import _repeat_data

    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.touch(), b.touch()
    given = ["compare", "softmax", "--data", str(a), str(b), "moba", "--json"]
    assert _repeat_data(given) == ["compare", "softmax", "--data", str(a), "--data", str(b), "moba", "--json"]
    assert _repeat_data(["compare", "softmax"]) == ["compare", "softmax"]


@pytest.fixture
def small_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick budget of `text`, at sizes of a test."""
    small = {"dim": 16, "layers": 1, "length": 32, "batch": 4, "evaluation_size": 8, "lengths": (32, 64)}
    quick = Text.budgets["quick"].changed({**small, "sweep_seconds": 0.01, "decode_tokens": 4, "map_length": 16})
    monkeypatch.setitem(Text.budgets, "quick", quick)


@pytest.mark.usefixtures("small_text")
def test_compare_writes_a_report_and_prints_json(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    code, out, _ = run(
        capsys, "compare", "softmax", "--budget", "0.1", "--data", str(text), "--out", str(tmp_path / "run"), "--json"
    )
    assert code == 0 and json.loads(out)["mechanisms"][0]["name"] == "softmax"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "softmax" in page and page.count("<img ") == len(list((tmp_path / "run").glob("*.png")))


@pytest.mark.usefixtures("small_text")
@pytest.mark.parametrize("as_json", [False, True])
def test_what_was_measured_is_shown_before_anything_is_drawn(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path, as_json: bool
) -> None:
    def failing(*given: object) -> None:
        raise RuntimeError("no such font")

    monkeypatch.setattr("saccade.report.html.write_report", failing)
    text = tmp_path / "own.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    arguments = ["compare", "softmax", "--budget", "0.1", "--data", str(text), "--out", str(tmp_path / "run")]
    code, out, err = run(capsys, *arguments, *(["--json"] if as_json else []))
    assert code == 0 and "no report" in err and "no such font" in err
    if as_json:
        assert json.loads(out)["mechanisms"][0]["name"] == "softmax"
    else:
        assert "softmax" in out and "bits per byte" in out


def test_claims_are_written_one_by_one_and_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    from saccade.train import claims

    ran: list[str] = []

    def run_claim(slug: str, bench: claims.Lab) -> claims.Outcome:
        if len(ran) == 1 and slug == "moba" and not bench.smoke:
            raise KeyboardInterrupt
        ran.append(slug)
        shows = slug != "mra" or bench.scale > 1
        figures = {"speedup": 2.5}
        return claims.Outcome(
            slug, "A title", "fast", "2 x", figures, shows, "", 3.0, bench.smoke, 0, scale=bench.scale
        )

    monkeypatch.setattr(claims, "run_claim", run_claim)
    code, out, err = run(capsys, "claim", "softmax", "moba", "--out", str(tmp_path))
    assert code == 130 and "stopped" in err and "softmax: shows" in out
    assert [found["slug"] for found in json.loads((tmp_path / "claims.json").read_text())] == ["softmax"]
    ran += ["counted"]
    code, out, _ = run(capsys, "claim", "softmax", "moba", "--missing", "--out", str(tmp_path), "--json")
    assert code == 0 and [found["slug"] for found in json.loads(out)] == ["moba"]
    before = (tmp_path / "claims.json").read_text()
    code, out, _ = run(capsys, "claim", "softmax", "mra", "--missing", "--smoke", "--out", str(tmp_path))
    assert code == 0 and "mra: smoke run, no verdict" in out and "softmax" not in out
    assert (tmp_path / "claims.json").read_text() == before
    assert run(capsys, "claim", "softmax", "--missing", "--out", str(tmp_path))[1].endswith("has all of them already\n")
    assert json.loads(run(capsys, "claim", "softmax", "--missing", "--out", str(tmp_path), "--json")[1]) == []

    # those that do not show, ten times as long, beside their own line
    assert "does NOT show" in run(capsys, "claim", "mra", "--out", str(tmp_path))[1]
    code, out, _ = run(capsys, "claim", "--long", "--out", str(tmp_path))
    assert code == 0 and "mra with 10 times the steps: shows" in out and "softmax" not in out
    found = json.loads((tmp_path / "claims.json").read_text())
    assert [(line["slug"], line["scale"]) for line in found[-2:]] == [("mra", 1), ("mra", 10)] and len(found) == 4
    page = (tmp_path / "claims.md").read_text()
    assert "2 of 3 show." in page and "of those that do not: 1 of 1 show." in page and "### With 10 times" in page
    assert run(capsys, "claim", "--long", "--missing", "--out", str(tmp_path))[1].endswith("all of them already\n")
