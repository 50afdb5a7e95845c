"""Whether weights explain: held against other measures of importance, and put to the test of being changed.

Shape letters: B batch, N tokens, C channels, V classes, P permutations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from saccade.explain.attentive_survey.levels import AttentionPooling
from saccade.extras import new_figure
from saccade.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Reader(Protocol):
    """Whatever says something of embedded tokens by one row of weights."""

    def __call__(
        self, x_BNC: Tensor, *, mask_BN: Tensor | None = None, weights_BN: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, V) and weights (B, N): the own ones, or those that are given in their place."""
        ...


@dataclass
class Interpretability:
    """How weights (B, N) compare with importance.

    Attributes:
        weights: of the reader.
        gradient: |x . d logit / d x|, of the class that it says.
        left_out: how far its probabilities move without the token, half the sum of absolute differences.
        tau_gradient, tau_left_out: Kendall's correlation of weights and these, (B,).
        permuted: how far probabilities move when the weights are permuted, the median, (B,).
        adversarial: how far other weights can be from the own ones while probabilities move by `tolerance` at most,
            both by half the sum of absolute differences, (B,); what was found, not what there is.
        mask: real tokens.
    """

    weights: Tensor
    gradient: Tensor
    left_out: Tensor
    tau_gradient: Tensor
    tau_left_out: Tensor
    permuted: Tensor
    adversarial: Tensor
    mask: Tensor

    def figures(self) -> dict[str, float]:
        """Means over the batch, by name."""
        names = ("tau_gradient", "tau_left_out", "permuted", "adversarial")
        return {name: float(getattr(self, name).mean()) for name in names}

    def table(self) -> str:
        """A line a figure."""
        words = {
            "tau_gradient": "Kendall's tau with gradient x input",
            "tau_left_out": "Kendall's tau with leaving a token out",
            "permuted": "change of the prediction, weights permuted",
            "adversarial": "distance of other weights that say the same",
        }
        return table(("probe", "mean"), [(words[name], f"{value:.3f}") for name, value in self.figures().items()])

    def plot(self) -> Figure:
        """What permuting does, by the largest weight; explanations lie at the right and high.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        figure = new_figure(4.5, 3.4)
        axis = figure.subplots()
        axis.plot(self.weights.amax(-1), self.permuted, ".")
        axis.set(xlabel="largest weight", ylabel="change of the prediction, weights permuted", ylim=(0, 1))
        return figure


def kendall(a_BN: Tensor, b_BN: Tensor, mask_BN: Tensor | None = None) -> Tensor:
    """Kendall's tau-b of each row, (B,); 0 where one of them is constant.

    Args:
        a_BN, b_BN: to be compared.
        mask_BN: which of them count.
    """
    signs = [(each[:, :, None] - each[:, None]).sign().to(torch.double) for each in (a_BN, b_BN)]
    if mask_BN is not None:
        both = mask_BN[:, :, None] & mask_BN[:, None]
        signs = [each * both for each in signs]
    sizes = [each.square().sum((1, 2)).sqrt() for each in signs]
    return ((signs[0] * signs[1]).sum((1, 2)) / (sizes[0] * sizes[1]).clamp(min=1e-12)).float()


def interpretability(
    reader: Reader,
    x_BNC: Tensor,
    *,
    mask_BN: Tensor | None = None,
    permutations: int = 100,
    tolerance: float = 0.05,
    generator: torch.Generator | None = None,
) -> Interpretability:
    """The survey's probes of one row of weights.

    Args:
        reader: what reads; its parameters get no gradients.
        x_BNC: embedded tokens.
        mask_BN: True for real tokens; all where None.
        permutations: of the weights of a row.
        tolerance: how far predictions may move under other weights.
        generator: of the permutations.

    Raises:
        ValueError: if shapes do not fit or there are no permutations.
    """
    mask_BN = torch.ones(x_BNC.shape[:2], dtype=torch.bool, device=x_BNC.device) if mask_BN is None else mask_BN
    if x_BNC.ndim != 3 or mask_BN.shape != x_BNC.shape[:2] or permutations < 1:
        raise ValueError(
            "tokens must be (batch, tokens, channels), the mask (batch, tokens), permutations positive, got "
            f"{tuple(x_BNC.shape)}, {tuple(mask_BN.shape)} and {permutations}"
        )
    with torch.enable_grad():
        leaf = x_BNC.detach().clone().requires_grad_()
        logits_BV, weights_BN = reader(leaf, mask_BN=mask_BN)
        (slope_BNC,) = torch.autograd.grad(logits_BV.amax(-1).sum(), leaf)
    gradient_BN = (slope_BNC * x_BNC).sum(-1).abs() * mask_BN
    weights_BN = weights_BN.detach()
    with torch.no_grad():
        said_BV = logits_BV.detach().softmax(-1)

        def moved(mask: Tensor, weights: Tensor | None = None) -> Tensor:
            return _distance(reader(x_BNC, mask_BN=mask, weights_BN=weights)[0].softmax(-1), said_BV)

        left_out = []
        for i in range(x_BNC.shape[1]):
            without = mask_BN.clone()
            without[:, i] = False
            left_out.append(moved(without) * mask_BN[:, i])
        left_out_BN = torch.stack(left_out, 1)
        others = [_permuted(weights_BN, mask_BN, generator) for _ in range(permutations)]
        changes_PB = torch.stack([moved(mask_BN, each) for each in others])
        # weights on the way from the own ones to each permutation, as far as predictions stay
        adversarial_B = _farthest(lambda each: moved(mask_BN, each), weights_BN, others, tolerance)
    return Interpretability(
        weights_BN,
        gradient_BN,
        left_out_BN,
        kendall(weights_BN, gradient_BN, mask_BN),
        kendall(weights_BN, left_out_BN, mask_BN),
        changes_PB.median(0).values,
        adversarial_B,
        mask_BN,
    )


def _farthest(moved: Callable[[Tensor], Tensor], weights_BN: Tensor, others: list[Tensor], tolerance: float) -> Tensor:
    """The largest distance of mixtures of the weights with others at which predictions stay within the tolerance."""
    best_B = torch.zeros(len(weights_BN), device=weights_BN.device)
    for other_BN in others:
        for share in (1.0, 0.5, 0.25):
            mixed_BN = weights_BN + share * (other_BN - weights_BN)
            far_B = _distance(mixed_BN, weights_BN)
            best_B = torch.where((moved(mixed_BN) <= tolerance) & (far_B > best_B), far_B, best_B)
    return best_B


def _permuted(weights_BN: Tensor, mask_BN: Tensor, generator: torch.Generator | None) -> Tensor:
    """The weights of the real tokens of each row in another order."""
    draw_BN = torch.rand(weights_BN.shape, generator=generator).to(weights_BN.device).masked_fill(~mask_BN, 2)
    # the real tokens, in a random order and in their own
    order_BN = draw_BN.argsort(-1)
    place_BN = (~mask_BN).to(torch.uint8).argsort(dim=-1, stable=True)
    return torch.zeros_like(weights_BN).scatter(-1, place_BN, weights_BN.gather(-1, order_BN)) * mask_BN


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().sum(-1) / 2


class AttentionReader(nn.Module):
    """A classifier of one row of weights: tokens, what an encoder makes of them, `AttentionPooling`, a linear layer.

    Args:
        dim: C.
        classes: V.
        encoder: (B, N, C) to (B, N, C); where it mixes tokens, weights stand on mixtures. None for none.
        alignment, hidden, distribution: as of `AttentionPooling`.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        *,
        encoder: nn.Module | None = None,
        alignment: str = "additive",
        hidden: int | None = None,
        distribution: str | float = "softmax",
    ) -> None:
        super().__init__()
        self.encoder = nn.Identity() if encoder is None else encoder
        self.pool = AttentionPooling(dim, alignment=alignment, hidden=hidden, distribution=distribution)
        self.head = nn.Linear(dim, classes)

    def forward(
        self, x_BNC: Tensor, *, mask_BN: Tensor | None = None, weights_BN: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, V) and weights (B, N); what is not real is 0 before the encoder.

        Args:
            x_BNC: tokens.
            mask_BN: True for real ones.
            weights_BN: taken in place of the own weights.
        """
        x_BNC = x_BNC if mask_BN is None else torch.where(mask_BN[..., None], x_BNC, 0)
        pooled_BC, weights_BN = self.pool(self.encoder(x_BNC), mask_BN=mask_BN, weights_BN=weights_BN)
        return self.head(pooled_BC), weights_BN
