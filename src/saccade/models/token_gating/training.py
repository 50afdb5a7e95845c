"""How it is trained: AdamW, an epoch of text and one of captions in turn, and gates that harden.

AdamW with decay 0.01, betas (0.9, 0.999), epsilon 1e-8, gradients of norm 1 at most, batches of 64 (128 with
contrastive terms), 10 epochs of each; the next word's cross-entropy does not count what fills up.
"""

from __future__ import annotations

import math

from torch import nn

from saccade.models.token_gating.gate import DynamicGate

#: the highest rate, steps until it is reached, and all steps; steps over captions
RATE, WARM_UP, STEPS, CAPTION_STEPS = 5e-5, 12_000, 1_107_020, 307_408
#: of hard gates, at first and at last
_TEMPERATURES = (1.0, 0.1)


def learning_rate(step: int, rate: float = RATE, warm_up: int = WARM_UP, steps: int = STEPS) -> float:
    """A straight line up, then a cosine down to 0.

    Args:
        step: from 0.
        rate: the highest.
        warm_up: steps until it is reached.
        steps: all of them.

    >>> [round(learning_rate(step), 9) for step in (6_000, 12_000, 1_107_020)]
    [2.5e-05, 5e-05, 0.0]
    """
    if step < warm_up:
        return rate * step / warm_up
    return rate * (1 + math.cos(math.pi * min(1.0, (step - warm_up) / max(1, steps - warm_up)))) / 2


def gate_temperature(step: int, steps: int = CAPTION_STEPS) -> float:
    """Of hard gates: a straight line from 1 to 0.1.

    Args:
        step: over captions, from 0.
        steps: all of these.

    >>> gate_temperature(0), round(gate_temperature(307_408), 3)
    (1.0, 0.1)
    """
    first, last = _TEMPERATURES
    return first + (last - first) * min(1.0, step / steps)


def set_temperature(model: nn.Module, temperature: float) -> None:
    """Give all gates of a model this temperature.

    Args:
        model: with `DynamicGate`s in it.
        temperature: of `gate_temperature`.
    """
    for module in model.modules():
        if isinstance(module, DynamicGate):
            module.temperature = temperature
