"""The network: a frozen vision transformer, its prompts, and a head, which alone are trained.

Shape letters: B batch, C channels, H, W image, h, w patches, N = 1 + h w tokens, D width, K classes, L prompts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from saccade.layers.patches import filled
from saccade.layers.vision_transformer import VisionTransformer
from saccade.models.backbone import Backbone, ImageOutput, check_images
from saccade.models.tcpa.prompts import PromptedAttention, Prompting, Prompts, total_distance

if TYPE_CHECKING:
    from typing_extensions import Self


def simam(x_BCHW: Tensor, weight: float = 1e-4) -> Tensor:
    """x sigmoid((x - mean)^2 / (4 (var + weight)) + 1/2), over the pixels of a channel: SimAM, without parameters.

    Args:
        x_BCHW: maps.
        weight: lambda.
    """
    square_BCHW = (x_BCHW - x_BCHW.mean((2, 3), keepdim=True)).square()
    spread_BC11 = square_BCHW.sum((2, 3), keepdim=True) / max(1, x_BCHW.shape[2] * x_BCHW.shape[3] - 1)
    return x_BCHW * (square_BCHW / (4 * (spread_BC11 + weight)) + 0.5).sigmoid()


class TCPA(Backbone):
    """Images (B, C, H, W) -> classes, by prompts that are coordinated with the tokens.

    Args:
        num_classes: K; 0 has no head.
        image_size, patch, in_channels, dim, depth, num_heads, hidden, norm_eps: of the transformer, see
            `VisionTransformer`.
        image_prompter: images go through two convolutions too, whose outcome is added.
        attentive: images go through `simam` before.
        noise: spread of what is added to tokens in training.
        class_pool, image_pool, class_length, image_length, class_top_k, image_top_k: see `Prompts`.
        roles, matched, fourier, drop, modulation, renormalise: see `Prompts`.

    Raises:
        ValueError: if a number is out of range.
    """

    slug = "tcpa"
    authors_module = "model_vfpt_tcpa"

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        image_size: int = 224,
        patch: int = 16,
        in_channels: int = 3,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        hidden: int | None = None,
        norm_eps: float = 1e-6,
        image_prompter: bool = False,
        attentive: bool = False,
        noise: float = 0.0,
        class_pool: int = 18,
        image_pool: int = 18,
        class_length: int = 1,
        image_length: int = 1,
        class_top_k: int = 10,
        image_top_k: int = 10,
        roles: bool = True,
        matched: bool = True,
        fourier: bool = True,
        drop: float = 0.1,
        modulation: bool = False,
        renormalise: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 0 or noise < 0:
            raise ValueError(f"num_classes and noise must not be negative, got {num_classes} and {noise}")
        self.in_channels, self.image_size, self.patch = in_channels, image_size, patch
        self.channels, self.strides = (dim,), (patch,)
        self.attentive, self.noise = attentive, noise
        self.vit = VisionTransformer(
            image_size=image_size, patch=patch, in_channels=in_channels, dim=dim, depth=depth, num_heads=num_heads,
            hidden=hidden, norm_eps=norm_eps,
        )  # fmt: skip
        for block in self.vit.blocks:
            block.attention = PromptedAttention(dim, num_heads, rope=False, qkv_bias=True, proj_bias=True)
        self.norm = nn.LayerNorm(dim, norm_eps)
        self.prompts = Prompts(
            dim, depth, class_pool=class_pool, image_pool=image_pool, class_length=class_length,
            image_length=image_length, class_top_k=class_top_k, image_top_k=image_top_k, roles=roles, matched=matched,
            fourier=fourier, drop=drop, modulation=modulation, renormalise=renormalise,
        )  # fmt: skip
        self.image_prompter = (
            nn.Sequential(
                nn.Conv2d(in_channels, 3 * in_channels, 11, padding=5),
                nn.PReLU(),
                nn.Conv2d(3 * in_channels, in_channels, 11, padding=5),
            )
            if image_prompter
            else None
        )
        self.head = nn.Linear(dim, num_classes) if num_classes else None
        self.vit.requires_grad_(False).eval()
        self.norm.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """As of any module, but for the transformer, which is frozen."""
        super().train(mode)
        self.vit.eval()
        return self

    def tokens(self, x_BCHW: Tensor) -> tuple[Tensor, list[Prompting]]:
        """The normalised tokens (B, N, D), the class token first, and what each layer added to its own.

        Raises:
            ValueError: if `x` is no batch of images with the channels that the stem takes.
        """
        check_images(x_BCHW, self.in_channels)
        if self.attentive:
            x_BCHW = simam(x_BCHW)
        if self.image_prompter is not None:
            x_BCHW = x_BCHW + self.image_prompter(x_BCHW)
        x_BND, layers = self.vit.start(x_BCHW), []
        if self.noise and self.training:
            x_BND = x_BND + self.noise * torch.randn_like(x_BND)
        for i, block in enumerate(self.vit.blocks):
            norm: nn.Module = block.norm1  # type: ignore[assignment]
            layers.append(self.prompts(i, x_BND))
            prompting = norm(layers[-1].prompts), layers[-1].visible
            x_BND = block(x_BND, prompts=self.prompts, prompting=prompting)
        return self.norm(x_BND), layers

    def features(self, x_BCHW: Tensor) -> list[Tensor]:
        return [self._map(x_BCHW, self.tokens(x_BCHW)[0])]

    def forward(self, pixel_values: Tensor) -> ImageOutput:
        """Images (B, C, H, W) of any size; `penalty` is the distance of tokens to the keys that they chose."""
        x_BND, layers = self.tokens(pixel_values)
        logits_BK = None if self.head is None else self.head(x_BND[:, 0])
        return ImageOutput([self._map(pixel_values, x_BND)], logits_BK, penalty=total_distance(layers))

    def _map(self, image_BCHW: Tensor, x_BND: Tensor) -> Tensor:
        height = filled(image_BCHW, self.patch).shape[2] // self.patch
        return x_BND[:, 1:].mT.unflatten(2, (height, -1))
