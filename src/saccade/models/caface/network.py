"""CAFace on images: a network that embeds each, and the aggregator that makes one template of all of a set.

Shape letters: B batch, V views of one person, C channels of a feature, D width, S channels of statistics, H height, W
width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.resnet import ResNetTrunk
from saccade.models.backbone import check_images, maps_of
from saccade.models.caface.aggregator import ClusterAggregate, style_statistics
from saccade.models.embedding import Embedder, EmbeddingOutput
from saccade.ops.summary import Summary


class CAFace(Embedder):
    """One template of any number of images of a person.

    Args:
        dim: C, of a feature.
        encoder: a network that gives maps, with `channels`; the feature is a linear map of the mean of its last. A
            residual network of `trunk` layers where None.
        stages: of its maps, those whose statistics are the style.
        frozen: the encoder and the linear map are not trained, and stay in evaluation, as in the paper.
        trunk, trunk_stages, width: layers of the residual network, how many of its stages, channels of its stem.
        style_dim, norm_dim, num_centres, depth, num_heads, per_channel, drop_path: of `ClusterAggregate`.
        image_size: side to which files are scaled.
        chunk: files that are seen at a time.

    Raises:
        ValueError: if the encoder has no channels or not so many maps, or a size is not positive.
    """

    slug = "caface"
    authors_module = "caface_aggregator"
    authors_part = "aggregator"
    together = True

    def __init__(
        self,
        dim: int = 512,
        *,
        encoder: nn.Module | None = None,
        stages: Sequence[int] = (1, 2),
        frozen: bool = False,
        trunk: int = 18,
        trunk_stages: int = 4,
        width: int = 64,
        style_dim: int = 64,
        norm_dim: int = 64,
        num_centres: int = 4,
        depth: int = 2,
        num_heads: int = 8,
        per_channel: bool = True,
        drop_path: float = 0.1,
        image_size: int = 112,
        chunk: int = 256,
    ) -> None:
        super().__init__()
        if min(image_size, chunk) < 1:
            raise ValueError(f"image_size and chunk must be positive, got {image_size} and {chunk}")
        self.encoder = ResNetTrunk(trunk, width=width, stages=trunk_stages) if encoder is None else encoder
        channels = tuple(getattr(self.encoder, "channels", ()))
        if not channels or not stages or not all(0 <= stage < len(channels) for stage in stages):
            raise ValueError(f"stages must be numbers of the encoder's maps ({len(channels)}), got {tuple(stages)}")
        self.stages, self.chunk = tuple(stages), chunk
        self.image_size = (image_size, image_size)
        self.feature = nn.Linear(channels[-1], dim)
        self.aggregator = ClusterAggregate(
            dim, sum(channels[stage] for stage in stages), style_dim=style_dim, norm_dim=norm_dim,
            num_centres=num_centres, depth=depth, num_heads=num_heads, per_channel=per_channel, drop_path=drop_path,
        )  # fmt: skip
        if frozen:
            self.freeze(self.encoder, self.feature)

    def features(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Of each image the feature (B, C), not normalised, and the statistics (B, S, 2) of its style.

        Raises:
            ValueError: if `x` is no batch of colour images.
        """
        check_images(x_BCHW, 3)
        maps = maps_of(self.encoder(x_BCHW))
        return self.feature(maps[-1].mean((2, 3))), style_statistics([maps[stage] for stage in self.stages])

    def summarise(self, views_BVCHW: Tensor, summary: Summary | None = None, *, mask: Tensor | None = None) -> Summary:
        """The clusters of these views and of all that `summary` holds.

        Args:
            views_BVCHW: of each of B people V images.
            summary: of the views so far.
            mask: bool (B, V), False is padding.

        Raises:
            ValueError: if the images, the summary and the mask do not fit together.
        """
        features, statistics = self._seen(views_BVCHW)
        return self.aggregator.summarise(features, statistics, mask=mask, summary=summary)

    def fold(self, batches: Iterable[Tensor]) -> EmbeddingOutput:
        """One template of views that come batch by batch, in memory that does not grow with their number.

        Args:
            batches: (B, V, 3, H, W) each, of the same B people; V may differ.

        Raises:
            ValueError: if there is none, or one is not such views.
        """
        summary = None
        for views_BVCHW in batches:
            summary = self.summarise(views_BVCHW, summary)
        if summary is None:
            raise ValueError("batches must hold one at least, got none")
        return self.recognised(summary)

    def recognised(self, summary: Summary) -> EmbeddingOutput:
        """The template of a summary, of unit length, and as it is."""
        template_BC = self.aggregator.template(summary)
        return EmbeddingOutput(F.normalize(template_BC, dim=-1), features=template_BC)

    def embed(self, x_BCHW: Tensor) -> EmbeddingOutput:
        """Each image as a set of its own."""
        check_images(x_BCHW, 3)
        return self(x_BCHW[:, None])

    def forward(self, pixel_values: Tensor, mask: Tensor | None = None) -> EmbeddingOutput:
        """
        Args:
            pixel_values: views (B, V, 3, H, W) of B people, or images (B, 3, H, W) of a person each.
            mask: bool (B, V), False is padding.

        Raises:
            ValueError: if they are neither, or the mask does not fit.
        """
        if pixel_values.ndim == 4:
            return self.embed(pixel_values)
        features, statistics = self._seen(pixel_values)
        summary = self.aggregator.summarise(features, statistics, mask=mask)
        return replace(self.recognised(summary), views=F.normalize(features, dim=-1))

    def see(self, images: Sequence[Tensor]) -> EmbeddingOutput:
        """All images as one person, `chunk` at a time."""
        if len(images) <= self.chunk:
            return super().see(images)
        summary, views = None, []
        for start in range(0, len(images), self.chunk):
            features, statistics = self.features(self.ready(images[start : start + self.chunk]))
            summary = self.aggregator.summarise(features[None], statistics[None], summary=summary)
            views.append(F.normalize(features, dim=-1))
        assert summary is not None
        return replace(self.recognised(summary), views=torch.cat(views)[None], images=list(images))

    def _seen(self, views_BVCHW: Tensor) -> tuple[Tensor, Tensor]:
        """`features` of views: (B, V, C) and (B, V, S, 2)."""
        if views_BVCHW.ndim != 5 or not views_BVCHW.shape[1]:
            raise ValueError(
                f"pixel_values must be (batch, views, 3, height, width) of one view at least, got "
                f"{tuple(views_BVCHW.shape)}"
            )
        features, statistics = self.features(views_BVCHW.flatten(0, 1))
        sets = views_BVCHW.shape[:2]
        return features.unflatten(0, sets), statistics.unflatten(0, sets)
