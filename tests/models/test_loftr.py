"""LoFTR: its attention, its two ends at their limits, its losses, and kornia's network with the same weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.models.loftr import (
    FeatureTransformer,
    LoFTR,
    MatchingLayer,
    assign,
    cell_places,
    coarse_loss,
    dense_coarse_loss,
    elu_plus_one,
    expected_offsets,
    fine_loss,
    position_code,
    select,
    training_pairs,
    true_pairs,
    windows,
)
from saccade.ops.matching import Pairs, pixel_grid

SMALL: dict[str, Any] = {
    "widths": (8, 12, 16), "num_heads": 4, "layers": ("self", "cross"), "fine_heads": 2, "threshold": 0.0, "border": 0,
}  # fmt: skip


def small(**changes: Any) -> LoFTR:
    torch.manual_seed(0)
    return LoFTR(**{**SMALL, **changes}).eval()


def plain_layer(layer: MatchingLayer, x: Tensor, source: Tensor, valid: Tensor, source_valid: Tensor) -> Tensor:
    q, k, v = (
        p(t).unflatten(2, (layer.num_heads, -1)).transpose(1, 2)
        for p, t in ((layer.q_proj, x), (layer.k_proj, source), (layer.v_proj, source))
    )
    weights = elu_plus_one(q) @ elu_plus_one(k).mT * source_valid[:, None, None]
    read = weights / weights.sum(3, keepdim=True) @ v * valid[:, None, :, None]
    message = layer.norm1(layer.merge(read.transpose(1, 2).flatten(2)))
    return x + layer.norm2(layer.down(layer.up(torch.cat([x, message], 2)).relu()))


def test_linear_attention_is_the_quadratic_form_and_padding_a_shorter_sequence() -> None:
    torch.manual_seed(0)
    layer, x, source = MatchingLayer(8, 2), torch.randn(2, 9, 8), torch.randn(2, 7, 8)
    everything = torch.ones(2, 9, dtype=torch.bool), torch.ones(2, 7, dtype=torch.bool)
    torch.testing.assert_close(layer(x, source), plain_layer(layer, x, source, *everything))
    valid, source_valid = (v.clone() for v in everything)
    valid[:, 6:], source_valid[:, 4:] = False, False
    padded = layer(x, source, valid, source_valid)
    torch.testing.assert_close(padded, plain_layer(layer, x, source, valid, source_valid))
    torch.testing.assert_close(padded[:, :6], layer(x[:, :6], source[:, :4]))
    full = MatchingLayer(8, 2, "full")
    torch.testing.assert_close(full(x, source, valid, source_valid)[:, :6], full(x[:, :6], source[:, :4]))
    nothing = torch.zeros_like(source_valid)
    assert full(x, source, valid, nothing).isfinite().all() and layer(x, source, valid, nothing).isfinite().all()


@pytest.mark.parametrize("attention", ["linear", "full"])
def test_the_transformer_commutes_with_the_order_of_cells(attention: str) -> None:
    torch.manual_seed(0)
    module, f0, f1 = FeatureTransformer(8, 2, ("self", "cross"), attention), torch.randn(1, 6, 8), torch.randn(1, 5, 8)
    out0, out1 = module(f0, f1)
    order0, order1 = torch.randperm(6), torch.randperm(5)
    torch.testing.assert_close(module(f0[:, order0], f1[:, order1]), (out0[:, order0], out1[:, order1]))
    # the second image reads the first as the same layer has changed it
    crossed = module.layers[1](module.layers[0](f0, f0), module.layers[0](f1, f1))
    torch.testing.assert_close(out0, crossed)
    torch.testing.assert_close(out1, module.layers[1](module.layers[0](f1, f1), out0))


def test_positions() -> None:
    code = position_code(5, 7, 8, torch.zeros(()))
    assert code.shape == (8, 5, 7)
    rate = 10000 ** (-2 / 4)
    torch.testing.assert_close(code[4, 0], (torch.arange(1, 8) * rate).sin())
    torch.testing.assert_close(code[7, :, 0], (torch.arange(1, 6) * rate).cos())
    old = position_code(5, 7, 8, torch.zeros(()), first_release=True)
    torch.testing.assert_close(old[4, 0], (torch.arange(1, 8) * math.exp(-2)).sin())
    assert torch.equal(old[:4], code[:4])


def test_strong_features_match_themselves_away_from_the_border() -> None:
    features = 40 * torch.eye(42)[None]
    found = assign(features, features)
    torch.testing.assert_close(found.matrix()[0], torch.eye(42))
    pairs = select(found, ((6, 7), (6, 7)), border=2)
    assert torch.equal(pairs.index0, pairs.index1)
    assert pairs.index0.tolist() == [2 * 7 + 2, 2 * 7 + 3, 2 * 7 + 4, 3 * 7 + 2, 3 * 7 + 3, 3 * 7 + 4]
    valid = torch.zeros(1, 6, 7, dtype=torch.bool)
    valid[:, :5, :6] = True
    padded = {"valid0_BN": valid.flatten(1), "valid1_BM": valid.flatten(1)}
    real = select(assign(features, features, **padded), ((6, 7), (6, 7)), border=2, **padded)
    assert real.index0.tolist() == [2 * 7 + 2, 2 * 7 + 3]
    assert not len(select(found, ((6, 7), (6, 7)), threshold=1.0).batch)


def test_windows_are_those_of_unfold() -> None:
    torch.manual_seed(0)
    fine = torch.randn(2, 3, 16, 24)
    unfolded = torch.nn.functional.unfold(fine, 5, stride=4, padding=2).unflatten(1, (3, 25)).permute(0, 3, 2, 1)
    batch, index = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 7, 23, 11])
    torch.testing.assert_close(windows(fine, batch, 4 * cell_places(index, (4, 6)), 5), unfolded[batch, index])


def test_windows_made_alone_are_those_of_the_map() -> None:
    model = small(window=5)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # so that noughts do not stay noughts
            torch.nn.init.uniform_(module.running_mean)
            torch.nn.init.uniform_(module.bias)
    _, y = model.backbone(torch.rand(2, 1, 64, 96))
    batch, index = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 11, 95, 40])  # corners, a border, the middle
    alone = model.fine_windows(y, batch, index, (8, 12))
    whole = windows(model.backbone.finish(y), batch, 4 * cell_places(index, (8, 12)), 5)
    torch.testing.assert_close(alone, whole, atol=1e-5, rtol=1e-4)
    assert alone.shape == (4, 25, 8) and not torch.equal(alone, model.train().fine_windows(y, batch, index, (8, 12)))


def test_a_heat_map_of_one_place_gives_its_offset_and_the_least_deviation() -> None:
    window0, window1 = torch.zeros(25, 25, 4), torch.zeros(25, 25, 4)
    window0[:, 12] = 100.0
    window1[torch.arange(25), torch.arange(25)] = 100.0
    found = expected_offsets(window0, window1)
    torch.testing.assert_close(found[:, :2], (pixel_grid(5, 5, found) - 2) / 2)
    torch.testing.assert_close(found[:, 2], torch.full((25,), 2e-5))


def test_no_match_is_an_answer_and_padding_keeps_matches_inside() -> None:
    model = small(threshold=1.0)
    images = torch.rand(2, 1, 1, 32, 48)
    said = model(*images)
    assert said.keypoints0.shape == said.keypoints1.shape == (0, 2) and said.offsets.shape == (0, 3)
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[:, :3, :4] = True
    said = small()(*images, mask0=mask, mask1=mask)
    assert len(said.keypoints0) and (said.coarse0 < torch.tensor([32, 24])).all()
    assert (said.coarse1 < torch.tensor([32, 24])).all()
    scale = torch.tensor([[2.0, 0.5]])
    scaled = small()(*images, mask0=mask, mask1=mask, scale0=scale, scale1=scale)
    torch.testing.assert_close(scaled.keypoints0, said.keypoints0 * scale)
    torch.testing.assert_close(scaled.keypoints1, said.keypoints1 * scale)


def test_swapping_features_transposes_the_shares() -> None:
    torch.manual_seed(0)
    f0, f1 = torch.randn(1, 6, 8), torch.randn(1, 9, 8)
    torch.testing.assert_close(assign(f0, f1).matrix(), assign(f1, f0).matrix().mT)


def shifted(side: int, x: int, y: int) -> Tensor:
    grid = pixel_grid(side, side, torch.zeros(())).view(side, side, 2)
    return torch.stack([grid + torch.tensor([x, y]), grid - torch.tensor([x, y])])[None]


def test_true_pairs_and_their_losses() -> None:
    positions = shifted(32, 9, -1)
    truth = true_pairs(positions, 8)
    assert truth.index0.tolist() == [i for i in range(16) if i % 4 < 3]
    assert torch.equal(truth.index1, truth.index0 + 1)
    positions[0, 0, :, 8:] = math.nan
    assert true_pairs(positions, 8).index0.tolist() == [0, 4, 8, 12]
    torch.manual_seed(0)
    f = (0.3 * torch.randn(1, 16, 8)).requires_grad_()
    found = assign(f, f)
    share = found.matrix()[truth[:3]]
    expected = (-0.25 * (1 - share) ** 2 * share.log()).mean()
    torch.testing.assert_close(coarse_loss(found, truth), expected)
    assert dense_coarse_loss(found, truth) > expected
    nll = coarse_loss(found, truth, alpha=1.0, gamma=0.0)
    torch.testing.assert_close(nll, -share.log().mean())
    nothing = Pairs(*(x[:0] for x in truth))
    assert coarse_loss(found, nothing) == 0 and coarse_loss(found, nothing).requires_grad
    transport = assign(f, f, dustbin=torch.tensor(1.0))
    logs = [transport.log_at(*truth[:3]), transport.bin0_BN[:, 3::4].flatten(), transport.bin1_BM[:, ::4].flatten()]
    share = torch.cat(logs).exp()
    torch.testing.assert_close(coarse_loss(transport, truth), (-0.25 * (1 - share) ** 2 * share.log()).mean())


def test_the_fine_loss_counts_what_is_within_reach() -> None:
    positions = shifted(32, 9, -1)  # true offsets of (1, -1) px from the next cell
    pairs = Pairs(*(torch.tensor(x) for x in ([0, 0, 0], [5, 6, 9], [6, 7, 15])), torch.ones(3))
    offsets = torch.tensor([[0.25, -0.25, 1.0], [0.75, -0.25, 0.5], [0.0, 0.0, 0.25]], requires_grad=True)
    # inverse deviations 1, 2, 4 over their mean 7 / 3; the third pair's truth is two cells away
    expected = (2 * 3 / 7 * 0.5**2 + 0) / 2
    assert fine_loss(offsets, pairs, positions, 8, 4.0).item() == pytest.approx(expected)
    far = Pairs(*(x[2:] for x in pairs))
    assert fine_loss(offsets[2:], far, positions, 8, 4.0) == 0


def test_pairs_of_training_are_filled_up_with_true_ones() -> None:
    truth = true_pairs(shifted(32, 8, 0), 8)
    found = Pairs(*(torch.arange(50).clamp(max=0) for _ in range(3)), torch.full((50,), 0.5))
    pairs = training_pairs(found, truth, 100, least_true=8, generator=torch.Generator().manual_seed(0))
    assert len(pairs.batch) == 20 and (pairs.confidence == 0).sum() == 8  # 12 found of 50
    few = training_pairs(Pairs(*(x[:3] for x in found)), truth, 100, least_true=8)
    assert len(few.batch) == 20 and (few.confidence == 0).sum() == 17
    assert (few.index1 == few.index0 + 1)[3:].all()
    nothing = Pairs(*(x[:0] for x in truth))
    assert len(training_pairs(nothing, nothing, 100).batch) == 0


def test_a_step_of_training_moves_every_parameter() -> None:
    for changes in ({}, {"matching": "sinkhorn", "prefilter": True}):
        model = small(**changes).train()
        loss = model.loss(*torch.rand(2, 2, 1, 32, 32), shifted(32, 8, 1).expand(2, -1, -1, -1, -1))
        loss.backward()
        assert loss.isfinite() and not [name for name, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize(
    "changes",
    [
        {"resolution": (16, 4), "widths": (4, 6, 8, 12)},
        {"matching": "sinkhorn", "prefilter": True},
        {"fine_context": False, "attention": "full", "fine_attention": "full"},
    ],
)
def test_variants(changes: dict[str, Any]) -> None:
    model = small(**changes)
    said = model(torch.rand(1, 1, 48, 64), torch.rand(1, 1, 64, 32))
    assert said.keypoints0.isfinite().all() and said.keypoints1.isfinite().all()


def test_a_fused_network_is_the_same_function() -> None:
    model = small()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    images = torch.rand(2, 1, 1, 32, 48)
    expected = model(*images)
    ours = model.fuse()(*images)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(ours.keypoints1, expected.keypoints1, atol=1e-3, rtol=1e-4)
    with pytest.raises(ValueError, match="evaluation"):
        small().train().fuse()


@pytest.mark.parametrize("first_release", [False, True])
def test_the_same_weights_give_what_kornia_gives(first_release: bool) -> None:
    kornia = pytest.importorskip("kornia.feature")
    torch.manual_seed(0)
    config = {
        "backbone_type": "ResNetFPN", "resolution": (8, 2), "fine_window_size": 5, "fine_concat_coarse_feat": True,
        "resnetfpn": {"initial_dim": 8, "block_dims": [8, 12, 16]},
        "coarse": {
            "d_model": 16, "d_ffn": 16, "nhead": 4, "layer_names": ["self", "cross"] * 2, "attention": "linear",
            "temp_bug_fix": not first_release,
        },
        "match_coarse": {
            "thr": 0.01, "border_rm": 1, "match_type": "dual_softmax", "dsmax_temperature": 0.1, "skh_iters": 3,
            "skh_init_bin_score": 1.0, "skh_prefilter": True, "train_coarse_percent": 0.4, "train_pad_num_gt_min": 200,
        },
        "fine": {"d_model": 8, "d_ffn": 8, "nhead": 2, "layer_names": ["self", "cross"], "attention": "linear"},
    }  # fmt: skip
    theirs = kornia.LoFTR(pretrained=None, config=config).eval()
    sizes = {"num_heads": 4, "layers": ("self", "cross") * 2, "fine_heads": 2, "threshold": 0.01, "border": 1}
    ours = LoFTR.from_kornia(theirs, widths=(8, 12, 16), first_release=first_release, **sizes)
    data = {"image0": torch.rand(1, 1, 96, 128), "image1": torch.rand(1, 1, 80, 96)}
    with torch.no_grad():
        expected, found = theirs(dict(data)), ours.kornia(data)
    assert found.keys() == {"keypoints0", "keypoints1", "confidence", "batch_indexes"}
    assert len(found["keypoints0"]) >= 5
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-3, rtol=1e-4)


def test_weights_of_the_authors_file(tmp_path: Path) -> None:
    from saccade import catalogue

    model = small()
    forward = catalogue.port("loftr", "loftr").convert
    names = {}
    for theirs in _released(model):
        (ours,) = forward({theirs: torch.zeros(1)})
        names[ours] = theirs
    assert names.keys() == model.state_dict().keys()
    state = {f"matcher.{names[ours]}": x for ours, x in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "outdoor.ckpt")
    other = LoFTR.from_authors(tmp_path / "outdoor.ckpt", **SMALL)
    images = torch.rand(2, 1, 1, 32, 48)
    torch.testing.assert_close(other(*images).keypoints1, model(*images).keypoints1)


def _released(model: LoFTR) -> list[str]:
    """The released names of the card for what this network has."""
    names = []
    for ours in model.state_dict():
        where, _, rest = ours.partition(".")
        if where in ("coarse", "fine"):
            names.append(f"loftr_{where}.{rest.replace('.up.', '.mlp.0.').replace('.down.', '.mlp.2.')}")
        elif where == "backbone":
            part, n, *tail = rest.split(".")
            if part == "stem":
                names.append(f"backbone.{('conv1', 'bn1')[int(n)]}.{tail[0]}")
            elif part == "stages":
                block = ".".join(tail).replace("norm", "bn").replace("shortcut", "downsample")
                names.append(f"backbone.layer{int(n) + 1}.{block}")
            else:
                suffix = "outconv" if part == "lateral" else "outconv2"
                names.append(f"backbone.layer{n}_{suffix}.{'.'.join(tail)}")
        else:
            names.append(f"fine_preprocess.{ {'context': 'down_proj', 'join': 'merge_feat'}[where] }.{rest}")
    return names


def test_the_exported_file_computes_the_same_at_other_sizes() -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = small(widths=(4, 6, 8), num_heads=2, layers=("self", "cross"), threshold=0.005, border=1)
    sides = [{axis: 8 * torch.export.Dim(f"{name}{i}", min=2) for axis, name in ((2, "h"), (3, "w"))} for i in (0, 1)]
    images = torch.rand(1, 1, 64, 96), torch.rand(1, 1, 48, 80)
    program = torch.onnx.export(model, images, dynamo=True, dynamic_shapes=tuple(sides), verbose=False)
    assert program is not None and not {node.domain for node in program.model_proto.graph.node} - {""}
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    for shapes in (((64, 96), (48, 80)), ((96, 64), (80, 128))):
        given = [torch.rand(1, 1, *shape) for shape in shapes]
        names = [each.name for each in session.get_inputs()]
        found = session.run(None, {name: value.numpy() for name, value in zip(names, given)})
        with torch.no_grad():
            expected = model(*given)
        assert len(expected.confidence)
        for name, value in zip(("keypoints0", "keypoints1", "confidence", "batch_indexes"), found):
            torch.testing.assert_close(torch.from_numpy(value), getattr(expected, name), atol=1e-3, rtol=1e-3)


def test_refusals() -> None:
    for changes, message in (
        ({"matching": "greedy"}, "matching must be one of dual-softmax, sinkhorn"),
        ({"window": 4}, "window must be odd"),
        ({"resolution": (8, 4)}, "resolution must be one of"),
        ({"widths": (8, 16)}, "widths must be 3"),
        ({"widths": (8, 12, 18), "num_heads": 2}, "multiple of 4"),
        ({"layers": ("self", "both")}, "layers must be among self, cross, got 'both'"),
        ({"attention": "sparse"}, "attention must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**changes)
    with pytest.raises(ValueError, match="height and width of image0 must be multiples of 8"):
        small()(torch.rand(1, 1, 30, 32), torch.rand(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r"image1 must be images \(batch, 1"):
        small()(torch.rand(1, 1, 32, 32), torch.rand(1, 3, 32, 32))
