"""DAS attention: one weight per pixel and channel, from a deformable convolution behind a bottleneck.

Salajegheh, Asadi, Saryazdi, Mudur, "DAS: A Deformable Attention to Capture Salient Information in CNNs", 2023,
arXiv 2311.12091. No authors' code could be had; the method follows the card, which weighs the abstract against four
re-implementations, and builds what they disagree on as options.

    U   = PW(DW(X))                                                depthwise separable, C -> m = max(1, round(alpha C))
    X_c = act( InstanceNorm(U) )                                                   per sample and channel, over H and W
    D(p) = b + sum_k w_k X_c(p + p_k + d_k(p)),   d = conv3x3(X_c)          deformable convolution, m -> C, v1: no mask
    A   = sigmoid( Norm(D) )
    Y   = X * A

Symbols: alpha `alpha`, act `act`; X_c is read bilinearly and as zeros outside; d are offsets (dy, dx) per tap in
pixels, from a convolution that starts at zero (the deformable convolution starts as an ordinary one).

What the sources leave open, and the default here: `act` GELU (recalled from the paper; re-implementations have ReLU or
none); `norm_dims` "C", a LayerNorm over channels at each position, which does not depend on the image's size ("CHW":
over channels and positions, with a scale per channel); `gate_on` "input" (two re-implementations gate X_c instead, and
so change the number of channels: "bottleneck"); `residual` False.

Numerics: offsets and sampling are in single precision at least. On a map of one pixel the instance norm gives zeros,
so that the gate is its biases' alone. The gate starts near 1/2 on average: several in a row scale activations down,
which the norms that follow absorb.

Placement: one at the end of each stage of a ResNet; `saccade.insert(model, "das", after="...stages.*")`. Cost is linear
in the number of pixels: about 2 C^2 multiply-adds each at alpha = 0.2.

Shape letters: B batch, C channels of the map, m channels of the bottleneck, E channels of the gate (C or m), H height,
W width, k kernel size, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult, register
from saccade.ops.deformable import deformable_conv

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "none": lambda x: x}


class DAS(nn.Module):
    """The map times its deformable gate; x (B, C, H, W) -> y, any H and W, memory format kept.

    Args:
        channels: C.
        alpha: compression of the bottleneck, in (0, 1]; the paper's gain saturates near 0.1 to 0.2.
        kernel_size: of the depthwise and the deformable convolution, odd.
        act: "gelu", "relu" or "none".
        norm_dims: "C" or "CHW".
        gate_on: "input", or "bottleneck": X_c is gated and comes out, with m channels (`out_channels`).
        residual: add what was gated.

    Raises:
        ValueError: if an argument is out of range, or the input is not (B, C, H, W).
    """

    def __init__(
        self,
        channels: int,
        alpha: float = 0.2,
        kernel_size: int = 3,
        act: str = "gelu",
        norm_dims: str = "C",
        gate_on: str = "input",
        residual: bool = False,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be positive, got {channels}")
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must be above 0 and at most 1, got {alpha}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        for name, value, allowed in (
            ("act", act, tuple(ACTIVATIONS)),
            ("norm_dims", norm_dims, ("C", "CHW")),
            ("gate_on", gate_on, ("input", "bottleneck")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        width = max(1, round(alpha * channels))
        self.channels, self.act, self.norm_dims, self.residual = channels, act, norm_dims, residual
        self.gate_on, self.out_channels = gate_on, channels if gate_on == "input" else width
        self.depthwise = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.pointwise = nn.Conv2d(channels, width, 1)
        self.offset = nn.Conv2d(width, 2 * kernel_size**2, 3, padding=1)
        self.conv = nn.Conv2d(width, self.out_channels, kernel_size, padding=kernel_size // 2)  # weights of the taps
        self.norm = nn.LayerNorm(channels if gate_on == "input" else width, eps=1e-5)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]

    def bottleneck(self, x_BCHW: Tensor) -> Tensor:
        """X_c, (B, m, H, W), channels-last: the deformable convolution reads all channels of a pixel."""
        u_BmHW = self.pointwise(self.depthwise(x_BCHW))
        # a group per channel is the instance norm, which PyTorch refuses on single pixels
        normed_BmHW = torch.group_norm(u_BmHW, u_BmHW.shape[1])
        return ACTIVATIONS[self.act](normed_BmHW).contiguous(memory_format=torch.channels_last)

    def logits(self, c_BmHW: Tensor) -> Tensor:
        """Norm(D) of X_c, (B, E, H, W)."""
        d_BEHW = deformable_conv(
            c_BmHW, self.offset(c_BmHW), self.conv.weight, self.conv.bias, padding=self.conv.kernel_size[0] // 2
        )
        if self.norm_dims == "CHW":
            return F.group_norm(d_BEHW, 1, self.norm.weight, self.norm.bias, self.norm.eps)
        return self.norm(d_BEHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def gate(self, x_BCHW: Tensor) -> Tensor:
        """A, (B, E, H, W); what `attention_map` shows."""
        self._check(x_BCHW)
        return self.logits(self.bottleneck(x_BCHW)).sigmoid()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        self._check(x_BCHW)
        c_BmHW = self.bottleneck(x_BCHW)
        gate_BEHW = self.logits(c_BmHW).sigmoid()
        gated_BEHW = x_BCHW if self.gate_on == "input" else c_BmHW
        if x_BCHW.is_contiguous():
            gate_BEHW, gated_BEHW = gate_BEHW.contiguous(), gated_BEHW.contiguous()
        return gated_BEHW * (gate_BEHW + 1 if self.residual else gate_BEHW)

    def _check(self, x_BCHW: Tensor) -> None:
        if x_BCHW.ndim != 4 or x_BCHW.shape[1] != self.channels or 0 in x_BCHW.shape[2:]:
            raise ValueError(f"x must be (batch, {self.channels}, height, width), got {tuple(x_BCHW.shape)}")

    def extra_repr(self) -> str:
        return f"act={self.act!r}, norm_dims={self.norm_dims!r}, gate_on={self.gate_on!r}, residual={self.residual}"


# The claim: the answer lies beyond the kernel's square.


def beside(count: int, generator: torch.Generator, size: int = 21) -> tuple[Tensor, Tensor, Tensor]:
    """Images (count, 5, size, size) with a marked pixel and four 5x5 patches around it, one of each colour.

    Patches lie right, left, below and above the mark, their middles 4 to 8 pixels away; the label is the colour of the
    right one. All colours are in each image, so that no statistic of it tells. Channels 0 to 3 are the colours, 4 the
    mark. Returns images, labels and the marks' (row, column).
    """
    colour_B4 = torch.rand(count, 4, generator=generator).argsort(1)
    distance_B4 = torch.randint(4, 9, (count, 4), generator=generator)
    mark_B2 = torch.randint(10, size - 10, (count, 2), generator=generator)
    direction_42 = torch.tensor([[0, 1], [0, -1], [1, 0], [-1, 0]])
    middle_B42 = mark_B2[:, None] + distance_B4[..., None] * direction_42
    around = torch.arange(-2, 3)
    rows = middle_B42[..., 0, None, None] + around[:, None]
    columns = middle_B42[..., 1, None, None] + around
    image = torch.randn(count, 5, size, size, generator=generator) * 0.1
    batch = torch.arange(count)
    image[batch[:, None, None, None], colour_B4[..., None, None], rows, columns] += 1
    image[batch, 4, mark_B2[:, 0], mark_B2[:, 1]] += 1
    return image, colour_B4[:, 0], mark_B2


class _Reader(nn.Module):
    """A 3x3 convolution and a gate; logits (B, K) from the pixel that is marked."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(5, 16, 3, padding=1), nn.ReLU(), gate)
        self.head = nn.Linear(16, 4)

    def forward(self, image: Tensor, mark_B2: Tensor) -> Tensor:
        maps = self.body(image)
        return self.head(maps[torch.arange(len(maps)), :, mark_B2[:, 0], mark_B2[:, 1]])


