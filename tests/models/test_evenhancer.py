"""What the paper implies, and bad arguments. The rest is tested by being registered: tests/test_parts.py."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.models.evenhancer import (
    LIVT,
    ChannelFusion,
    EvEnhancer,
    EventAlignment,
    FeaturePyramid,
    ModulatedConv,
    PositionBias,
    charbonnier,
    intervals,
    simulated,
    voxels,
)
from saccade.models.evenhancer.decoder import between, nearest
from saccade.models.images import to_picture


def decoder(**changes: object) -> LIVT:
    torch.manual_seed(0)
    return LIVT(4, 8, 2, hidden=(12,), **changes)


def tiny(**changes: object) -> EvEnhancer:
    torch.manual_seed(0)
    sizes = {"blocks": 1, "recurrent_blocks": 1, "groups": 2, "base_dim": 4, "num_heads": 2, "hidden": (8,)}
    return EvEnhancer(8, **{**sizes, "moments": 2, "scale": 2.0, **changes})


@pytest.mark.parametrize("encode", ["ty", "tyx"])
def test_pixels_asked_in_pieces_are_those_asked_at_once(encode: str) -> None:
    whole, pieces = decoder(encode=encode), decoder(encode=encode, chunk=20)
    x = torch.randn(2, 4, 3, 5, 6)
    torch.testing.assert_close(pieces(x, 1.7, [0, 0.3, 1]), whole(x, 1.7, [0, 0.3, 1]))
    torch.testing.assert_close(whole(x, 1.7, [0, 0.3, 1])[:, 1:2], whole(x, 1.7, [0.3]))


def test_the_decoder_against_its_definition_pixel_by_pixel() -> None:
    """Grid sampling, as the authors' code has it, and loops."""
    module = decoder(encode="tyx")
    x, scale, time = torch.randn(1, 4, 4, 5, 3), 2.6, 0.45
    q, k, v = (conv(module.conv(x)) for conv in (module.q_conv, module.k_conv, module.v_conv))
    h, w, height, width = 5, 3, round(5 * scale), round(3 * scale)
    at = time * 3
    window = [min(max(round(at) + step, 0), 3) for step in (-1, 0, 1)]
    rel_t = (at - round(at)) * 2 / 3
    frequencies = 2 ** (torch.arange(16) * 10 / 15) - 1
    rows = torch.block_diag(frequencies[:, None], frequencies[:, None], frequencies[:, None])
    got = module(x, scale, [time])[0, 0]
    for row, column in ((0, 0), (4, 3), (height - 1, width - 1), (7, 6)):
        py, px = (2 * row + 1) / height - 1, (2 * column + 1) / width - 1
        grid = torch.tensor([px, py, rel_t]).view(1, 1, 1, 1, 3)
        query = F.grid_sample(q[:, :, window], grid, align_corners=False).view(2, 4)
        y0, x0 = (min(int((p + 1) / 2 * n), n - 1) for p, n in ((py, h), (px, w)))
        seen = []
        for step, frame in enumerate(window):
            logits, values = [], []
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    inside = 0 <= y0 + dy < h and 0 <= x0 + dx < w
                    key, value = (
                        m[0, :, frame, y0 + dy, x0 + dx].view(2, 4) if inside else torch.zeros(2, 4) for m in (k, v)
                    )
                    cy, cx = (2 * (y0 + dy) + 1) / h - 1, (2 * (x0 + dx) + 1) / w - 1
                    phases = rows @ torch.tensor([(rel_t - (step - 1) * 2 / 3) * 3, (py - cy) * h, (px - cx) * w])
                    bias = module.bias.proj(torch.cat([phases.sin(), phases.cos()]))
                    logits.append((query * key).sum(1) / 2 + bias)
                    values.append(value)
            weights = torch.stack(logits).softmax(0)
            torch.testing.assert_close(weights.sum(0), torch.ones(2))
            seen.append((weights[..., None] * torch.stack(values)).flatten())
        inputs = torch.cat([*seen, query.flatten(), torch.tensor([2 * h / height, 2 * w / width])])
        torch.testing.assert_close(got[:, row, column], module.mlp(inputs), atol=2e-4, rtol=1e-3)


