"""HAN: super-resolution with attention among layers (LAM) and over channels and space at once (CSAM).

Niu et al., "Single Image Super-Resolution via a Holistic Attention Network", arXiv 2008.08767 (ECCV 2020).

    F_0 = conv(image - mean);   F_i = RG_i(F_{i-1}), i = 1 .. G;   F_{G+1} = conv(F_G)
    LAM:   X = [F_{G+1}, ..., F_1] as rows;  E = X X^T;  A = softmax(rowmax(E) - E);  out = gamma A X + X
    CSAM:  out = F + F gamma sigmoid(conv3d(F)),   a 3 x 3 x 3 kernel over (channel, height, width)
    image = up(fuse[CSAM(F_{G+1}), conv(LAM)] + F_0) + mean

RG: residual channel-attention blocks, a convolution, and its input. At the start gamma is 0: LAM and CSAM do nothing.

Where paper and code differ, the code's way is the default: the softmax is of (rowmax - correlation), so that the least
similar layer weighs most (`invert=False`: of the correlation), and the two branches are fused by a convolution before
F_0 is added (the paper adds all three).

Shape letters: B batch, L layers, C channels, H height, W width, s scale.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Claim, ClaimResult, Published, register
from saccade.extras import need
from saccade.models.backbone import Sized, check_images
from saccade.ops.export import output

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab

#: DIV2K's mean colour, as a share of the range
MEAN = (0.4488, 0.4371, 0.4040)


@output
@dataclass
class SuperResolved:
    """What HAN returns: the image (B, 3, s H, s W), in the input's range."""

    image: Tensor


def layer_attention(x_BLCHW: Tensor, *, invert: bool = True) -> Tensor:
    """LAM's weights (B, L, L), rows sum to 1: softmax of rowmax(E) - E, or of E, with E = X X^T over all values.

    Energies are sums over C H W products, so they are taken in float32 at least.
    """
    rows = x_BLCHW.flatten(2)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    energy_BLL = rows @ rows.mT
    if invert:
        energy_BLL = energy_BLL.amax(-1, keepdim=True) - energy_BLL
    return energy_BLL.softmax(-1).to(x_BLCHW.dtype)


class LayerAttention(nn.Module):
    """LAM: each layer's map plus gamma times a mixture of all layers' maps."""

    def __init__(self, invert: bool = True) -> None:
        super().__init__()
        self.invert = invert
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x_BLCHW: Tensor) -> Tensor:
        """(B, L, C, H, W) -> (B, L C, H, W)."""
        mixed = layer_attention(x_BLCHW, invert=self.invert) @ x_BLCHW.flatten(2)
        return (self.gamma * mixed.view_as(x_BLCHW) + x_BLCHW).flatten(1, 2)


