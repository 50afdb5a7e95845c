"""The mask over candidates, and the state of what is chosen.

Shape letters: d candidates, k of them to be chosen, B batch, C = d channels, N rows of a table.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

TIMINGS = ("phase-end", "released")


def _softmax(w_d: Tensor, open_d: Tensor) -> Tensor:
    """0 where nothing is open."""
    top = w_d.masked_fill(~open_d, -torch.inf).amax(0)
    weight_d = open_d * (w_d - torch.where(top.isfinite(), top, 0)).masked_fill(~open_d, 0).exp()
    return weight_d / weight_d.sum().clamp(min=torch.finfo(w_d.dtype).tiny)


def _share(power: int) -> Callable[[Tensor, Tensor], Tensor]:
    def score(w_d: Tensor, open_d: Tensor) -> Tensor:
        weight_d = open_d * w_d.abs() ** power
        return weight_d / weight_d.sum().clamp(min=torch.finfo(w_d.dtype).tiny)

    return score


#: s of logits and of what is open to be chosen: the paper's softmax and the forms that it compares
SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softmax": _softmax,
    "l1": lambda w_d, open_d: open_d * w_d.abs(),
    "l2": lambda w_d, open_d: open_d * w_d.square(),
    "l1-share": _share(1),
    "l2-share": _share(2),
}


class SequentialAttention(nn.Module):
    """x * m, with m over axis 1 of x (B, C, ...), such as features (B, C) or maps (B, C, H, W).

    Args:
        channels: d.
        select: k.
        per_step: b, how many are chosen at once; k / b is whole.
        start, stop: the share of training at which the first phase begins and the last one ends.
        reset: draw w anew when something was chosen.
        timing: "phase-end", or "released", as the authors' code has it.
        score: s, of `SCORES`.
        std: of what w is drawn from.

    Attributes:
        order: what was chosen, in that order, (k,); -1 where nothing was yet.

    Raises:
        ValueError: if numbers do not fit each other, or an option is unknown.

    >>> gate = SequentialAttention(4, 2, start=0.0)
    >>> gate.advance(0.5), gate.advance(1.0), gate.order.ge(0).all().item()
    (True, True, True)
    """

    order: Tensor
    progress: Tensor

    def __init__(
        self,
        channels: int,
        select: int,
        *,
        per_step: int = 1,
        start: float = 0.1,
        stop: float = 1.0,
        reset: bool = True,
        timing: str = "phase-end",
        score: str = "softmax",
        std: float = 1e-5,
    ) -> None:
        super().__init__()
        if not 1 <= per_step <= select <= channels or select % per_step:
            raise ValueError(
                f"per_step must divide select, and select be at most channels, got {per_step}, {select} and {channels}"
            )
        if not 0 <= start < stop <= 1:
            raise ValueError(f"start and stop must be shares of training, start below stop, got {start} and {stop}")
        if timing not in TIMINGS:
            raise ValueError(f"timing must be one of {', '.join(TIMINGS)}, got {timing!r}")
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
        self.channels, self.select, self.per_step = channels, select, per_step
        self.start, self.stop, self.reset, self.timing, self.score, self.std = start, stop, reset, timing, score, std
        self.logits = nn.Parameter(std * torch.randn(channels))
        self.register_buffer("order", torch.full((select,), -1))
        self.register_buffer("progress", torch.zeros(()))

    @property
    def selected(self) -> Tensor:
        """S as bool (d,)."""
        numbers_d = torch.arange(self.channels, device=self.order.device)
        return (numbers_d[:, None] == self.order).any(1)

    def phase(self, progress: float) -> int:
        """c: phases that are over ("phase-end"), or the number of the one that runs ("released"); below 0 none began.

        Args:
            progress: p.
        """
        share = (progress - self.start) / (self.stop - self.start)
        phases = self.select // self.per_step
        now = int(torch.tensor(share * phases).floor())
        return min(now, phases if self.timing == "phase-end" else phases - 1)

    @torch.no_grad()
    def advance(self, progress: float, draws_d: Tensor | None = None) -> bool:
        """Say how far training is, before each of its steps; chooses where a phase asks for it.

        Args:
            progress: p, from 0 to 1.
            draws_d: what w becomes where it is drawn anew; random where None.

        Returns:
            whether something was chosen.

        Raises:
            ValueError: if the progress is no share.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must be between 0 and 1, got {progress}")
        self.progress.fill_(progress)
        phase, chose = self.phase(progress), False
        while (count := int((self.order >= 0).sum())) < self.select:
            due = phase >= count if self.timing == "released" else phase > count // self.per_step
            if not due:
                break
            weight_d = SCORES[self.score](self.logits.float(), ~self.selected).masked_fill(self.selected, -1)
            self.order[count : count + self.per_step] = weight_d.argsort(descending=True, stable=True)[: self.per_step]
            chose = True
            if self.reset:
                drawn = self.std * torch.randn(self.channels) if draws_d is None else draws_d
                self.logits.copy_(drawn)
            if self.timing == "released":
                break  # one choice a call
        return chose

    def mask(self) -> Tensor:
        """m (d,); 1 everywhere before the first phase."""
        open_d = ~self.selected
        weight_d = SCORES[self.score](self.logits, open_d)
        if self.timing == "phase-end":
            weight_d = torch.where((self.order >= 0).all(), 0, weight_d)
        return torch.where(self.progress < self.start, 1, weight_d + self.selected)

    def gate(self, x_BC: Tensor) -> Tensor:
        """m as a factor of x, (1, C, 1, ...)."""
        return self.mask().to(x_BC.dtype).view(1, -1, *[1] * (x_BC.ndim - 2))

    def forward(self, x_BC: Tensor) -> Tensor:
        """
        Args:
            x_BC: (B, C, ...).

        Raises:
            ValueError: if there are other channels.
        """
        if x_BC.ndim < 2 or x_BC.shape[1] != self.channels:
            raise ValueError(f"the input must be (batch, {self.channels}, ...), got {tuple(x_BC.shape)}")
        return x_BC * self.gate(x_BC)


def linear_loss(x_Nd: Tensor, y_N: Tensor, w_d: Tensor, beta_d: Tensor, selected_d: Tensor, penalty: float) -> Tensor:
    """1/2 |X (s * beta) - y|^2 + penalty/2 (|w|^2 + |beta|^2 of those not in S), s = 1 in S and w elsewhere.

    Its minimum is that of the LASSO whose penalty is taken off S; just below the penalty at which nothing new comes in,
    what comes in is what Orthogonal Matching Pursuit takes next.

    Args:
        x_Nd: X, columns of length 1.
        y_N: y.
        w_d, beta_d: what is learned.
        selected_d: S, bool.
        penalty: lambda.
    """
    rest_N = x_Nd @ (torch.where(selected_d, 1, w_d) * beta_d) - y_N
    free = w_d[~selected_d].square().sum() + beta_d[~selected_d].square().sum()
    return rest_N.square().sum() / 2 + penalty / 2 * free
