"""Joint attention: the map of people's attributes, its fusion with a map of the image, and both as one network.

Shape letters: B images, P people, F attributes, M = P + 1 maps, N points, H, W map, h, w a given map.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.models.heatmap import HeatmapNetwork, HeatmapOutput
from saccade.models.joint_attention_estimation.people import JointMaps, grid_points

AGGREGATIONS = ("token", "people", "both")
FUSIONS = ("weights", "average", "early", "mid", "none")


def joint_of_people(maps_BPhw: Tensor, there_BP: Tensor, size: tuple[int, int]) -> Tensor:
    """One map (B, H, W) of a map for each person: brought to the size, and averaged over the people who are there.

    Args:
        maps_BPhw: of any network of gaze.
        there_BP: bool; nobody gives zeros.
        size: H and W.
    """
    maps_BPHW = F.interpolate(maps_BPhw, size, mode="bilinear", align_corners=False)
    share_BP = there_BP.to(maps_BPHW.dtype)
    total_BHW = (maps_BPHW * share_BP[..., None, None]).sum(1)
    return total_BHW / share_BP.sum(1).clamp(min=1)[:, None, None]


class MapFusion(nn.Module):
    """Two maps (B, H, W) to one.

    Args:
        kind: "weights" adds them by the softmax of two learned numbers, "average" by halves; "early" sends both through
            one small network, "mid" each through its own convolutions first.

    Raises:
        ValueError: if there is no such fusion.
    """

    def __init__(self, kind: str = "weights") -> None:
        super().__init__()
        if kind not in FUSIONS[:-1]:
            raise ValueError(f"fusion must be one of {', '.join(FUSIONS[:-1])}, got {kind!r}")
        self.kind = kind
        self.weights = nn.Parameter(torch.rand(2)) if kind == "weights" else None
        self.ways = self.joined = None
        if kind == "mid":
            self.ways = nn.ModuleList(_convs(1, 4, 8, 8) for _ in range(2))
            self.joined = nn.Sequential(_convs(16, 8, 8), nn.Conv2d(8, 1, 1))
        elif kind == "early":
            self.joined = nn.Sequential(
                nn.Conv2d(2, 8, 5, 2, 2), nn.ReLU(), nn.Conv2d(8, 8, 5, 2, 2), nn.ReLU(),
                nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.ReLU(),
                nn.Conv2d(8, 1, 1),
            )  # fmt: skip

    def forward(self, a_BHW: Tensor, b_BHW: Tensor) -> Tensor:
        if self.weights is not None:
            first, second = self.weights.softmax(0)
            return first * a_BHW + second * b_BHW
        if self.joined is None:
            return (a_BHW + b_BHW) / 2
        if self.ways is None:
            out_B1HW = self.joined(torch.stack([a_BHW, b_BHW], 1))
        else:
            sides = [way(each[:, None]) for way, each in zip(self.ways, (a_BHW, b_BHW))]
            out_B1HW = self.joined(torch.cat(sides, 1))
        # two strides of 2 give a little more where the sides are no multiples of 4
        return out_B1HW[:, 0, : a_BHW.shape[1], : a_BHW.shape[2]]


class JointAttention(HeatmapNetwork):
    """Joint attention of people, from their attributes and, where there is one, a map of the image.

    Args:
        actions: how many actions there are; 0 where they are not told.
        position, gaze: whether these are among the attributes; the order is position, gaze, action.
        dim, depth, num_heads, embedding, field: of `JointMaps`.
        aggregation: "token", the map of the joint token; "people", the mean of the maps of who attends; "both", of
            these and the joint one's.
        map_size: height and width of the maps.
        activation: "identity" (squared error), or "sigmoid" (cross-entropy).
        fusion: of `FUSIONS`; "none" has no place for a map of the image.

    Raises:
        ValueError: if an argument is out of range, or people have no attributes.
    """

    slug = "joint-attention-estimation"
    authors_module = "estimator_and_fusion"
    runs_alone = False

    def __init__(
        self,
        actions: int = 9,
        *,
        position: bool = True,
        gaze: bool = True,
        dim: int = 16,
        depth: int = 2,
        num_heads: int = 2,
        embedding: str = "mlp",
        field: str = "middle",
        aggregation: str = "token",
        map_size: tuple[int, int] = (320, 640),
        activation: str = "identity",
        fusion: str = "weights",
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("aggregation", aggregation, AGGREGATIONS),
            ("activation", activation, ("identity", "sigmoid")),
            ("fusion", fusion, FUSIONS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if actions < 0 or min(map_size) < 1:
            raise ValueError(f"actions must not be negative and map_size positive, got {actions} and {map_size}")
        self.kept = [*([0, 1] if position else []), *([2, 3] if gaze else []), *range(4, 4 + actions)]
        self.given = 4 + actions
        self.map_size, self.aggregation, self.activation = tuple(map_size), aggregation, activation
        self.people = JointMaps(len(self.kept), dim, depth, num_heads, embedding=embedding, field=field)
        self.fuse = None if fusion == "none" else MapFusion(fusion)

    def attributes(self, people_BPF: Tensor) -> Tensor:
        """Those that this network takes, of position, gaze and action.

        Raises:
            ValueError: if there are not as many as that.
        """
        if people_BPF.ndim != 3 or people_BPF.shape[2] != self.given:
            raise ValueError(
                f"people must be (batch, people, {self.given}): position, gaze and {self.given - 4} actions, got "
                f"{tuple(people_BPF.shape)}"
            )
        return people_BPF if len(self.kept) == self.given else people_BPF[..., self.kept]

    def forward(
        self,
        people: Tensor,
        there: Tensor | None = None,
        image_map: Tensor | None = None,
        *,
        attends: Tensor | None = None,
        size: tuple[int, int] | None = None,
        each: bool = False,
    ) -> HeatmapOutput:
        """The joint map (B, H, W), and the maps of which it is made.

        Args:
            people: (B, P, 4 + actions): x and y of the head as shares of width and height, the gaze as a vector of
                unit length, and what each does, as probabilities.
            there: (B, P), bool: False for rows that only fill up; all are there where None.
            image_map: (B, H, W) of all people, or (B, P, h, w) of each, by a network of gaze.
            attends: (B, P), bool: who looks at what all look at, where `aggregation` asks for it; all where None.
            size: H and W; `map_size` where None.
            each: also the maps of single people.

        Raises:
            ValueError: if the inputs do not fit together, or the network.
        """
        height, width = self.map_size if size is None else size
        features = self.attributes(people)
        single = each or self.aggregation != "token"
        maps_BMN = self.people(features, there, grid_points(height, width, people.device), single)
        maps_BMHW = maps_BMN.unflatten(2, (height, width))
        logits_BMHW = maps_BMHW
        if self.activation == "sigmoid":
            maps_BMHW = maps_BMHW.sigmoid()
        joint_BHW = maps_BMHW[:, -1]
        if self.aggregation != "token":
            present = torch.ones_like(people[..., 0], dtype=torch.bool) if there is None else there
            weight_BM = F.pad(present if attends is None else present & attends, (0, 1), value=True)
            if self.aggregation == "people":
                weight_BM = F.pad(weight_BM[:, :-1], (0, 1), value=False)
            share_BM = weight_BM.to(maps_BMHW.dtype)
            share_BM = share_BM / share_BM.sum(1, keepdim=True).clamp(min=1)
            joint_BHW = (maps_BMHW * share_BM[..., None, None]).sum(1)
        of_each = maps_BMHW[:, :-1] if single else None
        if image_map is None or self.fuse is None:
            if image_map is not None:
                raise ValueError("image_map cannot be taken by a network of fusion='none'")
            plain = self.activation == "sigmoid" and self.aggregation == "token"
            return HeatmapOutput(joint_BHW, logits_BMHW[:, -1] if plain else None, each=of_each)
        if image_map.ndim == 4:
            present = torch.ones_like(people[..., 0], dtype=torch.bool) if there is None else there
            if image_map.shape[:2] != present.shape:
                raise ValueError(
                    f"image_map must be of each of {present.shape[1]} people, got {tuple(image_map.shape)}"
                )
            image_map = joint_of_people(image_map, present, (height, width))
        if image_map.shape != joint_BHW.shape:
            raise ValueError(f"image_map must be {tuple(joint_BHW.shape)}, got {tuple(image_map.shape)}")
        fused_BHW = self.fuse(joint_BHW, image_map)
        return HeatmapOutput(fused_BHW, each=of_each, branches=[joint_BHW, image_map])

    def see(
        self,
        images: Sequence[Tensor],
        people: Tensor | None = None,
        there: Tensor | None = None,
        image_map: Tensor | None = None,
    ) -> HeatmapOutput:
        if people is None:
            raise ValueError(
                "people must be given: where they are, look, and what they do, which no picture tells here"
            )
        if len(people) != len(images):
            raise ValueError(f"people must be given for each of {len(images)} images, got {len(people)}")
        return self.on_images(self(people, there, image_map), images)

    def predict(
        self,
        files: str | Path | Sequence[str | Path],
        people: Tensor | None = None,
        there: Tensor | None = None,
        image_map: Tensor | None = None,
    ) -> HeatmapOutput:
        """What the people of image files look at together, without gradients; the images are drawn on.

        Args:
            files: an image, or several of one size.
            people, there, image_map: of each image; see `forward`.

        Raises:
            OSError: if a file cannot be read.
            ValueError: if there is none, one is no image, sizes differ, or people do not fit.
        """
        return self.on_files(files, lambda images: self.see(images, people, there, image_map))


def _convs(*widths: int) -> nn.Sequential:
    layers = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Conv2d(a, b, 5, padding=2), nn.ReLU())]
    return nn.Sequential(*layers)