class ChannelSpatialAttention(nn.Module):
    """CSAM: x (1 + gamma sigmoid(conv3d(x))), one kernel over channel, height and width."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 1, 3, padding=1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def gate(self, x_BCHW: Tensor) -> Tensor:
        """sigmoid(conv3d(x)), (B, C, H, W)."""
        return self.conv(x_BCHW[:, None])[:, 0].sigmoid()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + x_BCHW * (self.gamma * self.gate(x_BCHW))


class ChannelBlock(nn.Module):
    """RCAB: two convolutions, a gate per channel from the global mean, and the input."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv(channels, channels), _conv(channels, channels)
        self.down, self.up = (
            nn.Conv2d(channels, channels // reduction, 1),
            nn.Conv2d(channels // reduction, channels, 1),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.conv2(F.relu(self.conv1(x_BCHW)))
        gate = self.up(F.relu(self.down(y_BCHW.mean((2, 3), keepdim=True)))).sigmoid()
        return x_BCHW + y_BCHW * gate


class ResidualGroup(nn.Module):
    """RG: blocks, a convolution, and the group's input."""

    def __init__(self, channels: int, reduction: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ChannelBlock(channels, reduction) for _ in range(blocks)))
        self.conv = _conv(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.conv(self.blocks(x_BCHW))


class HAN(Sized):
    """The holistic attention network.

    Args:
        scale: s, a power of two or 3.
        groups: G residual groups.
        blocks: in each.
        channels: C.
        reduction: of the channel gate, a divisor of C.
        value_range: the largest value of a pixel: 255, or 1.
        layer_attention, channel_spatial: False leaves LAM, or CSAM, out (without both it is RCAN's trunk).
        invert: LAM's sign, see the top of this file.

    Raises:
        ValueError: if the scale is not offered, or a number is out of range.
    """

    slug = "han"
    mean: Tensor

    def __init__(
        self,
        scale: int = 2,
        *,
        groups: int = 10,
        blocks: int = 20,
        channels: int = 64,
        reduction: int = 16,
        value_range: float = 255.0,
        layer_attention: bool = True,
        channel_spatial: bool = True,
        invert: bool = True,
    ) -> None:
        super().__init__()
        if scale != 3 and (scale < 1 or scale & (scale - 1)):
            raise ValueError(f"scale must be 3 or a power of two, got {scale}")
        if min(groups, blocks, channels, reduction) < 1 or channels < reduction:
            raise ValueError(
                f"groups, blocks and channels must be positive and reduction at most channels, got {groups}, {blocks}, "
                f"{channels} and {reduction}"
            )
        self.scale = scale
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None] * value_range)
        self.head = _conv(3, channels)
        self.groups = nn.ModuleList(ResidualGroup(channels, reduction, blocks) for _ in range(groups))
        self.body_conv = _conv(channels, channels)
        self.layer_attention = LayerAttention(invert) if layer_attention else None
        self.layer_conv = _conv((groups + 1) * channels, channels) if layer_attention else None
        self.channel_spatial = ChannelSpatialAttention() if channel_spatial else None
        self.fuse = _conv(2 * channels, channels) if layer_attention else None
        steps = [3] if scale == 3 else [2] * (scale.bit_length() - 1)
        self.upsample = nn.Sequential(
            *(layer for s in steps for layer in (_conv(channels, s * s * channels), nn.PixelShuffle(s)))
        )
        self.tail = _conv(channels, 3)

    def forward(self, x_BCHW: Tensor) -> SuperResolved:
        """Images (B, 3, H, W) in [0, value_range].

        Raises:
            ValueError: if `x` is no batch of colour images.
        """
        check_images(x_BCHW, 3)
        first = y_BCHW = self.head(x_BCHW - self.mean)
        maps = []
        for group in self.groups:
            y_BCHW = group(y_BCHW)
            maps.append(y_BCHW)
        y_BCHW = self.body_conv(y_BCHW)
        gated = y_BCHW if self.channel_spatial is None else self.channel_spatial(y_BCHW)
        if self.layer_attention is not None and self.layer_conv is not None and self.fuse is not None:
            stacked_BLCHW = torch.stack([y_BCHW, *maps[::-1]], 1)  # the latest first, as the authors stack them
            gated = self.fuse(torch.cat([gated, self.layer_conv(self.layer_attention(stacked_BLCHW))], 1))
        return SuperResolved(self.tail(self.upsample(gated + first)) + self.mean)


def self_ensemble(model: HAN, x_BCHW: Tensor) -> Tensor:
    """The mean over eight flips and rotations, turned back: the paper's HAN+."""
    images = []
    for turns in range(4):
        for flip in (False, True):
            turned = x_BCHW.rot90(turns, (2, 3))
            out = model(turned.flip(3) if flip else turned).image
            images.append((out.flip(3) if flip else out).rot90(-turns, (2, 3)))
    return torch.stack(images).mean(0)


def psnr(image_BCHW: Tensor, truth_BCHW: Tensor, *, value_range: float = 1.0, border: int = 0) -> Tensor:
    """Peak signal to noise ratio in dB, on the luma of ITU-R BT.601 of colour images, `border` pixels cut off."""
    weight = torch.tensor([65.481, 128.553, 24.966], device=image_BCHW.device) / 255
    off = ((image_BCHW - truth_BCHW) * weight[:, None, None]).sum(1)
    off = off[:, border : off.shape[1] - border, border : off.shape[2] - border]
    return 10 * (value_range**2 / off.square().mean((1, 2)).clamp(min=1e-12)).log10()


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


_NAMES = (
    (r"^head\.0\.", "head."),
    (r"^body\.(\d+)\.body\.(\d+)\.body\.0\.", r"groups.\1.blocks.\2.conv1."),
    (r"^body\.(\d+)\.body\.(\d+)\.body\.2\.", r"groups.\1.blocks.\2.conv2."),
    (r"^body\.(\d+)\.body\.(\d+)\.body\.3\.conv_du\.0\.", r"groups.\1.blocks.\2.down."),
    (r"^body\.(\d+)\.body\.(\d+)\.body\.3\.conv_du\.2\.", r"groups.\1.blocks.\2.up."),
    (r"^body\.(\d+)\.body\.\d+\.", r"groups.\1.conv."),
    (r"^body\.\d+\.", "body_conv."),
    (r"^csa\.", "channel_spatial."),
    (r"^la\.", "layer_attention."),
    (r"^last_conv\.", "layer_conv."),
    (r"^last\.", "fuse."),
    (r"^tail\.0\.", "upsample."),
    (r"^tail\.1\.", "tail."),
)


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    mean = -state["sub_mean.bias"]
    identity = torch.eye(len(mean))[:, :, None, None]
    for name in ("sub_mean.weight", "add_mean.weight", "add_mean.bias"):
        if name in state and not torch.equal(state[name], mean if name.endswith("bias") else identity):
            raise ValueError(f"{name} must only take the mean off or add it")
    converted = {"mean": mean[:, None, None]}
    for key, tensor in state.items():
        if key.startswith(("sub_mean.", "add_mean.")):
            continue
        for pattern, name in _NAMES:
            renamed, found = re.subn(pattern, name, key)
            if found:
                key = renamed
                break
        converted[key] = tensor
    return converted


def _build(args: dict[str, Any]) -> HAN:
    scale = args.get("scale", 2)
    return HAN(
        scale[0] if isinstance(scale, (list, tuple)) else scale,
        groups=args.get("n_resgroups", 10),
        blocks=args.get("n_resblocks", 20),
        channels=args.get("n_feats", 64),
        reduction=args.get("reduction", 16),
        value_range=args.get("rgb_range", 255),
    )


def _run_layers(module: LayerAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    return {"y": module(inputs["x"]), "attention": layer_attention(inputs["x"])}


def _photographs(factor: int) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """(small, large) pairs of skimage's photographs, to learn from and to be judged on; values in [0, 1]."""
    data = need("skimage.data", "the claim of han")

    def pair(image: Any) -> tuple[Tensor, Tensor]:
        large = torch.as_tensor(image[..., :3].copy()).permute(2, 0, 1)[None] / 255
        large = large[..., : large.shape[2] // factor * factor, : large.shape[3] // factor * factor]
        small = F.interpolate(large, scale_factor=1 / factor, mode="bicubic", antialias=True).clamp(0, 1)
        return small, large

    return [pair(data.chelsea()), pair(data.coffee()), pair(data.rocket())], [pair(data.astronaut())]


def _claim(lab: Lab) -> ClaimResult:
    """Photographs at twice their size: bicubic, the trunk alone, with LAM and CSAM; two seeds, equal budget."""
    learn, judge = _photographs(2)
    side = lab.size(24, 8)

    def patches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)

        def upto(n: int) -> int:
            return int(torch.randint(n, (1,), generator=generator))

        while True:
            chosen = []
            for _ in range(lab.size(8, 2)):
                small, large = learn[upto(len(learn))]
                top, left = upto(small.shape[2] - side), upto(small.shape[3] - side)
                pair = (
                    small[0, :, top : top + side, left : left + side],
                    large[0, :, 2 * top : 2 * (top + side), 2 * left : 2 * (left + side)],
                )
                chosen.append(pair)
            yield torch.stack([p[0] for p in chosen]), torch.stack([p[1] for p in chosen])

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]).image - batch[1]).abs().mean()

    def quality(image: Tensor, truth: Tensor) -> float:
        return psnr(image.clamp(0, 1), truth, border=2).item()

    (small, large), *_ = judge
    if lab.smoke:
        small, large = small[..., :16, :16], large[..., :32, :32]
    bicubic = F.interpolate(small, scale_factor=2, mode="bicubic")
    measured = {"bicubic_psnr_db": quality(bicubic, large)}
    sizes: dict[str, Any] = {"groups": 2, "blocks": 2, "channels": lab.size(16, 4), "reduction": 4, "value_range": 1.0}
    for name, parts in {
        "trunk": {"layer_attention": False, "channel_spatial": False},
        "han": {},
    }.items():
        found, gammas = [], []
        for seed in range(lab.seed, lab.seed + 2):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = HAN(2, **sizes, **parts)
            lab.train(model, patches(seed), loss, 200, lr=2e-3, description=f"{name}, seed {seed}")
            with torch.no_grad():
                found.append(quality(model.eval()(small).image, large))
            gammas += [p.abs().item() for n, p in model.named_parameters() if n.endswith("gamma")]
        measured[f"{name}_psnr_db"] = sum(found) / len(found)
        measured[f"{name}_psnr_spread_db"] = max(found) - min(found)
        if gammas:
            measured["largest_gamma"] = max(gammas)
    gain = measured["han_psnr_db"] - measured["trunk_psnr_db"]
    return ClaimResult(
        {**measured, "gain_over_trunk_db": gain},
        holds=gain > 0 and measured["han_psnr_db"] > measured["bicubic_psnr_db"],
    )


