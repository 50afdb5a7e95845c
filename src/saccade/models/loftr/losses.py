"""What LoFTR learns from: pairs of cells that are true, and how far their points are from the truth.

    true pair (i, j)    i's point lies in j, and j's point in i
    coarse              mean over true pairs of -alpha (1 - P)^gamma log P;  of optimal transport also over the cells
                        without a match and their dustbins
    fine                mean of w |e - e*|^2 over pairs with |e*|_inf < 1,   w = (1 / deviation) / mean(1 / deviation)

Shape letters: B pairs of images, N, M cells of the two images, K matches, H, W image, h, w grid of cells.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.models.matching import in_image
from saccade.ops.matching import Assignment, Pairs

#: of the focal loss
ALPHA, GAMMA = 0.25, 2.0
_LEAST = 1e-6


def true_pairs(positions_B2HW2: Tensor, stride: int) -> Pairs:
    """The pairs of cells of which each one's point lies in the other.

    Args:
        positions_B2HW2: where pixels of the first image lie in the second, and of the second in the first; NaN where
            that is not known. The point of a cell is its first pixel.
        stride: pixels of a cell.
    """
    points = positions_B2HW2[:, :, ::stride, ::stride]
    h, w = points.shape[2:4]
    cell = (points / stride).round()
    there = in_image(cell.flatten(2, 3), h, w)
    cell = cell.flatten(2, 3).nan_to_num(0.0).clamp(-1, max(h, w)).long()
    number = (cell[..., 1] * w + cell[..., 0]).where(there, 0)
    back = number[:, 1].gather(1, number[:, 0])
    itself = torch.arange(h * w, device=number.device)
    true = there[:, 0] & there[:, 1].gather(1, number[:, 0]) & (back == itself)
    batch, index0 = true.nonzero().unbind(1)
    return Pairs(batch, index0, number[batch, 0, index0], positions_B2HW2.new_ones(len(batch)))


def coarse_loss(found: Assignment, truth: Pairs, *, alpha: float = ALPHA, gamma: float = GAMMA) -> Tensor:
    """The focal loss of the true pairs, and of optimal transport also of "no match" where a cell has none.

    No P but those is made: memory is linear in the cells.

    Args:
        found: P of all pairs.
        truth: the true pairs.
        alpha, gamma: of the focal loss.
    """
    logs = [found.log_at(*truth[:3])]
    for bins, index in ((found.bin0_BN, truth.index0), (found.bin1_BM, truth.index1)):
        if bins is not None:
            matched = torch.zeros_like(bins, dtype=torch.bool)
            matched[truth.batch, index] = True
            logs.append(bins[~matched])
    log = torch.cat(logs)
    if not len(log):
        return found.row_BN.sum() * 0
    share = log.exp().clamp(_LEAST, 1 - _LEAST)
    return (-alpha * (1 - share) ** gamma * share.log()).mean()


def dense_coarse_loss(found: Assignment, truth: Pairs, *, alpha: float = ALPHA, gamma: float = GAMMA) -> Tensor:
    """The focal loss of true pairs and of all others, the mean of each; P of all pairs is made.

    Args:
        found, truth, alpha, gamma: as in `coarse_loss`.
    """
    share = found.matrix().clamp(_LEAST, 1 - _LEAST)
    true = torch.zeros_like(share, dtype=torch.bool)
    true[truth[:3]] = True
    missed = -alpha * (1 - share[true]) ** gamma * share[true].log()
    wrong = -alpha * share[~true] ** gamma * (1 - share[~true]).log()
    return missed.sum() / max(1, missed.numel()) + wrong.sum() / max(1, wrong.numel())


def training_pairs(
    found: Pairs, truth: Pairs, most: int, *, least_true: int = 200, share: float = 0.2,
    generator: torch.Generator | None = None,
) -> Pairs:  # fmt: skip
    """The pairs that the fine stage learns from: found ones, filled up with true ones, whose confidence is 0.

    Args:
        found: pairs that the coarse stage found; drawn with replacement where they are too many.
        truth: the true pairs, drawn with replacement.
        most: pairs that there could be.
        least_true: true ones, at least.
        share: of `most` that the fine stage gets.
        generator: of what is drawn; torch's global one where None.
    """
    room = max(int(most * share), least_true)
    count, device = len(found.batch), found.batch.device

    def drawn(pairs: Pairs, wanted: int) -> list[Tensor]:
        chosen = torch.randint(len(pairs.batch), (wanted,), generator=generator).to(device)
        return [x[chosen] for x in pairs]

    kept = drawn(found, room - least_true) if count > room - least_true else list(found)
    if len(truth.batch):
        *index, confidence = drawn(truth, max(room - count, least_true))
        kept = [torch.cat(both) for both in zip(kept, [*index, torch.zeros_like(confidence).to(found.confidence)])]
    return Pairs(*kept)


def fine_loss(offsets_K3: Tensor, pairs: Pairs, positions_B2HW2: Tensor, stride: int, reach: float) -> Tensor:
    """The squared error of the offsets, each weighted by how sure the network is of it, without gradient there.

    Args:
        offsets_K3: expected offset and deviation of each pair.
        pairs: of cells.
        positions_B2HW2: as in `true_pairs`.
        stride: pixels of a cell.
        reach: pixels of an offset of 1.
    """
    width0, width1 = (positions_B2HW2.shape[3] // stride,) * 2
    row, column = pairs.index0 // width0 * stride, pairs.index0 % width0 * stride
    wanted = positions_B2HW2[pairs.batch, 0, row, column]
    start = torch.stack([pairs.index1 % width1, pairs.index1 // width1], 1) * stride
    truth = (wanted - start) / reach
    near = truth.nan_to_num(torch.inf).abs().amax(1) < 1
    if not near.any():
        return offsets_K3.sum() * 0
    weight = 1 / offsets_K3[:, 2].detach().clamp(min=1e-10)
    weight = weight / weight.mean()
    return (weight[near] * (offsets_K3[near, :2] - truth[near]).square().sum(1)).mean()
