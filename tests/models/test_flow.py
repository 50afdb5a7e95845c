"""Networks of two images: consistency, the wheel of colours, files of the field, and images of any size."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from saccade.models.flow import FlowNetwork, FlowOutput, consistent, flo, kitti, pfm, png16, ramp, wheel
from saccade.models.images import to_picture
from saccade.report import predictions


class Shift(FlowNetwork):
    """Says that all moves by (2, 0), or by its disparity."""

    multiple = 16

    def __init__(self, task: str = "flow") -> None:
        super().__init__()
        self.task, self.one = task, nn.Parameter(torch.ones(1))

    def ready(self, images_B3HW: Tensor) -> Tensor:
        return images_B3HW

    def forward(self, image0: Tensor, image1: Tensor, *, both: bool = False) -> FlowOutput:
        assert image0.shape[2] % 16 == image0.shape[3] % 16 == 0
        if self.task == "stereo":
            return FlowOutput(disparity=255 * image0[:, 0])
        flow = torch.zeros_like(image0[:, :2])
        flow[:, 0] = 2
        return FlowOutput(flow=flow, backward=-flow if both else None)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.png" for name in ("first", "second")]
    for path in paths:
        to_picture(torch.rand(3, 20, 37)).save(path)
    return paths


def test_flow_there_and_back(files: list[Path]) -> None:
    model = Shift()
    said = model.predict(files)
    assert said.flow is not None and said.consistent is not None
    assert said.flow.shape == said.backward.shape == (1, 2, 20, 37) and said.consistent.shape == (1, 20, 37)
    assert said.consistent[0, :, :35].all() and not said.consistent[0, :, 35:].any()
    assert model.picture(said).size == (74, 20)
    (answer,) = model.answer(said)
    assert answer["moves by"] == "2.00 pixels, at most 2.00" and answer["there and back agree"] == pytest.approx(
        35 / 37
    )


def test_disparity(files: list[Path], tmp_path: Path) -> None:
    model = Shift("stereo")
    left = torch.zeros(3, 20, 37)
    left[0, 4, 7] = 1
    to_picture(left).save(tmp_path / "left.png")
    said = model.predict([tmp_path / "left.png", files[1]])
    assert said.disparity is not None and said.disparity[0, 4, 7] == 255 and said.disparity.sum() == 255
    assert model.picture(said).size == (74, 20) and model.answer(said) == [{"disparity": "0.0 to 255.0"}]
    with pytest.raises(ValueError, match="depth needs intrinsics and pose"):
        Shift("depth").predict(files)
    to_picture(torch.rand(3, 20, 30)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match="must have one size, got 30 x 20, 37 x 20"):
        model.predict([files[0], tmp_path / "small.png"])


def test_what_does_not_return_is_not_consistent() -> None:
    flow = torch.zeros(1, 2, 6, 8)
    flow[:, 0] = 1.0
    back = -flow
    back[0, 0, 2, 4] = 3.0
    there = consistent(flow, back)
    assert not there[0, 2, 3] and there[0, 2, 2] and not there[0, :, 7].any() and there[0, :, :7].sum() == 41


def test_wheel_and_ramp() -> None:
    flow = torch.zeros(2, 1, 5)
    flow[0, 0, 1], flow[0, 0, 2], flow[1, 0, 3], flow[0, 0, 4] = 1.0, -1.0, 1.0, 3.0
    colour = wheel(flow, 1.0)[:, 0].T
    assert colour[0].tolist() == [1, 1, 1]
    assert colour[1].argmax() == 0 and colour[2, 0] < 0.2 and colour[2, 1:].min() > 0.5  # right is red, left cyan
    assert colour[3, 2] < 0.2 and colour[3, 0] == 1  # down is yellow
    torch.testing.assert_close(colour[4], 0.75 * colour[1])  # longer than the most
    assert wheel(torch.zeros(2, 3, 3)).eq(1).all()
    heat = ramp(torch.tensor([[0.0, 5.0]]))[:, 0].T
    assert heat[0, 2] > heat[0, 0] and heat[1, 0] > heat[1, 2] and ramp(torch.ones(2, 2)).isfinite().all()


def test_files_of_the_field() -> None:
    torch.manual_seed(0)
    flow = torch.randn(2, 3, 5)
    data = flo(flow)
    assert data[:4] == b"PIEH" and struct.unpack("<ii", data[4:12]) == (5, 3) and len(data) == 12 + 4 * 30
    read = torch.frombuffer(bytearray(data[12:]), dtype=torch.float32).view(3, 5, 2).permute(2, 0, 1)
    assert read.equal(flow)
    data = pfm(flow[0])
    head, numbers = data[:12], data[len(b"Pf\n5 3\n-1.0\n") :]
    assert head == b"Pf\n5 3\n-1.0\n"
    assert torch.frombuffer(bytearray(numbers), dtype=torch.float32).view(3, 5).flip(0).equal(flow[0])
    values = unpacked(kitti(FlowOutput(flow=flow[None])))
    torch.testing.assert_close((values[:2] - 2**15) / 64, flow.double(), atol=1 / 128, rtol=0)
    assert values[2].eq(1).all()
    disparity = torch.tensor([[[0.0, 1.5, 300.0]]])
    assert unpacked(kitti(FlowOutput(disparity=disparity))).tolist() == [[[1, 384, 65535]]]
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        png16(torch.zeros(2, 3, 3))


def unpacked(data: bytes) -> Tensor:
    """The numbers of a PNG of 16 bits without filters, (C, H, W); its checksums are right."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, parts = 8, {}
    while place < len(data):
        length, name = struct.unpack(">I4s", data[place : place + 8])
        body = data[place + 8 : place + 8 + length]
        assert struct.unpack(">I", data[place + 8 + length : place + 12 + length])[0] == zlib.crc32(name + body)
        parts[name], place = body, place + 12 + length
    W, H, depth, colour = struct.unpack(">IIBB", parts[b"IHDR"][:10])
    C = {0: 1, 2: 3}[colour]
    lines = zlib.decompress(parts[b"IDAT"])
    assert depth == 16 and len(lines) == H * (1 + 2 * C * W)
    rows = [lines[row * (1 + 2 * C * W) + 1 : (row + 1) * (1 + 2 * C * W)] for row in range(H)]
    numbers = [struct.unpack(f">{C * W}H", row) for row in rows]
    return torch.tensor(numbers, dtype=torch.double).view(H, W, C).permute(2, 0, 1)


def test_documents_hold_what_they_are_for(tmp_path: Path) -> None:
    flow, disparity = FlowOutput(flow=torch.ones(1, 2, 2, 2)), FlowOutput(disparity=torch.ones(1, 2, 2))
    model = Shift()
    for said, name, content in (
        (flow, "a.flo", flo(flow.flow[0])),
        (disparity, "a.pfm", pfm(disparity.disparity[0])),
        (flow, "a.16.png", kitti(flow)),
    ):
        predictions.write(model, said, tmp_path / name)
        assert (tmp_path / name).read_bytes() == content
    for said, name, message in (
        (disparity, "b.flo", ".flo holds flow"),
        (flow, "b.pfm", ".pfm holds one number"),
        (FlowOutput(), "b.pfm", "must have flow, disparity or depth"),
    ):
        with pytest.raises(ValueError, match=message):
            predictions.write(model, said, tmp_path / name)
        assert not (tmp_path / name).exists()
