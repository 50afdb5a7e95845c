"""Networks that find which points of two images show the same: their output, files of it, and its picture.

Points are (x, y) in pixels, a whole number in the middle of a pixel.

Shape letters: B batch, K matches of all pairs of images, N points, H height, W width.
"""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from saccade.extras import need
from saccade.models.complete import Complete
from saccade.models.images import beside, luma, to_picture
from saccade.ops.export import exporting, output

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

#: matches that a picture draws
_DRAWN = 400


@output
@dataclass
class MatchOutput:
    """Which points belong together; names as in kornia.

    Attributes:
        keypoints0, keypoints1: (K, 2), points of the first and of the second image.
        confidence: (K,), in [0, 1].
        batch_indexes: (K,), the pair of images of each.
        images: (3, H, W) in [0, 1] each, as `predict` read them; None in what `forward` gives.
    """

    keypoints0: Tensor
    keypoints1: Tensor
    confidence: Tensor
    batch_indexes: Tensor
    images: list[Tensor] | None = None

    def of(self, pair: int) -> tuple[Tensor, Tensor, Tensor]:
        """Points of both images and confidence of one pair of a batch, the surest first.

        Args:
            pair: its number.
        """
        (chosen,) = (self.batch_indexes == pair).nonzero(as_tuple=True)
        chosen = chosen[self.confidence[chosen].argsort(descending=True, stable=True)]
        return self.keypoints0[chosen], self.keypoints1[chosen], self.confidence[chosen]


