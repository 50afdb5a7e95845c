"""How it is trained: the words' cross-entropy by Adam, the encoder later and slower.

Gradients of norm 0.1 at most, batches of 80 captions (20 images with 5 each in the released script), up to 50 epochs,
stopped early. Vocabularies hold words that come at least 5 times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from saccade.models.visual_sentinel.network import VisualSentinel

#: of the decoder, and of the encoder; Adam's betas and epsilon
RATE, ENCODER_RATE, BETAS, EPSILON = 4e-4, 1e-5, (0.8, 0.999), 1e-8
#: the encoder is trained from here on; the rate halves every 50 epochs after it
LATER, HALVES = 20, 50


def optimisers(model: VisualSentinel) -> tuple[torch.optim.Adam, torch.optim.Adam | None]:
    """Adam of the decoder, and of the encoder where the network has one of its own.

    Args:
        model: its trunk and stem are the encoder.
    """
    encoder = [p for part in (model.trunk, model.stem) if part is not None for p in part.parameters()]
    known = {id(p) for p in encoder}
    decoder = [p for p in model.parameters() if id(p) not in known]
    of_decoder = torch.optim.Adam(decoder, RATE, BETAS, EPSILON)
    return of_decoder, torch.optim.Adam(encoder, ENCODER_RATE, BETAS, EPSILON) if encoder else None


def learning_rate(epoch: int, rate: float = RATE) -> float:
    """The rate of an epoch, counted from 0.

    Args:
        epoch: from 0.
        rate: of the first ones.

    >>> learning_rate(20), learning_rate(70)
    (0.0004, 0.0002)
    """
    return rate * 0.5 ** (max(0, epoch - LATER) / HALVES)
