"""The sizes of one comparison."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

#: lengths of the sweep at the larger budgets
STANDARD_SWEEP = (256, 512, 1024, 2048, 4096, 8192, 16384)
LONG_SWEEP = (*STANDARD_SWEEP, 32768)


@dataclass(frozen=True)
class Settings:
    """Sizes of one comparison; every field may be given to `compare` by name.

    Attributes:
        dim, layers, heads: of the model (`dim` channels and `layers` blocks for `digits-cnn`).
        length: tokens of a sequence (of an expression at most, for `listops`).
        batch: sequences in a step.
        steps: how many; a budget in seconds replaces it.
        lr, weight_decay: of AdamW.
        pairs: key-value pairs of `recall`, pieces of evidence of `explain`.
        evaluations: points of the learning curve.
        evaluation_size: held-out sequences (of those there are) for the quality at the end; the curve uses a quarter.
        lengths: of the sweep; empty for none.
        sweep_seconds: for a point of the sweep.
        limit_seconds: that a single forward and backward of the sweep may take.
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
                row: list[Any] = list(value) if isinstance(value, (tuple, list, range)) else [None]
                if any(not isinstance(n, int) or n < 1 for n in row) or row != sorted(set(row)):
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
