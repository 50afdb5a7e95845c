"""The next byte of English, or of the user's own files.

Shape letters: B batch, N tokens, L bytes, V bytes that there are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saccade.train import data as sources
from saccade.train.data import generator_at
from saccade.train.records import Metric
from saccade.train.tasks.base import TRAIN
from saccade.train.tasks.sequence import SequenceTask
from saccade.train.tasks.settings import LONG_SWEEP, STANDARD_SWEEP, Settings


class Text(SequenceTask):
    """The next byte; quality in bits per byte on the held-out part.

    Args:
        settings: the sizes.
        device: where models and batches are.
        bytes_L: the caller's own text, of which a tenth is held out; `saccade.train.data.text_bytes` where None.

    Raises:
        ValueError: if the text is too short.
    """

    name = "text"
    needs = ("causal",)
    metric = Metric("bits_per_byte", "bits per byte", higher_is_better=False)
    predicts_next = True
    files = "texts"
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
            lengths=STANDARD_SWEEP,
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
            lengths=LONG_SWEEP,
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

    @classmethod
    def on_files(cls, settings: Settings, device: torch.device, data: Any) -> Text:
        return cls(settings, device, data if isinstance(data, Tensor) else sources.read_files(data))

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


def fingerprint(data: Any) -> Any:
    """What of the caller's text goes into config.json: digests, of files with their names.

    Args:
        data: file names, a tensor, or None.

    Raises:
        TypeError: if it is neither.
        OSError: if a file cannot be read.
    """
    if data is None:
        return None
    if isinstance(data, Tensor):
        return {"tensor": hashlib.sha256(data.cpu().contiguous().numpy().tobytes()).hexdigest()}
    if is_paths(data):
        paths = [data] if isinstance(data, (str, Path)) else list(data)
        return [{"file": str(p), "sha256": hashlib.sha256(Path(p).read_bytes()).hexdigest()} for p in paths]
    raise TypeError(f"data must be file names or a tensor, got {type(data).__name__}")


def is_paths(data: Any) -> bool:
    """Whether `data` are file names.

    Args:
        data: what the caller gave.
    """
    if isinstance(data, (str, Path)):
        return True
    return isinstance(data, Sequence) and bool(data) and all(isinstance(item, (str, Path)) for item in data)
