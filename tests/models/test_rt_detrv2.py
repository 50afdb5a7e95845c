"""RT-DETRv2: its parts at their limits, training, fusion, and transformers' model of the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from saccade import catalogue
from saccade.models.detection import Detection, surest
from saccade.models.resnest import ResNeSt
from saccade.models.rt_detrv2 import (
    Criterion,
    Decoder,
    HGNetV2,
    HungarianMatcher,
    HybridEncoder,
    MSDeformableAttention,
    RepVGG,
    ResNetVD,
    RTDETRv2,
    Trained,
    average_decay,
    contrastive_queries,
    parameter_groups,
    sine_code,
    varifocal_loss,
    warm_up,
)
from saccade.models.rt_detrv2.decoder import anchors
from saccade.ops.boxes import inverse_sigmoid, to_corners
from saccade.ops.deformable import deformable_attend_reference

GOLDEN = Path(__file__).parent.parent / "golden" / "rt-detrv2"
TINY: dict[str, Any] = dict(catalogue.part("rt-detrv2").example)
SHAPES = [(6, 5), (3, 2)]


def drawn(module: nn.Module) -> Any:
    """With random numbers everywhere, norms' too."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0, 0.3)
    for name, buffer in module.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
        elif name.endswith("running_mean"):
            buffer.normal_()
    return module.eval()


def looked_at(count: int = 7, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    boxes = torch.cat([torch.rand(2, count, 1, 2), torch.rand(2, count, 1, 2) / 2], -1)
    return torch.randn(2, count, dim), boxes, torch.randn(2, 36, dim)


def targets(*counts: int, classes: int = 3) -> list[dict[str, Tensor]]:
    torch.manual_seed(2)
    return [
        {
            "labels": torch.randint(classes, (count,)),
            "boxes": torch.cat([torch.rand(count, 2) * 0.4 + 0.3, torch.rand(count, 2) * 0.3 + 0.1], 1),
        }
        for count in counts
    ]


@pytest.mark.parametrize("sampling", ["bilinear", "discrete"])
@pytest.mark.parametrize("points", [3, (3, 1)])
def test_attention_is_a_weighted_sum_of_points_in_units_of_the_box(sampling: str, points: Any) -> None:
    module = drawn(MSDeformableAttention(16, 4, 2, points, sampling=sampling))
    query, boxes, value = looked_at()
    counts = (points, points) if isinstance(points, int) else points
    each = torch.tensor([count for count in counts for _ in range(count)])
    offsets = module.sampling_offsets(query).view(2, 7, 4, len(each), 2) / each[:, None] * 0.5
    places = boxes[:, :, None, :, :2] + offsets * boxes[:, :, None, :, 2:]
    weights = module.attention_weights(query).view(2, 7, 4, -1).softmax(-1)
    values = module.value_proj(value).view(2, 36, 4, 4)
    expected = deformable_attend_reference(values, SHAPES, places, weights, counts, mode=sampling)
    torch.testing.assert_close(module(query, boxes, value, SHAPES), module.output_proj(expected.flatten(2)))


def test_reference_points_move_by_pixels() -> None:
    module = drawn(MSDeformableAttention(16, 4, 2, (2, 1)))
    query, boxes, value = looked_at()
    points = boxes[..., :2].expand(-1, -1, 2, -1)
    size = torch.tensor([[5.0, 6], [5, 6], [2, 3]])
    expected = points[:, :, :1, None] + module.sampling_offsets(query).view(2, 7, 4, 3, 2) / size
    torch.testing.assert_close(module.locations(query, points, SHAPES), expected)
    assert module(query, points, value, SHAPES).shape == (2, 7, 16)


@pytest.mark.parametrize("sampling", ["bilinear", "discrete"])
def test_a_constant_map_gives_its_projection_and_a_hidden_one_the_bias(sampling: str) -> None:
    module = drawn(MSDeformableAttention(16, 4, 2, (3, 2), sampling=sampling))
    query, boxes, value = looked_at()
    boxes = torch.tensor([0.5, 0.5, 0.01, 0.01]).expand_as(boxes)  # so that points lie inside
    same = value[:1, :1].expand_as(value)
    expected = module.output_proj(module.value_proj(same[:, :7]))
    torch.testing.assert_close(module(query, boxes, same, SHAPES), expected, atol=1e-5, rtol=1e-5)
    hidden = module(query, boxes, value, SHAPES, torch.zeros(2, 36, dtype=torch.bool))
    torch.testing.assert_close(hidden, module.output_proj.bias.expand_as(hidden))


def test_a_level_without_weight_does_not_count() -> None:
    module = drawn(MSDeformableAttention(16, 4, 2, (3, 2)))
    query, boxes, value = looked_at()
    nn.init.zeros_(module.attention_weights.weight)
    module.attention_weights.bias.data.view(4, 5)[:, 3:] = -torch.inf
    other = torch.cat([value[:, :30], torch.randn(2, 6, 16)], 1)
    assert torch.equal(module(query, boxes, value, SHAPES), module(query, boxes, other, SHAPES))


def test_discrete_places_are_not_learned() -> None:
    module = MSDeformableAttention(16, 4, 2, 2, sampling="discrete")
    query, boxes, value = looked_at()
    query.requires_grad_()
    module(query, boxes, value, SHAPES).square().sum().backward()
    assert module.sampling_offsets.weight.grad is None and not module.sampling_offsets.bias.requires_grad
    assert module.attention_weights.weight.grad is not None
    module.sample("bilinear")
    assert all(p.requires_grad for p in module.parameters())


def test_points_start_on_rays() -> None:
    bias = MSDeformableAttention(16, 4, 2, (3, 1)).sampling_offsets.bias.view(4, 4, 2)
    rays = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    torch.testing.assert_close(bias, rays[:, None] * torch.tensor([1.0, 2, 3, 1])[:, None])


def test_places_of_the_coarsest_map() -> None:
    """On a square map the authors' x runs down the rows, and y along them."""
    code = sine_code(3, 3, 8).view(3, 3, 4, 2)
    x, y = torch.meshgrid(torch.arange(3.0), torch.arange(3.0), indexing="ij")
    for part, at, function in ((0, x, torch.sin), (1, x, torch.cos), (2, y, torch.sin), (3, y, torch.cos)):
        torch.testing.assert_close(code[:, :, part, 0], function(at))
        torch.testing.assert_close(code[:, :, part, 1], function(at / 100))


def test_anchors() -> None:
    logits, valid = anchors([(2, 60), (1, 2)])
    assert logits.shape == (122, 4)
    boxes = logits.sigmoid()
    torch.testing.assert_close(boxes[1], torch.tensor([1.5 / 60, 0.25, 0.05, 0.05]))
    torch.testing.assert_close(boxes[-1], torch.tensor([0.75, 0.5, 0.1, 0.1]))
    assert not valid[[0, 59, 60, 119]].any() and valid.sum() == 118 and (logits[0] == torch.inf).all()
    torch.testing.assert_close(inverse_sigmoid(boxes[1]), logits[1])


def maps(batch: int = 2) -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randn(batch, 8, side, side + 1) for side in (8, 4, 2)]