def _claim(lab: Lab) -> ClaimResult:
    """The same reader with DAS and with DAS whose offsets are held at zero; error by seeds, offsets, time by pixels."""
    seeds = lab.size(2, 1)
    errors: dict[str, list[float]] = {"das": [], "plain_convolution": []}
    moved = []
    for seed in lab.progress(range(lab.seed, lab.seed + seeds), "seeds"):
        test, label_B, mark_B2 = beside(lab.size(500, 8), torch.Generator().manual_seed(1000 + seed))
        for name in errors:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                gate = DAS(16, alpha=0.5)
                network = _Reader(gate)
            gate.offset.requires_grad_(name == "das")
            lab.train(network, _batches(seed, lab.size(32, 4)), _loss, 400, lr=1e-2, description=name)
            with torch.no_grad():
                errors[name].append(100 * (network.eval()(test, mark_B2).argmax(1) != label_B).float().mean().item())
                if name == "das":
                    moved.append(gate.offset(gate.bottleneck(network.body[:2](test))).abs().mean().item())
    gate = DAS(64).eval()
    times = []
    for side in lab.size((32, 64), (4, 8)):
        x_BCHW = torch.randn(1, 64, side, side)
        with torch.no_grad():
            times.append(lab.seconds(lambda x_BCHW=x_BCHW: gate(x_BCHW)))  # type: ignore[misc]
    mean = {name: sum(values) / seeds for name, values in errors.items()}
    spread = {f"spread_{name}_percent": max(values) - min(values) for name, values in errors.items()}
    return ClaimResult(
        {
            **{f"error_{name}_percent": value for name, value in mean.items()},
            **spread,
            "mean_offset_pixels": sum(moved) / seeds,
            "time_at_four_times_the_pixels_ratio": times[1] / times[0],
        },
        holds=mean["das"] < mean["plain_convolution"] and times[1] / times[0] < 8,
        note=f"means of {seeds} seeds; three quarters is chance; offsets start at 0; 16 would be quadratic time",
    )


