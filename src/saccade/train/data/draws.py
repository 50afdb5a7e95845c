"""What is drawn at a step, and so the same whenever the step comes."""

from __future__ import annotations

import torch
from torch import Tensor


def generator_at(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """The generator of one step: data depend on (seed, step, stream) alone, so a run resumes at any step.

    Args:
        seed, step: of the run.
        stream: 0 to 15, for numbers that must not meet.
    """
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 16 + stream)


def rows(count: int, generator: torch.Generator, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The same random rows of each of the tensors, with replacement: a batch of examples.

    Args:
        count: B.
        generator: of the choice.
        tensors: with as many rows each.
    """
    chosen = torch.randint(len(tensors[0]), (count,), generator=generator)
    return tuple(tensor[chosen] for tensor in tensors)
