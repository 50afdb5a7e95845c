"""Networks that say which thing an image shows, by a vector: their output, sets of views, and what is told of them.

Shape letters: B batch, V views of one thing, K spaces, D width, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from saccade.models.complete import Complete
from saccade.models.images import captioned, scaled
from saccade.ops.export import output

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from typing_extensions import Self

#: of a picture beside its bars
_HEIGHT = 112


@output
@dataclass
class EmbeddingOutput:
    """Vectors of unit length, near each other where the images show the same.

    Attributes:
        embedding: (B, D), of each image, or of each set of views.
        spaces: (B, K, D), of each of the network's spaces (attributes, conditions), `embedding` being the first; None
            where it has one.
        views: (B, V, D), of each view of a set, where these were asked for.
        features: (B, D'), what the embedding is made of, before its length is taken out, where training needs it.
        parts: (B, D') each, further features that are trained beside it; which they are, the network says.
        logits: (B, classes), of a head that training has.
        images: (3, H, W) in [0, 1] each, as `predict` read them; None in what `forward` gives.
    """

    embedding: Tensor
    spaces: Tensor | None = None
    views: Tensor | None = None
    features: Tensor | None = None
    parts: list[Tensor] | None = None
    logits: Tensor | None = None
    images: list[Tensor] | None = None


class Embedder(Complete):
    """Base of the networks that give embeddings; a subclass gives `embed`, and `fuse` where it knows better.

    Attributes:
        image_size: (height, width) to which files are scaled.
        together: whether the files of one call are views of one thing.
        frozen: parts that are not trained, see `freeze`.
    """

    image_size: tuple[int, int] = (224, 224)
    together: ClassVar[bool] = False
    frozen: tuple[nn.Module, ...] = ()

    def freeze(self, *modules: nn.Module) -> None:
        """Leave these parts as they are: without gradients, and in evaluation also where the network is trained."""
        for module in modules:
            module.requires_grad_(False).eval()
        self.frozen = (*self.frozen, *modules)

    def train(self, mode: bool = True) -> Self:
        """As of any module, but for what is frozen."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def embed(self, x_BCHW: Tensor) -> EmbeddingOutput:
        """The embedding of each image.

        Raises:
            ValueError: if `x` is no batch of images with the channels that the network takes.
        """
        raise NotImplementedError

    def fuse(self, said: EmbeddingOutput, views: int) -> EmbeddingOutput:
        """One output for each set, of the outputs of its images, which follow each other: the mean direction.

        Args:
            said: of B V images.
            views: V.
        """
        embedding_BVD = said.embedding.unflatten(0, (-1, views))
        spaces = None if said.spaces is None else said.spaces.unflatten(0, (-1, views)).mean(1)
        return EmbeddingOutput(
            F.normalize(embedding_BVD.mean(1), dim=-1),
            spaces=None if spaces is None else F.normalize(spaces, dim=-1),
            views=embedding_BVD,
        )

    def forward(self, pixel_values: Tensor) -> EmbeddingOutput:
        """
        Args:
            pixel_values: images (B, C, H, W), or sets of views of one thing (B, V, C, H, W).

        Raises:
            ValueError: if they are neither, or of other channels than the network takes.
        """
        if pixel_values.ndim != 5:
            return self.embed(pixel_values)
        if not pixel_values.shape[1]:
            raise ValueError(f"a set must have a view at least, got pixel_values {tuple(pixel_values.shape)}")
        return self.fuse(self.embed(pixel_values.flatten(0, 1)), pixel_values.shape[1])

    def ready(self, images: Sequence[Tensor]) -> Tensor:
        """Images (3, H, W) in [0, 1] as the network takes them."""
        return scaled(images, self.image_size, self.in_channels)

    def see(self, images: Sequence[Tensor]) -> EmbeddingOutput:
        pixels_BCHW = self.ready(images)
        said: EmbeddingOutput = self(pixels_BCHW[None] if self.together else pixels_BCHW)
        return replace(said, images=list(images))

    def answer(self, output: EmbeddingOutput, names: Sequence[str] | None = None) -> list[dict[str, float]]:
        """How near each image is to the first, or to what all of them make together: the cosine, of each space.

        Args:
            names: of the spaces; their numbers where None.

        Raises:
            ValueError: if the names are not as many as the spaces.
        """
        with_what = "all together" if self.together else "image 1"
        if self.together:
            embedding_BVD = output.embedding[:, None] if output.views is None else output.views
            return [{f"like {with_what}": float(x @ output.embedding[0])} for x in embedding_BVD[0]]
        if output.spaces is None:
            return [{f"like {with_what}": float(x @ output.embedding[0])} for x in output.embedding]
        spaces = output.spaces.shape[1]
        called = [f"space {k}" for k in range(spaces)] if names is None else list(names)
        if len(called) != spaces:
            raise ValueError(f"names must be one for each of {spaces} spaces, got {len(called)}")
        return [
            {f"like {with_what} in {name}": float(x @ first) for name, x, first in zip(called, each, output.spaces[0])}
            for each in output.spaces
        ]

    def drawn(self, output: EmbeddingOutput, names: Sequence[str] | None) -> Picture:
        return captioned(output.images or (), self.answer(output, names), _HEIGHT)