def _batches(seed: int, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield beside(size, generator)


def _loss(network: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    image, label_B, mark_B2 = batch
    return F.cross_entropy(network(image, mark_B2), label_B)


register(
    "das",
    kind="gate",
    summary="One weight per pixel and channel: a separable bottleneck, a deformable convolution, a sigmoid.",
    supports=(),
    taxonomy={
        "sequences": "self",
        "levels": "single",
        "positions": "soft",
        "representations": "multi-dimensional",
    },
    efficiency="",
    complexity="time O(H W (9 C + 10 C m + 162 m)), parameters 10 C m + 163 m + 13 C + 18 at k = 3, m = alpha C",
    invariants=(
        "with offsets of zero the deformable convolution is an ordinary one",
        "with the deformable convolution zero the output is half the input, exactly",
        "gates lie strictly between 0 and 1, so signs stay and magnitudes fall",
        "a constant offset of one pixel shifts the convolution's input by one",
        "scaling the bottleneck's channels leaves the gate as it is, up to the norm's epsilon",
        "logits have mean zero over channels at each position (norm_dims C) or over the whole sample (CHW)",
    ),
    build=DAS,
    example={"channels": 8, "alpha": 0.4},
    claim=Claim(
        paper="DAS beats other attention of CNNs at like cost, because its gate sees salient places beyond the "
        "kernel's square, in time linear in the pixels",
        expected="where the answer lies 4 to 8 pixels away, lower error than with the offsets held at zero; offsets "
        "grow; four times the pixels take about four times as long",
        run=_claim,
    ),
)
