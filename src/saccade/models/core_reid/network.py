"""CORE-ReID's network: a residual trunk that keeps its resolution at the end, and the head of three views.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from saccade.layers.resnet import ResNetTrunk
from saccade.models.backbone import check_images, maps_of
from saccade.models.core_reid.head import PartHead, Parts, bmfn, embedding_of
from saccade.models.embedding import Embedder, EmbeddingOutput


class CoReID(Embedder):
    """One network of CORE-ReID, student or teacher; persons are found by the teacher's embedding.

    Args:
        num_classes: K.
        depth: layers of the trunk: 50, 101 or 152 in the paper.
        width: channels of its stem, 64 in the paper.
        reduction: r of `ECAB`; r^3 divides the trunk's last channels.
        trunk: in the trunk's place, a network that gives maps, with `channels`.
        image_size: (height, width) to which files are scaled.

    Raises:
        ValueError: if the depth is not offered, or the channels are no multiple of r^3.
    """

    slug = "core-reid"
    authors_module = "ensemble_fusion"

    def __init__(
        self,
        num_classes: int = 700,
        *,
        depth: int = 101,
        width: int = 64,
        reduction: int = 4,
        trunk: nn.Module | None = None,
        image_size: tuple[int, int] = (256, 128),
    ) -> None:
        super().__init__()
        self.trunk = ResNetTrunk(depth, width=width, last_stride=1) if trunk is None else trunk
        channels = tuple(getattr(self.trunk, "channels", ()))
        if not channels:
            raise ValueError("trunk must have channels, those of its maps")
        if len(image_size) != 2 or min(image_size) < 1:
            raise ValueError(f"image_size must be (height, width), got {image_size}")
        self.channels: int = channels[-1]
        self.image_size = (image_size[0], image_size[1])
        self.head = PartHead(channels[-1], num_classes, reduction=reduction)

    def parts(self, x_BCHW: Tensor) -> Parts:
        """What the head sees of images.

        Raises:
            ValueError: if they are no batch of colour images.
        """
        check_images(x_BCHW, 3)
        return self.head.parts(maps_of(self.trunk(x_BCHW))[-1])

    def embed(self, x_BCHW: Tensor) -> EmbeddingOutput:
        """`embedding` (B, 3 C) of length 1; `parts` are the features of the whole, the upper and the lower half, and
        the attention t to the upper and the lower, (B, C) each."""
        parts = self.parts(x_BCHW)
        attention = [t_BC11.flatten(1) for t_BC11 in (parts.upper_attention, parts.lower_attention)]
        return EmbeddingOutput(embedding_of(parts), parts=[*parts.views, *attention], logits=parts.logits)

    def see(self, images: Sequence[Tensor]) -> EmbeddingOutput:
        """With their mirrors, see `bmfn`."""
        pixels_BCHW = self.ready(images)
        said, mirrored = self(pixels_BCHW), self(pixels_BCHW.flip(3))
        return replace(said, embedding=bmfn(said.embedding, mirrored.embedding), images=list(images))