def decoder(**changes: Any) -> Decoder:
    sizes = {"num_queries": 6, "num_heads": 2, "hidden": 12, "layers": 3, "num_points": (2, 1, 1), "num_denoising": 0}
    return drawn(Decoder(3, (8, 8, 8), 8, **{**sizes, **changes}))


def test_a_decoder_that_ends_early_is_a_shorter_one() -> None:
    whole = decoder(eval_layer=1)
    short = decoder(layers=2)
    short.load_state_dict({n: t for n, t in whole.state_dict().items() if n in short.state_dict()})
    ours, expected = whole(maps()), short(maps())
    assert torch.equal(ours.logits[-1], expected.logits[-1]) and torch.equal(ours.boxes[-1], expected.boxes[-1])
    assert not torch.equal(ours.logits[-1], decoder()(maps()).logits[-1])


def test_the_order_of_queries_does_not_matter() -> None:
    module, order = decoder(), torch.tensor([3, 0, 5, 1, 4, 2])
    memory, shapes = module.flatten(maps())
    queries = module.select(memory, shapes)
    expected = module.refine(queries, memory, shapes)
    queries.content_BTC, queries.box_BT4 = queries.content_BTC[:, order], queries.box_BT4[:, order]
    found = module.refine(queries, memory, shapes)
    torch.testing.assert_close(found.logits[-1], expected.logits[-1][:, order])
    torch.testing.assert_close(found.boxes[-1], expected.boxes[-1][:, order])


