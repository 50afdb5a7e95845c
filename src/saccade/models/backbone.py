"""What image backbones share: the pyramid that `features` gives, the head on its last level, sizes by name, a block.

Shape letters: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from saccade import catalogue
from saccade.layers.drop_path import DropPath
from saccade.ops.export import output

if TYPE_CHECKING:
    from typing_extensions import Self


@output
@dataclass
class ImageOutput:
    """What a backbone returns.

    Attributes:
        features: maps (B, C, H, W) from fine to coarse, of `channels` and `strides` of the backbone.
        logits: (B, K), None without a head.
    """

    features: list[Tensor]
    logits: Tensor | None = None


class Sized(nn.Module):
    """Base of the models that their papers give in sizes; a subclass sets `slug`, its paper."""

    slug: ClassVar[str]

    @classmethod
    def from_config(cls, name: str, **changes: Any) -> Self:
        """A published size by the paper's name for it, e.g. "Twins-SVT-S"; `changes` go before its arguments.

        Raises:
            ValueError: if there is no such size; the message lists them.
        """
        sizes = {size.name: size for size in catalogue.part(cls.slug).published}
        if name not in sizes:
            raise ValueError(f"{cls.slug} was published as {', '.join(sizes)}; got {name!r}")
        model = catalogue.create(cls.slug, **{**sizes[name].arguments, **changes})
        assert isinstance(model, cls)
        return model


class Backbone(Sized):
    """Base of the image backbones; a subclass sets `slug`, `channels`, `strides` and gives `features` and `classify`.

    Attributes:
        channels, strides: of the maps that `features` gives; a stride is the input's size over the map's.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]

    def features(self, x_BCHW: Tensor) -> list[Tensor]:
        """The pyramid, from fine to coarse; images of any size.

        Raises:
            ValueError: if `x` is no batch of images with the channels that the stem takes.
        """
        raise NotImplementedError

    def classify(self, x_BCHW: Tensor) -> Tensor | None:
        """Logits (B, K) of the last map; None without a head."""
        raise NotImplementedError

    def forward(self, x_BCHW: Tensor) -> ImageOutput:
        maps = self.features(x_BCHW)
        return ImageOutput(maps, self.classify(maps[-1]))


class MLP(nn.Module):
    """Two layers with GELU between them."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.fc2, self.drop = nn.Linear(dim, hidden), nn.Linear(hidden, dim), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """x + attention(LN(x)) where there is attention, then x + MLP(LN(x)), on (B, H, W, C).

    Args:
        dim: C.
        attention: a module on (B, H, W, C), or None.
        mlp_ratio: width of the MLP over C.
        drop: dropout of the MLP.
        drop_path: probability that a branch is left out, image by image.
        norm_eps: of both norms.
    """

    def __init__(
        self,
        dim: int,
        attention: nn.Module | None,
        mlp_ratio: float = 4.0,
        *,
        drop: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = None if attention is None else nn.LayerNorm(dim, norm_eps)
        self.attention, self.norm2 = attention, nn.LayerNorm(dim, norm_eps)
        self.mlp, self.drop_path = MLP(dim, int(dim * mlp_ratio), drop), DropPath(drop_path)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        if self.attention is not None and self.norm1 is not None:
            x_BHWC = x_BHWC + self.drop_path(self.attention(self.norm1(x_BHWC)))
        return x_BHWC + self.drop_path(self.mlp(self.norm2(x_BHWC)))


def check_images(x_BCHW: Tensor, channels: int) -> None:
    """Raise ValueError unless `x` is (B, channels, H, W) with at least one pixel."""
    if x_BCHW.ndim != 4 or x_BCHW.shape[1] != channels or 0 in x_BCHW.shape[2:]:
        raise ValueError(f"x must be images (batch, {channels}, height, width), got {tuple(x_BCHW.shape)}")
