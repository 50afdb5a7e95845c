"""The task of clicks: generated rows, logs from files, its scores."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import saccade
from saccade.models.click import ClickNetwork, ClickOutput, FieldTable, FirstOrder, Interaction
from saccade.train.arguments import task_of
from saccade.train.data import Market, read_log
from saccade.train.entries import Entry
from saccade.train.metrics.clicks import auc, group_auc, log_loss, mixed
from saccade.train.tasks.click import Click
from saccade.train.tasks.settings import Settings

pytest.importorskip("sklearn")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Plain(ClickNetwork):
    def __init__(self, fields: tuple[int, ...], numeric: int = 0, form: str = "fm") -> None:
        super().__init__()
        self.table, self.first = FieldTable(fields, 4), FirstOrder(fields)
        self.interaction = Interaction(len(fields), 4, form, hidden=(16,))
        self.numbers = nn.Linear(numeric, 1)

    def forward(self, ids: Tensor, numbers: Tensor | None = None) -> ClickOutput:
        e = self.table(ids)
        return ClickOutput(self.interaction(e) + self.first(ids) + self.numbers(numbers)[:, 0], e)

    def stored(self) -> int:
        return self.table.weight.numel()


@pytest.fixture(scope="module")
def task() -> Click:
    return Click(Settings(length=8, batch=64, steps=2, evaluation_size=2048), torch.device("cpu"))


def test_scores_by_hand() -> None:
    score, label = torch.tensor([0.9, 0.2, 0.6, 0.1, 0.5]), torch.tensor([1, 0, 0, 1, 1])
    assert auc(score, label) == pytest.approx(3 / 6)
    groups = torch.tensor([0, 0, 1, 1, 2])
    assert group_auc(score, label, groups) == pytest.approx(0.5)
    assert group_auc(score, label, torch.tensor([0, 0, 0, 1, 2])) == 1.0
    assert [rows.tolist() for rows in mixed(label, groups)] == [[0, 1], [2, 3]]
    expected = -(math.log(0.9) + math.log(0.8) + math.log(0.4) + math.log(0.1) + math.log(0.5)) / 5
    assert log_loss(score, label) == pytest.approx(expected)
    for bad, message in (
        (lambda: auc(score, torch.ones(5)), "with a click and rows without"),
        (lambda: auc(score, label[:3]), r"must be \(rows,\)"),
        (lambda: auc(score, label + 1), "labels must be 0 or 1"),
        (lambda: auc(score / 0, label), "scores must be finite"),
        (lambda: group_auc(score, label, torch.arange(5)), "a group that has"),
        (lambda: group_auc(score, label, groups[:2]), "groups must be"),
        (lambda: log_loss(score + 1, label), r"in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


def test_rows_follow_from_their_generator_and_clicks_from_the_logit() -> None:
    market = Market(8)
    first, again = (market.drawn(20_000, generator()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert (first.ids.amax(0) < torch.tensor(market.fields)).all() and first.ids.min() == 0
    chance = market.logit(first.ids, first.numbers).sigmoid()
    for low, high in ((0.1, 0.2), (0.45, 0.55), (0.8, 0.9)):
        rows = (chance >= low) & (chance < high)
        assert abs(float(first.labels[rows].mean()) - float(chance[rows].mean())) < 4 / (2 * float(rows.sum()) ** 0.5)
    noise = first.ids.clone()
    noise[:, market.said :] = 0
    assert torch.equal(market.logit(noise, first.numbers), market.logit(first.ids, first.numbers))


def test_the_memorised_pair_has_no_say_alone() -> None:
    market = Market(8, cross=3.0)
    i, j = market.crossed
    ids, numbers = torch.zeros(market.fields[j], 8, dtype=torch.long), torch.zeros(market.fields[j], 1)
    ids[:, j] = torch.arange(market.fields[j])
    said = market.logit(ids, numbers)
    assert len(said.unique()) == 2 and float(said.max() - said.min()) == pytest.approx(6.0, abs=1e-4) and i == j - 1


def test_figures_lie_between_chance_and_the_ceiling(task: Click) -> None:
    torch.manual_seed(0)
    model = Plain(**task.arguments(Entry("plain", None)))
    optimiser = torch.optim.Adam(model.parameters(), 0.02)
    for step in range(60):
        optimiser.zero_grad()
        task.loss(model, task.batch(0, step)).backward()
        optimiser.step()
    found = task.figures(model)
    assert set(found) == {"auc", "gauc", "log_loss", "kib", "ceiling"}
    assert 0.52 < found["auc"] < found["ceiling"] < 1 and found["auc"] == task.quality(model)
    assert found["kib"] == sum(task.fields) * 4 * 4 / 1024
    pictures = task.pictures(model)
    i, j = task.market.crossed
    assert {name: tuple(x.shape) for name, x in pictures.items()} == {
        name: (1, task.fields[i], task.fields[j], 3) for name in ("planted", "found")
    }
    assert [tuple(x.shape) for x in task.part_inputs(9)] == [(9, 8), (9, 1)]
    assert torch.equal(task.batch(0, 3)[0], task.batch(0, 3)[0]) and task.tokens_per_step == 64


def test_criteos_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "day_0.txt"
    lines = []
    for row in range(40):
        numbers = ["" if column == 3 and row % 2 else str(row * column) for column in range(13)]
        names = [f"{row % 5:08x}", "", f"{row:08x}", *["68fd1e64"] * 23]
        lines.append("\t".join([str(row % 3 % 2), *numbers, *names]))
    path.write_text("\n".join(lines) + "\n")
    log = read_log([path])
    assert log.learn.ids.shape == (36, 26) and log.judge.ids.shape == (4, 26)
    assert log.learn.numbers.shape == (36, 13) and log.names[:2] == ("c1", "c2")
    assert log.fields[:4] == (6, 1, 1, 2)  # five values and the rare; none; all rare; one
    assert (log.learn.ids[:, 1] == -1).all() and (log.learn.ids[:, 2] == 0).all()
    assert log.learn.labels[:4].tolist() == [0, 1, 0, 0]
    spread = log.learn.numbers[:, 1]
    assert abs(float(spread.mean())) < 1e-5 and float(spread.std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert not log.learn.numbers[1::2, 3].any() and log.learn.numbers[:, 0].isfinite().all()


def test_named_tables_are_read_and_compared_on(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    rows = [f"{row % 7 % 2},{'ab'[row % 2]},u{row % 4},{row / 3:.3f}" for row in range(60)]
    path.write_text("click,site,user_id,price\n" + "\n".join(rows))
    task = task_of("click", "quick", {"batch": 8, "evaluation_size": 6}, torch.device("cpu"), str(path))
    assert isinstance(task, Click) and task.fields == (3, 5) and task.user == 1
    assert task.arguments(Entry("x", None)) == {"fields": (3, 5), "numeric": 1}
    found = task.figures(Plain((3, 5), 1))
    assert "ceiling" not in found and 0 <= found["auc"] <= 1 and task.pictures(Plain((3, 5), 1)) == {}
    result = saccade.compare(
        {"plain": Plain}, task="click", data=[path], steps=2, batch=8, evaluation_size=6, lengths=(4, 8), map_length=0,
        sweep_seconds=0.01, evaluations=1,
    )  # fmt: skip
    assert result.metric.name == "auc" and [p.length for p in result["plain"].scaling] == [4, 8]


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for text, message in (
        ("", "has no rows"),
        ("a,b\n1,2\n", "must have a line of names with 'click' or 'label', or be Criteo's"),
        ("click,a\n1,2\n1\n", "row 2 must have 2 columns, got 1"),
        ("click,a\n1,2\n", "at least 20 rows, got 1"),
        ("click,a\n" + "2,x\n" * 20, "labels must be 0 or 1, got '2'"),
        ("click,i1\n" + "1,2\n" * 20, "must have a column of categories"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_log([path])
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no text in UTF-8"):
        read_log([path])
    with pytest.raises(OSError):
        read_log([tmp_path / "none"])
    with pytest.raises(ValueError, match="four fields"):
        Market(3)
    with pytest.raises(ValueError, match="sizes must be those of 4 fields"):
        Market(4, sizes=(1, 2))