def test_how_cells_become_queries() -> None:
    for selection in ("default", "one2many", "agnostic"):
        module = decoder(selection=selection)
        memory, shapes = module.flatten(maps())
        queries = module.select(memory, shapes)
        features = module.enc_output(memory)  # all cells of so small maps count
        logits = module.enc_score(features)
        if selection == "one2many":
            cell = logits.flatten(1).topk(6).indices // 3
        else:
            cell = logits.amax(-1).topk(6).indices
        for b in range(2):
            assert torch.equal(queries.content_BTC[b], features[b, cell[b]])
        assert module(maps()).logits[-1].shape == (2, 6, 3)
    few = decoder(num_queries=500, learned_content=True)
    assert few(maps()).logits[-1].shape == (2, 8 * 9 + 4 * 5 + 2 * 3, 3)


def test_further_levels_are_made() -> None:
    module = decoder(num_levels=5, num_points=1)
    _, shapes = module.flatten(maps())
    assert shapes == [(8, 9), (4, 5), (2, 3), (1, 2), (1, 1)]
    assert module(maps()).boxes[-1].shape == (2, 6, 4)


def test_a_fused_network_is_the_same_function() -> None:
    for backbone in ({"backbone": "R18"}, {"backbone": "R50"}):
        model = drawn(RTDETRv2(**{**TINY, **backbone}))
        x = torch.rand(1, 3, 64, 96)
        before = model(x)
        norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        after = model.fuse()(x)
        assert norms and not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        assert all(m.conv2 is None for m in model.modules() if isinstance(m, RepVGG))
        torch.testing.assert_close(after.logits, before.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(after.pred_boxes, before.pred_boxes, atol=1e-5, rtol=0)
        model.fuse()  # a second time there is nothing left to do
        assert torch.equal(model(x).logits, after.logits)
    with pytest.raises(ValueError, match="evaluation"):
        RTDETRv2(**TINY).train().fuse()


def test_rep_vgg_is_one_convolution() -> None:
    module, x = drawn(RepVGG(6)), torch.randn(2, 6, 5, 7)
    expected = module(x)
    module.fuse()
    assert isinstance(module.conv1, nn.Conv2d) and (module(x) - expected).abs().max() < 1e-5


def test_images_of_any_size_and_other_backbones() -> None:
    model = drawn(RTDETRv2(**TINY))
    for size in ((1, 1), (37, 70), (64, 32)):
        out = model(torch.rand(1, 3, *size))
        assert out.logits.isfinite().all() and ((out.pred_boxes >= 0) & (out.pred_boxes <= 1)).all()
    for name in ("R50", "HGNetv2-L"):
        with torch.device("meta"):
            big = RTDETRv2(**{**TINY, "backbone": name, "backbone_width": 64, "backbone_blocks": None})
            assert big.backbone.channels == (512, 1024, 2048)
            assert [m.shape[1:] for m in big.backbone(torch.empty(1, 3, 64, 32))] == [
                (512, 8, 4), (1024, 4, 2), (2048, 2, 1)
            ]  # fmt: skip
        assert not any(isinstance(m, nn.BatchNorm2d) for m in big.backbone.modules())
    assert isinstance(RTDETRv2(**TINY).backbone.stem[0][1], nn.BatchNorm2d)  # R18's live


class Pyramid(nn.Module):
    """A backbone of another house: maps in an output, as transformers gives them."""

    channels = (4, 5, 6)

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, c, s, s) for c, s in zip(self.channels, (8, 16, 32)))

    def forward(self, x: Tensor) -> Any:
        return type("Output", (), {"feature_maps": tuple(conv(x) for conv in self.convs)})()


def test_a_backbone_may_be_any_module() -> None:
    sizes = {k: v for k, v in TINY.items() if not k.startswith("backbone")}
    assert RTDETRv2(backbone=Pyramid(), **sizes).eval()(torch.rand(1, 3, 64, 64)).logits.shape == (1, 5, 3)
    with pytest.raises(ValueError, match="channels"):
        RTDETRv2(backbone=nn.Conv2d(3, 3, 1), **sizes)
    with pytest.raises(ValueError, match="num_levels"):  # it gives four maps, from stride 4 on
        RTDETRv2(backbone=ResNeSt(14, num_classes=0), **sizes)


