"""The paper's claim at laptop size: small transformers on few digits, with attention or one kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.vision.lkca.gate import LKCA

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial


class _Attention(nn.Module):
    """Multi-head self-attention over a grid's tokens, with a learned embedding of positions."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(size * size, channels))  # as large as what it is added to
        self.attention = nn.MultiheadAttention(channels, 4, batch_first=True)

    def tokens(self, x_BNC: Tensor, size: tuple[int, int]) -> Tensor:
        x_BNC = x_BNC + self.position
        return self.attention(x_BNC, x_BNC, x_BNC, need_weights=False)[0]


def _kernels(channels: int, size: int, num_heads: int = 1) -> LKCA:
    """LKCA whose start has the scale of the attention's beside it: the kernel keeps the variance of what it mixes, and
    linear layers start as torch's do. With the 0.02 of the small-data setting, whose width is 192, a mixer of width 32
    gives two thousandths of its input.
    """
    layer = LKCA(channels, size, num_heads=num_heads)
    nn.init.trunc_normal_(layer.kernel, std=1 / size)
    for linear in (layer.v_proj, layer.out_proj):
        assert linear is not None
        linear.reset_parameters()
        nn.init.zeros_(linear.bias)
    return layer


class _Transformer(nn.Module):
    """Images (B, 1, S, S), a token a pixel -> logits (B, 10); pre-norm blocks, mean pooling."""

    def __init__(self, mixers: list[nn.Module], channels: int) -> None:
        super().__init__()
        self.embed = nn.Linear(1, channels)
        self.mixers = nn.ModuleList(mixers)
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(channels),
                nn.Linear(channels, 2 * channels),
                nn.GELU(),
                nn.Linear(2 * channels, channels),
            )
            for _ in mixers
        )
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in mixers)
        self.head = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 10))

    def forward(self, image_B1SS: Tensor) -> Tensor:
        H, W = image_B1SS.shape[2:]
        x_BNC = self.embed(image_B1SS.flatten(2).transpose(1, 2))
        for mixer, mlp, norm in zip(self.mixers, self.mlps, self.norms, strict=True):
            x_BNC = x_BNC + mixer.tokens(norm(x_BNC), (H, W))  # type: ignore[operator]
            x_BNC = x_BNC + mlp(x_BNC)
        return self.head(x_BNC.mean(1))


def _claim(lab: Lab) -> ClaimResult:
    """Four-layer transformers on 400 digits with MSA, with one kernel, with a kernel a head; both views' curves."""
    source = lab.data.digits()
    channels, depth, size, count = 32, lab.size(4, 1), 8, lab.size(400, 8)
    test_images, test_labels = source.test_images[: lab.size(360, 8)], source.test_labels[: lab.size(360, 8)]

    def network(mixer: Callable[[], nn.Module]) -> nn.Module:
        return _Transformer([mixer() for _ in range(depth)], channels)

    few = source.train_images[:count], source.train_labels[:count]

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return lab.data.rows(lab.size(32, 4), generator, *few)

    def measure(trial: Trial) -> dict[str, float]:
        wrong = trial.model(test_images).argmax(1) != test_labels
        return {"error": 100 * wrong.float().mean().item(), "parameters": trial.parameters}

    kinds: dict[str, Callable[[], nn.Module]] = {
        "msa": lambda: _Attention(channels, size),
        "lkca_one_kernel": lambda: _kernels(channels, size),
        "lkca_kernel_a_head": lambda: _kernels(channels, size, num_heads=4),
    }
    forms = {name: partial(network, mixer) for name, mixer in kinds.items()}
    trials = lab.forms(forms, draw, measure, 300, lr=6e-3, seeds=4)

    curves: dict[str, list[float]] = {}

    def keep(trial: Trial) -> dict[str, float]:
        curves[trial.form] = trial.losses
        return {}

    views = {
        view: partial(network, partial(LKCA, channels, size, implementation=view)) for view in ("conv", "attention")
    }
    lab.forms(views, draw, keep, 10, lr=2e-3)
    apart = max(abs(a - b) for a, b in zip(*curves.values(), strict=True))
    error = trials.means("error_{form}_percent", "error")
    return ClaimResult(
        {
            **error,
            **trials.spreads("spread_{form}_percent", "error"),
            **trials.means("parameters_{form}", "parameters"),
            "largest_difference_of_the_views_losses": apart,
        },
        holds=error["error_lkca_one_kernel_percent"] < error["error_msa_percent"] and apart < 1e-3,
        note="means of 4 seeds, which differ by more than the forms do; views compared over 10 steps. The learning "
        "rate is attention's best of four: at 2e-3, 4e-3 and 1e-2 it has 13.5, 12.5 and 11.5 % of errors (one kernel "
        "11.0 and 9.1 at the first two). Attention's position embedding has a standard deviation of 1: with 0.02 it "
        "learns too slowly for these steps. So does LKCA where kernel and layers start at 0.02, the card's inferred "
        "start (26 % at 2e-3, 13 % at 6e-3): here it starts at the scale of its input, as attention does",
    )


CLAIM = Claim(
    paper="static large-kernel mixing beats self-attention in compact vision transformers on small data; both of "
    "its implementations give the same accuracy",
    expected="lower error than self-attention at equal depth and width with fewer parameters; the same losses in "
    "both views",
    run=_claim,
)
