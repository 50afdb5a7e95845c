"""A frozen diffusion U-Net as what an image classifier sees: its maps at several noise steps, once, or fed back.

Shape letters: B batch, C channels, H height, W width, K classes, T noise steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from saccade.models.backbone import Backbone, ImageOutput, check_images
from saccade.models.diffssl.fusion import AttentionFusion, FeedbackLayer, Maps, PooledHead
from saccade.models.diffssl.unet import DiffusersUNet, UNet, check_blocks
from saccade.models.diffusion import Diffusion
from saccade.models.images import middle

if TYPE_CHECKING:
    from typing_extensions import Self


class DiffusionClassifier(Backbone):
    """Names the class of an image by the maps of a denoising U-Net, which is not trained.

    Args:
        num_classes: K.
        unet: a `UNet`, or an unconditional `UNet2DModel` of diffusers; a `UNet` of the paper's sizes where None.
        unet_sizes: arguments of that `UNet`.
        times: the noise steps t at which the image is read, from 0 to 999.
        first_blocks, second_blocks: numbers of the blocks that are read in the first and in the second pass.
        feedback: numbers of the blocks of the way up that are fed back; a second pass runs where there are some.
        layout: of `FeedbackLayer`.
        head: "attention": `AttentionFusion`. "linear": `PooledHead` on the only map that is read.
        pool: longest side of a pooled map; 16 with attention and 2 with a linear head where None.
        dim, num_heads, hidden, depth, norm, pooled: of `AttentionFusion`.
        image_size: side of the images, by which the sides of maps are known.
        schedule: of the noise; 1000 linear steps where None.

    Raises:
        ValueError: if nothing is read, a block or a time does not exist, or the head is unknown.
    """

    slug = "diffssl"
    authors_module = "attention_fusion"
    authors_part = "head"

    def __init__(
        self,
        num_classes: int = 1000,
        unet: nn.Module | None = None,
        *,
        unet_sizes: Mapping[str, Any] | None = None,
        times: Sequence[int] = (90, 150, 300),
        first_blocks: Sequence[int] = (19, 24, 30),
        second_blocks: Sequence[int] = (),
        feedback: Sequence[int] = (),
        layout: str = "C_B_R",
        head: Literal["attention", "linear"] = "attention",
        pool: int | None = None,
        dim: int = 1024,
        num_heads: int = 8,
        hidden: int | None = None,
        depth: int = 2,
        norm: Literal["layer", "batch"] = "layer",
        pooled: Literal["class", "mean"] = "class",
        image_size: int = 256,
        schedule: Diffusion | None = None,
    ) -> None:
        super().__init__()
        given = UNet(**(unet_sizes or {})) if unet is None else unet
        self.unet: UNet | DiffusersUNet = given if isinstance(given, (UNet, DiffusersUNet)) else DiffusersUNet(given)
        self.unet.requires_grad_(False).eval()
        with torch.device("cpu"):  # numbers, also where the network itself is built without memory
            schedule = Diffusion() if schedule is None else schedule
        self.times, self.first_blocks, self.second_blocks = tuple(times), tuple(first_blocks), tuple(second_blocks)
        self.in_channels, self.image_size = self.unet.in_channels, image_size
        channels, levels, count = self.unet.channels, self.unet.levels, len(self.unet.channels)
        read = sorted({*first_blocks, *second_blocks})
        check_blocks((*read, *feedback), count)
        if not read or not times or not all(0 <= t < schedule.steps for t in times):
            raise ValueError(
                f"a block must be read, and times lie from 0 to {schedule.steps - 1}, got blocks {read} and times "
                f"{self.times}"
            )
        self.kept = tuple(float(schedule.kept[t]) for t in self.times)
        if second_blocks and not feedback:
            raise ValueError("second_blocks need feedback: without it the second pass is the first again")
        if any(2 * b <= count + 1 for b in feedback):
            raise ValueError(f"feedback must be of the way up, from block {count // 2 + 2} on, got {tuple(feedback)}")
        self.channels, self.strides = tuple(channels[b - 1] for b in read), tuple(2 ** levels[b - 1] for b in read)
        self.feedback = nn.ModuleDict(
            {str(b): FeedbackLayer(channels[b - 1], channels[count - b], layout) for b in sorted(feedback)}
        )
        if head == "linear":
            if len(read) != 1 or len(self.times) != 1 or (first_blocks and second_blocks):
                raise ValueError(f"a linear head reads one map, got blocks {read} at times {self.times}")
            self.head: nn.Module = PooledHead(self.channels[0], num_classes, pool=2 if pool is None else pool)
        elif head == "attention":
            sides = {b: -(-image_size // 2 ** levels[b - 1]) for b in read}
            self.head = AttentionFusion(
                {b: channels[b - 1] for b in read}, sides, num_classes, steps=len(self.times),
                pool=16 if pool is None else pool, dim=dim, num_heads=num_heads, hidden=hidden, depth=depth, norm=norm,
                pooled=pooled,
            )  # fmt: skip
        else:
            raise ValueError(f"head must be 'attention' or 'linear', got {head!r}")

    def train(self, mode: bool = True) -> Self:
        """As of any module, but for the U-Net, which stays in evaluation."""
        super().train(mode)
        self.unet.eval()
        return self

    def passes(self, x_BCHW: Tensor, noise_BTCHW: Tensor) -> tuple[list[Maps], list[Maps]]:
        """Of each noise step the maps of the first pass, and those of the second, on the same x_t.

        In training nothing is kept of the first pass for gradients: these reach the layers of the feedback by the
        second.

        Args:
            x_BCHW: images in [-1, 1].
            noise_BTCHW: of each noise step.
        """
        count = len(self.unet.channels)
        first: list[Maps] = []
        second: list[Maps] = []
        sources = {int(name): layer for name, layer in self.feedback.items()}
        for number, (t, kept) in enumerate(zip(self.times, self.kept)):
            step_B = torch.full((len(x_BCHW),), t, device=x_BCHW.device)
            noisy_BCHW = kept**0.5 * x_BCHW + (1 - kept) ** 0.5 * noise_BTCHW[:, number]
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.training):
                maps = self.unet.read(noisy_BCHW, step_B, {*self.first_blocks, *sources})
            if self.first_blocks:
                first.append({b: maps[b] for b in self.first_blocks})
            if self.second_blocks:
                add = {count + 1 - b: layer(maps[b]) for b, layer in sources.items()}
                again = self.unet.read(noisy_BCHW, step_B, self.second_blocks, add)
                second.append({b: again[b] for b in self.second_blocks})
        return first, second

    def forward(self, pixel_values: Tensor, noise: Tensor | None = None) -> ImageOutput:
        """
        Args:
            pixel_values: images (B, C, H, W) in [-1, 1].
            noise: (B, T, C, H, W); where None it is drawn, in evaluation always the same.

        Raises:
            ValueError: if they are no such images, or the noise does not fit.
        """
        check_images(pixel_values, self.in_channels)
        shape = (len(pixel_values), len(self.times), *pixel_values.shape[1:])
        if noise is None:
            noise = self._noise(pixel_values, shape)
        if noise.shape != shape:
            raise ValueError(f"noise must be {shape}, got {tuple(noise.shape)}")
        first, second = self.passes(pixel_values, noise)
        maps = [x_BCHW for of_step in (*first, *second) for x_BCHW in of_step.values()]
        return ImageOutput(maps, self.head(maps[0]) if isinstance(self.head, PooledHead) else self.head(first, second))

    def _noise(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self.training:
            return torch.randn(shape, device=like.device, dtype=like.dtype)
        one = torch.randn(shape[1:], generator=torch.Generator().manual_seed(0), device="cpu")
        return one.to(like).expand(shape)

    def see(self, images: Sequence[Tensor]) -> ImageOutput:
        squares = torch.stack([middle(image, self.image_size) for image in images])
        said: ImageOutput = self(2 * squares - 1)
        return replace(said, images=list(images))

    def features(self, x_BCHW: Tensor) -> list[Tensor]:
        """The maps that are read, noise step by noise step, first and then second pass."""
        return self(x_BCHW).features

    def classify(self, x_BCHW: Tensor) -> Any:
        """Not of a single map: `forward` gives the logits."""
        raise NotImplementedError(f"{type(self).__name__} names classes by several maps: call it with images")
