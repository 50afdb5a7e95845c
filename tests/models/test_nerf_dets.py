"""NeRF-DetS: the baseline at the start, views by depth, moved points, rendering, boxes and their losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saccade import catalogue
from saccade.models.boxes3d import SceneDetection, surest
from saccade.models.images import to_picture
from saccade.models.nerf_dets import (
    AdaptiveSampling,
    Neck3d,
    NeRFDetS,
    ViewFusion,
    assign,
    detection_loss,
    lift,
    read,
    render,
    voxel_points,
)
from saccade.ops import rays
from saccade.ops.boxes import suppress, union_shares
from saccade.ops.feature_maps import pixel_grid

SMALL = {**catalogue.part("nerf-dets").example, "blocks": (1, 1, 1)}


def model(**changes: object) -> NeRFDetS:
    torch.manual_seed(0)
    return NeRFDetS(**{**SMALL, **changes}).eval()


def given(size: int = 5) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return catalogue.part("nerf-dets").inputs(model(), size)


def filled(fusion: ViewFusion) -> ViewFusion:
    torch.manual_seed(0)
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return fusion


def test_at_the_start_it_is_the_mean_over_views() -> None:
    """Zero scores and offsets: DS-MHA and PASS change nothing."""
    inputs = given()
    full, mean = model(), model(fusion="mean", adaptive=False)
    mean.load_state_dict({name: t for name, t in full.state_dict().items() if name in mean.state_dict()})
    for ours, expected in ((getattr(m(*inputs), n) for m in (full, mean)) for n in ("logits", "pred_boxes", "colour")):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_the_reading_of_strides_is_bilinear_where_lifting_is_nearest() -> None:
    _, cameras, lenses, *_ = given()
    P, maps = rays.projection(lenses, cameras), torch.randn(2, 3, 4, 16, 16)
    at = rays.camera_rays(2 * pixel_grid(16, 16, torch.zeros(())), lenses, cameras)
    points = (at[0] + 1.5 * at[1])[:, 0]  # on whole pixels of the first view's map
    one, other = (read(maps, P, points, (32, 32), reading) for reading in ("stride", "nearest"))
    torch.testing.assert_close(one.features[:, 0], other.features[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one.features[:, 0], maps[:, 0].flatten(2).mT, atol=1e-4, rtol=1e-4)
    corner = read(maps, P, (at[0] + 1.5 * at[1] * 0)[:, 0, :1] + 0, (32, 32))
    assert not corner.seen[:, 0].any()  # the camera's own place is not before it


def test_views_of_any_order_and_only_those_that_show_a_point() -> None:
    fusion = filled(ViewFusion(8, 2, 4))
    held, gap = torch.randn(2, 3, 7, 12), torch.randn(2, 3, 7)
    seen = torch.rand(2, 3, 7) > 0.3
    seen[0, :, 0], seen[1, :, 0] = False, torch.tensor([False, True, False])
    held = held * seen[..., None]
    out = fusion(held, seen, gap)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(fusion(held[:, order], seen[:, order], gap[:, order]), out)
    assert not out[0, 0].any()
    torch.testing.assert_close(out[1, 0], fusion.out(held[1, 1, 0, :8]))
    weights = fusion.weights(held[..., 8:], seen, gap)
    torch.testing.assert_close(weights.sum(1), seen.any(1)[..., None].expand(-1, -1, 2).float())
    assert not weights[~seen].any()
    other = torch.where(seen, gap, 100.0)
    torch.testing.assert_close(fusion(held, seen, other), out)


def test_a_view_that_sees_something_nearer_loses_its_weight() -> None:
    fusion = ViewFusion(8, 2, 4)
    with torch.no_grad():
        for layer in fusion.gap[::2]:  # g is the depth behind what is seen, a hundred times over
            layer.weight.fill_(0.0), layer.bias.fill_(0.0)
            layer.weight[0, 0] = 10.0
        fusion.gap_score.weight[:, 0] = -1.0
    gap = torch.tensor([0.0, 0.5, 0.0])[None, :, None]
    weights = fusion.weights(torch.randn(1, 3, 1, 4), torch.ones(1, 3, 1, dtype=torch.bool), gap)
    torch.testing.assert_close(weights[0, :, 0, 0], torch.tensor([0.5, 0.0, 0.5]))


@pytest.mark.parametrize("source", ["rendered", "sensor", "z", "none"])
def test_depths_from_everywhere(source: str) -> None:
    net = model(depth_source=source)
    if net.fusion is not None:
        filled(net.fusion)
    depths = torch.full((2, 3, 32, 32), 1.5)
    inputs = given()[:4]
    out = net(*inputs, depths=depths).logits
    if source == "sensor":
        assert not torch.equal(net(*inputs, depths=0.5 * depths).logits, out)
        with pytest.raises(ValueError, match="depths must be given"):
            net(*inputs)
        with pytest.raises(ValueError, match=r"depths must be \(2, 3, height, width\)"):
            net(*inputs, depths=depths[:, :2])
    else:
        assert torch.equal(net(*inputs).logits, out)


def test_a_wall_is_rendered_at_its_depth() -> None:
    net = model(voxels=(9, 9, 9), voxel_size=(0.2, 0.2, 0.2), samples=128, depth_side=3)
    camera = rays.looking(torch.tensor([0.0, 0, -2]), torch.zeros(3), torch.tensor([0.0, 1, 0]))
    lens = torch.tensor([[40.0, 0, 15.5], [0, 40.0, 15.5], [0, 0, 1]])
    views = net.encode(torch.rand(1, 1, 3, 32, 32), camera[None, None], lens[None, None])
    alpha = torch.zeros(1, 1, 9, 9, 9)
    alpha[..., 4:] = 1.0
    depth, taken = net.rendered_depths(views, alpha, torch.zeros(1, 3))
    # voxel 4 lies at z = -0.1; between it and voxel 3, at -0.3, opacity rises
    torch.testing.assert_close(depth, torch.full_like(depth, 1.8), atol=0.1, rtol=0)
    assert (taken > 0.99).all()
    depth, taken = net.rendered_depths(views, 0 * alpha, torch.zeros(1, 3))
    assert not taken.any() and torch.equal(depth, torch.full_like(depth, net.near))


@pytest.mark.parametrize("size", [(4, 4, 4), (5, 3, 1)])
def test_offsets_are_bounded_and_add_up(size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    edges = torch.tensor([0.1, 0.2, 0.3])
    layer = AdaptiveSampling(4, 3, (0.1, 0.2, 0.3))
    assert not layer.offsets(1, torch.randn(2, 4, *size)).any()
    for conv in layer.offset:
        torch.nn.init.normal_(conv.weight, std=30.0)
    one = layer.offsets(1, torch.randn(2, 4, *size))
    coarse = [-(-n // 2) for n in size]
    assert one.shape == (2, 3, *coarse) and (one.abs() <= edges[:, None, None, None] + 1e-6).all()
    y = torch.randn(2, 8, *coarse)
    alone = layer.offsets(2, y)
    assert (alone.abs() <= 2 * edges[:, None, None, None] + 1e-6).all()
    moved = layer.offsets(2, y, one)
    torch.testing.assert_close(moved[..., 0, 0, 0], alone[..., 0, 0, 0] + (one[:, :, :2, :2, :2].mean((2, 3, 4))))
    layer.accumulate = False
    torch.testing.assert_close(layer.offsets(2, y, one), alone)
    with pytest.raises(ValueError, match="bound must be one of tanh, none"):
        AdaptiveSampling(4, bound="clip")


def test_gradients_reach_the_offsets_through_the_reading() -> None:
    _, cameras, lenses, *_ = given()
    P = rays.projection(lenses.double(), cameras.double())
    maps = torch.randn(2, 3, 2, 8, 8, dtype=torch.float64)
    points = (0.2 * torch.randn(2, 4, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: read(maps, P, x, (32, 32)).features, points)
    net = model()
    torch.nn.init.normal_(net.sampling.out[0].weight)
    net(*given()[:3]).logits.square().sum().backward()
    assert net.sampling.offset[0].weight.grad.any()


def test_voxels() -> None:
    points = voxel_points((4, 2, 1), torch.tensor([1.0, 2, 4]), torch.tensor([[0.0, 0, 0], [10, 0, 0]]))
    assert points.shape == (2, 4, 2, 1, 3) and points[0, 0, 0, 0].tolist() == [-2, -2, -2]
    assert points[1, 3, 1, 0].tolist() == [11, 0, -2]
    behind = lift(torch.rand(1, 1, 2, 4, 4), torch.eye(3, 4)[None, None], torch.tensor([[[0.0, 0, -1]]]))
    assert not behind.seen.any() and not behind.features.any()


@pytest.mark.parametrize("size", [(1, 1, 1), (7, 5, 3), (8, 8, 4)])
def test_the_neck_takes_any_size(size: tuple[int, int, int]) -> None:
    maps = Neck3d(2, (1, 2, 1), 3).eval()(torch.randn(1, 2, *size))
    assert [tuple(x.shape[2:]) for x in maps] == [tuple(-(-n // 2**i) for n in size) for i in range(3)]


def test_rendering() -> None:
    depths, colours = torch.linspace(0.5, 4, 12).expand(2, 12), torch.rand(2, 12, 3)
    density = torch.zeros(2, 12)
    density[1, 7] = 50.0
    seen = render(colours, density, depths, torch.ones(2, 12, dtype=torch.bool))
    assert not seen.colour[0].any() and seen.depth[0] == 0.5 and seen.counted.all()
    torch.testing.assert_close(seen.depth[1], depths[1, 7])
    torch.testing.assert_close(seen.colour[1], colours[1, 7])
    assert (render(colours, torch.rand(2, 12), depths, density > 0).weights.sum(-1) <= 1 + 1e-6).all()
    assert not render(colours, density, depths, density > 0).counted.any()


def test_boxes_are_given_to_places() -> None:
    fine = voxel_points((8, 8, 8), torch.full((3,), 0.25), torch.zeros(1, 3)).flatten(0, 3)
    coarse = voxel_points((4, 4, 4), torch.full((3,), 0.5), torch.zeros(1, 3)).flatten(0, 3)
    places, levels = torch.cat([fine, coarse]), (512, 64)
    boxes = torch.tensor([[-0.9, -0.9, -0.9, 0.9, 0.9, 0.9], [-0.3, -0.3, -0.3, 0.3, 0.3, 0.3]])
    label, box, centre = assign(places, levels, boxes, torch.tensor([2, 1]))
    assert set(label[512:].tolist()) == {-1, 2} and set(label[:512].tolist()) == {-1, 1}
    assert (label == 2).sum() <= 18 and (label == 1).sum() <= 18
    middle = (places[:512].norm(dim=1) < 1e-6).nonzero()[0, 0]
    assert centre[middle] == 1 and torch.equal(box[middle], boxes[1])
    label, _, _ = assign(places, levels, boxes[:0], torch.tensor([], dtype=torch.long))
    assert (label == -1).all()


def perfect(places: Tensor, levels: tuple[int, ...], boxes: Tensor, labels: Tensor) -> SceneDetection:
    label, box, centre = assign(places, levels, boxes, labels)
    logits = torch.full((1, len(places), 3), -12.0)
    logits[0, label >= 0, label[label >= 0]] = 12.0
    seen = torch.ones(1, len(places), dtype=torch.bool)
    return SceneDetection(logits, box[None], torch.logit(centre, 1e-4)[None], seen, places[None], levels)


def test_losses_are_small_when_all_is_right() -> None:
    places = voxel_points((8, 8, 8), torch.full((3,), 0.25), torch.zeros(1, 3)).flatten(0, 3)
    boxes, labels = (
        torch.tensor([[-0.6, -0.6, -0.6, 0.1, 0.1, 0.1], [0.2, 0.2, 0.2, 0.8, 0.9, 0.8]]),
        torch.tensor([0, 2]),
    )
    found = perfect(places, (512,), boxes, labels)
    found.colour, found.depth, found.counted = (
        torch.rand(1, 4, 3),
        torch.ones(1, 4),
        torch.tensor([[True, True, False, True]]),
    )
    terms = detection_loss(found, [boxes], [labels], found.colour, torch.tensor([[1.0, 0, 5, 2]]))
    assert set(terms) == {"classes", "boxes", "centreness", "colours", "depths"}
    assert terms["classes"] < 1e-3 and terms["boxes"] < 1e-5 and terms["colours"] == 0
    assert terms["depths"] == 0.5  # of two rays that count and were measured one is off by 1
    wrong = perfect(places, (512,), boxes, labels.flip(0))
    assert detection_loss(wrong, [boxes], [labels])["classes"] > 1
    kept, classes, scores = surest(found)
    assert sorted(classes.tolist()) == [0, 2] and scores.min() > 0.5
    torch.testing.assert_close(kept[classes.argsort()], boxes)
    found.seen[:] = False
    assert len(surest(found)[0]) == 0 and detection_loss(found, [boxes], [labels])["classes"] == 0
    with pytest.raises(ValueError, match="must be of 1 scenes"):
        detection_loss(found, [], [])
    empty = detection_loss(found, [boxes[:0]], [labels[:0]])
    assert all(term.isfinite() for term in empty.values())


def test_overlap_in_space() -> None:
    a, b = torch.tensor([[0.0, 0, 0, 2, 2, 2]]), torch.tensor([[1.0, 1, 1, 3, 3, 3], [0, 0, 0, 2, 2, 1]])
    torch.testing.assert_close(union_shares(a, b), torch.tensor([[1 / 15, 0.5]]))
    assert suppress(torch.cat([a, b]), torch.tensor([0.5, 0.4, 0.9]), most=0.3).tolist() == [2, 1]


def scene_file(folder: Path, distance: float = 1.5) -> Path:
    torch.manual_seed(0)
    frames = []
    for number in range(3):
        to_picture(torch.rand(3, 32, 32)).save(folder / f"{number}.png")
        pose = [[1, 0, 0, 0.1 * number], [0, 1, 0, 0], [0, 0, 1, distance], [0, 0, 0, 1]]
        frames.append({"file_path": f"{number}.png", "transform_matrix": pose})
    path = folder / "scene.json"
    (folder / "points.xyz").write_text("0 0 0\n")
    path.write_text(json.dumps({"fl_x": 20, "frames": frames, "points": "points.xyz"}))
    return path


def test_a_scene_file_in_boxes_out(tmp_path: Path) -> None:
    net = model()
    net.threshold = 0.0
    torch.nn.init.zeros_(net.head.classes.bias)
    output = net.predict(scene_file(tmp_path))
    assert output.boxes.shape[1] == 6 and (output.scores.diff() <= 0).all() and len(output.images) == 3
    said = net.answer(output, ["chair", "table", "sofa"])[0]
    assert said and all(name.split()[0] in ("chair", "table", "sofa") for name in said)
    assert net.picture(output).size == (32, 96)
    net.threshold = 1.0
    assert "no box of 100% or more" in net.answer(output)[0]
    with pytest.raises(ValueError, match="no view shows any of the 5 x 4 x 3 voxels"):
        net.predict(scene_file(tmp_path, -3.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.rand(2, 0, 3, 32, 32), 1: torch.rand(2, 0, 3, 4), 2: torch.rand(2, 0, 3, 3)}, "at least one view"),
        ({0: torch.rand(2, 3, 4, 32, 32)}, r"images must be \(batch, views, 3"),
        ({1: torch.rand(2, 2, 3, 4)}, r"as many as views \(3\), got 2"),
        ({2: torch.rand(2, 3, 4, 4)}, "intrinsics must be"),
        ({3: torch.rand(2, 2)}, r"origin must be \(2, 3\)"),
        ({4: torch.rand(2, 4, 3)}, "ray_origins and ray_directions must be"),
    ],
)
def test_bad_calls(change: dict[int, Tensor], message: str) -> None:
    arguments = list(given())
    for place, tensor in change.items():
        arguments[place] = tensor
    with pytest.raises(ValueError, match=message):
        model()(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion": "sum"}, "fusion must be one of heads, mean"),
        ({"depth_source": "lidar"}, "depth_source must be one of"),
        ({"reading": "cubic"}, "reading must be one of"),
        ({"voxels": (0, 1, 1)}, "must be positive"),
        ({"near": 9.0}, "near must be"),
        ({"num_heads": 3}, "num_heads must divide channels"),
    ],
)
def test_bad_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**options)
