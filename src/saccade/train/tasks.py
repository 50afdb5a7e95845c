"""The tasks on which mechanisms are compared: data, model around the mechanism, loss, quality.

| task | what is learned | quality |
|---|---|---|
| `text` | the next byte of English, or of the user's files | bits per byte on held-out text |
| `recall` | values of keys seen before (multi-query associative recall) | accuracy on the queried values |
| `listops` | the value of a nested expression | accuracy |
| `digits` | the digit of an image read as 64 tokens | accuracy |
| `digits-cnn` | the digit, by a small CNN with the gate in each block | accuracy |
| `paired` | the digit of two noisy views, either may be missing | accuracy |

Shape letters: B batch, N tokens, C channels, H and W height and width.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.train import data as sources
from saccade.train import fingerprints
from saccade.train.data import IGNORE, generator_at
from saccade.train.mechanisms import NONE, Mechanism
from saccade.train.model import GatedCNN, SequenceModel, TwoStream
from saccade.train.result import Metric

ACCURACY = Metric("accuracy", "accuracy", higher_is_better=True)

#: batches of the caller's own data that identify it
_FIRST = 3

#: steps that a run takes before the next one has its turn
TURN = 4

#: streams of random numbers that never meet: training, evaluation, the sample of the attention maps
TRAIN, HELD_OUT, SAMPLE = 0, 1, 2


@dataclass(frozen=True)
class Settings:
    """Sizes of one comparison; every field may be given to `compare` by name.

    Attributes:
        dim, layers, heads: of the model (`dim` channels and `layers` blocks for `digits-cnn`).
        length: tokens of a sequence (of an expression at most, for `listops`).
        batch: sequences in a step.
        steps: how many; a budget in seconds replaces it.
        lr, weight_decay: of AdamW.
        pairs: key-value pairs of `recall`.
        evaluations: points of the learning curve.
        evaluation_size: held-out sequences (of those there are) for the quality at the end; the curve uses a quarter.
        lengths: of the sweep; empty for none.
        sweep_seconds: for a point of the sweep, and limit_seconds a single forward and backward may take.
        decode_tokens: generated to measure decoding; 0 for none.
        map_length: tokens of the sample whose attention is kept; 0 for none.
        checkpoint_seconds: at least so long between checkpoints.
    """

    dim: int = 64
    layers: int = 2
    heads: int = 4
    length: int = 64
    batch: int = 32
    steps: int = 300
    lr: float = 2e-3
    weight_decay: float = 0.01
    pairs: int = 8
    evaluations: int = 8
    evaluation_size: int = 512
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    sweep_seconds: float = 0.4
    limit_seconds: float = 4.0
    decode_tokens: int = 64
    map_length: int = 64
    checkpoint_seconds: float = 10.0

    def changed(self, changes: dict[str, Any]) -> Settings:
        """With some fields replaced.

        Raises:
            ValueError: for an unknown name or a value out of range.
        """
        known = {field.name for field in fields(self)}
        for name, value in changes.items():
            if name not in known:
                raise ValueError(f"no setting is called {name!r}; there is {', '.join(sorted(known))}")
            if name == "lengths":
                if any(not isinstance(n, int) or n < 1 for n in value) or list(value) != sorted(set(value)):
                    raise ValueError(f"lengths must be positive integers in ascending order, got {value}")
                continue
            lowest = 0 if name in ("decode_tokens", "map_length", "checkpoint_seconds", "weight_decay") else 1
            whole = isinstance(getattr(self, name), int)
            fits = (
                isinstance(value, int) and value >= lowest
                if whole
                else isinstance(value, (int, float)) and (value >= 0 if lowest == 0 else value > 0)
            )
            if isinstance(value, bool) or not fits:
                expected = (
                    f"an integer of at least {lowest}" if whole else "a number above 0" if lowest else "at least 0"
                )
                raise ValueError(f"{name} must be {expected}, got {value!r}")
        changes = {**changes, "lengths": tuple(changes["lengths"])} if "lengths" in changes else changes
        return replace(self, **changes)


_STANDARD_SWEEP = (256, 512, 1024, 2048, 4096, 8192, 16384)
_LONG_SWEEP = (*_STANDARD_SWEEP, 32768)


class Task:
    """One task at one size. Subclasses give what the table above says; `batch` is a function of (seed, step) alone."""

    name: str
    kind: str = "sequence"
    needs: tuple[str, ...] = ()
    metric: Metric = ACCURACY
    #: baseline that is added to every comparison
    baseline: str | None = None
    #: whether seeing later tokens means seeing the answer
    predicts_next = False
    #: a run with fewer steps is hardly trained
    least_steps = 100
    budgets: dict[str, Settings]

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.device = settings, device

    def model(self, mechanism: Mechanism, seed: int) -> nn.Module:
        """A new model with the mechanism in it."""
        raise NotImplementedError

    def part(self, mechanism: Mechanism, length: int) -> nn.Module:
        """The mechanism alone, at the model's width."""
        raise NotImplementedError

    def part_inputs(self, length: int) -> tuple[Any, ...]:
        """Random inputs of that length for it."""
        raise NotImplementedError

    def parts_of(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The mechanisms in a model, named."""
        raise NotImplementedError

    def batch(self, seed: int, step: int) -> tuple[Any, ...]:
        """The batch of a step."""
        raise NotImplementedError

    def held_out(self, share: float = 1.0) -> Iterator[tuple[Any, ...]]:
        """The held-out batches, or the first `share` of them; the same for every seed."""
        raise NotImplementedError

    def outputs(self, model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        """The logits; the last entry of a batch is the targets."""
        return model(*batch[:-1])

    def loss(self, model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        """Cross entropy in nats."""
        return F.cross_entropy(self.outputs(model, batch).flatten(0, -2), batch[-1].flatten(), ignore_index=IGNORE)

    @torch.no_grad()
    def quality(self, model: nn.Module, share: float = 1.0) -> float:
        """The metric on held-out data."""
        model.eval()
        right = scored = 0
        for batch in self.held_out(share):
            counts = batch[-1] != IGNORE
            right += int(((self.outputs(model, batch).argmax(-1) == batch[-1]) & counts).sum())
            scored += int(counts.sum())
        return right / scored

    def chance(self) -> float | None:
        """The quality that guessing reaches: always the commonest answer, and two standard errors. None: not known."""
        answers = torch.cat([batch[-1].flatten() for batch in self.held_out()])
        answers = answers[answers != IGNORE]
        right = float(answers.bincount().max()) / len(answers)
        return min(1.0, right + 2 * math.sqrt(right * (1 - right) / len(answers)))

    @property
    def tokens_per_step(self) -> int:
        return self.settings.batch * self.settings.length

    def sample(self) -> tuple[Any, ...]:
        """One held-out input for attention maps (without targets)."""
        return next(iter(self.held_out()))[:-1]

    def to_device(self, batch: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(item.to(self.device) if isinstance(item, Tensor) else item for item in batch)


class SequenceTask(Task):
    """Tasks on token sequences: a transformer whose mixers are the mechanism."""

    vocab: int
    classes: int | None = None
    #: whether each token is embedded together with the one before it
    pair = False

    def causal(self, mechanism: Mechanism) -> bool:
        """Whether the mechanism is built causal: where the task needs it, or its card knows nothing else."""
        return "causal" in self.needs or ("causal" in mechanism.supports and "bidirectional" not in mechanism.supports)

    def _arguments(self, mechanism: Mechanism) -> dict[str, Any]:
        arguments: dict[str, Any] = {"dim": self.settings.dim, "num_heads": self.settings.heads}
        return arguments | ({"causal": True} if self.causal(mechanism) else self._not_causal(mechanism))

    def _not_causal(self, mechanism: Mechanism) -> dict[str, Any]:
        return {"causal": False} if mechanism.slug is None or "bidirectional" in mechanism.supports else {}

    def model(self, mechanism: Mechanism, seed: int) -> nn.Module:
        size = self.settings
        torch.manual_seed(seed)

        def mixer(layer: int) -> nn.Module:
            return mechanism.build(
                size.length,
                seed=seed * 1000 + layer,
                layer_index=layer,
                num_layers=size.layers,
                **self._arguments(mechanism),
            )

        return SequenceModel(
            mixer, vocab=self.vocab, dim=size.dim, layers=size.layers, classes=self.classes, pair=self.pair
        )

    def part(self, mechanism: Mechanism, length: int) -> nn.Module:
        # the options of the trained model, so that the sweep shows how this very mechanism grows
        return mechanism.build(
            self.settings.length, seed=0, layer_index=0, num_layers=self.settings.layers, **self._arguments(mechanism)
        )

    def part_inputs(self, length: int) -> tuple[Any, ...]:
        return (torch.randn(1, length, self.settings.dim, device=self.device),)

    def parts_of(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        assert isinstance(model, SequenceModel)
        return [(f"layer {layer}", mixer) for layer, mixer in enumerate(model.mixers)]

    def prompt(self, length: int) -> Tensor:
        """Held-out tokens to decode from, (1, N)."""
        return next(iter(self.held_out()))[0][:1, :length]


class Text(SequenceTask):
    """The next byte; quality in bits per byte on the held-out part."""

    name = "text"
    needs = ("causal",)
    metric = Metric("bits_per_byte", "bits per byte", higher_is_better=False)
    predicts_next = True
    vocab = 256
    budgets = {
        "quick": Settings(dim=96, layers=2, heads=4, length=256, batch=16, steps=360, lr=3e-3, map_length=128),
        "standard": Settings(
            dim=192,
            layers=4,
            heads=6,
            length=512,
            batch=16,
            steps=1500,
            lr=2e-3,
            map_length=256,
            lengths=_STANDARD_SWEEP,
            evaluations=15,
        ),
        "long": Settings(
            dim=256,
            layers=6,
            heads=8,
            length=1024,
            batch=16,
            steps=8000,
            lr=1e-3,
            map_length=256,
            lengths=_LONG_SWEEP,
            evaluations=20,
        ),
    }

    def __init__(self, settings: Settings, device: torch.device, bytes_L: Tensor | None = None) -> None:
        super().__init__(settings, device)
        if bytes_L is None:
            self.train_L, self.held_L = sources.text_bytes("train"), sources.text_bytes("held-out")
        else:
            cut = len(bytes_L) - len(bytes_L) // 10
            self.train_L, self.held_L = bytes_L[:cut], bytes_L[cut:]
        if len(self.held_L) < settings.length + 1:
            raise ValueError(
                f"the data must have at least {10 * (settings.length + 2)} bytes (a tenth is held out, and a window is "
                f"{settings.length + 1}), got {len(self.train_L) + len(self.held_L)}"
            )

    def batch(self, seed: int, step: int) -> tuple[Any, ...]:
        size = self.settings
        return self.to_device(sources.windows(self.train_L, size.batch, size.length, generator_at(seed, step, TRAIN)))

    def held_out(self, share: float = 1.0) -> Iterator[tuple[Any, ...]]:
        length = self.settings.length
        window_BN = self.held_L[: (len(self.held_L) - 1) // length * length + 1].unfold(0, length + 1, length).long()
        window_BN = window_BN[: self.settings.evaluation_size]
        count = max(1, round(share * len(window_BN)))
        for piece_BN in window_BN[:: max(1, len(window_BN) // count)][:count].split(self.settings.batch):
            yield self.to_device((piece_BN[:, :-1], piece_BN[:, 1:]))

    @torch.no_grad()
    def quality(self, model: nn.Module, share: float = 1.0) -> float:
        model.eval()
        total, count = 0.0, 0
        for batch in self.held_out(share):
            total += float(self.loss(model, batch)) * batch[-1].numel()
            count += batch[-1].numel()
        return total / count / math.log(2)

    def chance(self) -> float | None:
        """Bits of a byte for whoever knows how often each comes, and nothing of what stands before it."""
        share_V = torch.cat([batch[-1].flatten() for batch in self.held_out()]).bincount().double()
        share_V = share_V[share_V > 0] / share_V.sum()
        return float(-(share_V * share_V.log2()).sum())


class Recall(SequenceTask):
    """Which value came with this key? Quality is the accuracy at the queries.

    Each token is embedded together with the one before it, so that a value is marked with its key: what is compared is
    how well a mechanism finds one token among many, not how many thousand steps it takes to learn to look one back.
    """

    name = "recall"
    needs = ("causal",)
    vocab = 64
    pair = True
    budgets = {
        "quick": Settings(dim=64, length=128, pairs=16, batch=32, steps=300, lr=3e-3),
        "standard": Settings(
            dim=96, length=256, pairs=16, batch=64, steps=3000, lr=2e-3, lengths=_STANDARD_SWEEP, map_length=128
        ),
        "long": Settings(
            dim=128, length=512, pairs=32, batch=64, steps=12000, lr=1e-3, lengths=_LONG_SWEEP, map_length=128
        ),
    }

    def __init__(self, settings: Settings, device: torch.device) -> None:
        super().__init__(settings, device)
        self.vocab = max(type(self).vocab, 2 * settings.pairs)
        self._draw(1, generator_at(0, 0, SAMPLE))

    def _draw(self, batch: int, generator: torch.Generator) -> tuple[Any, ...]:
        size = self.settings
        return self.to_device(sources.recall(batch, size.length, size.pairs, vocab=self.vocab, generator=generator))

    def batch(self, seed: int, step: int) -> tuple[Any, ...]:
        return self._draw(self.settings.batch, generator_at(seed, step, TRAIN))

    def held_out(self, share: float = 1.0) -> Iterator[tuple[Any, ...]]:
        for number in range(_batches(self.settings, share)):
            yield self._draw(self.settings.batch, generator_at(0, number, HELD_OUT))


class ListOps(SequenceTask):
    """The value of a nested expression, Long Range Arena's generator at a length that fits the budget."""

    name = "listops"
    vocab = len(sources.LISTOPS_TOKENS)
    classes = 10
    budgets = {
        "quick": Settings(dim=64, length=64, batch=64, steps=500, lr=2e-3),
        "standard": Settings(dim=128, layers=4, length=512, batch=32, steps=4000, lr=1e-3, lengths=_STANDARD_SWEEP),
        "long": Settings(dim=256, layers=6, heads=8, length=2000, batch=32, steps=10000, lr=5e-4, lengths=_LONG_SWEEP),
    }

    def __init__(self, settings: Settings, device: torch.device) -> None:
        super().__init__(settings, device)
        self._draw(1, generator_at(0, 0, SAMPLE))

    def _draw(self, batch: int, generator: torch.Generator) -> tuple[Any, ...]:
        tokens_BN, values_B = sources.listops(batch, self.settings.length, generator=generator)
        return self.to_device((tokens_BN, values_B))

    def batch(self, seed: int, step: int) -> tuple[Any, ...]:
        return self._draw(self.settings.batch, generator_at(seed, step, TRAIN))

    def held_out(self, share: float = 1.0) -> Iterator[tuple[Any, ...]]:
        for number in range(_batches(self.settings, share)):
            yield self._draw(self.settings.batch, generator_at(0, number, HELD_OUT))

    def model(self, mechanism: Mechanism, seed: int) -> nn.Module:
        model = super().model(mechanism, seed)
        # mechanisms that take no padding read the fill as one more token
        model.register_buffer("reads_mask", torch.tensor("padding" in mechanism.supports), persistent=False)
        return model

    def outputs(self, model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        return model(batch[0], batch[0] != 0) if model.reads_mask else model(batch[0])


class DigitImages(Task):
    """Scikit-learn's digits: random rows of `train` in each step, `test` in order."""

    train: tuple[Tensor, ...]
    test: tuple[Tensor, ...]

    def __init__(self, settings: Settings, device: torch.device) -> None:
        if settings.length != 64:
            raise ValueError(f"length must be 64 for digits (8 x 8 pixels), got {settings.length}")
        super().__init__(settings, device)
        images = sources.digits()
        self.train, self.test = tuple(images[:2]), tuple(images[2:])

    def batch(self, seed: int, step: int) -> tuple[Any, ...]:
        chosen = torch.randint(len(self.train[1]), (self.settings.batch,), generator=generator_at(seed, step, TRAIN))
        return self.to_device(item[chosen] for item in self.train)

    def held_out(self, share: float = 1.0) -> Iterator[tuple[Any, ...]]:
        yield from _in_batches(self, self.test, share)


class Digits(DigitImages, SequenceTask):
    """Which digit? The image is read pixel by pixel, row by row, each a token of 17 shades."""

    name = "digits"
    vocab = 17
    classes = 10
    budgets = {
        "quick": Settings(dim=64, length=64, batch=64, steps=600, lr=3e-3),
        "standard": Settings(dim=96, layers=3, length=64, batch=64, steps=2000, lr=1e-3, lengths=_STANDARD_SWEEP),
        "long": Settings(dim=128, layers=4, length=64, batch=64, steps=8000, lr=1e-3, lengths=_LONG_SWEEP),
    }

    def __init__(self, settings: Settings, device: torch.device) -> None:
        super().__init__(settings, device)
        self.train, self.test = (
            ((pixels * 16).round().long().flatten(1), labels) for pixels, labels in (self.train, self.test)
        )


class DigitsCNN(DigitImages):
    """Which digit? A small CNN with the gate in each of its residual blocks, beside the same without."""

    name = "digits-cnn"
    kind = "gate"
    baseline = NONE
    budgets = {
        "quick": Settings(
            dim=32, layers=3, length=64, batch=64, steps=200, lr=2e-3, lengths=(64, 256, 1024, 4096, 16384)
        ),
        "standard": Settings(
            dim=48, layers=4, length=64, batch=64, steps=1500, lr=2e-3, lengths=(64, 256, 1024, 4096, 16384)
        ),
        "long": Settings(
            dim=64, layers=6, length=64, batch=64, steps=6000, lr=1e-3, lengths=(64, 256, 1024, 4096, 16384, 65536)
        ),
    }

    def model(self, mechanism: Mechanism, seed: int) -> nn.Module:
        size = self.settings
        torch.manual_seed(seed)

        def gate(block: int) -> nn.Module:
            return mechanism.build(size.length, seed=seed * 1000 + block, channels=size.dim)

        return GatedCNN(None if mechanism.slug == NONE else gate, channels=size.dim, blocks=size.layers, classes=10)

    def part(self, mechanism: Mechanism, length: int) -> nn.Module:
        return mechanism.build(length, seed=0, channels=self.settings.dim)

    def part_inputs(self, length: int) -> tuple[Any, ...]:
        side = max(1, math.isqrt(length))
        return (torch.randn(1, self.settings.dim, side, length // side, device=self.device),)

    def parts_of(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        assert isinstance(model, GatedCNN)
        return [(f"block {number}", gate) for number, gate in enumerate(model.gates)]


class PairedViews(Task):
    """Which digit? Two noisy views, either may be missing; the fusion part stands between two encoders."""

    name = "paired"
    kind = "fusion"
    baseline = NONE
    budgets = {
        "quick": Settings(dim=64, layers=1, length=16, batch=64, steps=500, lr=3e-3, lengths=(16, 64, 256, 1024)),
        "standard": Settings(
            dim=96, layers=1, length=16, batch=64, steps=2000, lr=1e-3, lengths=(16, 64, 256, 1024, 4096)
        ),
        "long": Settings(
            dim=128, layers=1, length=16, batch=64, steps=8000, lr=1e-3, lengths=(16, 64, 256, 1024, 4096)
        ),
    }

    def __init__(self, settings: Settings, device: torch.device) -> None:
        if settings.length != 16:
            raise ValueError(f"length must be 16 for paired (4 x 4 patches a view), got {settings.length}")
        super().__init__(settings, device)
        self.test = sources.paired(None, split="test", generator=generator_at(0, 0, HELD_OUT))

    def model(self, mechanism: Mechanism, seed: int) -> nn.Module:
        size = self.settings
        torch.manual_seed(seed)
        softmax = Mechanism("softmax", "softmax")

        def encoder(stream: int) -> nn.Module:
            return softmax.build(
                size.length, seed=seed * 1000 + stream, dim=size.dim, num_heads=size.heads, causal=False
            )

        fusion = None if mechanism.slug == NONE else self.part(mechanism, size.length, seed * 1000 + 2)
        return TwoStream(fusion, encoder, dim=size.dim, classes=10)

    def part(self, mechanism: Mechanism, length: int, seed: int = 0) -> nn.Module:
        return mechanism.build(length, seed=seed, dim=self.settings.dim, num_heads=self.settings.heads)

    def part_inputs(self, length: int) -> tuple[Any, ...]:
        return tuple(torch.randn(1, length, self.settings.dim, device=self.device) for _ in range(2))

    def parts_of(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        assert isinstance(model, TwoStream)
        return [] if model.fusion is None else [("fusion", model.fusion)]

    @property
    def tokens_per_step(self) -> int:
        return 2 * self.settings.batch * self.settings.length

    def batch(self, seed: int, step: int) -> tuple[Any, ...]:
        return self.to_device(sources.paired(self.settings.batch, generator=generator_at(seed, step, TRAIN)))

    def held_out(self, share: float = 1.0) -> Iterator[tuple[Any, ...]]:
        yield from _in_batches(self, self.test, share)


class Own(Task):
    """The caller's own model and data.

    Batches are whatever the loader gives; without a `loss` of the caller's they are (inputs..., targets) and the loss
    is the cross entropy of the model's logits. Quality is the mean loss on `held_out` (the loader itself where there
    is none), or the `quality` that the caller gives.
    """

    name = "own"
    kind = "sequence"
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

    def model(self, mechanism: Mechanism, seed: int) -> nn.Module:
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


TASKS: dict[str, type[Task]] = {task.name: task for task in (Text, Recall, ListOps, Digits, DigitsCNN, PairedViews)}


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


def fingerprint(data: Any) -> Any:
    """What of the caller's text goes into config.json: digests, of files with their names."""
    if data is None:
        return None
    if isinstance(data, Tensor):
        return {"tensor": hashlib.sha256(data.cpu().contiguous().numpy().tobytes()).hexdigest()}
    if is_paths(data):
        paths = [data] if isinstance(data, (str, Path)) else list(data)
        return [{"file": str(p), "sha256": hashlib.sha256(Path(p).read_bytes()).hexdigest()} for p in paths]
    raise TypeError(f"data must be file names or a tensor, got {type(data).__name__}")


def is_paths(data: Any) -> bool:
    """Whether `data` are file names."""
    if isinstance(data, (str, Path)):
        return True
    return isinstance(data, Sequence) and bool(data) and all(isinstance(item, (str, Path)) for item in data)


def _batches(settings: Settings, share: float) -> int:
    return max(1, round(share * settings.evaluation_size / settings.batch))


def _in_batches(task: Task, items: Sequence[Tensor], share: float) -> Iterator[tuple[Any, ...]]:
    count = min(len(items[-1]), max(1, round(share * min(task.settings.evaluation_size, len(items[-1])))))
    for start in range(0, count, task.settings.batch):
        yield task.to_device(item[start : min(count, start + task.settings.batch)] for item in items)
