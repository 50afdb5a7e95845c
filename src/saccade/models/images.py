"""Image files as tensors, and what is drawn of what a network says of them.

Shape letters: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.extras import need
from saccade.ops.constants import numbers

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

#: ImageNet's mean colour and deviation, as a share of the range
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: share of the shorter side that the middle of an image takes, where networks are tested at 224 of 256 pixels
MIDDLE = 0.875
#: ITU-R BT.601
_LUMA = (0.299, 0.587, 0.114)

_INK, _BAR, _LINE, _PANEL = (20, 20, 20), (150, 180, 215), 22, 260


def read_image(path: str | Path) -> Tensor:
    """A photograph as (3, H, W) in [0, 1], the right way up.

    Raises:
        OSError: if there is no such file, or it cannot be read.
        ValueError: if it is no image.
        ImportError: where pillow is missing.
    """
    image, ops = need("PIL.Image", "reading images"), need("PIL.ImageOps", "reading images")
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not an image")
    if not path.exists():
        raise FileNotFoundError(f"no image at {path}")
    try:
        with image.open(path) as file:
            upright = ops.exif_transpose(file)
            deep = upright.mode.startswith(("I;16", "F")) or upright.mode == "I"
            colours = upright.convert("F" if deep else "RGB")
    except (image.UnidentifiedImageError, image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(f"{path} is no image that can be read: {' '.join(str(error).split())}") from error
    values = torch.frombuffer(bytearray(colours.tobytes()), dtype=torch.float32 if deep else torch.uint8)
    values_HWC = values.reshape(colours.height, colours.width, -1)
    if deep:  # 16 bits a pixel, or numbers of any range: the range of the file becomes [0, 1]
        top = 65535.0 if upright.mode.startswith("I") else max(float(values.max()), 1e-12)
        values_HWC = (values_HWC / top).clamp(0, 1).expand(-1, -1, 3)
    else:
        values_HWC = values_HWC / 255
    return values_HWC.permute(2, 0, 1).contiguous()


def to_picture(image_3HW: Tensor) -> Picture:
    """An image in [0, 1] as one of pillow's."""
    values_HW3 = (image_3HW.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    size = (values_HW3.shape[1], values_HW3.shape[0])
    return need("PIL.Image", "drawing").frombytes("RGB", size, values_HW3.contiguous().numpy().tobytes())


def middle(image_3HW: Tensor, side: int) -> Tensor:
    """The middle of an image as a square: the shorter side scaled to side / 0.875, the rest cut off."""
    height, width = image_3HW.shape[1:]
    scale = side / MIDDLE / min(height, width)
    size = [max(side, round(height * scale)), max(side, round(width * scale))]
    scaled = F.interpolate(image_3HW[None], size, mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)
    top, left = ((length - side) // 2 for length in size)
    return scaled[:, top : top + side, left : left + side]


def scaled(images: Sequence[Tensor], size: tuple[int, int], channels: int) -> Tensor:
    """Images of any sizes at one, and `normalised`: (B, channels, height, width).

    Args:
        images: (3, H, W) in [0, 1] each.
        size: height and width.
        channels: of the network.

    Raises:
        ValueError: as `normalised`.
    """
    fitted = [F.interpolate(image[None], list(size), mode="bicubic", antialias=True)[0].clamp(0, 1) for image in images]
    return normalised(torch.stack(fitted), channels)


def normalised(images_B3HW: Tensor, channels: int) -> Tensor:
    """With ImageNet's mean colour and deviation taken out; one channel is the luma.

    Raises:
        ValueError: if a network takes other numbers of channels than 1 and 3.
    """
    if channels not in (1, 3):
        raise ValueError(f"image files have 3 channels, or 1 as grey; this network takes {channels}")
    mean, std = (numbers(values, images_B3HW, torch.get_default_dtype())[:, None, None] for values in (MEAN, STD))
    if channels == 3:
        return (images_B3HW - mean) / std
    weight = torch.tensor(_LUMA, device=images_B3HW.device)[:, None, None]
    grey = ((images_B3HW - mean) * weight).sum(1, keepdim=True)
    return grey / (std * weight).sum()


def colours(count: int) -> Tensor:
    """K colours in [0, 1] that neighbours in number do not share, (K, 3)."""
    return torch.tensor([colorsys.hsv_to_rgb(k * 0.618034 % 1, 0.75, 0.95 if k % 2 else 0.7) for k in range(count)])


def with_bars(
    picture: Picture, shares: Sequence[tuple[str, float]], colours_K3: Sequence[Sequence[float]] | None = None
) -> Picture:
    """A picture, and right of it a bar from 0 to 1 for each name.

    Args:
        colours_K3: of the bars, in [0, 1]; all blue where None.
    """
    image, draw, font = (need(f"PIL.{name}", "drawing") for name in ("Image", "ImageDraw", "ImageFont"))
    letters = font.load_default()
    sheet = image.new("RGB", (picture.width + _PANEL, max(picture.height, _LINE * len(shares))), (255, 255, 255))
    sheet.paste(picture, (0, 0))
    pen, left = draw.Draw(sheet), picture.width + 8
    for line, (name, share) in enumerate(shares):
        top = line * _LINE
        colour = _BAR if colours_K3 is None else tuple(round(255 * (0.4 + 0.6 * part)) for part in colours_K3[line])
        length = round((_PANEL - 16) * min(max(share, 0.0), 1.0))
        pen.rectangle((left, top + 3, left + length, top + _LINE - 4), fill=colour)
        pen.text((left + 4, top + 5), f"{share:.1%}  {name}", fill=_INK, font=letters)
    return sheet


def luma(images_B3HW: Tensor) -> Tensor:
    """Y of YUV (ITU-R BT.601), (B, 1, H, W), or (1, H, W) of one image."""
    weight = numbers(_LUMA, images_B3HW)[:, None, None]
    return (images_B3HW * weight).sum(-3, keepdim=True)


def beside(pictures: Sequence[Picture]) -> Picture:
    """Pictures right of each other."""
    size = (sum(each.width for each in pictures), max(each.height for each in pictures))
    sheet, left = need("PIL.Image", "drawing").new("RGB", size, (255, 255, 255)), 0
    for each in pictures:
        sheet.paste(each, (left, 0))
        left += each.width
    return sheet


def stacked(pictures: Sequence[Picture]) -> Picture:
    """Pictures below each other."""
    if len(pictures) == 1:
        return pictures[0]
    size = (max(each.width for each in pictures), sum(each.height for each in pictures))
    sheet, top = need("PIL.Image", "drawing").new("RGB", size, (255, 255, 255)), 0
    for each in pictures:
        sheet.paste(each, (0, top))
        top += each.height
    return sheet


def captioned(images: Sequence[Tensor], answers: Sequence[Mapping[str, float]], height: int) -> Picture:
    """Images below each other, each beside a bar for every share that is said of it.

    Args:
        images: (3, H, W) in [0, 1].
        answers: of each image names and shares.
        height: to which they are drawn.
    """
    pictures = []
    for image, said in zip(images, answers):
        shown = to_picture(image)
        shown = shown.resize((max(1, round(shown.width * height / shown.height)), height))
        pictures.append(with_bars(shown, list(said.items())))
    return stacked(pictures)
