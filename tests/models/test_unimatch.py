"""UniMatch: matching at its limits, windows against their definition, propagation, both ways, losses and export."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.models.images import to_picture
from saccade.models.unimatch import FeatureTransformer, Propagation, UniMatch, depth_loss, disparity_loss, flow_loss
from saccade.models.unimatch.encoder import Encoder, with_places
from saccade.models.unimatch.matching import (
    convex_upsampled,
    depth_weights,
    global_disparity,
    global_flow,
    local_disparity,
    local_flow,
    warped,
)
from saccade.models.unimatch.transformer import _as_swin, window_attend_maps

TINY = {"dim": 8, "layers": 2, "width": 4, "expansion": 2}


def images(*size: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    return 255 * torch.rand(batch, 3, *size), 255 * torch.rand(batch, 3, *size)


def cameras(batch: int = 1) -> tuple[Tensor, Tensor]:
    pose = torch.eye(4).repeat(batch, 1, 1)
    pose[:, 0, 3], pose[:, 0, 1], pose[:, 1, 0] = 0.2, 0.02, -0.02
    return torch.tensor([[30.0, 0, 16], [0, 30, 16], [0, 0, 1]]).repeat(batch, 1, 1), pose


def test_orthonormal_features_are_matched_exactly() -> None:
    f0 = 30 * torch.eye(48).view(1, 48, 6, 8)
    flow = global_flow(f0, f0.roll((1, 2), (2, 3)))
    torch.testing.assert_close(flow[0, :, :5, :6], torch.tensor([2.0, 1.0])[:, None, None].expand(-1, 5, 6))


def test_local_matching_over_all_is_global_matching() -> None:
    torch.manual_seed(0)
    f0, f1 = torch.randn(2, 2, 8, 5, 7).unbind(0)
    torch.testing.assert_close(local_flow(f0, f1, 7)[0], global_flow(f0, f1), rtol=1e-5, atol=1e-5)
    flow, weight = local_flow(f0, f1, 1)
    torch.testing.assert_close(weight.sum(-1), torch.ones(2, 5, 7))
    assert weight[:, 0, 0].reshape(2, 3, 3)[:, 0].eq(0).all() and flow[:, :, 0, 0].min() >= 0
    torch.testing.assert_close(local_disparity(f0, f1, 2), -local_flow(f0, f1, (0, 2))[0][:, :1])


def test_disparity() -> None:
    torch.manual_seed(0)
    f0, f1 = (3 * torch.randn(2, 2, 8, 5, 7)).unbind(0)
    found = global_disparity(f0, f1)
    assert found.min() >= -1e-5 and (found <= torch.arange(7) + 1e-5).all() and found[..., 0].abs().max() < 1e-6
    score = torch.einsum("bchw,bchv->bhwv", f0, f1) / 8**0.5
    weight = score.masked_fill(torch.ones(7, 7).triu(1).bool(), -1e9).softmax(-1)
    expected = torch.arange(7.0) - weight @ torch.arange(7.0)
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_depth_of_the_identity_is_the_mean_candidate() -> None:
    torch.manual_seed(0)
    f0, f1 = torch.randn(2, 1, 8, 5, 7).unbind(0)
    candidates = torch.linspace(0.1, 2, 6)[:, None, None].expand(1, 6, 5, 7)
    K = torch.tensor([[[5.0, 0, 3], [0, 5, 2], [0, 0, 1]]])
    weight = depth_weights(f0, f1, candidates, K, torch.eye(4)[None])
    torch.testing.assert_close(weight, torch.full_like(weight, 1 / 6), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "splits"), [((8, 12), (1, 1)), ((8, 12), (2, 2)), ((12, 6), (4, 2)), ((3, 12), (1, 3))]
)
@pytest.mark.parametrize("shifted", [False, True])
def test_windows_are_swins(size: tuple[int, int], splits: tuple[int, int], shifted: bool) -> None:
    """Rolled, cut, and masked by regions, as Swin writes it down."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, *size, 4).unbind(0)
    (H, W), (h, w) = size, (size[0] // splits[0], size[1] // splits[1])
    shifts = [n // 2 if shifted and s > 1 else 0 for n, s in zip((h, w), splits)]

    def windows(x: Tensor) -> Tensor:
        x = x.roll([-s for s in shifts], (1, 2)).view(len(x), splits[0], h, splits[1], w, -1)
        return x.transpose(2, 3).reshape(len(x), -1, h * w, x.shape[-1])

    region = torch.zeros(1, H, W, 1)
    for axis, (n, size_n, s) in enumerate(zip((h, w), (H, W), shifts)):
        place = torch.arange(size_n)
        kind = ((place >= size_n - n).long() + (place >= size_n - s).long()).float() * 3**axis
        region += kind.view(1, -1, 1, 1) if axis == 0 else kind.view(1, 1, -1, 1)
    regions = region.view(1, splits[0], h, splits[1], w).transpose(2, 3).reshape(-1, h * w)
    apart = regions[:, :, None] != regions[:, None]
    score = (windows(q) @ windows(k).mT / 2).masked_fill(apart, -1e9)
    out = (score.softmax(-1) @ windows(v)).view(2, splits[0], splits[1], h, w, 4).transpose(2, 3).reshape(2, H, W, 4)
    expected = out.roll(shifts, (1, 2))
    for form in (window_attend_maps, _as_swin):
        torch.testing.assert_close(form(q, k, v, splits, shifted), expected, rtol=1e-5, atol=1e-5)


def test_places_repeat_in_windows() -> None:
    zero = torch.zeros(1, 8, 4, 6)
    places = with_places(zero, 2)
    assert places[..., :2, :3].equal(places[..., 2:, 3:]) and places[..., :2, :3].equal(with_places(zero[..., :2, :3]))
    y = torch.tensor(2 / (4 + 1e-6) * 2 * torch.pi)
    whole = with_places(zero)[0, :, 1, 0]
    torch.testing.assert_close(whole[:4], torch.stack([y.sin(), y.cos(), (y / 100).sin(), (y / 100).cos()]))


def test_images_see_each_other_as_they_were() -> None:
    torch.manual_seed(0)
    module = FeatureTransformer(8, 2, 2)
    f0, f1 = torch.randn(2, 1, 8, 4, 6).unbind(0)
    out0, out1 = module(f0, f1, 2)
    back1, back0 = module(f1, f0, 2)
    torch.testing.assert_close((out0, out1), (back0, back1))
    nn.init.zeros_(module.layers[1].cross_attention.norm2.weight)  # what is left of the last block sees the own image
    nn.init.zeros_(module.layers[0].cross_attention.norm2.weight)
    torch.testing.assert_close(module(f0, f1)[0], module(f0, f0 + 1)[0])


def test_propagation() -> None:
    torch.manual_seed(0)
    module, f = Propagation(8), torch.randn(2, 8, 5, 6)
    flow = torch.tensor([3.0, -2.0])[None, :, None, None].expand(2, -1, 5, 6)
    torch.testing.assert_close(module(f, flow), flow)
    near = module(f, flow, 1)
    torch.testing.assert_close(near[..., 1:-1, 1:-1], flow[..., 1:-1, 1:-1])
    assert (near[:, 0, 0] < 3).all()  # the places outside take a share
    q = module.q_proj(f.flatten(2).mT)
    for chained, x in ((True, q), (False, f.flatten(2).mT)):
        module.chained, value = chained, torch.randn(2, 2, 5, 6)
        weight = (q @ module.k_proj(x).mT / 8**0.5).softmax(-1)
        torch.testing.assert_close(
            module(f, value), (weight @ value.flatten(2).mT).mT.view_as(value), rtol=1e-4, atol=1e-5
        )


def test_upsampling_and_warping() -> None:
    torch.manual_seed(0)
    flow, logits = torch.randn(1, 2, 3, 4), torch.full((1, 9, 4, 3, 4), -1e4)
    logits[:, 4] = 1e4
    fine = convex_upsampled(2 * flow, logits.flatten(1, 2), 2)
    torch.testing.assert_close(fine, 2 * F.interpolate(flow, scale_factor=2, mode="nearest"))
    f = torch.randn(1, 3, 4, 5)
    moved = warped(f, torch.tensor([1.0, 0.0])[None, :, None, None].expand(1, -1, 4, 5))
    torch.testing.assert_close(moved[..., :-1], f[..., 1:])
    assert moved[..., -1].eq(0).all()


def test_scales_are_from_coarse_to_fine() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 64, 96)
    for scales, sizes in ((1, [(8, 12)]), (2, [(8, 12), (16, 24)]), (3, [(4, 6), (8, 12), (16, 24)])):
        assert [tuple(m.shape[2:]) for m in Encoder(8, 4, scales)(x)] == sizes


@pytest.mark.parametrize("options", [{}, {"scales": 2, "splits": (1, 2), "radii": (-1, 2), "refinements": 1}])
def test_the_images_exchanged(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = UniMatch(**TINY, **options).eval()
    first, second = images(32, 48)
    one, other = model(first, second, both=True), model(second, first, both=True)
    torch.testing.assert_close(one.flow, other.backward, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(one.flow, model(first, second).flow, rtol=1e-4, atol=1e-3)
    depth = UniMatch("depth", **TINY, candidates=4, refinements=1).eval()
    K, pose = cameras()
    one, other = depth(first, second, K, pose, both=True), depth(second, first, K, torch.linalg.inv(pose))
    torch.testing.assert_close(one.backward, other.depth, rtol=1e-4, atol=1e-4)
    assert one.depth is not None and one.depth.min() >= 0.5 and one.depth.max() <= 10.0001


@pytest.mark.parametrize("task", ["flow", "stereo", "depth"])
@pytest.mark.parametrize("refinements", [0, 2])
def test_trains_on_all_predictions(task: str, refinements: int) -> None:
    torch.manual_seed(0)
    scales = 1 if task == "depth" else 2
    splits = (1, 2)[:scales]
    model = UniMatch(task, **TINY, scales=scales, splits=splits, refinements=refinements, candidates=4)
    first, second = images(32, 32, batch=2)
    said = model(first, second, *(cameras(2) if task == "depth" else ()))
    assert said.stages is not None
    assert len(said.stages) == 2 * scales + refinements
    last = said.stages[-1]
    if task == "flow":
        loss = flow_loss(said.stages, torch.ones(2, 2, 32, 32))
        assert last.equal(said.flow)
    elif task == "stereo":
        loss = disparity_loss(said.stages, torch.ones(2, 32, 32))
        assert last[:, 0].equal(said.disparity) and last.min() >= 0
    else:
        loss = depth_loss(said.stages, 2 * torch.ones(2, 32, 32))
        torch.testing.assert_close(1 / last[:, 0], said.depth)
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without and model.eval()(first, second, *(cameras(2) if task == "depth" else ())).stages is None


def test_losses() -> None:
    torch.manual_seed(0)
    flow, valid = torch.randn(2, 2, 4, 5), torch.rand(2, 4, 5) > 0.3
    flow[0, :, 0, 0] = 500.0
    stages = [torch.randn(2, 2, 4, 5) for _ in range(3)]
    kept = valid & (flow.norm(dim=1) < 400)
    each = [((p - flow).abs() * kept[:, None]).mean() for p in stages]
    torch.testing.assert_close(flow_loss(stages, flow, valid), 0.81 * each[0] + 0.9 * each[1] + each[2])
    truth = torch.rand(2, 4, 5) * 500
    prediction = torch.rand(2, 1, 4, 5)
    kept = valid & (truth < 400)
    expected = F.smooth_l1_loss(prediction[:, 0][kept], truth[kept])
    torch.testing.assert_close(disparity_loss([prediction], truth, valid), expected)
    depth = torch.rand(2, 4, 5) + 0.5
    torch.testing.assert_close(depth_loss([1 / depth[:, None]], depth), torch.tensor(0.0))
    depth[0, 1, 2] = 0.0  # not known
    assert depth_loss([prediction], depth).isfinite()
    shifted = 1 / torch.ones(2, 4, 5)[:, None] + 0.25
    torch.testing.assert_close(depth_loss([shifted], torch.ones(2, 4, 5)), torch.tensor(0.25))
    for call in (lambda: flow_loss([], flow), lambda: flow_loss([prediction], flow)):
        with pytest.raises(ValueError, match=r"stages must hold|predictions must have"):
            call()


def test_files_of_any_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        to_picture(torch.rand(3, 30, 41)).save(path)
    said = UniMatch(**TINY).predict(paths)
    assert said.flow.shape == (1, 2, 30, 41) and said.consistent.shape == (1, 30, 41)
    assert UniMatch("stereo", **TINY).predict(paths).disparity.shape == (1, 30, 41)


def test_bad_arguments() -> None:
    model, (first, second) = UniMatch(**TINY), images(32, 48)
    depth = UniMatch("depth", **TINY)
    for call, message in (
        (lambda: model(first, second[..., :32]), "image1 must be"),
        (lambda: model(first[:, :1], second), "x must be images"),
        (lambda: model(first[..., :40], second[..., :40]), "sides must be multiples of 16"),
        (lambda: UniMatch("stereo", **TINY)(first, second, both=True), "both is for flow and depth"),
        (lambda: depth(first, second), "depth needs intrinsics and pose"),
        (lambda: depth(first, second, torch.eye(3), torch.eye(4)), r"intrinsics must be \(1, 3, 3\)"),
        (lambda: UniMatch("sound"), "task must be one of flow"),
        (lambda: UniMatch("depth", scales=2), "1 for depth"),
        (lambda: UniMatch(dim=6), "dim must be a multiple of 4"),
        (lambda: UniMatch(scales=2, splits=(2,)), "splits must be one for each of 2 scales"),
        (lambda: UniMatch(cross="columns"), "cross must be one of windows"),
        (lambda: UniMatch("depth", inverse_depths=(2.0, 0.1)), "inverse_depths must be positive and rise"),
        (lambda: UniMatch(splits=(0,)), "splits must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


#: exporting these takes minutes
LONG = pytest.mark.skipif("SACCADE_LONG" not in os.environ, reason="takes minutes: SACCADE_LONG=1 runs it")


class _Values(nn.Module):
    """A network whose output is a tensor."""

    def __init__(self, network: UniMatch) -> None:
        super().__init__()
        self.network = network

    def forward(self, image0: Tensor, image1: Tensor, *cameras: Tensor) -> Tensor:
        said = self.network(image0, image1, *cameras)
        return next(values for values in (said.flow, said.disparity, said.depth) if values is not None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, tolerance",
    [
        pytest.param({}, 1e-4, id="flow"),
        # where the second scale looks follows from the first one's disparity: single pixels differ more
        pytest.param({"task": "stereo", "scales": 2}, 2e-3, id="stereo", marks=LONG),
        pytest.param({"task": "depth"}, 1e-4, id="depth", marks=LONG),
    ],
)
def test_exports_with_free_sizes(arguments: dict[str, Any], tolerance: float) -> None:
    """The graph, at sizes other than that at which it was taken, run by another runtime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = _Values(UniMatch(**(TINY | arguments))).eval()
    multiple = model.network.multiple
    free = {2 + i: multiple * torch.export.Dim(name, min=2, max=200) for i, name in enumerate(("h", "w"))}
    pose = torch.eye(4)[None].clone()
    pose[:, :3, 3] = torch.tensor([0.2, -0.1, 0.05])
    cameras = (torch.tensor([[[40.0, 0.0, 30.0], [0.0, 42.0, 20.0], [0.0, 0.0, 1.0]]]), pose)
    cameras = cameras if model.network.task == "depth" else ()
    axes = (free, free, *([({}, {})] if cameras else []))
    with torch.no_grad():
        given = (*images(4 * multiple, 6 * multiple), *cameras)
        program = torch.onnx.export(model, given, dynamo=True, dynamic_shapes=axes, optimize=False, verbose=False)
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for size in ((4 * multiple, 6 * multiple), (2 * multiple, 2 * multiple), (3 * multiple, 5 * multiple)):
        given = (*images(*size), *cameras)
        named = {put.name: value.numpy() for put, value in zip(session.get_inputs(), given, strict=True)}
        with torch.no_grad():
            expected = model(*given)
        (found,) = session.run(None, named)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=tolerance, atol=10 * tolerance)
