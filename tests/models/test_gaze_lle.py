"""Gaze-LLE: the prompt, people who do not meet, the frozen encoder, training, real features, files."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import catalogue
from saccade.models.gaze_lle import (
    GazeLLE,
    augmented,
    gaze_loss,
    head_maps,
    learning_rates,
    people_of,
    place_code,
)
from saccade.models.images import normalised, to_picture
from saccade.report import predictions
from saccade.train import models
from saccade.train.data import gazes, generator_at, photographs

BOXES = [[[0.1, 0.1, 0.4, 0.5], None], [], [[0.5, 0.2, 0.9, 0.9]]]


def small(**changes: object) -> GazeLLE:
    torch.manual_seed(0)
    return GazeLLE(12, **{"dim": 16, "num_layers": 2, "inout": True, "out_size": (16, 16), **changes}).eval()  # type: ignore[arg-type]


def test_the_prompt_covers_the_rounded_box() -> None:
    box = torch.tensor([[0.12, 0.26, 0.51, 0.99], [0.3, 0.3, 0.3, 0.9], [math.nan] * 4, [0.3125, 0.0, 0.4375, 0.1875]])
    maps = head_maps(box, 8, 8)
    assert maps[0].nonzero().tolist() == [[i, j] for i in range(2, 8) for j in range(1, 4)]
    assert not maps[1].any() and not maps[2].any()
    assert maps[3].nonzero().tolist() == [[i, j] for i in (0, 1) for j in (2, 3)]  # 2.5, 3.5 and 1.5 round to even
    forced = head_maps(box, 8, 8, least_cell=True)
    assert torch.equal(forced[[0, 3]], maps[[0, 3]]) and not forced[2].any()
    assert forced[1].nonzero().tolist() == [[4, 2]]


def test_places_are_told_by_waves_of_x_and_y() -> None:
    code = place_code(3, 5, 8)
    rate = [1.0, math.exp(-2 * math.log(10000) / 4)]
    for k in range(2):
        for y, x in ((0, 0), (2, 4), (1, 3)):
            expected = [math.sin(x * rate[k]), math.cos(x * rate[k]), math.sin(y * rate[k]), math.cos(y * rate[k])]
            assert code[[2 * k, 2 * k + 1, 4 + 2 * k, 5 + 2 * k], y, x].tolist() == pytest.approx(expected, abs=1e-6)


def test_people_of_one_call_get_what_each_gets_alone() -> None:
    model, features = small(), torch.randn(3, 12, 8, 8)
    together = model(features=features, bboxes=BOXES)
    assert together.heatmap.shape == (3, 16, 16) and together.people.tolist() == [0, 0, 2]
    assert together.of_image(1) == [] and together.of_image(0) == [0, 1]
    singles = [(0, BOXES[0][0]), (0, None), (2, BOXES[2][0])]
    for place, (image, box) in enumerate(singles):
        alone = model(features=features[image : image + 1], bboxes=[[box]])
        torch.testing.assert_close(together.heatmap[place], alone.heatmap[0])
        torch.testing.assert_close(together.inside[place], alone.inside[0])
    assert together.heatmap.min() > 0 and together.heatmap.max() < 1
    assert together.inside.min() > 0 and together.inside.max() < 1
    nobody = model(features=features, bboxes=[[], [], []])
    assert nobody.heatmap.shape == (0, 16, 16) and nobody.inside.shape == (0,)
    as_tensor = model(features=features[:1], bboxes=torch.tensor([[BOXES[0][0], [math.nan] * 4]]))
    torch.testing.assert_close(as_tensor.heatmap, together.heatmap[:2])


def test_no_box_is_an_empty_one_and_without_the_prompt_all_are_alike() -> None:
    model, features = small(), torch.randn(1, 12, 8, 8)
    none, empty, default = (
        model(features=features, bboxes=boxes).heatmap for boxes in ([[None]], [[[0.3, 0.3, 0.3, 0.6]]], None)
    )
    assert torch.equal(none, empty) and torch.equal(none, default)
    boxed = model(features=features, bboxes=BOXES[:1]).heatmap
    assert (boxed[0] - boxed[1]).abs().max() > 1e-4
    nn.init.zeros_(model.head_token)
    boxed = model(features=features, bboxes=BOXES[:1]).heatmap
    torch.testing.assert_close(boxed[0], boxed[1])


def test_maps_are_resized_only_where_they_must_be() -> None:
    model, features = small(), torch.randn(1, 12, 8, 8)
    same = model(features=features)
    assert torch.equal(same.heatmap, same.logits.sigmoid())
    other = copy.deepcopy(model)
    other.out_size = (10, 12)
    resized = other(features=features)
    expected = F.interpolate(same.heatmap[:, None], (10, 12), mode="bilinear", antialias=True)[:, 0]
    torch.testing.assert_close(resized.heatmap, expected)
    assert resized.logits is None and model(features=torch.randn(1, 12, 5, 7)).heatmap.shape == (1, 16, 16)


class Tokens(nn.Module):
    """As transformers' models give them, with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 4, 4)

    def forward(self, pixel_values: Tensor) -> object:
        tokens = self.embed(pixel_values).flatten(2).mT
        return type("Output", (), {"last_hidden_state": torch.cat([tokens[:, :1] * 0, tokens], 1)})()


