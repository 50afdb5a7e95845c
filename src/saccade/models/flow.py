"""Networks of two images that say how far each pixel moved, or how far away it is: output, pictures and files.

Shape letters: B batch, H height, W width, C channels, K colours.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.models.complete import Complete, batch
from saccade.models.images import beside, stacked, to_picture
from saccade.ops.export import output

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

#: segments of the wheel of colours and how many each has (Baker et al., IJCV 2011), from red by yellow round to red
_WHEEL = (
    (15, (255, 0, 0), (255, 255, 0)),
    (6, (255, 255, 0), (0, 255, 0)),
    (4, (0, 255, 0), (0, 255, 255)),
    (11, (0, 255, 255), (0, 0, 255)),
    (13, (0, 0, 255), (255, 0, 255)),
    (6, (255, 0, 255), (255, 0, 0)),
)
#: from far to near
_RAMP = ((48, 18, 59), (70, 120, 250), (28, 230, 180), (164, 252, 60), (251, 185, 56), (217, 56, 6), (122, 4, 3))


@output
@dataclass
class FlowOutput:
    """What two images say of each pixel of the first; one of flow, disparity and depth, what the network is for.

    Attributes:
        flow: (B, 2, H, W), how far x and y of a pixel are in the second image from those in the first, in pixels.
        disparity: (B, H, W), how far to the left it is in the right one.
        depth: (B, H, W), in the unit of the pose.
        backward: the same of the second image, where it was asked for.
        consistent: (B, H, W), True where flow there and back returns; False is mostly what the second does not show.
        stages: in training all predictions from the first to the last, (B, channels, H, W): flow, disparity or inverse
            depth.
        images: (3, H, W) in [0, 1] each, as `predict` read them; None in what `forward` gives.
    """

    flow: Tensor | None = None
    disparity: Tensor | None = None
    depth: Tensor | None = None
    backward: Tensor | None = None
    consistent: Tensor | None = None
    stages: list[Tensor] | None = None
    images: list[Tensor] | None = None


class FlowNetwork(Complete):
    """Base of the networks of two images; a subclass gives `forward`, of images that are `ready`.

    Attributes:
        multiple: of which sides have to be; `predict` repeats the edges of others.
        task: "flow", "stereo" or "depth".
    """

    views = ("image0", "image1")
    documents: ClassVar[tuple[str, ...]] = (".flo", ".pfm", ".16.png")
    multiple: int = 1
    task: str

    def ready(self, images_B3HW: Tensor) -> Tensor:
        """Images in [0, 1] as the network takes them."""
        raise NotImplementedError

    def see(self, images: Sequence[Tensor]) -> FlowOutput:
        """Flow both ways, and where they agree; or disparity of left and right.

        Raises:
            ValueError: if the two have not one size, or depth is asked for, which needs cameras.
        """
        if self.task == "depth":
            raise ValueError("depth needs intrinsics and pose, which are in no image: call the network")
        both = batch(images)
        padding = _padding(both.shape[2], both.shape[3], self.multiple)
        filled = self.ready(F.pad(both, padding, mode="replicate") if any(padding) else both)
        left, right, top, bottom = padding

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]

        said: FlowOutput = self(filled[:1], filled[1:], **({"both": True} if self.task == "flow" else {}))
        said = replace(said, flow=cut(said.flow), disparity=cut(said.disparity), backward=cut(said.backward))
        if said.flow is not None and said.backward is not None:
            said = replace(said, consistent=consistent(said.flow, said.backward))
        return replace(said, images=list(images))

    def answer(self, output: FlowOutput, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """How far pixels move, in the mean and at most, or the least and the largest disparity; and how many agree."""
        if output.flow is None:
            values = _of_one_channel(output)
            what = "disparity" if output.depth is None else "depth"
            return [{what: f"{float(v.min()):.1f} to {float(v.max()):.1f}"} for v in values]
        said: list[dict[str, Any]] = []
        for number, far_HW in enumerate(output.flow.norm(dim=1)):
            said.append({"moves by": f"{float(far_HW.mean()):.2f} pixels, at most {float(far_HW.max()):.2f}"})
            if output.consistent is not None:
                said[-1]["there and back agree"] = float(output.consistent[number].float().mean())
        return said

    def drawn(self, output: FlowOutput, names: Sequence[str] | None) -> Picture:
        """The first image beside flow by the wheel of colours (black where it does not return), or disparity from far,
        blue, to near, red."""
        images = (output.images or [])[::2]
        if output.flow is None:
            maps = [ramp(v) for v in _of_one_channel(output)]
        else:
            maps = [wheel(flow) for flow in output.flow.float().cpu()]
            if output.consistent is not None:
                maps = [m * (0.25 + 0.75 * kept.float().cpu()) for m, kept in zip(maps, output.consistent)]
        return stacked([beside([to_picture(image), to_picture(m)]) for image, m in zip(images, maps)])

    def document(self, output: FlowOutput, place: Path, files: Sequence[Path]) -> dict[Path, bytes]:
        """ ".flo" of flow (Middlebury), ".pfm" of disparity or depth, ".16.png" of any (KITTI)."""
        name = place.name.lower()
        if name.endswith(".16.png"):
            return {place: kitti(output)}
        if name.endswith(".flo"):
            if output.flow is None:
                raise ValueError(".flo holds flow; this is another thing: use .pfm or .16.png")
            return {place: flo(output.flow[0])}
        if output.flow is not None:
            raise ValueError(".pfm holds one number a pixel; use .flo or .16.png for flow")
        return {place: pfm(_of_one_channel(output)[0])}


def consistent(flow_B2HW: Tensor, backward_B2HW: Tensor, *, share: float = 0.01, pixels: float = 0.5) -> Tensor:
    """Where flow there and back returns, bool (B, H, W): |f + b there| <= share (|f| + |b there|) + pixels.

    What moves out of the image is not consistent. (After Sundaram et al., ECCV 2010.)

    Args:
        flow_B2HW, backward_B2HW: from the first image to the second, and back.
        share, pixels: how much may be missing.
    """
    H, W = flow_B2HW.shape[2:]
    y, x = (torch.arange(n, device=flow_B2HW.device, dtype=flow_B2HW.dtype) for n in (H, W))
    at = torch.stack([flow_B2HW[:, 0] + x, flow_B2HW[:, 1] + y[:, None]], 3)
    extent = at.new_tensor([W, H])
    there = F.grid_sample(backward_B2HW, (2 * at + 1) / extent - 1, align_corners=False)
    inside = ((at >= 0) & (at <= extent - 1)).all(3)
    lost = (flow_B2HW + there).norm(dim=1)
    return inside & (lost <= share * (flow_B2HW.norm(dim=1) + there.norm(dim=1)) + pixels)


def wheel(flow_2HW: Tensor, most: float | None = None) -> Tensor:
    """Flow as colours (3, H, W) in [0, 1]: the hue is the direction, white does not move.

    Args:
        flow_2HW: in pixels.
        most: the length of full colour; the longest of the flow where None.
    """
    steps = [n for n, _, _ in _WHEEL]
    parts = []
    for count, first, last in _WHEEL:
        ends = (torch.tensor(end, dtype=torch.float32).expand(count, -1) for end in (first, last))
        parts.append(torch.lerp(next(ends), next(ends), torch.arange(count)[:, None] / count))
    colours_K3 = (torch.cat(parts) / 255).to(flow_2HW)
    far_HW = flow_2HW.norm(dim=0)
    far_HW = far_HW / max(float(far_HW.max()) if most is None else most, 1e-6)
    place_HW = (torch.atan2(-flow_2HW[1], -flow_2HW[0]) / torch.pi + 1) / 2 * (sum(steps) - 1)
    low_HW = place_HW.floor().long()
    near, far = colours_K3[low_HW % sum(steps)], colours_K3[(low_HW + 1) % sum(steps)]
    colour_3HW = torch.lerp(near, far, (place_HW - low_HW)[..., None]).permute(2, 0, 1)
    return torch.where(far_HW <= 1, 1 - far_HW * (1 - colour_3HW), 0.75 * colour_3HW)


def ramp(map_HW: Tensor) -> Tensor:
    """A map as colours (3, H, W), from blue at its smallest value to red at its largest."""
    map_HW = map_HW.float().cpu()
    least, most = map_HW.min(), map_HW.max()
    place = (map_HW - least) / (most - least).clamp(min=1e-12) * (len(_RAMP) - 1)
    low = place.long().clamp(max=len(_RAMP) - 2)
    colours_K3 = torch.tensor(_RAMP) / 255
    return torch.lerp(colours_K3[low], colours_K3[low + 1], (place - low)[..., None]).permute(2, 0, 1)


def flo(flow_2HW: Tensor) -> bytes:
    """Middlebury's file of flow: "PIEH", width, height, and x and y of each pixel in single precision."""
    H, W = flow_2HW.shape[1:]
    numbers = flow_2HW.detach().float().cpu().permute(1, 2, 0).contiguous().numpy().astype("<f4")
    return b"PIEH" + struct.pack("<ii", W, H) + numbers.tobytes()


