"""The paper's claim as an experiment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.vision.lkca.gate import LKCA

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab


class _Attention(nn.Module):
    """Multi-head self-attention over a grid's tokens, with a learned embedding of positions."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(size * size, channels))  # as large as what it is added to
        self.attention = nn.MultiheadAttention(channels, 4, batch_first=True)

    def tokens(self, x_BNC: Tensor, size: tuple[int, int]) -> Tensor:
        x_BNC = x_BNC + self.position
        return self.attention(x_BNC, x_BNC, x_BNC, need_weights=False)[0]


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
    seeds = lab.size(2, 1)

    def train(seed: int, steps: int, name: str, mixer: Callable[[], nn.Module]) -> tuple[nn.Module, list[float]]:
        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            drawn = torch.Generator().manual_seed(seed)
            while True:
                chosen = torch.randint(count, (lab.size(32, 4),), generator=drawn)
                yield source.train_images[chosen], source.train_labels[chosen]

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _Transformer([mixer() for _ in range(depth)], channels)
        return network, lab.train(network, batches(), _loss, steps, lr=2e-3, description=name)

    kinds: dict[str, Callable[[], nn.Module]] = {
        "msa": lambda: _Attention(channels, size),
        "lkca_one_kernel": lambda: LKCA(channels, size),
        "lkca_kernel_a_head": lambda: LKCA(channels, size, num_heads=4),
    }
    errors: dict[str, list[float]] = {name: [] for name in kinds}
    measured: dict[str, float] = {}
    for seed in lab.progress(range(lab.seed, lab.seed + seeds), "seeds"):
        for name, mixer in kinds.items():
            network, _ = train(seed, 300, name, mixer)
            measured[f"parameters_{name}"] = float(sum(p.numel() for p in network.parameters()))
            with torch.no_grad():
                wrong = network.eval()(test_images).argmax(1) != test_labels
            errors[name].append(100 * wrong.float().mean().item())
    views = [
        train(lab.seed, 10, view, lambda view=view: LKCA(channels, size, implementation=view))[1]  # type: ignore[misc]
        for view in ("conv", "attention")
    ]
    apart = max(abs(a - b) for a, b in zip(*views, strict=True))
    mean = {name: sum(values) / seeds for name, values in errors.items()}
    return ClaimResult(
        {
            **{f"error_{name}_percent": value for name, value in mean.items()},
            **{f"spread_{name}_percent": max(values) - min(values) for name, values in errors.items()},
            **measured,
            "largest_difference_of_the_views_losses": apart,
        },
        holds=mean["lkca_one_kernel"] < mean["msa"] and apart < 1e-3,
        note=f"means of {seeds} seeds; views compared over 10 steps; the verdict hangs on attention's position "
        "embedding: with a standard deviation of 0.02 instead of 1 it learns too slowly for these steps and is behind",
    )


def _loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(network(batch[0]), batch[1])


CLAIM = Claim(
    paper="static large-kernel mixing beats self-attention in compact vision transformers on small data; both of "
    "its implementations give the same accuracy",
    expected="lower error than self-attention at equal depth and width with fewer parameters; the same losses in "
    "both views",
    run=_claim,
)