def test_gradients_reach_the_decoder_alone() -> None:
    encoder, model = Tokens(), small().train()
    model.on(encoder, patch=4)
    names = {name for name, _ in model.named_parameters()}
    out = model(torch.rand(2, 3, 32, 32), [[BOXES[0][0]], [None]])
    out.heatmap.sum().backward()
    assert encoder.embed.weight.grad is None and model.linear.weight.grad is not None
    assert not any(name.startswith("_encoder") for name in names | set(model.state_dict()))
    assert model.double()._encoder[0].embed.weight.dtype == torch.float64  # it is moved along
    direct = model.eval()(features=encoder.embed(torch.ones(1, 3, 32, 32).double()))
    torch.testing.assert_close(model(torch.ones(1, 3, 32, 32).double()).heatmap, direct.heatmap)
    with pytest.raises(ValueError, match="needs features"):
        small()(torch.rand(1, 3, 32, 32))


def test_published_decoders_are_the_papers() -> None:
    part = catalogue.part("gaze-lle")
    assert {size.name for size in part.published} == {
        f"gazelle_dinov2_vit{size}14{inout}" for size in "bl" for inout in ("", "_inout")
    }
    with torch.device("meta"):
        model = GazeLLE.from_config("gazelle_dinov2_vitb14_inout")
    assert sum(p.numel() for p in model.parameters()) == 2_826_752 + 256 + 128 * 257 + 129
    assert 2 * (model.image_size[0] // model.patch) == model.out_size[0]  # no resizing at 448


def test_the_loss() -> None:
    model, features = small(), torch.randn(2, 12, 8, 8)
    targets, inside = torch.tensor([[0.5, 0.25], [0.1, 0.9]]), torch.tensor([True, False])
    said = model(features=features)
    bump = torch.zeros(16, 16)
    for i in range(16):
        for j in range(16):
            if abs(i - 4) <= 3 and abs(j - 8) <= 3:
                bump[i, j] = math.exp(-((i - 4) ** 2 + (j - 8) ** 2) / 2)
    heat = F.binary_cross_entropy(said.heatmap[0], bump)
    sure = F.binary_cross_entropy(said.inside, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(gaze_loss(said, targets, inside, sigma=1.0, weight=0.5), heat + 0.5 * sure)
    outside = gaze_loss(said, targets, torch.tensor([False, False]))
    torch.testing.assert_close(outside, F.binary_cross_entropy(said.inside, torch.zeros(2)))
    with pytest.raises(ValueError, match=r"targets must be \(2, 2\)"):
        gaze_loss(said, targets[:1])
    groups = learning_rates(model)
    assert [group["lr"] for group in groups] == [1e-2, 1e-5]
    assert sum(p.numel() for p in groups[0]["params"]) == 16 + 128 * 17 + 129
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_augmentation_keeps_head_and_targets_in_place() -> None:
    torch.manual_seed(0)
    image = torch.zeros(3, 60, 80)
    box, targets = torch.tensor([0.2, 0.3, 0.3, 0.5]), torch.tensor([[0.7, 0.65], [0.6, 0.8]])
    image[0, 39, 56] = image[1, 18:30, 16:24] = 1  # the first target; the head
    seen = set()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        other, head, marks = augmented(image, box, targets, generator, probability=0.5)
        seen.add(other.shape)
        height, width = other.shape[1:]
        assert marks.min() >= 0 and marks.max() <= 1 and head.min() >= 0 and head.max() <= 1
        y, x = other[0].nonzero()[0].tolist()
        assert (marks[0] * torch.tensor([width, height]) - torch.tensor([x, y])).abs().max() < 1.01
        rows, columns = other[1].nonzero().unbind(1)
        drift = torch.tensor([columns.min() / width, rows.min() / height]) - head[:2]
        assert drift.abs().max() <= 0.2 * max(24 / width, 12 / height) + 2 / height
    assert len(seen) > 5
    same = augmented(image, box, targets, generator, probability=0.0)
    assert all(map(torch.equal, same, (image, box, targets)))


def test_files_and_heads_in_a_picture_of_their_gaze_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = small(stem=(4, 8), out_size=None).train()
    model.image_size = (32, 32)
    to_picture(torch.rand(3, 40, 52)).save(tmp_path / "people.png")
    output = model.predict(tmp_path / "people.png", bboxes=BOXES[:1])
    assert model.training and output.heatmap.shape == (2, 40, 52)
    assert set(model.answer(output)[0]) == {
        "person 1 looks at", "person 1: in the picture", "person 2 looks at", "person 2: in the picture"
    }  # fmt: skip
    assert model.picture(output).size == (52, 40)
    empty = model.predict(tmp_path / "people.png", bboxes=[[]])
    assert model.answer(empty) == [{"people": "none"}] and model.picture(empty).size == (52, 40)


def test_heads_are_given_in_pixels_on_the_command_line(tmp_path: Path) -> None:
    to_picture(torch.rand(3, 40, 52)).save(tmp_path / "people.png")
    call, network = [tmp_path / "people.png"], small()
    assert predictions.boxes_of(network, call, ()) == {}
    found = predictions.boxes_of(network, call, ("13,10,26,20", "0, 0, 52, 40"))["bboxes"]
    assert found == [[[0.25, 0.25, 0.5, 0.5], [0.0, 0.0, 1.0, 1.0]]]
    for box in ("1,2,3", "a,b,c,d", "10,10,5,20", "0,0,53,40", "1.2.3,0,5,5"):
        with pytest.raises(ValueError, match="52 x 40"):
            predictions.boxes_of(network, call, (box,))
    with pytest.raises(ValueError, match="one image, got 2"):
        predictions.boxes_of(network, call * 2, ("0,0,5,5",))


def test_refusals() -> None:
    for arguments, message in (
        ({"dim": 18}, "multiple of 4"),
        ({"num_heads": 3}, "of the heads"),
        ({"encoder": "x", "stem": (4,)}, "got both"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**arguments)
    model, features = small(), torch.randn(2, 12, 8, 8)
    for bboxes, message in (
        ([[None]], "each of 2 images, got 1"),
        ([[[0.1, 0.2, 0.3]], []], r"x0 <= x1"),
        ([[[0.5, 0.2, 0.3, 0.9]], []], r"x0 <= x1"),
        (torch.rand(2, 4), "batch, people, 4"),
        (torch.rand(2, 1, 3), "four numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            model(features=features, bboxes=bboxes)
    with pytest.raises(ValueError, match=r"features must be \(batch, 12"):
        model(features=torch.randn(1, 13, 8, 8))
    with pytest.raises(ValueError, match="neither"):
        model()
    with pytest.raises(ValueError, match="pixels wide"):
        small(stem=(4, 8))(torch.rand(1, 3, 3, 9))
    assert people_of(None, 2)[0].isnan().all()


def test_a_real_vit_stays_as_it_is_while_the_decoder_learns() -> None:
    """People of generated scenes, on the ViT-S/14 that a package carries."""
    if not models.installed("vit-s14"):
        pytest.skip("vit-s14 is not installed")
    vit = models.load("vit-s14")
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    scene = gazes(8, 112, generator_at(0, 0), photographs("coffee"))
    torch.manual_seed(0)
    model = GazeLLE(384, dim=32, num_layers=1, num_heads=4, inout=True, out_size=None).on(vit)
    assert model.patch == 14
    images = normalised(scene.images, 3)
    features = model.features(images)
    with torch.no_grad():
        torch.testing.assert_close(features.flatten(2).mT, vit(images).last_hidden_state[:, 1:])
    boxes = [heads[there] for heads, there in zip(scene.boxes, scene.there)]
    targets = scene.targets[:, None].expand(-1, scene.there.shape[1], -1)[scene.there]
    inside, losses = scene.inside[scene.there], []
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(40):
        loss = gaze_loss(model(features=features, bboxes=boxes), targets, inside, sigma=1.0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in vit.state_dict().items())
