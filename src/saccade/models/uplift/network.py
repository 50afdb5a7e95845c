"""UPLiFT: an encoder of the image, a decoder that makes the guide of one step, and the steps one after the other.

Shape letters: B batch, C channels of the features, D channels inside, H, W image, h, w features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.norms import ChannelNorm
from saccade.models.backbone import check_images
from saccade.models.uplift.attender import LocalAttender, added
from saccade.models.upsampling import Upsampled, Upsampler
from saccade.ops.feature_maps import check_map

NORMS = ("batch", "layer")
RESAMPLES = ("nearest", "bilinear")


class ConvBlock(nn.Module):
    """(convolution, norm, ReLU) once or twice, a 1x1 convolution, and the input's first channels.

    Args:
        in_channels, out_channels: of the map.
        convolutions: 3x3 ones: 1 (SingleConv) or 2 (DoubleConv).
        norm: of `NORMS`.
    """

    def __init__(self, in_channels: int, out_channels: int, convolutions: int, norm: str) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        for channels in (in_channels, out_channels)[:convolutions]:
            steps.append(nn.Conv2d(channels, out_channels, 3, padding=1, bias=False))
            steps.append(nn.BatchNorm2d(out_channels) if norm == "batch" else ChannelNorm(out_channels, 1e-6))
            steps.append(nn.ReLU())
        self.conv = nn.Sequential(*steps, nn.Conv2d(out_channels, out_channels, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return added(self.conv(x_BCHW), x_BCHW)


class Decoder(nn.Module):
    """The guide of one step: [x; e4] -> block -> twice the size -> [.; e3] -> block.

    Args:
        in_channels: C.
        encoded: channels of the encoder's last two maps, e3 and e4.
        width: D.
        blocks: in each half.
        convolutions, norm: of a block.
        noise: channels of noise beside both.
    """

    def __init__(
        self, in_channels: int, encoded: tuple[int, int], width: int, blocks: tuple[int, int], convolutions: int,
        norm: str, noise: int,
    ) -> None:  # fmt: skip
        super().__init__()
        third, fourth = encoded
        self.coarse = _blocks(in_channels + fourth + noise, width, blocks[0], convolutions, norm)
        self.up = nn.ConvTranspose2d(width, width, 2, 2)
        self.fine = _blocks(width + third + noise, width, blocks[1], convolutions, norm)

    def enlarged(self, z_BDHW: Tensor) -> Tensor:
        """Twice the size: by a transposed convolution, and bilinear."""
        size = [2 * n for n in z_BDHW.shape[2:]]
        return self.up(z_BDHW) + F.interpolate(z_BDHW, size, mode="bilinear", align_corners=True)


class UPLiFT(Upsampler):
    """Features of a frozen backbone at the size of its image, by steps of twice the size with the same weights.

        e0 .. e4 = encoder(image);   guide = decoder(x, e3, e4);   x <- LocalAttender(guide, x)

    Args:
        in_channels: C.
        patch: pixels of the image for each feature; where it is no power of two the image is enlarged to the next (16
            for 14).
        iters: steps of a call; as many as reach the pixels where None.
        encoder_widths: channels of the encoder's maps.
        encoder_blocks: in each of its stages.
        decoder_width: D, of the guide.
        decoder_blocks: before and behind the enlargement.
        convolutions: 3x3 ones in a block of the decoder, 1 or 2.
        norm: of `NORMS`.
        attender: offsets of the local attender; None: a 1x1 convolution of the guide and its first channels in its
            place (which drifts away from the features).
        attender_residual: see `LocalAttender`.
        enc_share: the image is encoded once; False: twice as large at every further step.
        enc_resample: how the encoder's maps are brought to a step's size, of `RESAMPLES`.
        refiner_blocks: behind the attender, one convolution each; 0 for none.
        noise: channels of noise in decoder and refiner, as for a VAE's latents.
        noise_scale: their standard deviation.

    Raises:
        ValueError: if an argument is out of range.
    """

    slug = "uplift"
    authors_module = "uplift"

    def __init__(
        self,
        in_channels: int = 384,
        patch: int = 14,
        *,
        iters: int | None = None,
        encoder_widths: Sequence[int] = (16, 32, 64, 128, 128),
        encoder_blocks: int = 1,
        decoder_width: int = 64,
        decoder_blocks: tuple[int, int] = (1, 1),
        convolutions: int = 2,
        norm: str = "batch",
        attender: int | None = 17,
        attender_residual: bool = True,
        enc_share: bool = True,
        enc_resample: str = "nearest",
        refiner_blocks: int = 0,
        noise: int = 0,
        noise_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if norm not in NORMS or enc_resample not in RESAMPLES:
            raise ValueError(
                f"norm must be one of {', '.join(NORMS)} and enc_resample of {', '.join(RESAMPLES)}, got {norm!r} and "
                f"{enc_resample!r}"
            )
        if min(in_channels, patch, encoder_blocks, decoder_width, *decoder_blocks, *encoder_widths) < 1:
            raise ValueError(f"channels, patch and blocks must be positive, got {in_channels}, {patch} and others")
        if len(encoder_widths) < 2 or convolutions not in (1, 2) or min(refiner_blocks, noise) < 0:
            raise ValueError("encoder_widths must be two or more, convolutions 1 or 2, refiner_blocks and noise from 0")
        #: the image's side over the features' after all steps to its pixels
        self.cell = 1 << (patch - 1).bit_length()
        self.iters = self.cell.bit_length() - 1 if iters is None else iters
        if self.iters < 1:
            raise ValueError(f"iters must be positive, got {self.iters}")
        self.in_features, self.patch = in_channels, patch
        self.enc_share, self.enc_resample = enc_share, enc_resample
        self.noise, self.noise_scale = noise, noise_scale
        widths = (3, *encoder_widths)
        self.encoder = nn.ModuleList(
            _blocks(inputs, outputs, encoder_blocks, 1, norm) for inputs, outputs in zip(widths, widths[1:])
        )
        encoded = (encoder_widths[-2], encoder_widths[-1])
        self.decoder = Decoder(in_channels, encoded, decoder_width, decoder_blocks, convolutions, norm, noise)
        self.attender = LocalAttender(decoder_width, attender, residual=attender_residual) if attender else None
        self.out = None if attender else nn.Conv2d(decoder_width, in_channels, 1)
        self.refiner: nn.Sequential | None = None
        if refiner_blocks:
            self.refiner = _blocks(in_channels + encoded[1] + noise, decoder_width, refiner_blocks, 1, norm)
            self.refiner.append(nn.Conv2d(decoder_width, in_channels, 1))

    def encode(self, image_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's last two maps, e3 and e4, at the image's size."""
        maps = [image_B3HW]
        for stage in self.encoder:
            maps.append(stage(maps[-1]))
        return maps[-2], maps[-1]

    def step(self, x_BCHW: Tensor, encoded: tuple[Tensor, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Features at twice their size.

        Args:
            x_BCHW: features (B, C, h, w).
            encoded: what `encode` gave.
            generator: of the noise.
        """
        third, fourth = encoded
        z_BDHW = self.decoder.coarse(self._beside(x_BCHW, fourth, generator))
        guide = self.decoder.fine(self._beside(self.decoder.enlarged(z_BDHW), third, generator))
        if self.attender is not None:
            y_BCHW = self.attender(guide, x_BCHW)
        else:
            assert self.out is not None
            y_BCHW = added(self.out(guide), guide)
        return y_BCHW if self.refiner is None else self.refiner(self._beside(y_BCHW, fourth, generator))

    def forward(
        self,
        pixel_values: Tensor,
        features: Tensor | None = None,
        *,
        iters: int | None = None,
        size: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Upsampled:
        """
        Args:
            pixel_values: images (B, 3, H, W), as the backbone sees them.
            features: (B, C, h, w); those of the backbone (`on`) where None.
            iters: steps, those of the network where None.
            size: (height, width) to which the last features are brought, bilinearly.
            generator: of the noise; torch's global one where None.

        Raises:
            ValueError: if images or features do not fit, or there are neither features nor a backbone.
        """
        check_images(pixel_values, 3)
        x_BCHW = self.seen_by_backbone(pixel_values) if features is None else features
        check_map(x_BCHW, self.in_features)
        if len(x_BCHW) != len(pixel_values):
            raise ValueError(f"features must be of {len(pixel_values)} images, got {len(x_BCHW)}")
        image_B3HW = pixel_values
        if self.cell != self.patch:
            grown = [n * self.cell // self.patch for n in image_B3HW.shape[2:]]
            image_B3HW = F.interpolate(image_B3HW, grown, mode="bilinear", antialias=True)
        encoded = self.encode(image_B3HW)
        steps: list[Tensor] = []
        for number in range(self.iters if iters is None else iters):
            if number and not self.enc_share:
                image_B3HW = F.interpolate(image_B3HW, scale_factor=2, mode="bilinear")
                encoded = self.encode(image_B3HW)
            x_BCHW = self.step(x_BCHW, encoded, generator)
            steps.append(x_BCHW)
        if size is not None:
            x_BCHW = F.interpolate(x_BCHW, size, mode="bilinear")
        return Upsampled(x_BCHW, steps)

    def _beside(self, x_BCHW: Tensor, encoded_BDHW: Tensor, generator: torch.Generator | None) -> Tensor:
        """[x; the encoder's map at its size; noise]."""
        parts = [x_BCHW, F.interpolate(encoded_BDHW, x_BCHW.shape[2:], mode=self.enc_resample)]
        if self.noise:
            shape = (len(x_BCHW), self.noise, *x_BCHW.shape[2:])
            drawn = torch.randn(shape, generator=generator, dtype=x_BCHW.dtype, device=x_BCHW.device)
            parts.append(self.noise_scale * drawn)
        return torch.cat(parts, 1)


def _blocks(inputs: int, outputs: int, count: int, convolutions: int, norm: str) -> nn.Sequential:
    return nn.Sequential(*(ConvBlock(outputs if i else inputs, outputs, convolutions, norm) for i in range(count)))
