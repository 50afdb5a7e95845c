"""Gaze-LLE: the head's prompt, the places' code, and the decoder on somebody else's features.

Shape letters: B images, P people of all images, C channels, H, W image, h, w map of features, N = h w tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.extras import need
from saccade.layers.positions import sinusoids
from saccade.layers.pre_norm import PreNormBlock
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.models.encoder import SeesThroughEncoder
from saccade.models.heatmap import HeatmapNetwork, HeatmapOutput

#: of the people of each image their head boxes; None for one without a box
Boxes = Tensor | Sequence[Tensor | Sequence[Sequence[float] | Tensor | None]]


def place_code(height: int, width: int, dim: int, device: torch.device | None = None) -> Tensor:
    """p, (dim, h, w): sines and cosines in turn of x / 10000^(4 k / dim), and in the other half of y.

    Args:
        height, width: h and w.
        dim: a multiple of 4.
        device: where it is made.
    """
    down_hC, across_wC = (sinusoids(torch.arange(n, device=device).float(), dim // 2) for n in (height, width))
    both = across_wC[None].expand(height, -1, -1), down_hC[:, None].expand(-1, width, -1)
    return torch.cat(both, 2).permute(2, 0, 1)


def people_of(bboxes: Boxes | None, images: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Head boxes (P, 4) of all people in a row, nan where there is none, and the image of each (P,).

    Args:
        bboxes: for each image the boxes of its people as (x0, y0, x1, y1), shares of width and height, or None for
            somebody without a box; a tensor (B, people, 4). None: one person without a box in each image.
        images: B.
        device: of what is returned.

    Raises:
        ValueError: if there is not a list for each image, or a box has other than four numbers, or they run backwards.
    """
    if bboxes is None:
        bboxes = torch.full((images, 1, 4), torch.nan, device=device)
    if isinstance(bboxes, Tensor) and bboxes.ndim != 3:
        raise ValueError(f"bboxes must be (batch, people, 4), or a list for each image, got {tuple(bboxes.shape)}")
    if len(bboxes) != images:
        raise ValueError(f"bboxes must be a list for each of {images} images, got {len(bboxes)}")
    if isinstance(bboxes, Tensor):
        rows, counts = bboxes.double().flatten(0, 1), [bboxes.shape[1]] * images
    else:
        kept = [_boxes(each, device) for each in bboxes]
        rows, counts = torch.cat(kept), [len(each) for each in kept]
    if rows.shape[1] != 4:
        raise ValueError(f"a box must be four numbers, got {rows.shape[1]}")
    owners = [image for image, count in enumerate(counts) for _ in range(count)]
    return rows.to(device), torch.tensor(owners, dtype=torch.long, device=device)


def _boxes(given: Any, device: torch.device | None) -> Tensor:
    """The boxes of an image's people, (people, 4)."""
    if isinstance(given, Tensor):
        return given.detach().double().reshape(-1, given.shape[-1] if given.numel() else 4).to(device)
    rows = [[torch.nan] * 4 if box is None else [float(edge) for edge in box] for box in given]
    strange = [box for box in rows if len(box) != 4 or box[0] > box[2] or box[1] > box[3]]
    if strange:
        raise ValueError(f"a box must be (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1, got {strange[0]}")
    return torch.tensor(rows, dtype=torch.double, device=device).reshape(-1, 4)


def head_maps(boxes_P4: Tensor, height: int, width: int, *, least_cell: bool = False) -> Tensor:
    """M, (P, h, w) of 0 and 1: cells round(y0 h) to round(y1 h), round(x0 w) to round(x1 w), the ends left out.

    Halves are rounded to even. Of a box of nan nothing is covered.

    Args:
        boxes_P4: (x0, y0, x1, y1), shares of width and height.
        height, width: h and w.
        least_cell: a box that covers nothing covers the cell of its middle.
    """
    edges_P4 = boxes_P4.double() * boxes_P4.new_tensor([width, height, width, height], dtype=torch.double)
    x0_P, y0_P, x1_P, y1_P = edges_P4.round().unbind(1)
    across_w, down_h = (torch.arange(n, device=boxes_P4.device) for n in (width, height))

    def covered(axis: Tensor, first_P: Tensor, last_P: Tensor) -> Tensor:
        return (axis >= first_P[:, None]) & (axis < last_P[:, None])

    map_Phw = covered(down_h, y0_P, y1_P)[:, :, None] & covered(across_w, x0_P, x1_P)[:, None]
    if least_cell:
        middle_P2 = ((edges_P4[:, :2] + edges_P4[:, 2:]) / 2).floor()
        column_P, row_P = middle_P2[:, 0].clamp(0, width - 1), middle_P2[:, 1].clamp(0, height - 1)
        cell_Phw = (down_h == row_P[:, None])[:, :, None] & (across_w == column_P[:, None])[:, None]
        map_Phw = torch.where(map_Phw.flatten(1).any(1)[:, None, None], map_Phw, cell_Phw)
    return map_Phw.double()


