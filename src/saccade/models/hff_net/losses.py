"""What trains HFF-Net: Dice on every head, agreement of the branches' spectra, and the Laplacian's elastic pull.

    total = sum over the four heads of Dice + u(e) FFL(low, high) + 5e-6 sum (W - Laplacian)^2
    u(e) = 15 (e + 1) / 450 in epoch e
    FFL(a, b) = mean of w d,    d = |A - B|^2,    w = |A - B|^alpha / its largest, without gradient

with A, B the unitary spectra of the logits, over depth, height and width. After warm-up the weights of the Laplacian
convolution that matter are held at it, once (`consolidate`).

Shape letters: B batch, K classes, D depth, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from saccade.models.hff_net.network import HFFNet
from saccade.models.segmentation import Segmentation
from saccade.models.segmentation_losses import dice_loss
from saccade.ops.autocast import exact
from saccade.ops.frequency import fisher_information, important

#: epochs; weight of the elastic penalty, of FFL at the end
EPOCHS, ELASTIC, AGREEMENT = 450, 5e-6, 15.0


@exact
def focal_frequency_loss(a_BKDHW: Tensor, b_BKDHW: Tensor, alpha: float = 1.0) -> Tensor:
    """FFL; 0 for equal volumes, and symmetric.

    Args:
        a_BKDHW, b_BKDHW: logits of both branches.
        alpha: power of the weight.
    """
    off = a_BKDHW - b_BKDHW
    spectrum = torch.fft.fftn(off.to(torch.promote_types(off.dtype, torch.float32)), dim=(2, 3, 4), norm="ortho")
    distance = spectrum.real.square() + spectrum.imag.square()
    weight = distance.detach() ** (alpha / 2)
    weight = (weight / weight.amax((2, 3, 4), keepdim=True)).nan_to_num(0.0).clamp(0, 1)
    return (weight * distance).mean()


def hff_loss(output: Segmentation, labels_BDHW: Tensor, epoch: int, model: HFFNet | None = None) -> Tensor:
    """The whole loss.

    Args:
        output: of the network in training mode.
        labels_BDHW: a class for each voxel.
        epoch: from 0 on; the branches are drawn to each other more and more.
        model: whose Laplacian convolution is drawn to the Laplacian; None leaves that out.

    Raises:
        ValueError: if the output is not from training mode.
    """
    if output.heads is None:
        raise ValueError("the loss needs the output of a network in training mode")
    total = torch.stack([dice_loss(logits, labels_BDHW) for logits in output.heads]).sum()
    total = total + AGREEMENT * (epoch + 1) / EPOCHS * focal_frequency_loss(output.heads[0], output.heads[1])
    return total if model is None else total + ELASTIC * model.laplacian.penalty()


def consolidate(model: HFFNet, samples: Iterable[tuple[Tensor, Tensor, Tensor]], deviations: float = 1.0) -> Tensor:
    """Hold the taps of the Laplacian convolution that matter at the Laplacian; bool, which they are.

    What matters is measured once, in evaluation mode: the squared slope of both branches' Dice.

    Args:
        model: is changed.
        samples: low bands, high bands and labels.
        deviations: above the mean of a kernel's 27 taps.

    Raises:
        ValueError: if there are no samples.
    """
    training = model.training

    def losses() -> Iterable[Tensor]:
        for low, high, labels in samples:
            logits_low, logits_high, *_ = model.branches(low, high)
            yield dice_loss(logits_low, labels) + dice_loss(logits_high, labels)

    try:
        model.eval()
        taps = important(fisher_information(losses(), model.laplacian.weight), (2, 3, 4), deviations)
    finally:
        model.train(training)
    model.laplacian.hold(taps)
    return taps