register(
    "han",
    kind="model",
    summary="Super-resolution with attention among the outputs of all layers and a 3-D gate over channels and space.",
    taxonomy={"sequences": "self", "levels": "multi", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="LAM: time O(L^2 C H W), one parameter; CSAM: 27 C H W, 29 parameters",
    invariants=(
        "with gamma 0 LAM and CSAM return their input",
        "LAM's rows sum to 1; equal layers weigh equally and give (1 + gamma) X; it commutes with their order",
        "zero kernels make CSAM x (1 + gamma / 2)",
        "the parameters at scale 2 are the authors' 15,924,057, less 24 that are fixed",
    ),
    build=HAN,
    example={"scale": 2, "groups": 2, "blocks": 1, "channels": 8, "reduction": 4, "value_range": 1.0},
    inputs=lambda module, size: (torch.rand(2, 3, size, size + 2),),
    ports=(
        AuthorsPort("lam", build=lambda args: LayerAttention(), convert=dict, run=_run_layers),
        AuthorsPort(
            "csam",
            build=lambda args: ChannelSpatialAttention(),
            convert=dict,
            run=lambda module, inputs, args: {"y": module(inputs["x"])},
        ),
        AuthorsPort(
            "han",
            build=_build,
            convert=_convert,
            run=lambda module, inputs, args: {"y": module(inputs["x"]).image},
        ),
    ),
    claim=Claim(
        paper="LAM and CSAM add 0.2 dB over the residual-channel-attention trunk (Manga109, four times the size)",
        expected="a tiny HAN beats bicubic, and its own trunk, on a photograph it has not seen, at twice the size",
        run=_claim,
    ),
    published=(
        Published(
            "HAN x2",
            {"scale": 2},
            15.924057,
            resolution=48,
            note="the paper counts the 24 fixed numbers of the mean",
        ),
    ),
)
