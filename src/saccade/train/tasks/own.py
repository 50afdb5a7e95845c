"""The caller's own model and data."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.train import fingerprints
from saccade.train.data import IGNORE
from saccade.train.entries import Entry
from saccade.train.records import Metric
from saccade.train.tasks.base import TURN, Task
from saccade.train.tasks.settings import Settings

#: batches of the data that identify them
_FIRST = 3


class Own(Task):
    """The caller's own model and data.

    Batches are whatever the loader gives; without a `loss` of the caller's they are (inputs..., targets) and the loss
    is the cross entropy of the model's logits. Quality is the mean loss on `held_out` (the loader itself where there
    is none), or the `quality` that the caller gives.

    Args:
        settings: the sizes.
        device: where models and batches are.
        loader: batches that can be gone through again and again, or a function of the step.
        model: called with `part(**arguments)`, which builds the mechanism; None where mechanisms are whole models.
        loss: (model, batch) -> scalar.
        held_out: batches for the quality.
        quality: model -> figure.
        metric: what that figure is.

    Raises:
        ValueError: if the loader is an iterator, or a function with neither `held_out` nor `quality` beside it.
    """

    name = "own"
    #: a step of the caller's own may be an epoch
    least_steps = 10
    metric = Metric("loss", "loss", higher_is_better=False)
    budgets = {
        "quick": Settings(steps=300, lengths=(), decode_tokens=0, map_length=0),
        "standard": Settings(steps=2000, lengths=(), decode_tokens=0, map_length=0),
        "long": Settings(steps=10000, lengths=(), decode_tokens=0, map_length=0),
    }

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        loader: Iterable[Any] | Callable[[int], Any],
        model: Callable[..., nn.Module] | None,
        loss: Callable[[nn.Module, Any], Tensor] | None,
        held_out: Iterable[Any] | None,
        quality: Callable[[nn.Module], float] | None,
        metric: Metric | None,
    ) -> None:
        super().__init__(settings, device)
        self.loader, self.held, self.own_model = loader, held_out, model
        self.own_loss, self.own_quality = loss, quality
        if metric is not None:
            self.metric = metric
        elif quality is not None:
            self.metric = Metric("quality", "quality", higher_is_better=True)
        if held_out is None and quality is None and callable(loader):
            raise ValueError("a loader that is a function of the step needs held_out= or quality= beside it")
        if isinstance(loader, Iterator):
            raise ValueError("the loader must give its batches anew each time (a list, a DataLoader), got an iterator")
        self._at = (0, -1)
        #: the last batches: the runs that take turns ask for the same ones
        self._recent: dict[tuple[int, int], Any] = {}
        self._iterator: Iterator[Any] = iter(())
        self._tokens = 0

    def model(self, mechanism: Entry, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        if self.own_model is not None:
            numbers = iter(range(10**6))

            def part(**arguments: Any) -> nn.Module:
                return mechanism.build(self.settings.length, seed=seed * 1000 + next(numbers), **arguments)

            model = self.own_model(part)
        elif mechanism.factory is not None:
            model = mechanism.factory()
        else:
            raise ValueError(
                f"own data need a model: give model=lambda part: ... (part(dim=...) builds {mechanism.name!r}), or "
                "constructors of whole models instead of names"
            )
        if not isinstance(model, nn.Module):
            raise ValueError(f"the model of {mechanism.name!r} must be a module, got {type(model).__name__}")
        return model

    def parts_of(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        return []

    def batch(self, seed: int, step: int) -> tuple[Any, ...]:
        if callable(self.loader):
            batch = self.loader(step)
        else:
            if (seed, step) not in self._recent:
                if self._at != (seed, step):
                    self._at, self._iterator = (seed, 0), iter(())
                    for _ in range(step):  # a resumed run goes through what it has seen
                        self._next()
                self._recent[seed, step] = self._next()
                if len(self._recent) > TURN:
                    self._recent.pop(next(iter(self._recent)))
            batch = self._recent[seed, step]
        batch = self._moved(batch)
        self._tokens = _tokens(batch[0] if isinstance(batch, tuple) else batch)
        return batch

    def _next(self) -> Any:
        """The next batch, with all random numbers a function of (seed, step): shuffling and augmenting resume, too."""
        assert not callable(self.loader)
        seed, step = self._at
        with _random_numbers(seed * 1_000_003 + step):
            try:
                batch = next(self._iterator)
            except StopIteration:
                self._iterator = iter(self.loader)
                try:
                    batch = next(self._iterator)
                except StopIteration:
                    raise ValueError("the loader gave no batch") from None
        self._at = (seed, step + 1)
        return batch

    def _moved(self, batch: Any) -> Any:
        return self.to_device(batch) if isinstance(batch, (tuple, list)) else batch

    def held_out(self, share: float = 1.0) -> Iterator[tuple[Any, ...]]:
        source = self.held if self.held is not None else self.loader
        assert not callable(source)
        batches = list(source)
        for batch in batches[: max(1, round(share * len(batches)))]:
            yield self._moved(batch)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        if self.own_loss is not None:
            return self.own_loss(model, batch)
        logits = model(*batch[:-1])
        return F.cross_entropy(logits.flatten(0, -2), batch[-1].flatten(), ignore_index=IGNORE)

    @torch.no_grad()
    def quality(self, model: nn.Module, share: float = 1.0) -> float:
        model.eval()
        if self.own_quality is not None:
            return float(self.own_quality(model))
        losses = [float(self.loss(model, batch)) for batch in self.held_out(share)]
        if not losses:
            raise ValueError("held_out gave no batch")
        return sum(losses) / len(losses)

    def fingerprint(self, seed: int) -> dict[str, Any]:
        """What identifies the data and the functions of the caller's: digests of contents, first batches and code."""
        functions = {"model": self.own_model, "loss": self.own_loss, "quality": self.own_quality}
        return {
            "own": getattr(self.loader, "__qualname__", type(self.loader).__qualname__),
            "contents": fingerprints.code(self.loader) if callable(self.loader) else fingerprints.values(self.loader),
            "first batches": fingerprints.values([self.batch(seed, step) for step in range(_FIRST)]),
            "held out": None
            if self.held is None
            else fingerprints.values(self.held, next(iter(self.held_out()), None)),
            **{f"{name} code": fingerprints.code(given) for name, given in functions.items() if given is not None},
        }

    def chance(self) -> float | None:
        return None

    @property
    def tokens_per_step(self) -> int:
        return self._tokens


@contextmanager
def _random_numbers(seed: int) -> Iterator[None]:
    """Torch's, Python's and numpy's generators at a seed, and back as they were afterwards."""
    pythons, numpys = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(pythons)
            np.random.set_state(numpys)


def _tokens(inputs: Any) -> int:
    """How many tokens (samples, where there are no tokens) an input counts for."""
    if not isinstance(inputs, Tensor) or not inputs.ndim:
        return 1
    if not inputs.is_floating_point():
        return inputs.numel()
    return inputs.shape[:2].numel() if inputs.ndim == 3 else inputs.shape[0]