def test_who_sees_whom_in_denoising() -> None:
    there = targets(2, 0, 3)
    noised = contrastive_queries(there, 3, 13)
    assert noised is not None and noised.groups == 4 and noised.labels_BD.shape == (3, 24)
    assert [len(p) for p in noised.positive] == [8, 0, 12] and noised.positive[0].tolist() == [
        0,
        1,
        6,
        7,
        12,
        13,
        18,
        19,
    ]
    assert (noised.labels_BD[1] == 3).all() and (noised.labels_BD[0].view(8, 3)[:, 2] == 3).all()
    mask = noised.mask(5)
    own = torch.block_diag(*(torch.ones(6, 6) for _ in range(4))).bool()
    assert torch.equal(mask[:24, :24], own) and mask[:, 24:].all() and not mask[24:, :24].any()
    assert contrastive_queries(targets(0, 0), 3) is None and contrastive_queries(there, 3, 0) is None


def test_how_far_noise_goes() -> None:
    (there,) = targets(4)
    noised = contrastive_queries([there], 3, 4000, label_noise=0.5, box_noise=0.4)
    assert noised is not None
    moved = (to_corners(noised.boxes_BD4[0].view(-1, 2, 4, 4)) - to_corners(there["boxes"])).abs()
    moved = moved / there["boxes"][:, 2:].repeat(1, 2) * 2 / 0.4
    assert moved[:, 0].max() < 1 + 1e-4 and moved[:, 0].mean().item() == pytest.approx(0.5, abs=0.02)
    assert moved[:, 1].min() > 1 - 1e-4 and moved[:, 1].max() < 2 + 1e-4
    changed = noised.labels_BD[0].view(-1, 4) != there["labels"]
    assert changed.float().mean().item() == pytest.approx(0.25 * 2 / 3, abs=0.02)
    plain = contrastive_queries([there], 3, 8, label_noise=0, box_noise=0)
    assert plain is not None and torch.equal(plain.boxes_BD4[0, :4], there["boxes"])


def test_denoising_does_not_change_the_other_queries() -> None:
    torch.manual_seed(0)
    model = RTDETRv2(**{**TINY, "num_denoising": 8}).train()
    x = torch.rand(2, 3, 64, 64)
    without, with_noise = model(x), model(x, targets(2, 1))
    assert isinstance(with_noise, Trained) and without.denoised is None and with_noise.denoised is not None
    torch.testing.assert_close(with_noise.logits, without.logits)
    torch.testing.assert_close(with_noise.pred_boxes, without.pred_boxes)
    assert with_noise.denoised[0].logits.shape == (2, 16, 3)


def test_matches_cost_least() -> None:
    boxes = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2], [0.5, 0.5, 0.9, 0.9]])
    logits = torch.tensor([[5.0, -5], [-5, 5], [0, 0]])
    target = {"labels": torch.tensor([1, 0]), "boxes": boxes[[1, 0]]}
    ((query, chosen),) = HungarianMatcher()(logits[None], boxes[None], [target])
    assert dict(zip(query.tolist(), chosen.tolist())) == {0: 1, 1: 0}
    cost = HungarianMatcher().cost(logits, boxes, target)
    p = torch.tensor(5.0).sigmoid().item()
    focal = 0.25 * (1 - p) ** 2 * -torch.tensor(p).log() - 0.75 * p**2 * -torch.tensor(1 - p).log()
    assert cost[1, 0].item() == pytest.approx(2 * focal.item() - 2, abs=1e-3)


def test_varifocal_loss() -> None:
    logits, labels = torch.randn(1, 3, 4), torch.tensor([[2, 4, 0]])
    quality = torch.tensor([[0.7, 0.0, 0.2]])
    expected = 0.0
    for n, k in [(n, k) for n in range(3) for k in range(4)]:
        own = labels[0, n] == k
        y = quality[0, n] if own else torch.tensor(0.0)
        weight = y if own else 0.75 * logits[0, n, k].sigmoid() ** 2
        expected += (weight * F.binary_cross_entropy_with_logits(logits[0, n, k], y)).item()
    assert varifocal_loss(logits, labels, quality).item() == pytest.approx(expected, rel=1e-5)