class Matcher(Complete):
    """Base of the networks that match two images; a subclass gives `forward(image0, image1)` and `loss`.

    Files may differ in size. Each is scaled so that its longer side is at most `longest`, its sides cut down to
    multiples of `multiple`; points come back in pixels of the file.

    Attributes:
        multiple: what the sides of an image must be multiples of.
        longest: of the sides that the network sees; None for any.
    """

    in_channels = 1
    views = ("image0", "image1")
    documents: ClassVar[tuple[str, ...]] = (".csv", ".txt")
    multiple: int = 8
    longest: int | None = 840

    def loss(self, image0: Tensor, image1: Tensor, positions: Tensor) -> Tensor:
        """What training makes small.

        Args:
            image0, image1: pairs of images of one size, as `forward` takes them.
            positions: (B, 2, H, W, 2), where each pixel of the first image lies in the second, and of the second in
                the first; NaN where that is not known.
        """
        raise NotImplementedError

    def ready(self, image_3HW: Tensor) -> Tensor:
        """An image as the network takes it, (1, C, h, w)."""
        (height, width), most = image_3HW.shape[1:], max(image_3HW.shape[1:])
        scale = 1.0 if self.longest is None else min(1.0, self.longest / most)
        size = [max(1, int(side * scale) // self.multiple) * self.multiple for side in (height, width)]
        pixels = luma(image_3HW[None]) if self.in_channels == 1 else image_3HW[None]
        if size == [height, width]:
            return pixels
        return F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)

    def see(self, images: Sequence[Tensor]) -> MatchOutput:
        ready = [self.ready(image) for image in images]
        said: MatchOutput = self(*ready)
        points = []
        for keypoints, seen, image in zip((said.keypoints0, said.keypoints1), ready, images):
            of_file, of_seen = (keypoints.new_tensor([x.shape[-1], x.shape[-2]]) for x in (image, seen))
            points.append((keypoints + 0.5) * (of_file / of_seen) - 0.5)
        return replace(said, keypoints0=points[0], keypoints1=points[1], images=list(images))

    def answer(self, output: MatchOutput, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """How many matches there are, how sure they are, and by how much points move."""
        first, second, confidence = output.of(0)
        said: dict[str, Any] = {"matches": f"{len(first)}"}
        if len(first):
            x, y = (second - first).float().median(0).values.tolist()
            said |= {
                "median confidence": float(confidence.detach().median()),
                "median displacement": f"{x:+.1f}, {y:+.1f} px",
            }
        return [said]

    def drawn(self, output: MatchOutput, names: Sequence[str] | None) -> Picture:
        images = output.images or []
        sheet = beside([to_picture(image) for image in images])
        pen, right = need("PIL.ImageDraw", "drawing").Draw(sheet), images[0].shape[2]
        first, second, confidence = (x[:_DRAWN].tolist() for x in output.of(0))
        for start, end, sure in reversed(list(zip(first, second, confidence))):  # the surest on top
            ink = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(min(max(sure, 0.0), 1.0) / 3, 1.0, 0.9))
            end = [end[0] + right, end[1]]
            pen.line([*start, *end], fill=ink)
            for x, y in (start, end):
                pen.ellipse((x - 2, y - 2, x + 2, y + 2), outline=ink)
        return sheet

    def document(self, output: Any, place: Path, files: Sequence[Path]) -> dict[Path, bytes]:
        """ ".csv": a table. ".txt": what COLMAP imports, the matches in `place` and each image's points beside it."""
        if place.suffix.lower() == ".csv":
            return {place: csv_text(output).encode()}
        names = [file.name for file in files]
        if names[0] == names[1]:
            raise ValueError(f"COLMAP tells images by their names, and both are called {names[0]}")
        features, pairs = colmap_text(output, names)
        found = {place.with_name(f"{name}.txt"): text.encode() for name, text in features.items()}
        if place in found:
            raise ValueError(f"{place} is where the points of an image go: choose another name for the matches")
        return {**found, place: pairs.encode()}


def csv_text(matches: MatchOutput) -> str:
    """A line for each match of the first pair, the surest first: x0,y0,x1,y1,confidence.

    Args:
        matches: of `predict`.
    """
    file = io.StringIO()
    file.write("x0,y0,x1,y1,confidence\n")
    for first, second, confidence in zip(*(x.tolist() for x in matches.of(0))):
        file.write(",".join(f"{number:.4f}" for number in (*first, *second)) + f",{confidence:.6f}\n")
    return file.getvalue()


def colmap_text(matches: MatchOutput, names: Sequence[str]) -> tuple[dict[str, str], str]:
    """The matches of the first pair as COLMAP's importers read them: the points of each image by name, and the pairs.

    An image's text is `N 128`, then `x y scale orientation` and a descriptor of noughts for each point; the middle of
    the first pixel is (0.5, 0.5). The pairs' is the names of both images, then `number0 number1` for each match.

    Args:
        matches: of `predict`.
        names: of both images.
    """
    first, second, _ = matches.of(0)
    nothing, features = " 0" * 128, {}
    for name, points in zip(names, (first, second)):
        lines = [f"{x + 0.5:.4f} {y + 0.5:.4f} 1 0{nothing}\n" for x, y in points.tolist()]
        features[name] = "".join([f"{len(points)} 128\n", *lines])
    return features, "".join([f"{names[0]} {names[1]}\n", *(f"{i} {i}\n" for i in range(len(first))), "\n"])


def in_image(points_N2: Tensor, height: int, width: int) -> Tensor:
    """Whether points lie in an image of that size, (N,); not a number is outside.

    Args:
        points_N2: (..., 2).
        height, width: of the image.
    """
    extent = points_N2.new_tensor([width, height]) - 0.5
    return ((points_N2 >= -0.5) & (points_N2 < extent)).all(-1)


def check_pair(image0: Tensor, image1: Tensor, channels: int, multiple: int) -> None:
    """Raise ValueError unless both are images (B, channels, H, W), as many, with sides that are multiples.

    Args:
        image0, image1: they may differ in size.
        channels: of both.
        multiple: of their sides.
    """
    for name, image in (("image0", image0), ("image1", image1)):
        if image.ndim != 4 or image.shape[1] != channels:
            raise ValueError(f"{name} must be images (batch, {channels}, height, width), got {tuple(image.shape)}")
        if not exporting() and (min(image.shape[2:]) < multiple or any(side % multiple for side in image.shape[2:])):
            raise ValueError(
                f"height and width of {name} must be multiples of {multiple}, got {image.shape[2]} and {image.shape[3]}"
            )
    if image0.shape[0] != image1.shape[0]:
        raise ValueError(f"image0 and image1 must be as many, got {image0.shape[0]} and {image1.shape[0]}")