class GazeLLE(SeesThroughEncoder, HeatmapNetwork):
    """Where people look.

    Args:
        channels: of the encoder's features.
        dim: of the decoder, a multiple of 4 and of the heads.
        num_layers, num_heads, mlp_ratio: of its blocks.
        drop_path: probability that a branch of a block is left out in training.
        inout: also tell whether the target is in the picture.
        out_size: height and width of heat maps; None leaves them at twice the features'.
        encoder: name or folder of a transformers model that gives tokens; None where features are given, or the
            encoder by `on`.
        stem: widths of convolutions that halve the image each and are learned, in the encoder's place; the last are
            the channels then.
        least_cell: see `head_maps`.

    Raises:
        ValueError: if a number is out of range, or there are both an encoder and a stem.
        ImportError: if there is an encoder and transformers is not installed.
    """

    slug = "gaze-lle"
    authors_module = "gazelle"
    image_size = (448, 448)

    def __init__(
        self,
        channels: int = 768,
        *,
        dim: int = 256,
        num_layers: int = 3,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.1,
        inout: bool = False,
        out_size: tuple[int, int] | None = (64, 64),
        encoder: str | None = None,
        stem: tuple[int, ...] = (),
        least_cell: bool = False,
    ) -> None:
        super().__init__()
        if min(channels, dim, num_layers + 1, num_heads) < 1 or dim % 4 or dim % num_heads:
            raise ValueError(
                f"channels, dim and heads must be positive, dim a multiple of 4 and of the heads, got {channels}, "
                f"{dim} and {num_heads}"
            )
        if encoder is not None and stem:
            raise ValueError("there must be an encoder or a stem, got both")
        self.channels, self.dim, self.least_cell = stem[-1] if stem else channels, dim, least_cell
        self.out_size = None if out_size is None else tuple(out_size)
        self.see_through(stem)
        self.linear = nn.Conv2d(self.channels, dim, 1)
        self.head_token = nn.Parameter(torch.randn(1, dim))
        self.inout_token = nn.Parameter(torch.randn(1, dim)) if inout else None
        self.blocks = nn.ModuleList(
            PreNormBlock(
                SoftmaxAttention(dim, num_heads, rope=False, proj_bias=True),
                dim, int(dim * mlp_ratio), drop_path=drop_path,
            )
            for _ in range(num_layers)
        )  # fmt: skip
        self.up = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.to_map = nn.Conv2d(dim, 1, 1, bias=False)
        self.inout_head = (
            nn.Sequential(nn.Linear(dim, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 1)) if inout else None
        )
        if encoder is not None:
            self.on(need("transformers", "an encoder").AutoModel.from_pretrained(encoder))

    def forward(
        self, pixel_values: Tensor | None = None, bboxes: Boxes | None = None, *, features: Tensor | None = None
    ) -> HeatmapOutput:
        """A map for each person, those of the first image first.

        Args:
            pixel_values: images (B, 3, H, W), about ImageNet's mean; not needed where there are features.
            bboxes: see `people_of`.
            features: (B, C, h, w), in place of what the encoder gives.

        Raises:
            ValueError: if images, features or boxes do not fit the network.
        """
        if features is None:
            if pixel_values is None:
                raise ValueError("GazeLLE needs pixel_values, or features, got neither")
            features = self.features(pixel_values)
        if features.ndim != 4 or features.shape[1] != self.channels or 0 in features.shape[2:]:
            raise ValueError(f"features must be (batch, {self.channels}, h, w), got {tuple(features.shape)}")
        boxes_P4, people_P = people_of(bboxes, len(features), features.device)
        height, width = features.shape[2:]
        x_BChw = self.linear(features)
        x_BChw = x_BChw + place_code(height, width, self.dim, features.device).to(x_BChw.dtype)
        map_P1hw = head_maps(boxes_P4, height, width, least_cell=self.least_cell)[:, None].to(x_BChw.dtype)
        x_PChw = x_BChw[people_P] + map_P1hw * self.head_token[..., None, None]
        x_PNC = x_PChw.flatten(2).mT
        if self.inout_token is not None:
            x_PNC = torch.cat([self.inout_token.expand(len(x_PNC), 1, -1).to(x_PNC.dtype), x_PNC], 1)
        for block in self.blocks:
            x_PNC = block(x_PNC)
        inside_P = None
        if self.inout_head is not None:
            inside_P = self.inout_head(x_PNC[:, 0])[:, 0].sigmoid()
            x_PNC = x_PNC[:, 1:]
        logits_Phw = self.to_map(self.up(x_PNC.mT.unflatten(2, (height, width))))[:, 0]
        heat_Phw = logits_Phw.sigmoid()
        if self.out_size is not None and heat_Phw.shape[1:] != self.out_size:
            return HeatmapOutput(_resized(heat_Phw, self.out_size), None, inside_P, people_P, boxes_P4.to(heat_Phw))
        return HeatmapOutput(heat_Phw, logits_Phw, inside_P, people_P, boxes_P4.to(heat_Phw))

    def see(self, images: Sequence[Tensor], bboxes: Boxes | None = None) -> HeatmapOutput:
        return self.on_images(self(self.ready(images), bboxes), images)

    def predict(self, files: str | Path | Sequence[str | Path], bboxes: Boxes | None = None) -> HeatmapOutput:
        """Where people in image files look, without gradients.

        Args:
            files: an image, or several of one size.
            bboxes: of each image the head boxes of its people; see `people_of`. Without, one map of each image for
                somebody who is not pointed at, which does for a picture of one person.

        Raises:
            OSError: if a file cannot be read.
            ValueError: if there is none, one is no image, sizes differ, or boxes do not fit.
        """
        return self.on_files(files, lambda images: self.see(images, bboxes))


def _resized(heat_Phw: Tensor, size: tuple[int, ...]) -> Tensor:
    if not len(heat_Phw):
        return heat_Phw.new_zeros(0, *size)
    wide = heat_Phw[:, None].to(torch.promote_types(heat_Phw.dtype, torch.float32))
    return F.interpolate(wide, size, mode="bilinear", antialias=True)[:, 0].to(heat_Phw.dtype)