def test_a_right_answer_costs_little_and_images_may_be_empty() -> None:
    there = targets(2, 0)
    boxes = torch.full((2, 4, 4), 0.5)
    boxes[0, :2] = there[0]["boxes"]
    logits = torch.full((2, 4, 3), -20.0)
    logits[0, [0, 1], there[0]["labels"]] = 20.0
    losses = Criterion()(Detection(logits, boxes), there)
    assert set(losses) == {"loss_vfl", "loss_bbox", "loss_giou"} and sum(losses.values()) < 1e-4
    empty = Criterion()(Detection(logits[1:], boxes[1:]), targets(0))
    assert empty["loss_bbox"] == 0 and empty["loss_vfl"] < 1e-6


@pytest.mark.parametrize("selection", ["default", "agnostic"])
def test_training_reaches_every_parameter_and_the_loss_falls(selection: str) -> None:
    torch.manual_seed(0)
    model = RTDETRv2(**{**TINY, "num_denoising": 8, "selection": selection}).train()
    x, there = torch.rand(2, 3, 64, 64), targets(2, 3)
    losses = Criterion()(model(x, there), there)
    parts = {name.split("_", 2)[2] if name.count("_") > 1 else "" for name in losses}
    assert parts == {"", "aux_0", "enc_0", "dn_0", "dn_1"} and len(losses) == 15
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimiser = torch.optim.AdamW(parameter_groups(model, 5e-3, 5e-3))
    values = []
    for _ in range(30):
        loss = sum(Criterion()(model(x), there).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        values.append(loss.item())
    assert min(values[-5:]) < 0.9 * values[0]


def test_looking_forward_twice() -> None:
    """In training the last layer's box teaches the layer before it; what that layer looks at does not."""
    module = decoder(layers=2).train()
    out = module(maps())
    out.boxes[1].sum().backward()
    assert module.boxes[0][-1].weight.grad.abs().sum() > 0 and module.enc_box[-1].weight.grad is None


def test_rates_and_decays() -> None:
    model = RTDETRv2(**TINY)
    groups = parameter_groups(model, backbone_lr=1e-5)
    assert sum(len(g["params"]) for g in groups) == sum(1 for _ in model.parameters())
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert rates[id(model.backbone.stem[0][0].weight)] == (1e-5, 1e-4)
    assert rates[id(model.backbone.stem[0][1].weight)] == (1e-5, 0)
    assert rates[id(model.decoder.layers[0].norm1.bias)] == (1e-4, 0)
    assert {g["lr"] for g in parameter_groups(RTDETRv2(**{**TINY, "backbone": "R34"}))} == {1e-4, 5e-5}
    assert warm_up(0) == 1 / 2000 and warm_up(1999) == warm_up(5000) == 1
    assert average_decay(2000) == pytest.approx(0.9999 * 0.632, abs=1e-3)


def test_whole_pixels_for_tuning() -> None:
    model = drawn(RTDETRv2(**TINY))
    x = torch.rand(1, 3, 64, 64)
    before = model(x).logits
    assert not torch.allclose(model.sample("discrete")(x).logits, before)
    other = drawn(RTDETRv2(**TINY, sampling="discrete"))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x).logits, model(x).logits)
    names = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert len(names) == 4 and all("sampling_offsets" in name for name in names)