def test_at_scale_one_the_query_is_the_maps_own_value() -> None:
    x = torch.randn(2, 5, 7, 3)
    assert torch.equal(between(between(x, 5, slice(None), 1), 7, slice(None), 2), x)
    index, off = nearest(5, 5, x.device)
    assert index.tolist() == [0, 1, 2, 3, 4] and off.abs().max() < 1e-6


def test_frames_that_are_the_same_look_the_same_at_latent_times() -> None:
    module = decoder()
    x = torch.randn(1, 4, 1, 5, 6).expand(-1, -1, 9, -1, -1)
    frames = module(x, 2.0, [3 / 8, 4 / 8, 5 / 8])  # the convolutions see the border of time in frames 0, 1, 7, 8
    torch.testing.assert_close(frames[:, 0], frames[:, 1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(frames[:, 2], frames[:, 1], atol=1e-4, rtol=1e-4)


def test_what_is_zero_at_the_start() -> None:
    torch.manual_seed(0)
    fusion, x, y = ChannelFusion(6), *torch.randn(2, 2, 6, 5, 4)
    torch.testing.assert_close(fusion(x, y), fusion.out(x + y))
    deformable = ModulatedConv(6, 3)
    conv = deformable.conv
    expected = 0.5 * F.conv2d(x, conv.weight, None, padding=1) + conv.bias.view(-1, 1, 1)
    torch.testing.assert_close(deformable(x, y), expected)


def test_a_video_backwards() -> None:
    torch.manual_seed(0)
    alignment, pyramid = EventAlignment(8, 2, 1).double(), FeaturePyramid(3, 8, 1, 5).double()
    for parameter in alignment.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    first, last = (pyramid(torch.rand(1, 3, 9, 10).double()) for _ in range(2))
    events = torch.randn(1, 3, 2, 9, 10).double()
    on = alignment(first, last, events)
    for parts in (alignment.events, alignment.levels):
        one, two = parts
        parts[0], parts[1] = two, one
    alignment.fuse.weight.data = alignment.fuse.weight.data.roll(8, 1)
    back = alignment(last, first, -events.flip(1, 2))
    torch.testing.assert_close(back.flip(1), on)


@pytest.mark.parametrize("scale", [1.0, 1.3, 2.5, 4.0])
def test_any_size_and_time(scale: float) -> None:
    out = tiny()(torch.rand(1, 2, 3, 7, 6), torch.randn(1, 3, 2, 7, 6), scale, [0.1, 0.77])
    assert out.frames.shape == (1, 2, 3, round(7 * scale), round(6 * scale)) and out.times.tolist() == pytest.approx(
        [0.1, 0.77]
    )
    usual = tiny()(torch.rand(1, 2, 3, 7, 6), torch.randn(1, 3, 2, 7, 6))
    assert usual.frames.shape == (1, 5, 3, 14, 12) and usual.times.tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_voxels() -> None:
    events = torch.tensor([[10.0, 0, 0, 1], [12.5, 1, 2, 0], [20, 0, 0, 1], [13.75, 1, 2, -1]])
    grid = voxels(events, 5, 3, 2)
    expected = torch.zeros(5, 3, 2)
    expected[0, 0, 0] = expected[4, 0, 0] = 1
    expected[1, 2, 1], expected[2, 2, 1] = -1.5, -0.5
    torch.testing.assert_close(grid, expected)
    pairs = intervals(grid)
    assert pairs.shape == (4, 2, 3, 2) and torch.equal(pairs[1, 1], grid[2]) and torch.equal(pairs[2, 0], grid[2])
    assert not voxels(events[:0], 3, 2, 2).any()


def test_simulated_events_add_up_to_the_change_of_brightness() -> None:
    torch.manual_seed(0)
    levels = torch.randn(6, 4, 5).cumsum(0) / 3
    frames = levels.exp() - 1e-3
    events = simulated(frames, positive=0.1, negative=0.2)
    time, x, y, sign = events.unbind(1)
    assert time.min() >= 0 and time.max() <= 1
    for row, column in ((0, 0), (3, 2)):
        mine = (x == column) & (y == row)
        change = (0.1 * (sign[mine] > 0) - 0.2 * (sign[mine] < 0)).sum()
        assert -0.2 < levels[-1, row, column] - levels[0, row, column] - change < 0.1
    steady = simulated(torch.linspace(0, 1, 11)[:, None, None].exp().expand(-1, 1, 1), positive=0.25)
    assert (steady[:, 3] == 1).all() and steady[:, 0].diff().min() > 0.2 and len(steady) == 3


def test_the_loss() -> None:
    x = torch.rand(2, 3, 4, 4)
    assert charbonnier(x, x).item() == pytest.approx(1e-3) and charbonnier(x + 1, x).item() == pytest.approx(
        1, rel=1e-4
    )


def test_files_in_and_frames_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    paths = [tmp_path / name for name in ("a.png", "b.png", "events.npy", "voxels.npy")]
    for path in paths[:2]:
        to_picture(torch.rand(3, 10, 12)).save(path)
    events = torch.rand(40, 4) * torch.tensor([1e3, 12, 10, 1]) - torch.tensor([0, 0, 0, 0.5])
    numpy.save(paths[2], events.numpy())
    grid = voxels(events.double(), 3, 10, 12)
    numpy.save(paths[3], grid.numpy())
    model = tiny().train()
    output = model.predict(paths[:3])
    assert model.training and output.frames.shape == (1, 4, 3, 20, 24) and len(output.images) == 2
    assert output.frames.min() >= 0 and output.frames.max() <= 1
    torch.testing.assert_close(model.predict([*paths[:2], paths[3]]).frames, output.frames)
    (said,) = model.answer(output)
    assert said == {"size": "12 x 10 -> 24 x 20", "frames": "2 -> 4"}
    assert model.picture(output).size == (4 * 24, 20)
    numpy.save(paths[3], F.interpolate(grid[None], scale_factor=2, mode="bicubic")[0].numpy())
    assert model.predict([*paths[:2], paths[3]]).frames.shape == output.frames.shape
    numpy.save(paths[2], torch.rand(3, 5).numpy())
    to_picture(torch.rand(3, 9, 12)).save(tmp_path / "small.png")
    for files, error, message in (
        (paths[:2], ValueError, r"files must be 3 \(frame0, frame1, events\), got 2"),
        (paths[:3], ValueError, "must hold events"),
        ([paths[0], tmp_path / "small.png", paths[3]], ValueError, "one size"),
        ([*paths[:2], tmp_path / "none.npy"], FileNotFoundError, "no file of events at"),
    ):
        with pytest.raises(error, match=message):
            model.predict(files)


def frames_and_events(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.rand(1, 2, 3, 6, 7), torch.rand(*shape)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="groups divide channels"):
        EvEnhancer(8, groups=3)
    with pytest.raises(ValueError, match="multiple of num_heads"):
        LIVT(4, 9, 2)
    with pytest.raises(ValueError, match="encode must be"):
        PositionBias("xyz")
    with pytest.raises(ValueError, match="radius"):
        LIVT(4, 8, 2, -1)
    with pytest.raises(ValueError, match="at least 2"):
        ChannelFusion(1)
    model = tiny()
    for shape in ((1, 3, 1, 6, 7), (1, 3, 2, 6, 8), (2, 3, 2, 6, 7), (1, 0, 2, 6, 7)):
        with pytest.raises(ValueError, match="events must be"):
            model(*frames_and_events(*shape))
    with pytest.raises(ValueError, match="frames must be"):
        model(torch.rand(1, 3, 3, 6, 7), torch.rand(1, 3, 2, 6, 7))
    with pytest.raises(ValueError, match="times must be"):
        model(*frames_and_events(1, 3, 2, 6, 7), 2.0, [1.2])
    with pytest.raises(ValueError, match="scale must leave"):
        model(*frames_and_events(1, 3, 2, 6, 7), 0.01)
    with pytest.raises(ValueError, match="events must be"):
        voxels(torch.rand(3, 3), 4, 5, 5)
    with pytest.raises(ValueError, match="must lie in"):
        voxels(torch.tensor([[0.0, 5, 0, 1]]), 4, 5, 5)
    with pytest.raises(ValueError, match="frames must be"):
        simulated(torch.rand(1, 3, 3))
