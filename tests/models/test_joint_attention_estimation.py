"""Joint attention: people in any order, absent ones, the field at any points, fusions, training, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saccade.models.images import to_picture
from saccade.models.joint_attention_estimation import (
    Field,
    JointAttention,
    MapFusion,
    detected,
    grid_points,
    joint_loss,
    joint_of_people,
    joint_truth,
)


def small(**changes: object) -> JointAttention:
    torch.manual_seed(0)
    model = JointAttention(**{"actions": 3, "map_size": (6, 8), **changes}).eval()  # type: ignore[arg-type]
    nn.init.normal_(model.people.token)
    return model


def test_the_order_of_people_does_not_matter_nor_do_absent_ones() -> None:
    model, people, order = small(), torch.rand(2, 5, 7), torch.tensor([3, 0, 4, 1, 2])
    said, turned = model(people, each=True), model(people[:, order], each=True)
    torch.testing.assert_close(turned.heatmap, said.heatmap, atol=1e-6, rtol=0)
    torch.testing.assert_close(turned.each, said.each[:, order], atol=1e-6, rtol=0)
    more = torch.cat([people, torch.rand(2, 2, 7)], 1)
    there = torch.arange(7).expand(2, -1) < 5
    padded = model(more, there, each=True)
    torch.testing.assert_close(padded.heatmap, said.heatmap, atol=1e-6, rtol=0)
    torch.testing.assert_close(padded.each[:, :5], said.each, atol=1e-6, rtol=0)
    nobody = model(people, torch.zeros(2, 5, dtype=torch.bool))
    assert nobody.heatmap.isfinite().all() and torch.equal(nobody.heatmap[0], nobody.heatmap[1])
    weights = model.people.weights(model.attributes(more), there)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 8))
    assert not weights[..., 5:7].any()


def test_without_blocks_the_map_does_not_see_people() -> None:
    model = small(depth=0)
    torch.testing.assert_close(model(torch.rand(1, 1, 7)).heatmap, model(torch.rand(1, 4, 7)).heatmap)


def test_the_field_can_be_asked_anywhere() -> None:
    torch.manual_seed(0)
    field, token = Field(8, 2), torch.randn(2, 3, 8)
    points = grid_points(6, 8)
    assert points[9].tolist() == pytest.approx([1 / 8, 1 / 6])
    whole = field(token, points)
    torch.testing.assert_close(field(token, points[[3, 40, 7]]), whole[..., [3, 40, 7]])
    by_hand = field.last(field.middle(F.relu(field.first(torch.cat([token[1, 2], points[9]])))))
    torch.testing.assert_close(whole[1, 2, 9], by_hand[0])
    model, people = small(), torch.rand(2, 3, 7)
    fine = model(people, size=(12, 16)).heatmap
    torch.testing.assert_close(fine[:, ::2, ::2], model(people).heatmap)


def test_fusions() -> None:
    torch.manual_seed(0)
    a, b = torch.rand(2, 2, 9, 11)
    weighted, average = MapFusion("weights"), MapFusion("average")
    share = weighted.weights.softmax(0)
    torch.testing.assert_close(weighted(a, b), share[0] * a + (1 - share[0]) * b)
    torch.testing.assert_close(average(a, b), (a + b) / 2)
    for fuse in (weighted, average):
        torch.testing.assert_close(fuse(a, a), a)
    for kind in ("early", "mid"):
        fuse = MapFusion(kind)
        fused = fuse(a, b)
        assert fused.shape == a.shape and (fused - fuse(b, a)).abs().max() > 1e-5
        fused.sum().backward()
        assert all(p.grad is not None for p in fuse.parameters())
        model = small(fusion=kind)
        assert model(torch.rand(2, 3, 7), image_map=torch.rand(2, 6, 8)).heatmap.shape == (2, 6, 8)


def test_maps_of_an_image_are_averaged_over_who_is_there() -> None:
    maps, there = torch.rand(2, 3, 3, 4), torch.tensor([[True, True, False], [False, False, False]])
    joint = joint_of_people(maps, there, (6, 8))
    expected = F.interpolate(maps[:1, :2].mean(1, keepdim=True), (6, 8), mode="bilinear")[0, 0]
    torch.testing.assert_close(joint[0], expected)
    assert not joint[1].any()
    model, people = small(), torch.rand(2, 3, 7)
    by_people, by_one = model(people, there, maps), model(people, there, joint)
    torch.testing.assert_close(by_people.heatmap, by_one.heatmap)
    torch.testing.assert_close(by_one.branches[0], model(people, there).heatmap)


def test_aggregations() -> None:
    people, there = torch.rand(2, 3, 7), torch.tensor([[True, True, True], [True, True, False]])
    attends = torch.tensor([[True, False, True], [True, True, True]])
    token = small()(people, there, each=True)
    of_people = small(aggregation="people")(people, there, attends=attends).heatmap
    torch.testing.assert_close(of_people[0], token.each[0, [0, 2]].mean(0))
    torch.testing.assert_close(of_people[1], token.each[1, :2].mean(0))
    both = small(aggregation="both")(people, there, attends=attends).heatmap
    torch.testing.assert_close(both[0], (token.each[0, 0] + token.each[0, 2] + token.heatmap[0]) / 3)
    sure = small(activation="sigmoid")(people, there)
    torch.testing.assert_close(sure.heatmap, token.heatmap.sigmoid())
    torch.testing.assert_close(sure.logits, token.heatmap)
    no_position = small(position=False)
    moved = people.clone()
    moved[..., :2] += 1
    torch.testing.assert_close(no_position(moved).heatmap, no_position(people).heatmap)


def test_truth_loss_and_detection() -> None:
    points = torch.tensor([[[0.5, 0.5], [0.25, 0.5]]])
    each, joint = joint_truth(points, torch.tensor([[True, False]]), (8, 8), 1.0)
    assert each[0, 0, 4, 4] == 1 and not each[0, 1].any() and torch.equal(joint[0], each[0, 0])
    same, both = joint_truth(points[:, [0, 0]], torch.tensor([[True, True]]), (8, 8), 1.0)
    assert both.max() == 1 and same.sum(1).max() == 2
    model, people, image_map = small(map_size=(8, 8)), torch.rand(1, 2, 7), torch.rand(1, 8, 8)
    said, of_image = model(people, image_map=image_map), torch.rand(1, 2, 8, 8)
    expected = F.mse_loss(said.heatmap, joint) + F.mse_loss(said.branches[0], joint)
    torch.testing.assert_close(joint_loss(said, joint), expected)
    attends = torch.tensor([[True, False]])
    with_people = joint_loss(said, joint, image_maps_BPHW=of_image, each_BPHW=each, attends_BP=attends)
    torch.testing.assert_close(with_people, expected + F.mse_loss(of_image[0, 0], each[0, 0]))
    with pytest.raises(ValueError, match="image_maps must come"):
        joint_loss(said, joint, image_maps_BPHW=of_image)
    found = detected(torch.cat([joint, joint]), torch.tensor([[0.5, 0.5], [0.875, 0.0]]), (1.0, 4.0))
    assert found == {"distance": pytest.approx(2.5), "within_1": 0.5, "within_4": 0.5}


def test_files_and_people_in_a_map_out(tmp_path: Path) -> None:
    to_picture(torch.rand(3, 20, 26)).save(tmp_path / "game.png")
    model, people = small().train(), torch.rand(1, 4, 7)
    output = model.predict(tmp_path / "game.png", people=people)
    assert model.training and output.heatmap.shape == (1, 20, 26)
    assert set(model.answer(output)[0]) == {"people look at"} and model.picture(output).size == (26, 20)
    with pytest.raises(ValueError, match="people must be given"):
        model.predict(tmp_path / "game.png")
    with pytest.raises(ValueError, match="each of 1 images"):
        model.predict(tmp_path / "game.png", people=people.expand(2, -1, -1))


def test_refusals() -> None:
    for arguments, message in (
        ({"field": "wide"}, "field"),
        ({"embedding": "x"}, "embedding"),
        ({"aggregation": "x"}, "aggregation"),
        ({"fusion": "x"}, "fusion"),
        ({"activation": "x"}, "activation"),
        ({"num_heads": 3}, "heads"),
        ({"actions": -1}, "actions"),
        ({"actions": 0, "position": False, "gaze": False}, "attributes"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**arguments)
    model, people = small(), torch.rand(2, 3, 7)
    for arguments, message in (
        ((people[..., :6],), r"people must be \(batch, people, 7\)"),
        ((people, torch.ones(2, 4, dtype=torch.bool)), "there must be bool"),
        ((people, torch.ones(2, 3)), "there must be bool"),
        ((people, None, torch.rand(2, 6, 9)), r"image_map must be \(2, 6, 8\)"),
        ((people, None, torch.rand(2, 4, 6, 8)), "each of 3 people"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*arguments)
    with pytest.raises(ValueError, match="fusion='none'"):
        small(fusion="none")(people, image_map=torch.rand(2, 6, 8))
    with pytest.raises(ValueError, match="fusion must be"):
        MapFusion("none")
