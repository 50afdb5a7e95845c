"""MM-Pyramid on features of sound, picture and motion, with a head for parsing or for localisation.

Shape letters: B batch, T steps, M streams, K classes, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from saccade.models.mm_pyramid.losses import localisation_loss
from saccade.models.mm_pyramid.pyramid import Pyramid
from saccade.models.moments import EventOutput, EventParser, check_mask, check_streams


class ParsingHead(nn.Module):
    """p at each step of each stream; in a stream by weights over time, at all by weights over streams too.

    Args:
        dim: C.
        num_classes: K.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.probability = nn.Linear(dim, num_classes)
        self.over_time, self.over_streams = nn.Linear(dim, num_classes), nn.Linear(dim, num_classes)

    def forward(self, x_BTMC: Tensor, mask: Tensor | None = None) -> EventOutput:
        """Of streams beside each other; `mask` is bool (B, T), False is padding."""
        p_BTMK = self.probability(x_BTMC).sigmoid()
        scores = self.over_time(x_BTMC)
        if mask is not None:
            scores = scores.masked_fill(~mask[..., None, None], torch.finfo(scores.dtype).min)
        over_time = scores.softmax(1)
        over_streams = self.over_streams(x_BTMC).softmax(2)
        return EventOutput(
            p_BTMK, (over_time * p_BTMK).sum(1), (over_time * over_streams * p_BTMK).sum((1, 2)), mask=mask
        )


class LocalisationHead(nn.Module):
    """One class or none for each step, from both streams beside each other: softmax of 1 + K, none first.

    Args:
        dim: C.
        num_classes: K.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.classify = nn.Linear(2 * dim, 1 + num_classes)

    def forward(self, x_BTMC: Tensor, mask: Tensor | None = None) -> EventOutput:
        """One stream comes out, of both; that a class happens is the largest of its steps."""
        logits = self.classify(x_BTMC.flatten(2))
        p_BTMK = logits.softmax(-1)[:, :, None, 1:]
        streams = (p_BTMK if mask is None else p_BTMK * mask[..., None, None]).amax(1)
        return EventOutput(p_BTMK, streams, streams[:, 0], logits=logits, mask=mask)


class MMPyramid(EventParser):
    """Which events are heard and seen when.

    Args:
        num_classes: K.
        hidden: C.
        audio_dim, video_dim, motion_dim: channels of the features of sound (VGGish), frames (ResNet-152) and motion
            (R(2+1)D); without motion where that is 0.
        frames: of the picture in each step; their mean is taken.
        num_heads, feedforward, levels, kernel_size, cross, drop, attention_drop: of `Pyramid`.
        head: "parse": probabilities in each stream. "localise": one class or none for each step of both.

    Raises:
        ValueError: if the head is unknown, or a size does not fit.
    """

    slug = "mm-pyramid"
    views: ClassVar[tuple[str, ...]] = ("audio", "video", "motion")
    authors_module = "avvp_net"

    def __init__(
        self,
        num_classes: int = 25,
        hidden: int = 512,
        *,
        audio_dim: int = 128,
        video_dim: int = 2048,
        motion_dim: int = 512,
        frames: int = 8,
        num_heads: int = 8,
        feedforward: int = 512,
        levels: int = 4,
        kernel_size: int = 3,
        cross: bool = True,
        head: Literal["parse", "localise"] = "parse",
        drop: float = 0.2,
        attention_drop: float = 0.1,
    ) -> None:
        super().__init__()
        if head not in ("parse", "localise"):
            raise ValueError(f"head must be 'parse' or 'localise', got {head!r}")
        if min(num_classes, audio_dim, video_dim, frames) < 1 or motion_dim < 0:
            raise ValueError(
                f"num_classes, audio_dim, video_dim and frames must be positive and motion_dim 0 or more, got "
                f"{num_classes}, {audio_dim}, {video_dim}, {frames} and {motion_dim}"
            )
        self.frames, self.dims = frames, (audio_dim, video_dim, motion_dim)
        self.audio_map, self.video_map = nn.Linear(audio_dim, hidden), nn.Linear(video_dim, hidden)
        self.motion_map = nn.Linear(motion_dim, hidden) if motion_dim else None
        self.join = nn.Linear(2 * hidden, hidden) if motion_dim else None
        self.pyramid = Pyramid(
            hidden, feedforward, num_heads, levels=levels, kernel_size=kernel_size, cross=cross, drop=drop,
            attention_drop=attention_drop,
        )  # fmt: skip
        self.head = (ParsingHead if head == "parse" else LocalisationHead)(hidden, num_classes)
        if not motion_dim:
            self.views = ("audio", "video")  # type: ignore[misc]
        if head == "localise":
            self.streams = ("audio and video",)

    def forward(
        self, audio: Tensor, video: Tensor, motion: Tensor | None = None, mask: Tensor | None = None
    ) -> EventOutput:
        """
        Args:
            audio: (B, T, audio_dim).
            video: (B, T frames, video_dim), or (B, T, video_dim) where there is one frame a step.
            motion: (B, T, motion_dim); None for a network without.
            mask: bool (B, T), False is padding.

        Raises:
            ValueError: if they do not fit the network or each other.
        """
        audio_dim, video_dim, motion_dim = self.dims
        given = {"audio": (audio, audio_dim), "video": (video, video_dim)}
        if (motion is None) != (self.motion_map is None):
            raise ValueError(
                f"motion must be given: this network takes {motion_dim} channels of it"
                if motion is None
                else "motion must be None: this network takes none"
            )
        if motion is not None:
            given["motion"] = (motion, motion_dim)
        check_streams(**given)
        check_mask(mask, audio)
        steps = audio.shape[1]
        if video.shape[1] != steps * self.frames or (motion is not None and motion.shape[1] != steps):
            raise ValueError(
                f"video must have {self.frames} frames and motion one step for each of {steps} steps of audio, got "
                f"{video.shape[1]}" + ("" if motion is None else f" and {motion.shape[1]}")
            )
        v_BTC = self.video_map(video).unflatten(1, (steps, self.frames)).mean(2)
        if self.join is not None and self.motion_map is not None:
            v_BTC = self.join(torch.cat([v_BTC, self.motion_map(motion)], -1))
        video_BTC, audio_BTC = self.pyramid(v_BTC, self.audio_map(audio), mask)
        return self.head(torch.stack([audio_BTC, video_BTC], 2), mask)

    def loss(self, said: EventOutput, truth_BTMK: Tensor) -> Tensor:
        """Of the base; with a head for localisation cross entropy over 1 + K, see `localisation_loss`."""
        return super().loss(said, truth_BTMK) if said.logits is None else localisation_loss(said, truth_BTMK)

    def predict(self, files: str | Path | Sequence[str | Path]) -> Any:
        """As of the base; a class that does not happen at all (below 0.5) happens at no step."""
        said = super().predict(files)
        there = (said.whole >= 0.5).to(said.probabilities.dtype)
        return replace(said, probabilities=said.probabilities * there[:, None, None])
