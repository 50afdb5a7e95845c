"""Bidirectional recurrent compensation: latent frames put right by the events of their interval, back and forth.

Shape letters: B batch, T latent frames, E intervals, C channels, H height, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.convolution import depthwise
from saccade.layers.gates import ChannelGate
from saccade.layers.norms import ChannelNorm
from saccade.layers.residual import PlainResidualBlock

#: of the leaky ReLU in the recurrent trunk, and of those around it
_INNER, _OUTER = 0.1, 0.2
_EPS = 1e-6


class ChannelFusion(nn.Module):
    """CF: a latent frame x and an event map y, by gates of channels; at the start a 1 x 1 convolution of x + y.

        x_2 = x_1 SE(x_1),  y_2 = x_2 SE(y_1),     x_1 = GELU(DW(conv(LN x))), y_1 likewise of y
        z = conv(x + y + beta conv[y_2; x_2]) + gamma y_2

    Args:
        channels: C, two or more.

    Raises:
        ValueError: if there is one alone.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 2:
            raise ValueError(f"channels must be at least 2, got {channels}")
        self.branches = nn.ModuleList(
            nn.Sequential(
                ChannelNorm(channels, eps=_EPS), nn.Conv2d(channels, channels, 1), depthwise(channels, 3), nn.GELU()
            )
            for _ in range(2)
        )
        self.own_gate, self.event_gate = (ChannelGate(channels, channels // 2) for _ in range(2))
        self.mix = nn.Conv2d(2 * channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        self.beta, self.gamma = (nn.Parameter(torch.zeros(1, channels, 1, 1)) for _ in range(2))

    def forward(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        x1_BCHW, y1_BCHW = self.branches[0](x_BCHW), self.branches[1](y_BCHW)
        x2_BCHW = self.own_gate(x1_BCHW)
        y2_BCHW = x2_BCHW * self.event_gate.gate(y1_BCHW)
        mixed = x_BCHW + y_BCHW + self.beta * self.mix(torch.cat([y2_BCHW, x2_BCHW], 1))
        return self.out(mixed) + self.gamma * y2_BCHW


class CompensationLayer(nn.Module):
    """One direction of the recurrence: h = R[x'; state], where x' is x with its events, if it has some.

    Args:
        channels: C.
        blocks: residual blocks of R.
        both: fuse h with the other direction's state.
    """

    def __init__(self, channels: int, blocks: int = 3, *, both: bool = False) -> None:
        super().__init__()
        self.alone = nn.Conv2d(channels, channels, 3, padding=1)
        self.fusion = ChannelFusion(channels)
        self.trunk = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 3, padding=1),
            nn.LeakyReLU(_INNER),
            nn.Sequential(*(PlainResidualBlock(channels) for _ in range(blocks))),
        )
        self.fuse = nn.Conv2d(2 * channels, channels, 1) if both else None

    def forward(
        self, x_BCHW: Tensor, event: Tensor | None = None, state: Tensor | None = None, other: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The output, and the new state.

        Args:
            x_BCHW: a latent frame.
            event: the map of its interval; None at both ends.
            state: of the frame before; zeros where None.
            other: of the other direction at this frame.
        """
        if event is None:  # the activation is there twice in the authors' code
            x_BCHW = F.leaky_relu(F.leaky_relu(self.alone(x_BCHW), _OUTER), _OUTER)
        else:
            x_BCHW = self.fusion(x_BCHW, event)
        state = torch.zeros_like(x_BCHW) if state is None else state
        h_BCHW = self.trunk(torch.cat([x_BCHW, state], 1))
        if other is None or self.fuse is None:
            return h_BCHW, h_BCHW
        return F.leaky_relu(self.fuse(torch.cat([h_BCHW, other], 1)), _OUTER), h_BCHW


class RecurrentCompensation(nn.Module):
    """BRC: the latent frames, from the last to the first, then from the first to the last; and added to what came in.

    Args:
        channels, blocks: see `CompensationLayer`.
    """

    def __init__(self, channels: int, blocks: int = 3) -> None:
        super().__init__()
        self.back = CompensationLayer(channels, blocks)
        self.on = CompensationLayer(channels, blocks, both=True)

    def forward(self, x_BTCHW: Tensor, events_BECHW: Tensor) -> Tensor:
        """(B, T, C, H, W).

        Args:
            x_BTCHW: T = E + 2 latent frames, the first and last of which are those that were given.
            events_BECHW: of the intervals between.
        """
        frames = x_BTCHW.unbind(1)
        events = [None, *events_BECHW.unbind(1), None]
        states: list[Tensor] = []
        state = None
        for x_BCHW, event in zip(reversed(frames), reversed(events)):
            _, state = self.back(x_BCHW, event, state)
            states.append(state)
        out, state = [], None
        for x_BCHW, event, other in zip(frames, events, reversed(states)):
            y_BCHW, state = self.on(x_BCHW, event, state, other)
            out.append(y_BCHW)
        return x_BTCHW + torch.stack(out, 1)
