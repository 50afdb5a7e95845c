"""How joint attention is trained and judged.

Adam: the map of attributes alone at 1e-3, up to 500 epochs of 8; the network of the image's map alone; then both at
1e-5, 15 to 20 epochs of 4.

Shape letters: B images, P people, H, W map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.models.heatmap import HeatmapOutput, gaussian

#: of the bump at what is looked at, in pixels of the map
SIGMA = 10.0


def joint_truth(
    points_BP2: Tensor, attends_BP: Tensor, size: tuple[int, int], sigma: float = SIGMA
) -> tuple[Tensor, Tensor]:
    """The maps of each person (B, P, H, W), zeros for who does not attend, and min(1, their sum) (B, H, W).

    Args:
        points_BP2: what each looks at, x and y as shares of width and height.
        attends_BP: who looks at what all look at.
        size: H and W.
        sigma: of the bumps, in pixels.
    """
    each = gaussian(points_BP2.flatten(0, 1), size, sigma).unflatten(0, points_BP2.shape[:2])
    each = each * attends_BP[..., None, None]
    return each, each.sum(1).clamp(max=1)


def joint_loss(
    said: HeatmapOutput,
    truth_BHW: Tensor,
    *,
    image_maps_BPHW: Tensor | None = None,
    each_BPHW: Tensor | None = None,
    attends_BP: Tensor | None = None,
    cross_entropy: bool = False,
) -> Tensor:
    """The errors of the final map and of the attributes' joint map and, where they are given, of each person's.

    Each is a mean over pixels; those of people are summed over who attends, and divided by how many that are.

    Args:
        said: of the network.
        truth_BHW: of all together.
        image_maps_BPHW: of each person, by the network of the image, at the size of the truth.
        each_BPHW: the truth of each person.
        attends_BP: who attends.
        cross_entropy: instead of the squared error; maps are in [0, 1] then.

    Raises:
        ValueError: if maps of people come without their truth and who attends.
    """
    error = F.binary_cross_entropy if cross_entropy else F.mse_loss
    loss = error(said.heatmap.float(), truth_BHW.float())
    if said.branches is not None:
        loss = loss + error(said.branches[0].float(), truth_BHW.float())
    if image_maps_BPHW is not None:
        if each_BPHW is None or attends_BP is None:
            raise ValueError("image_maps must come with each and attends, got them alone")
        if attends_BP.any():
            loss = loss + error(image_maps_BPHW[attends_BP].float(), each_BPHW[attends_BP].float())
    return loss


def detected(
    heatmap_BHW: Tensor, points_B2: Tensor, thresholds: tuple[float, ...] = (30.0, 60.0, 90.0)
) -> dict[str, float]:
    """How far the peak is from the point, `distance` in pixels of the map, and the share within each threshold.

    Args:
        heatmap_BHW: joint maps.
        points_B2: what is looked at, x and y as shares of width and height.
        thresholds: in pixels.
    """
    height, width = heatmap_BHW.shape[1:]
    place_B = heatmap_BHW.flatten(1).argmax(1)
    peak_B2 = torch.stack([place_B % width, place_B // width], 1)
    away_B = (peak_B2 - points_B2 * points_B2.new_tensor([width, height])).norm(dim=1)
    found = {"distance": float(away_B.mean())}
    return found | {f"within_{each:g}": float((away_B <= each).float().mean()) for each in thresholds}
