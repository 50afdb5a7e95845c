"""What MM-Pyramid learns by: labels of whole videos, or of each step.

Shape letters: B batch, T steps, M streams, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.models.moments import EventOutput, event_loss


def parsing_loss(
    said: EventOutput,
    label_BK: Tensor,
    audio_BK: Tensor | None = None,
    video_BK: Tensor | None = None,
    *,
    smooth_audio: float = 1.0,
    smooth_video: float = 0.9,
) -> Tensor:
    """BCE of what happens in each stream and at all, from labels of whole videos.

    Args:
        said: streams in the order (audio, video).
        label_BK: what happens in the video, heard or seen.
        audio_BK, video_BK: labels of a stream where they are known; `label_BK` where None.
        smooth_audio, smooth_video: s of s y + (1 - s) / 2.

    Raises:
        ValueError: if there are not two streams.
    """
    if said.streams.shape[1] != 2:
        raise ValueError(f"said must be of two streams, audio and video, got {said.streams.shape[1]}")
    audio, video = (label_BK if x is None else x for x in (audio_BK, video_BK))
    of_streams = event_loss(said.streams[:, 0], audio, smooth_audio) + event_loss(
        said.streams[:, 1], video, smooth_video
    )
    return of_streams + event_loss(said.whole, label_BK)


def localisation_loss(said: EventOutput, truth_BTMK: Tensor) -> Tensor:
    """Cross entropy of the class of each step, 0 for none; of several at a time the first is learned.

    Args:
        said: with `logits`.
        truth_BTMK: what happens when; an event is one of any stream.

    Raises:
        ValueError: if there are no logits.
    """
    if said.logits is None:
        raise ValueError("said must have logits: the head must be 'localise'")
    truth_BTK = truth_BTMK.bool().any(2)
    label_BT = torch.where(truth_BTK.any(-1), 1 + truth_BTK.int().argmax(-1), 0)
    loss_BT = F.cross_entropy(said.logits.float().flatten(0, 1), label_BT.flatten(), reduction="none").view_as(label_BT)
    return loss_BT.mean() if said.mask is None else loss_BT[said.mask].mean()
