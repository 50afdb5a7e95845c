"""What the paper implies, and bad arguments. The rest is tested by being registered: tests/test_parts.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from saccade import catalogue
from saccade.models.images import to_picture
from saccade.models.taptrv2 import (
    DecoderLayer,
    KeyAwareDeformableAttention,
    PositionUpdate,
    TAPTRv2,
    focal_loss,
    sine_embedding,
    tracking_loss,
    windows,
)
from saccade.models.taptrv2.attention import level_sizes
from saccade.models.tracking import TrackOutput
from saccade.ops.deformable import deformable_attend
from saccade.report import predictions

SHAPES = [(5, 7), (3, 4)]
PIXELS = 5 * 7 + 3 * 4


def tiny(**changes: object) -> TAPTRv2:
    torch.manual_seed(0)
    return TAPTRv2(**{**catalogue.part("taptrv2").example, **changes})


def layer_inputs(update: Tensor) -> tuple[object, ...]:
    torch.manual_seed(1)
    T, N = update.shape[1:]
    return (
        torch.randn(1, T, N, 8), torch.randn(1, T, N, 8), torch.rand(1, T, N, 4), torch.randn(1, T, PIXELS, 8), SHAPES,
        update, torch.ones(1, T, N, dtype=torch.bool),
    )  # fmt: skip


def test_key_aware_attention_against_its_definition() -> None:
    torch.manual_seed(0)
    module = KeyAwareDeformableAttention(8, 2, 2, 3)
    nn.init.normal_(module.sampling_offsets.weight)
    x, memory, at = torch.randn(2, 5, 8), torch.randn(2, PIXELS, 8), torch.rand(2, 5, 1, 2)
    looked = module(x, at, memory, SHAPES)
    locations = at[:, :, :, None] + looked.offsets / level_sizes(SHAPES, 3, at)
    query, keys = module.query_proj(x).view(2, 5, 2, 4), module.key_proj(memory).view(2, PIXELS, 2, 4)
    for sample in range(6):
        one = torch.zeros(2, 5, 2, 6)
        one[..., sample] = 1
        key = deformable_attend(keys, SHAPES, locations, one)
        torch.testing.assert_close(looked.logits[..., sample], (query * key).sum(-1) / 2)
    values = module.value_proj(memory).view(2, PIXELS, 2, 4)
    found = deformable_attend(values, SHAPES, locations, looked.logits.softmax(-1))
    torch.testing.assert_close(looked.out, module.output_proj(found.flatten(2)))


def test_equal_keys_are_plain_attention_with_equal_weights() -> None:
    torch.manual_seed(0)
    module = KeyAwareDeformableAttention(8, 2, 2, 1)
    nn.init.zeros_(module.key_proj.weight)
    x, memory, at = torch.randn(1, 5, 8), torch.randn(1, PIXELS, 8), 0.4 + 0.2 * torch.rand(1, 5, 1, 2)
    nn.init.zeros_(module.sampling_offsets.bias)  # so that no sample reaches over the border
    looked = module(x, at, memory, SHAPES)
    values = module.value_proj(memory).view(1, PIXELS, 2, 4)
    alike = deformable_attend(values, SHAPES, at[:, :, None].expand(-1, -1, 2, 2, 2), torch.full((1, 5, 2, 2), 0.5))
    torch.testing.assert_close(looked.out, module.output_proj(alike.flatten(2)))


def test_padding_is_not_looked_at() -> None:
    torch.manual_seed(0)
    module, mask = KeyAwareDeformableAttention(8, 2, 2, 2), torch.ones(1, PIXELS, dtype=torch.bool)
    mask[:, 30:] = False
    x, memory, at = torch.randn(1, 5, 8), torch.randn(1, PIXELS, 8), torch.rand(1, 5, 1, 4)
    other = torch.where(mask[..., None], memory, 100.0)
    assert torch.equal(module(x, at, memory, SHAPES, mask).out, module(x, at, other, SHAPES, mask).out)


def test_a_move_lies_among_the_offsets() -> None:
    torch.manual_seed(0)
    update, moves = PositionUpdate(8, 6), torch.randn(3, 6, 2)
    move = update(torch.randn(3, 6), moves)
    assert (move >= moves.amin(1)).all() and (move <= moves.amax(1)).all()
    last = update.disentangle[-1]
    nn.init.zeros_(last.weight)
    with torch.no_grad():
        last.bias.copy_(torch.tensor([0.0, 0, 100, 0, 0, 0]))
    assert torch.equal(update(torch.randn(3, 6), moves), moves[:, 2])
    with torch.no_grad():
        last.bias.zero_()
    torch.testing.assert_close(update(torch.randn(3, 6), moves), moves.mean(1))


def test_without_offsets_nothing_moves_and_what_is_given_stays_bit_for_bit() -> None:
    torch.manual_seed(0)
    layer = DecoderLayer(8, 2, 2, 2, feedforward=12).eval()
    some = torch.tensor([[False, True, True]])[..., None] & torch.tensor([True, False, True, True])
    inputs = layer_inputs(some)
    box = inputs[2]
    said = layer(*inputs)
    assert torch.equal(said.box[~some], box[~some]) and not said.delta[~some].any()
    assert (said.box[some][:, :2] != box[some][:, :2]).any() and torch.equal(said.box[..., 2:], box[..., 2:])
    nn.init.zeros_(layer.cross_attention.sampling_offsets.bias)
    still = layer(*inputs)
    torch.testing.assert_close(still.box, box.clamp(1e-3, 1 - 1e-3), atol=2e-6, rtol=0)


def test_sizes_of_levels_may_be_swapped_as_released() -> None:
    torch.manual_seed(0)
    layer = DecoderLayer(8, 2, 2, 2, feedforward=12).eval()
    inputs = layer_inputs(torch.ones(1, 2, 3, dtype=torch.bool))
    right = layer(*inputs).delta
    layer.transposed = True
    assert not torch.allclose(layer(*inputs).delta, right)
    square = (*inputs[:3], torch.randn(1, 2, 25 + 9, 8), [(5, 5), (3, 3)], *inputs[5:])
    swapped = layer(*square).delta
    layer.transposed = False
    assert torch.equal(layer(*square).delta, swapped)
    model = tiny()
    model.as_released()
    assert all(each.transposed for each in model.decoder.layers)


def test_sines() -> None:
    x = torch.tensor([[0.25, 0.5, 0.1, 0.0]])
    e = sine_embedding(x, 4, 10.0)[0].view(4, 4)
    expected = torch.tensor([torch.pi, torch.pi / 10**0.5])
    torch.testing.assert_close(e[0, ::2], expected.sin(), atol=1e-6, rtol=0)  # y comes first
    torch.testing.assert_close(e[1, 1::2], (expected / 2).cos(), atol=1e-6, rtol=0)
    assert e[3].tolist() == [0, 1, 0, 1]


def test_windows_cover_the_video_and_end_with_it() -> None:
    assert windows(3, 8, 4) == [range(3)]
    for frames in range(1, 40):
        found = windows(frames, 8, 4)
        assert found[0].start == 0 and found[-1].stop == frames
        assert all(b.start - a.start <= 4 and len(a) == min(8, frames) for a, b in zip(found, found[1:]))


def test_a_point_is_followed_from_where_it_is_given() -> None:
    model = tiny().double().eval()
    for head in model.decoder.box_heads:
        nn.init.normal_(head[-1].weight, std=0.3)
    video = torch.randn(1, 9, 3, 32, 32).double()
    points = torch.tensor([[[0.0, 0.2, 0.7], [4, 0.5, 0.5], [8, 0.1, 0.9]]]).double()
    said = model(video, points)
    for n, start in enumerate((0, 4, 8)):
        torch.testing.assert_close(said.points[0, : start + 1, n], points[0, n, 1:].expand(start + 1, 2))
        assert (said.visible[0, : start + 1, n] == 1).all()
        moved = said.points[0, start + 1 :, n] != points[0, n, 1:]
        assert moved.any(-1).all()
    # what is not tracked yet is not seen by what is: the third point is given in frame 8, which the window from 5 sees
    alone = model(video, points[:, :2])
    torch.testing.assert_close(alone.points[:, :5], said.points[:, :5, :2])
    # windows are of four frames and go on by two: what comes later does not matter to the first two
    later = torch.cat([video[:, :4], torch.randn(1, 5, 3, 32, 32).double()], 1)
    torch.testing.assert_close(model(later, points).points[:, :2], said.points[:, :2])


@pytest.mark.parametrize("frames", [25, 50])
def test_long_videos(frames: int) -> None:
    model = tiny(window=8, stride=4).eval()
    said = model(torch.randn(1, frames, 3, 16, 16), torch.tensor([[[0.0, 0.2, 0.7]]]))
    assert said.points.shape == (1, frames, 1, 2) and said.points.isfinite().all()


def test_the_loss_falls_and_reaches_all() -> None:
    model = tiny().train()
    video, points = torch.randn(1, 5, 3, 32, 32), torch.tensor([[[0.0, 0.2, 0.7], [1, 0.5, 0.5]]])
    truth = points[:, None, :, 1:].expand(-1, 5, -1, -1) + 0.03 * torch.arange(5)[:, None, None]
    seen, starts = torch.ones(1, 5, 2, dtype=torch.bool), points[..., 0].long()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss, terms = tracking_loss(model(video, points), truth, seen, starts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-3:]) < 0.9 * losses[0] and set(terms) == {"distance", "visibility"}
    exact = TrackOutput(truth, seen.float(), torch.tensor([-50.0, 50, -50]).expand(1, 5, 2, 3), [truth])
    assert float(tracking_loss(exact, truth, seen, starts).loss) == pytest.approx(0, abs=1e-6)
    p = torch.tensor([0.0]).sigmoid()
    assert float(focal_loss(torch.zeros(1), torch.ones(1))) == pytest.approx(float(-0.25 * 0.25 * p.log()))


def test_files_in_and_tracks_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path in paths:
        to_picture(torch.rand(3, 40, 52)).save(path)
    model = tiny(image_size=(32, 32)).train()
    model.grid = 3
    output = model.predict(paths)
    assert model.training and output.points.shape == (1, 3, 9, 2) and len(output.images) == 3
    torch.testing.assert_close(output.points[0, 0, 0], torch.tensor([1 / 6, 1 / 6]))
    (said,) = model.answer(output)
    assert said["frames"] == "3" and said["points"] == "9"
    assert model.picture(output).size == (3 * 52, 40)
    for point in ([3.0, 0.5, 0.5], [0, 1.5, 0.5], [-1, 0.5, 0.5]):
        with pytest.raises(ValueError, match="points must lie in 3 frames"):
            model.see(list(output.images), torch.tensor([point]))


def test_the_command_hands_all_files_over_as_one_video() -> None:
    files = [Path(f"{i}.png") for i in range(3)]
    assert predictions.calls("taptrv2", files) == [files]
    assert predictions.calls("resnest", files) == [[file] for file in files]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="stride must be"):
        tiny(stride=5)
    with pytest.raises(ValueError, match="channels must be given"):
        tiny(backbone=nn.Identity())
    with pytest.raises(ValueError, match="num_heads must divide"):
        KeyAwareDeformableAttention(9, 2)
    with pytest.raises(ValueError, match="shapes must be 2 levels"):
        KeyAwareDeformableAttention(8, 2, 2, 2)(
            torch.zeros(1, 1, 8), torch.zeros(1, 1, 1, 2), torch.zeros(1, 5, 8), [(2, 2), (1, 2)]
        )
    model = tiny()
    with pytest.raises(ValueError, match="video must be"):
        model(torch.rand(1, 3, 16, 16), torch.zeros(1, 1, 3))
    with pytest.raises(ValueError, match="points must be"):
        model(torch.rand(1, 2, 3, 16, 16), torch.zeros(1, 1, 2))
    with pytest.raises(ValueError, match="training mode"):
        tracking_loss(model.eval()(torch.rand(1, 2, 3, 16, 16), torch.zeros(1, 1, 3)), *torch.zeros(3, 1))
