"""Will it be clicked? Rows of categories and numbers whose reasons are known, or the caller's own logs.

Shape letters: B rows, F fields, M numbers, I, J values of the memorised pair.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from saccade.models.click import ClickNetwork, ClickOutput, click_loss
from saccade.train.data import rows
from saccade.train.data.clicks import Clicks, Log, Market, read_log
from saccade.train.entries import Entry
from saccade.train.metrics import clicks as measures
from saccade.train.result import Metric
from saccade.train.tasks.base import Task
from saccade.train.tasks.network import NetworkTask
from saccade.train.tasks.settings import Settings

#: rows of a generated log that are learned from; more would make selection needless
_LOG = 160_000


class Click(NetworkTask):
    """Which rows are clicked? Quality is the AUC; gAUC over users, log loss and `kib` of embeddings stand beside it.

    A network is told `fields`, the numbers of values of all fields, and `numeric`, how many numbers a row has. Rows
    come from a generated log of a `Market` of `length` fields, again and again, as those of real logs do; what is
    judged on is new. `ceiling` is the AUC of the logit by which clicks were drawn; of files there is none, and the
    users of gAUC are the field whose name begins with "user", or the first.

    Args:
        settings: the sizes; `length` is the number of fields of generated rows.
        device: where models and batches are.
        log: of the caller's files.

    Raises:
        ValueError: if `length` is below 4.
        ImportError: if scikit-learn is not installed.
    """

    name = "click"
    metric = Metric("auc", "AUC", higher_is_better=True)
    inputs = ("ids", "numbers")
    files = "tables of clicks (Criteo's, or with a line of names)"
    budgets = {
        "quick": Settings(length=20, batch=512, steps=300, lr=3e-3, lengths=(256, 1024, 4096), evaluation_size=8192),
        "standard": Settings(
            length=20, batch=1024, steps=2000, lr=2e-3, lengths=(256, 1024, 4096), evaluation_size=16384
        ),
        "long": Settings(length=40, batch=4096, steps=10000, lr=1e-3, lengths=(256, 1024, 4096), evaluation_size=32768),
    }

    def __init__(self, settings: Settings, device: torch.device, log: Log | None = None) -> None:
        Task.__init__(self, settings, device)
        self.log = log
        self.market = Market(settings.length) if log is None else None

    @classmethod
    def on_files(cls, settings: Settings, device: torch.device, data: Any) -> Click:
        return cls(settings, device, read_log([data] if isinstance(data, str) else data))

    @property
    def fields(self) -> tuple[int, ...]:
        """How many values each field has."""
        if self.log is not None:
            return self.log.fields
        assert self.market is not None
        return self.market.fields

    @property
    def user(self) -> int:
        """The field by which rows are grouped."""
        names = () if self.log is None else self.log.names
        return next((i for i, name in enumerate(names) if name.startswith("user")), 0)

    @cached_property
    def learned(self) -> Clicks:
        """What is learned from."""
        if self.log is not None:
            return self.log.learn
        assert self.market is not None
        return self.market.drawn(_LOG, torch.Generator().manual_seed(1))

    def arguments(self, mechanism: Entry) -> dict[str, Any]:
        return {"fields": self.fields, "numeric": self.learned.numbers.shape[1]}

    def part_inputs(self, length: int) -> tuple[Any, ...]:
        """So many rows."""
        return self.to_device(rows(length, torch.Generator().manual_seed(0), *self.learned)[:-1])

    def drawn(self, count: int, generator: torch.Generator, judge: bool = False) -> tuple[Tensor, ...]:
        """So many rows (`Clicks`): of what is learned from, or new ones."""
        if not judge:
            return rows(count, generator, *self.learned)
        if self.log is not None:
            return tuple(x[:count] for x in self.log.judge)
        assert self.market is not None
        return self.market.drawn(count, generator)

    def loss(self, model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        """The log loss, and the network's penalty where it has one."""
        return click_loss(self.call(model, batch), batch[-1])

    @torch.no_grad()
    def figures(self, model: nn.Module, share: float = 1.0) -> dict[str, float]:
        """`auc`, `gauc`, `log_loss` on held-out rows; `kib` of embeddings in fp32; `ceiling`, of generated rows."""
        model.eval()
        said, seen = [], []
        for batch in self.held_out(share):
            output: ClickOutput = self.call(model, batch)
            said.append(output.probability.cpu())
            seen.append(Clicks(*(x.cpu() for x in batch)))
        probability = torch.cat(said)
        ids, numbers, labels = (torch.cat(x) for x in zip(*seen, strict=True))
        found = {"auc": measures.auc(probability, labels), "log_loss": measures.log_loss(probability, labels)}
        if measures.mixed(labels, ids[:, self.user]):
            found["gauc"] = measures.group_auc(probability, labels, ids[:, self.user])
        if isinstance(model, ClickNetwork):
            found["kib"] = model.stored() * 4 / 1024
        if self.market is not None:
            found["ceiling"] = measures.auc(self.market.logit(ids, numbers), labels)
        return found

    @torch.no_grad()
    def pictures(self, model: nn.Module) -> dict[str, Tensor]:
        """The chance of one row with each combination of the memorised pair, planted and found; of files none."""
        if self.market is None:
            return {}
        model.eval()
        i, j = self.market.crossed
        size_I, size_J = self.market.fields[i], self.market.fields[j]
        ids, numbers = (x[:1].expand(size_I * size_J, -1).clone() for x in self.test[:2])
        ids[:, i] = torch.arange(size_I).repeat_interleave(size_J)
        ids[:, j] = torch.arange(size_J).repeat(size_I)
        output: ClickOutput = self.call(model, (*self.to_device((ids, numbers)), None))
        said = {"planted": self.market.logit(ids, numbers).sigmoid(), "found": output.probability.cpu()}
        return {name: _picture(x.unflatten(0, (size_I, size_J))) for name, x in said.items()}

    def chance(self) -> float:
        """Of a score that knows nothing."""
        return 0.5

    @property
    def tokens_per_step(self) -> int:
        """Rows."""
        return self.settings.batch


def _picture(share_IJ: Tensor) -> Tensor:
    """(1, I, J, 3), the larger the lighter."""
    return share_IJ.float()[None, ..., None].expand(-1, -1, -1, 3).contiguous()
