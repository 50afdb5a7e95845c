"""The whole network: a backbone's five maps, the decoder's pyramid, a neck, a head on each of three sizes.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.convolution import conv_norm_relu
from saccade.layers.efficientnet import SIZES, EfficientNetTrunk
from saccade.layers.mobilenet import MobileNetTrunk
from saccade.layers.resize import resize
from saccade.models.backbone import check_images, maps_of
from saccade.models.cpdr.blocks import CPDRA, CPDRB
from saccade.models.segmentation import Saliency, SaliencyNetwork
from saccade.ops.feature_maps import check_map

NECKS: Mapping[str, type[CPDRA] | type[CPDRB]] = {"a": CPDRA, "b": CPDRB}
DECODERS = ("concat", "sum")


class Decoder(nn.Module):
    """A step of the decoder: y and the next finer map r -> the next y, and the feature that is handed on.

        "concat" (U-Net):  y <- CBR_1x1([CBR(up y); r])        "sum" (FPN):  y <- CBR_1x1(CBR(up y + r))

    Args:
        in_channels: of y.
        skip_channels: of r; as many as `in_channels` where they are summed.
        out_channels: of the next y.
        emitted: channels of the feature, CBR_1x1 of the next y.
        kind: of `DECODERS`.
    """

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int, emitted: int, kind: str) -> None:
        super().__init__()
        self.concat = kind == "concat"
        self.conv_in = conv_norm_relu(in_channels, skip_channels)
        self.conv_out = conv_norm_relu(2 * skip_channels if self.concat else in_channels, out_channels, 1)
        self.project = conv_norm_relu(out_channels, emitted, 1)

    def forward(self, y_BCHW: Tensor, skip_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        up_BCHW = resize(y_BCHW, skip_BCHW, align_corners=True)
        if self.concat:
            both_BCHW = torch.cat([self.conv_in(up_BCHW), skip_BCHW], 1)
        else:
            both_BCHW = self.conv_in(up_BCHW + skip_BCHW)
        y_BCHW = self.conv_out(both_BCHW)
        return y_BCHW, self.project(y_BCHW)


class CPDR(SaliencyNetwork):
    """Salient object detection with a crossed refinement behind the decoder; by default CPDR-S.

    Args:
        backbone: gives five maps at strides 2, 4, 8, 16 and 32 (each half of the one before, rounded up), as a list,
            a `Backbone`'s output or one of transformers; or a name of `saccade.layers.efficientnet`, as CPDR-L's
            "efficientnet-b0". A MobileNetV2 where None.
        channels: of these maps; the backbone's own `channels` where None.
        neck: "a" (ADF and AUF), "b" (DACF), or "none" (the decoder's three finest maps as they are).
        base: b, the width at the image's size.
        decoder: of `DECODERS`; "concat" for neck "a" and "sum" for the others where None, as published.
        reductions: of the neck's channel attention, see `CPDRA` and `CPDRB`; theirs where None.
        kernel_size: of the neck's spatial attention.
        factor: of the channel attention's logits.
        width: factor of MobileNetV2's channels.

    Raises:
        ValueError: if an argument is out of range, the backbone unknown, or it tells no channels.
    """

    slug = "cpdr"
    authors_module = "network_cpdr_b"
    image_size = 256

    def __init__(
        self,
        backbone: nn.Module | str | None = None,
        *,
        channels: Sequence[int] | None = None,
        neck: str = "b",
        base: int = 16,
        decoder: str | None = None,
        reductions: Sequence[int] | None = None,
        kernel_size: int = 7,
        factor: float = 2.0,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        if neck not in (*NECKS, "none"):
            raise ValueError(f"neck must be one of {', '.join(NECKS)} and none, got {neck!r}")
        kind = ("concat" if neck == "a" else "sum") if decoder is None else decoder
        if kind not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {decoder!r}")
        if base < 2 or base % 2:
            raise ValueError(f"base must be positive and even, got {base}")
        self.backbone = _trunk(backbone, width) if backbone is None or isinstance(backbone, str) else backbone
        told = getattr(self.backbone, "channels", None) if channels is None else channels
        if told is None or len(told) != 5:
            raise ValueError(f"channels must be those of the backbone's five maps, got {told}")
        self.in_channels = getattr(self.backbone, "in_channels", 3)
        self.channels, b = tuple(told), base
        mapped = (b, 2 * b, 4 * b, 8 * b, 8 * b)
        decoded = (8 * b, 4 * b, 2 * b, b) if kind == "concat" else (4 * b, 2 * b, b, b)
        self.mappers = nn.ModuleList(conv_norm_relu(c, m, 1) for c, m in zip(self.channels, mapped))
        options: dict[str, Any] = {} if reductions is None else {"reductions": reductions}
        self.neck = None if neck == "none" else NECKS[neck](b, kernel_size=kernel_size, factor=factor, **options)
        widths = (4 * b, 2 * b, b, b) if self.neck is None else self.neck.widths
        out_widths = widths[1:] if self.neck is None else self.neck.out_widths
        self.decoders, current = nn.ModuleList(), mapped[-1]
        for skip, out, emitted in zip(mapped[-2::-1], decoded, widths):
            self.decoders.append(Decoder(current, skip, out, emitted, kind))
            current = out
        self.heads = nn.ModuleList(nn.Conv2d(c, 1, 3, padding=1) for c in reversed(out_widths))

    def decode(self, maps: Sequence[Tensor], size: Sequence[int] | None = None) -> list[Tensor]:
        """Logits at strides 1, 2 and 4, of the backbone's five maps.

        Args:
            maps: from fine to coarse, strides 2 to 32.
            size: height and width of the image; twice those of the finest map where None.

        Raises:
            ValueError: if the maps are not five, or their channels or sizes do not fit.
        """
        if len(maps) != 5:
            raise ValueError(f"the backbone must give five maps, got {len(maps)}")
        for x_BCHW, width in zip(maps, self.channels):
            check_map(x_BCHW, width)
        H, W = [2 * length for length in maps[0].shape[2:]] if size is None else size
        for level, x_BCHW in enumerate(maps, 1):
            step = 1 << level
            expected = (-(-H // step), -(-W // step))
            if tuple(x_BCHW.shape[2:]) != expected:
                raise ValueError(f"the map at stride {step} must be {expected}, got {tuple(x_BCHW.shape[2:])}")
        skips = [mapper(x_BCHW) for mapper, x_BCHW in zip(self.mappers, maps)]
        sizes = [(H, W), *(x_BCHW.shape[2:] for x_BCHW in maps[:3])]
        y_BCHW, features = skips.pop(), []
        for decoder in self.decoders:
            y_BCHW, feature = decoder(y_BCHW, skips.pop())
            features.append(F.interpolate(feature, sizes.pop(), mode="bilinear", align_corners=True))
        refined = features[1:] if self.neck is None else self.neck(features)
        return [head(x_BCHW) for head, x_BCHW in zip(self.heads, reversed(refined))]

    def forward(self, pixel_values: Tensor) -> Saliency:
        """Images (B, 3, H, W) in [-1, 1], of any size that the backbone takes; 256 x 256 as published.

        Raises:
            ValueError: if they are no batch of images, or the backbone's maps do not fit.
        """
        check_images(pixel_values, self.in_channels)
        logits, *side = self.decode(maps_of(self.backbone(pixel_values)), pixel_values.shape[2:])
        return Saliency(logits, side)

    def prepared(self, images_B3HW: Tensor) -> Tensor:
        return 2 * images_B3HW - 1


def _trunk(name: str | None, width: float) -> nn.Module:
    if name is None:
        return MobileNetTrunk(width)
    if name not in SIZES:
        raise ValueError(f"backbone must be a module or one of {', '.join(SIZES)}, got {name!r}")
    return EfficientNetTrunk(*SIZES[name])
