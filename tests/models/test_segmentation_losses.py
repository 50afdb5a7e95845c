"""Dice beside numbers by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from saccade.models.segmentation_losses import dice_loss


@pytest.mark.parametrize("sizes", [(5, 6), (4, 5, 6)])
def test_dice(sizes: tuple[int, ...]) -> None:
    labels = torch.randint(3, (2, *sizes))
    right = 100.0 * F.one_hot(labels, 4).movedim(-1, 1)
    torch.testing.assert_close(dice_loss(right, labels), torch.tensor(0.0))
    even, count = torch.zeros(2, 3, *sizes), labels.flatten().bincount(minlength=3).double()
    share = (2 * count / 3 + 0.5) / (labels.numel() / 9 + count + 0.5)
    assert dice_loss(even, labels, smooth=0.5).item() == pytest.approx(1 - share.mean().item(), abs=1e-6)
    weighed = ((1 - share) * torch.tensor([1.0, 0.0, 2.0])).mean().item()
    assert dice_loss(even, labels, smooth=0.5, weights=(1, 0, 2)).item() == pytest.approx(weighed, abs=1e-6)


def test_gradients_and_halves() -> None:
    labels = torch.randint(3, (1, 2, 3))
    logits = torch.randn(1, 3, 2, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda logits: dice_loss(logits, labels), logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert dice_loss(logits.bfloat16(), labels).dtype == torch.float32
