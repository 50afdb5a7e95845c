"""Triplet attention: three gates, one per pair of axes of a feature map, averaged.

Misra, Nalamada, Arasanipalai, Hou, "Rotate to Attend: Convolutional Triplet Attention Module", WACV 2021,
arXiv 2010.03045.

    Z_a(x) = [max over axis a; mean over axis a]                                              (Z-pool)
    A_cw   = sigmoid( BN( conv_kxk(Z_H(x)) ) ),    a map over channel and column
    A_hc   = sigmoid( BN( conv_kxk(Z_W(x)) ) ),    a map over row and channel
    A_hw   = sigmoid( BN( conv_kxk(Z_C(x)) ) ),    a map over row and column
    y[c,h,w] = x[c,h,w] (A_cw[c,w] + A_hc[h,c] + A_hw[h,w]) / 3

Symbols: k `kernel_size`; each convolution has 2 channels in, 1 out, no bias; BN is a BatchNorm of one channel
(momentum 0.01). Nothing is squeezed, so the module costs 6 k^2 + 6 parameters whatever the number of channels; and
because two of its convolutions slide along the channels, it depends on their order, which SE and CBAM do not.

The paper and the authors' code turn the map, gate it, and turn it back, three times. Here the three maps come from
reductions of the map as it lies, and one product applies their mean; both forms agree up to rounding. The paper speaks
of rotations, the code permutes axes; this follows the code.

Placement: on the residual branch, after its last norm and before the addition, in every block of a ResNet; at the end
of each inverted residual's branch in MobileNetV2.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Claim, ClaimResult, register

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab


def z_pool(x_BCHW: Tensor, axis: int) -> Tensor:
    """[max; mean] over one axis of a map, as two channels of a plane: (B, 2, ...) of the two axes that are left."""
    return torch.stack([x_BCHW.amax(axis), x_BCHW.mean(axis)], 1)


class PlaneGate(nn.Module):
    """sigmoid(BN(conv(z))): two channels (B, 2, rows, columns) to one (B, 1, rows, columns)."""

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(1, eps=1e-5, momentum=0.01)

    def forward(self, z_B2RS: Tensor, transposed: bool = False) -> Tensor:
        """`transposed`: rows and columns of the plane are exchanged; the kernel is turned instead of the plane."""
        if transposed:
            kernel = self.conv.weight.transpose(2, 3)
            return self.norm(F.conv2d(z_B2RS, kernel, padding=kernel.shape[-1] // 2)).sigmoid()
        return self.norm(self.conv(z_B2RS)).sigmoid()


class TripletAttention(nn.Module):
    """The map times the mean of its three gates; x (B, C, H, W) -> y of the same shape and memory format, any C, H, W.

    Args:
        channels: C of the maps; None takes any number, for the weights do not depend on it.
        kernel_size: k, odd; the paper has 7 and 3.
        spatial: False leaves A_hw out and averages the other two (the authors' `no_spatial`).

    Raises:
        ValueError: if an argument is out of range, or the input is not (B, C, H, W).
    """

    def __init__(self, channels: int | None = None, kernel_size: int = 7, spatial: bool = True) -> None:
        super().__init__()
        if channels is not None and channels < 1:
            raise ValueError(f"channels must be positive, got {channels}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.channels = channels
        self.cw, self.hc = PlaneGate(kernel_size), PlaneGate(kernel_size)
        self.hw = PlaneGate(kernel_size) if spatial else None

    def gates(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        """A_cw (B, C, 1, W), A_hc (B, C, H, 1) and, with `spatial`, A_hw (B, 1, H, W)."""
        self._check(x_BCHW)
        if x_BCHW.is_contiguous(memory_format=torch.channels_last) and not x_BCHW.is_contiguous():
            # pooled as the map lies in memory: across it, PyTorch's reductions take twenty times as long
            x_BHWC = x_BCHW.permute(0, 2, 3, 1)
            cw_BC1W = self.cw(z_pool(x_BHWC, 1), transposed=True).permute(0, 3, 1, 2)
            hc_BCH1 = self.hc(z_pool(x_BHWC, 2)).permute(0, 3, 2, 1)
            hw_B2HW = z_pool(x_BHWC, 3)
        else:
            cw_BC1W = self.cw(z_pool(x_BCHW, 2)).transpose(1, 2)
            hc_BCH1 = self.hc(z_pool(x_BCHW, 3), transposed=True)[:, 0, ..., None]
            hw_B2HW = z_pool(x_BCHW, 1)
        return (cw_BC1W, hc_BCH1) if self.hw is None else (cw_BC1W, hc_BCH1, self.hw(hw_B2HW))

    def gate(self, x_BCHW: Tensor) -> Tensor:
        """The mean of the gates, (B, C, H, W): `module(x) == x * module.gate(x)`; what `attention_map` shows."""
        cw_BC1W, hc_BCH1, *hw = (gate / (2 if self.hw is None else 3) for gate in self.gates(x_BCHW))
        total_BCHW = cw_BC1W + hc_BCH1
        return total_BCHW.add_(hw[0]) if hw else total_BCHW

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW * self.gate(x_BCHW)

    def _check(self, x_BCHW: Tensor) -> None:
        if x_BCHW.ndim != 4 or 0 in x_BCHW.shape[1:] or self.channels not in (None, x_BCHW.shape[1]):
            channels = "channels" if self.channels is None else self.channels
            raise ValueError(f"x must be (batch, {channels}, height, width), got {tuple(x_BCHW.shape)}")

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


# The authors' names.


def _build(args: dict[str, Any]) -> TripletAttention:
    return TripletAttention(kernel_size=args.get("kernel_size", 7), spatial=not args.get("no_spatial", False))


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(".conv.conv.", ".conv.").replace(".conv.bn.", ".norm."): t for name, t in state.items()}


def _run(module: TripletAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    x_BCHW = inputs["x"]
    cw_BC1W, hc_BCH1, *_ = module.gates(x_BCHW)
    return {"branch_cw": x_BCHW * cw_BC1W, "branch_hc": x_BCHW * hc_BCH1, "y": module(x_BCHW)}


# The claim: a handwritten digit somewhere on noise.


def digits_on_noise(
    images_N1HW: Tensor, labels_N: Tensor, count: int, generator: torch.Generator, size: int = 20
) -> tuple[Tensor, Tensor]:
    """Images (count, 1, size, size) of unit noise with one of the digits added at a random place, and their labels."""
    chosen_B = torch.randint(len(labels_N), (count,), generator=generator)
    side = images_N1HW.shape[-1]
    corner_B2 = torch.randint(size - side + 1, (count, 2), generator=generator)
    offset = torch.arange(side)
    rows, columns = corner_B2[:, :1, None] + offset[:, None], corner_B2[:, 1:, None] + offset
    image_BHW = torch.randn(count, size, size, generator=generator)
    image_BHW[torch.arange(count)[:, None, None], rows, columns] += 4 * images_N1HW[chosen_B, 0]
    return image_BHW[:, None], labels_N[chosen_B]


class _Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int, gate: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            gate(channels),
        )
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(self.branch(x_BCHW) + self.shortcut(x_BCHW))


def _network(gate: Callable[[int], nn.Module]) -> nn.Sequential:
    blocks = [_Block(i, o, s, gate) for i, o, s in ((1, 16, 1), (16, 32, 2), (32, 64, 2))]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def _claim(lab: Lab) -> ClaimResult:
    """A residual network of three blocks plain and with triplet attention, same seeds, steps and images."""
    source = lab.data.digits()
    kinds: dict[str, Callable[[int], nn.Module]] = {
        "plain": lambda channels: nn.Identity(),
        "triplet": TripletAttention,
    }
    seeds = lab.size(3, 1)
    errors: dict[str, list[float]] = {name: [] for name in kinds}
    parameters = {}
    for seed in lab.progress(range(lab.seed, lab.seed + seeds), "seeds"):
        held_out = torch.Generator().manual_seed(1000 + seed)
        test, label_B = digits_on_noise(source.test_images, source.test_labels, lab.size(1000, 8), held_out)
        for name, gate in kinds.items():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                network = _network(gate)
            parameters[name] = sum(p.numel() for p in network.parameters())
            drawn = torch.Generator().manual_seed(seed)

            def batches(drawn: torch.Generator = drawn) -> Iterator[tuple[Tensor, Tensor]]:
                while True:
                    yield digits_on_noise(source.train_images, source.train_labels, lab.size(32, 4), drawn)

            lab.train(network, batches(), _loss, 250, lr=5e-3, description=name)
            _refresh(network, batches(), lab.steps(20))
            with torch.no_grad():
                errors[name].append(100 * (network.eval()(test).argmax(1) != label_B).float().mean().item())
    measured = {f"error_{name}_percent": sum(values) / seeds for name, values in errors.items()}
    measured |= {f"spread_{name}_percent": max(values) - min(values) for name, values in errors.items()}
    added = 100 * (parameters["triplet"] / parameters["plain"] - 1)
    return ClaimResult(
        {**measured, "added_parameters_triplet_percent": added},
        holds=measured["error_triplet_percent"] < measured["error_plain_percent"],
        note=f"means of {seeds} seeds and their spread (largest less smallest)",
    )


@torch.no_grad()
def _refresh(network: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], count: int) -> None:
    """Running statistics of the trained network: the gates' norms, of momentum 0.01, are still on their way."""
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None  # the plain average
    network.train()
    for _ in range(count):
        network(next(batches)[0])


def _loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(network(batch[0]), batch[1])


register(
    "triplet",
    kind="gate",
    summary="Three gates over the planes (C, W), (H, C) and (H, W), each from a 2-to-1 convolution, averaged.",
    supports=(),
    taxonomy={
        "sequences": "self",
        "levels": "multi",
        "positions": "soft",
        "representations": "multi-dimensional",
    },
    efficiency="",
    complexity="time O(C H W + k^2 (C W + H C + H W)), parameters 6 k^2 + 6",
    invariants=(
        "with zero convolutions the output is half the input, exactly",
        "gates lie strictly between 0 and 1, so signs stay and magnitudes fall",
        "exchanging height and width of input and kernels exchanges them in the output",
        "twice the output without the spatial gate, plus the spatial branch, is three times the full output",
        "one product by the mean of the maps equals three permuted, gated and turned-back maps",
        "the order of channels matters",
    ),
    build=TripletAttention,
    example={"channels": 8, "kernel_size": 3},
    ports=(AuthorsPort("triplet_attention", build=_build, convert=_convert, run=_run),),
    claim=Claim(
        paper="triplet attention lowers the error of residual networks at next to no parameters",
        expected="lower error than the plain network after the same steps, with about 1 % more parameters",
        run=_claim,
    ),
)