def test_the_surest_pairs_of_query_and_class() -> None:
    logits = torch.tensor([[[0.0, 3.0], [2.0, -1.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0]]])
    found, labels, scores = surest(Detection(logits, boxes), torch.tensor([[100, 50]]), 3)
    assert labels.tolist() == [[1, 0, 0]]
    torch.testing.assert_close(found[0], torch.tensor([[40.0, 15, 60, 35], [0, 0, 50, 50], [40, 15, 60, 35]]))
    torch.testing.assert_close(scores, torch.tensor([[3.0, 2.0, 0.0]]).sigmoid())


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@pytest.mark.parametrize("method", ["default", "discrete"])
def test_transformers_model_of_the_same_weights(kind: str, method: str, tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "RTDetrV2ForObjectDetection"):
        pytest.skip("this transformers has no RTDetrV2")
    sizes = [8, 16, 32, 64] if kind == "basic" else [32, 64, 128, 256]
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=sizes, depths=[2, 1, 1, 1], layer_type=kind,
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.RTDetrV2Config(
        backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=sizes[1:], encoder_ffn_dim=24,
        encoder_attention_heads=4, d_model=16, num_queries=20, decoder_in_channels=[16] * 3, decoder_ffn_dim=24,
        decoder_layers=2, decoder_attention_heads=4, decoder_n_points=2, num_labels=5, hidden_expansion=0.5,
        decoder_method=method,
    )  # fmt: skip
    theirs = drawn(transformers.RTDetrV2ForObjectDetection(config))
    ours = RTDETRv2.from_transformers(theirs)
    for size in ((64, 96), (448, 32)):  # cells at the border of the second do not count
        x = torch.rand(2, 3, *size)
        with torch.no_grad():
            expected, found = theirs(x), ours(x)
        assert (found.logits - expected.logits).abs().max() < 1e-4 * max(1, expected.logits.abs().max())
        torch.testing.assert_close(found.pred_boxes, expected.pred_boxes, atol=1e-4, rtol=0)
    theirs.save_pretrained(tmp_path)
    for again in (RTDETRv2.from_transformers(tmp_path), drawn(RTDETRv2.from_transformers(theirs))):
        again.load(tmp_path / "model.safetensors")
        assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values()))
    with pytest.raises(ValueError, match="feat_strides"):
        RTDETRv2.from_transformers(
            type("Other", (), {"config": type(config)(**{**config.to_dict(), "feat_strides": [4, 8, 16]}),
                               "state_dict": dict})()
        )  # fmt: skip


def test_released_files_of_the_authors(tmp_path: Any) -> None:
    """The running mean of the weights is what is evaluated."""
    port = catalogue.port("rt-detrv2", "network")
    recorded = load_file(GOLDEN / "network.a.safetensors")
    with safe_open(GOLDEN / "network.a.safetensors", "pt") as file:
        model = port.build(json.loads(file.metadata()["args"])).eval()
    state = {name[6:]: tensor for name, tensor in recorded.items() if name.startswith("param.")}
    trained = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save({"model": trained, "ema": {"module": state, "updates": 3}, "last_epoch": 7}, tmp_path / "r50.pth")
    out = model.load(tmp_path / "r50.pth")(recorded["input.x"])
    expected = recorded["output.pred_logits"]
    assert (out.logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    torch.save({"model": state, "ema": {"decay": 0.9}}, tmp_path / "plain.pth")
    assert torch.equal(model.load(tmp_path / "plain.pth")(recorded["input.x"]).logits, out.logits)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="num_points"):
        MSDeformableAttention(16, 4, 3, (2, 1))
    with pytest.raises(ValueError, match="sampling"):
        MSDeformableAttention(16, 4, sampling="nearest")
    with pytest.raises(ValueError, match="num_heads"):
        MSDeformableAttention(16, 3)
    query, boxes, value = looked_at()
    module = MSDeformableAttention(16, 4, 2)
    with pytest.raises(ValueError, match="shapes"):
        module(query, boxes, value[:, 1:], SHAPES)
    with pytest.raises(ValueError, match="reference"):
        module(query, boxes[..., :2], value, SHAPES)
    with pytest.raises(ValueError, match="backbone"):
        RTDETRv2(backbone="R19")
    with pytest.raises(ValueError, match="depth"):
        ResNetVD(20)
    with pytest.raises(ValueError, match="size"):
        HGNetV2("S")
    with pytest.raises(ValueError, match="selection"):
        Decoder(selection="all")
    with pytest.raises(ValueError, match="eval_layer"):
        Decoder(layers=2, eval_layer=2)
    with pytest.raises(ValueError, match="channels"):
        HybridEncoder((4, 8), 8, num_heads=2, encoded=(1,))([torch.randn(1, 4, 4, 4), torch.randn(1, 4, 2, 2)])
    with pytest.raises(ValueError, match="encoded"):
        HybridEncoder((4, 8), 8, num_heads=2)
    model = RTDETRv2(**TINY)
    with pytest.raises(ValueError, match="images"):
        model(torch.rand(1, 1, 64, 64))
    with pytest.raises(ValueError, match="targets"):
        model(torch.rand(2, 3, 64, 64), targets(1))
    out = Detection(torch.zeros(1, 4, 3), torch.rand(1, 4, 4))
    with pytest.raises(ValueError, match="labels must be"):
        Criterion()(out, targets(5, classes=9))
    with pytest.raises(ValueError, match="shapes"):
        Criterion()(out, [{"labels": torch.zeros(2, dtype=torch.long), "boxes": torch.rand(3, 4)}])
