"""LoFTR: two grey images -> which points show the same, to a fraction of a pixel.

Shape letters: B pairs of images, N, M cells of the two images, K matches, C channels, H, W image, h, w grid of cells, S
places of a window of side w.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from saccade import catalogue
from saccade.catalogue.authors import load_state
from saccade.layers.fusing import fuse_norms
from saccade.models.loftr.backbone import ResNetFPN
from saccade.models.loftr.losses import coarse_loss, fine_loss, training_pairs, true_pairs
from saccade.models.loftr.refinement import (
    KINDS,
    Size,
    assign,
    cell_places,
    expected_offsets,
    inside_windows,
    select,
    windows,
)
from saccade.models.loftr.transformer import LAYERS, FeatureTransformer, position_code
from saccade.models.matching import Matcher, MatchOutput, check_pair
from saccade.ops.export import exporting, output
from saccade.ops.matching import Assignment, Pairs


@output
@dataclass
class LoFTROutput(MatchOutput):
    """Matches, and what the two ends of the network said of them.

    Attributes:
        coarse0, coarse1: (K, 2), points of the cells.
        cells0, cells1: (K,), numbers of the cells.
        offsets: (K, 3), expected offset of the second point in half windows, and its deviation.
    """

    coarse0: Tensor | None = None
    coarse1: Tensor | None = None
    cells0: Tensor | None = None
    cells1: Tensor | None = None
    offsets: Tensor | None = None


class LoFTR(Matcher):
    """Detector-free matching: features of all cells of both images depend on both images, then cells are matched.

    Args:
        widths: of the backbone's stages, at strides 2, 4, 8 (and 16); the coarse width is the last, the fine width
            that of the fine stride.
        resolution: strides of cells and of the fine map, (8, 2) or (16, 4).
        num_heads, layers: of the coarse transformer; "self" and "cross" in turn.
        attention: "linear" or "full", of the coarse transformer.
        fine_heads, fine_layers, fine_attention: of the fine transformer.
        window: places of a fine window along a side, odd.
        fine_context: whether a window knows the coarse feature of its cell.
        matching: "dual-softmax" or "sinkhorn".
        temperature: tau of the dual softmax.
        iterations: of Sinkhorn.
        dustbin: first value of the score of no match, learned.
        prefilter: in evaluation, cells for which no match is likeliest are left out; of Sinkhorn.
        threshold: of P.
        border: cells along each border that are not matched.
        first_release: positions as the first released weights need them (`position_code`).

    Raises:
        ValueError: if a name is unknown, or widths, heads and windows do not fit.
    """

    slug = "loftr"
    authors_module = "loftr"

    def __init__(
        self,
        widths: Sequence[int] = (128, 196, 256),
        *,
        resolution: tuple[int, int] = (8, 2),
        num_heads: int = 8,
        layers: Sequence[str] = LAYERS * 4,
        attention: str = "linear",
        fine_heads: int = 8,
        fine_layers: Sequence[str] = LAYERS,
        fine_attention: str = "linear",
        window: int = 5,
        fine_context: bool = True,
        matching: str = "dual-softmax",
        temperature: float = 0.1,
        iterations: int = 3,
        dustbin: float = 1.0,
        prefilter: bool = False,
        threshold: float = 0.2,
        border: int = 2,
        first_release: bool = False,
    ) -> None:
        super().__init__()
        if matching not in KINDS:
            raise ValueError(f"matching must be one of {', '.join(KINDS)}, got {matching!r}")
        if window < 3 or window % 2 == 0:
            raise ValueError(f"window must be odd and at least 3, got {window}")
        self.backbone = ResNetFPN(widths, resolution)
        coarse, fine = self.backbone.coarse_channels, self.backbone.fine_channels
        if coarse % 4:
            raise ValueError(f"the last width must be a multiple of 4, for the code of positions, got {coarse}")
        self.multiple, self.fine_stride, self.window = resolution[0], resolution[1], window
        self.temperature, self.iterations, self.prefilter = temperature, iterations, prefilter
        self.threshold, self.border, self.first_release = threshold, border, first_release
        self.coarse = FeatureTransformer(coarse, num_heads, layers, attention)
        self.fine = FeatureTransformer(fine, fine_heads, fine_layers, fine_attention)
        self.context = nn.Linear(coarse, fine) if fine_context else None
        self.join = nn.Linear(2 * fine, fine) if fine_context else None
        for linear in (self.context, self.join):
            if linear is not None:
                nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
        self.dustbin = nn.Parameter(torch.tensor(float(dustbin))) if matching == "sinkhorn" else None

    @classmethod
    def from_kornia(cls, source: nn.Module | Mapping[str, Any], **changes: Any) -> Self:
        """The network with the weights of kornia's `LoFTR`, in evaluation.

        Args:
            source: the module, or its state dict.
            **changes: constructor arguments; `first_release=True` for its "outdoor" and "indoor" weights.

        Raises:
            ValueError: if the weights do not fit.
        """
        model = cls(**changes)
        state = source.state_dict() if isinstance(source, nn.Module) else dict(source)
        load_state(model, catalogue.port(cls.slug, cls.authors_module).convert(state))
        return model.eval()

    def features(
        self, image0: Tensor, image1: Tensor, valid0: Tensor | None = None, valid1: Tensor | None = None
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Size, Size]]:
        """Features of the cells (B, N, C) and (B, M, C), fine maps unfinished, and height and width of both grids.

        Args:
            image0, image1: as in `forward`.
            valid0, valid1: as in `forward`.

        Raises:
            ValueError: as `forward`.
        """
        check_pair(image0, image1, 1, self.multiple)
        if image0.shape == image1.shape:
            coarse, fine = self.backbone(torch.cat([image0, image1]))
            (coarse0, coarse1), (fine0, fine1) = coarse.chunk(2), fine.chunk(2)
        else:
            (coarse0, fine0), (coarse1, fine1) = self.backbone(image0), self.backbone(image1)
        tokens = []
        for map_BChw in (coarse0, coarse1):
            _, channels, height, width = map_BChw.shape
            code = position_code(height, width, channels, map_BChw, first_release=self.first_release)
            tokens.append((map_BChw + code).flatten(2).transpose(1, 2))
        cells = self.coarse(tokens[0], tokens[1], *(None if v is None else v.flatten(1) for v in (valid0, valid1)))
        sizes = ((coarse0.shape[2], coarse0.shape[3]), (coarse1.shape[2], coarse1.shape[3]))
        return cells, (fine0, fine1), sizes

    def assignment(
        self, cells: tuple[Tensor, Tensor], valid0: Tensor | None = None, valid1: Tensor | None = None
    ) -> Assignment:
        """P of all pairs of cells.

        Args:
            cells: features of the cells.
            valid0, valid1: as in `forward`.
        """
        valid0, valid1 = (None if v is None else v.flatten(1) for v in (valid0, valid1))
        found = assign(
            *cells, temperature=self.temperature, dustbin=self.dustbin, iterations=self.iterations,
            valid0_BN=valid0, valid1_BM=valid1,
        )  # fmt: skip
        return found.without_binned() if self.dustbin is not None and self.prefilter and not self.training else found

    def refine(
        self, pairs: Pairs, cells: tuple[Tensor, Tensor], fine: tuple[Tensor, Tensor], sizes: tuple[Size, Size]
    ) -> Tensor:
        """Offsets of the second points of pairs, (K, 3), see `expected_offsets`.

        Args:
            pairs: of cells.
            cells: features of the cells.
            fine: fine maps unfinished.
            sizes: height and width of both grids.
        """
        sides = list(zip(cells, fine, pairs[1:3], sizes))
        found = [self.fine_windows(map_BCHW, pairs.batch, index, size) for _, map_BCHW, index, size in sides]
        if self.context is not None and self.join is not None:
            known = [self.context(f_BNC[pairs.batch, index])[:, None] for f_BNC, _, index, _ in sides]
            found = [self.join(torch.cat([w, c.expand_as(w)], 2)) for w, c in zip(found, known)]
        return expected_offsets(*self.fine(*found))

    def fine_windows(self, y_BCHW: Tensor, batch_K: Tensor, index_K: Tensor, grid: Size) -> Tensor:
        """Windows of a fine map around cells, (K, w w, C): of the whole map, or made alone where that is less work.

        Args:
            y_BCHW: the map, unfinished.
            batch_K, index_K: image and cell of each.
            grid: height and width of the cells.
        """
        (B, _, H, W), size = y_BCHW.shape, self.window
        places = cell_places(index_K, grid) * (self.multiple // self.fine_stride)
        # the convolutions of a window of 5 make 7 x 7 and 5 x 5 places, those of the map twice all, somewhat faster
        if self.training or exporting() or index_K.shape[0] * ((size + 2) ** 2 + size**2) > B * H * W:
            return windows(self.backbone.finish(y_BCHW), batch_K, places, size)
        wide_KSC = windows(y_BCHW, batch_K, places, size + 4)
        wide_KCww = wide_KSC.transpose(1, 2).unflatten(2, (size + 4, size + 4))
        found_KCww = self.backbone.finish_windows(wide_KCww, inside_windows(places, (H, W), size + 2))
        return (found_KCww * inside_windows(places, (H, W), size)[:, None]).flatten(2).transpose(1, 2)

    def forward(
        self,
        image0: Tensor,
        image1: Tensor,
        *,
        mask0: Tensor | None = None,
        mask1: Tensor | None = None,
        scale0: Tensor | None = None,
        scale1: Tensor | None = None,
    ) -> LoFTROutput:
        """
        Args:
            image0, image1: grey images (B, 1, H, W) in [0, 1], which may differ in size; sides are multiples of
                `multiple`.
            mask0, mask1: bool (B, h, w), the cells that are no padding.
            scale0, scale1: (B, 2), original over given size, (x, y), by which points are multiplied.

        Raises:
            ValueError: if the images are no such pair.
        """
        cells, fine, sizes = self.features(image0, image1, mask0, mask1)
        found = self.assignment(cells, mask0, mask1)
        valid = (None if mask is None else mask.flatten(1) for mask in (mask0, mask1))
        pairs = select(found, sizes, threshold=self.threshold, border=self.border, **dict(zip(_VALID, valid)))
        offsets = self.refine(pairs, cells, fine, sizes)
        ones = offsets.new_ones(pairs.batch.shape[0], 2)
        scales = [ones if scale is None else scale[pairs.batch] for scale in (scale0, scale1)]
        coarse0, coarse1 = (
            cell_places(index, size) * (self.multiple * scale) for index, size, scale in zip(pairs[1:3], sizes, scales)
        )
        moved = offsets[:, :2] * (self.window // 2) * self.fine_stride * scales[1]
        return LoFTROutput(
            coarse0, coarse1 + moved, pairs.confidence.to(offsets.dtype), pairs.batch,
            coarse0=coarse0, coarse1=coarse1, cells0=pairs.index0, cells1=pairs.index1, offsets=offsets,
        )  # fmt: skip

    def kornia(self, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """kornia's call: a dict of `image0`, `image1` and, where images are padded, `mask0`, `mask1`, to one of
        `keypoints0`, `keypoints1`, `confidence`, `batch_indexes`.

        Raises:
            ValueError: as `forward`.
        """
        masks = {name: data[name].bool() for name in ("mask0", "mask1") if name in data}
        said = self(data["image0"], data["image1"], **masks)
        return {name: getattr(said, name) for name in ("keypoints0", "keypoints1", "confidence", "batch_indexes")}

    def loss(self, image0: Tensor, image1: Tensor, positions: Tensor) -> Tensor:
        """Coarse and fine loss, with the true pairs of `positions`, as `Matcher.loss` has them."""
        cells, fine, sizes = self.features(image0, image1)
        found = self.assignment(cells)
        truth = true_pairs(positions, self.multiple)
        coarse = coarse_loss(found, truth)
        pairs = training_pairs(found.mutual(self.threshold), truth, max(f.shape[1] for f in cells) * len(image0))
        offsets = self.refine(pairs, cells, fine, sizes)
        return coarse + fine_loss(offsets, pairs, positions, self.multiple, self.window // 2 * self.fine_stride)

    def fuse(self) -> Self:
        """Take each batch norm into the convolution before it, in place, for use alone.

        Raises:
            ValueError: in training, where norms follow the batch.
        """
        if self.training:
            raise ValueError("fuse is for evaluation: call eval() first")
        fuse_norms(self.backbone)
        return self


_VALID = ("valid0_BN", "valid1_BM")