def pfm(map_HW: Tensor) -> bytes:
    """A portable float map: single precision, little-endian, from the lowest line to the first."""
    H, W = map_HW.shape
    numbers = map_HW.detach().float().cpu().flip(0).contiguous().numpy().astype("<f4")
    return f"Pf\n{W} {H}\n-1.0\n".encode() + numbers.tobytes()


def kitti(output: FlowOutput) -> bytes:
    """KITTI's PNG of 16 bits, of the first pair: 64 flow + 2^15 and a 1 where it is known, or 256 disparity or depth.

    What is out of range is cut off; 0 of disparity and depth would mean "not known", so that the least is 1.

    Args:
        output: of one pair or more.
    """
    if output.flow is None:
        return png16((256 * _of_one_channel(output)[:1].float()).round().clamp(1, 65535))
    flow_2HW = (64 * output.flow[0].float() + 2**15).round().clamp(0, 65535)
    return png16(torch.cat([flow_2HW, torch.ones_like(flow_2HW[:1])]))


def png16(values_CHW: Tensor) -> bytes:
    """A PNG with 16 bits for each of 1 or 3 channels, which pillow does not write.

    Args:
        values_CHW: whole numbers from 0 to 65,535.

    Raises:
        ValueError: if there are other numbers of channels.
    """
    C, H, W = values_CHW.shape
    if C not in (1, 3):
        raise ValueError(f"a PNG of 16 bits has 1 or 3 channels, got {C}")
    rows = values_CHW.detach().cpu().permute(1, 2, 0).reshape(H, -1).numpy().astype(">u2")
    lines = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", W, H, 16, 0 if C == 1 else 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def _of_one_channel(output: FlowOutput) -> Tensor:
    maps = output.disparity if output.depth is None else output.depth
    if maps is None:
        raise ValueError("output must have flow, disparity or depth, got none of them")
    return maps


def _padding(height: int, width: int, multiple: int) -> tuple[int, int, int, int]:
    """Left, right, top and bottom, in equal parts."""
    down, across = -height % multiple, -width % multiple
    return across // 2, across - across // 2, down // 2, down - down // 2
