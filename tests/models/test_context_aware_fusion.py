"""C-DiffDet+: what one token of context does, the decoder's symmetries, the diffusion, the losses, bad arguments."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from saccade.models.backbone import ImageOutput, maps_of
from saccade.models.context_aware_fusion import (
    ACEBlock,
    BoxDiffusion,
    CDiffDet,
    ContextFusion,
    DecoderStage,
    GlobalContextEncoder,
    Objects,
    apply_deltas,
    cosine_alphas,
    detection_loss,
    fill,
    focal_eiou_loss,
    focal_loss,
    gate_last_stage,
    match,
)
from saccade.models.context_aware_fusion.losses import WEIGHTS
from saccade.ops.boxes import to_centres, to_corners

SMALL = {"depth": 18, "width": 4, "dim": 8, "hidden": 12, "num_heads": 2, "inner": 4, "pooled": 2}


def _stage(**changes: object) -> DecoderStage:
    torch.manual_seed(0)
    return DecoderStage(3, 8, 12, 2, **{"inner": 4, "pooled": 2, **changes}).eval()


def _model(**changes: object) -> CDiffDet:
    torch.manual_seed(0)
    return CDiffDet(3, 5, **{**SMALL, "stages": 2, **changes}).eval()


def test_one_token_of_context_adds_one_vector() -> None:
    torch.manual_seed(0)
    fusion = ContextFusion(8, 2)
    query, context = torch.randn(2, 5, 8), torch.randn(2, 1, 8)
    attention = fusion.attention
    vector = attention.out_proj(attention.v_proj(context))
    expected = fusion.norm(query + vector)
    torch.testing.assert_close(fusion(query, context), expected)
    for projection in (attention.q_proj, attention.k_proj):
        nn.init.normal_(projection.weight, std=3)
    torch.testing.assert_close(fusion(query, context), expected)
    # with several tokens the queries do choose
    several = torch.randn(2, 4, 8)
    added = attention(query, several)
    assert (added[:, 0] - added[:, 1]).abs().max() > 1e-3
    for parameter in attention.out_proj.parameters():
        nn.init.zeros_(parameter)
    torch.testing.assert_close(fusion(query, context), fusion.norm(query))


def test_encoder_takes_any_size_and_pads_the_pools_with_zeros() -> None:
    torch.manual_seed(0)
    encoder, unpooled = GlobalContextEncoder(8), GlobalContextEncoder(8, pooled=False)
    unpooled.load_state_dict(encoder.state_dict())
    for size, tokens in (((1, 1), 1), ((9, 17), 2 * 3), ((32, 24), 4 * 3)):
        image = torch.randn(2, 3, *size)
        assert encoder(image).shape == (2, 1, 8) and unpooled(image).shape == (2, tokens, 8)
        torch.testing.assert_close(encoder(image), unpooled(image).mean(1, keepdim=True))
    for conv in encoder.convs:
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    nn.init.ones_(encoder.shortcut.weight)
    nn.init.zeros_(encoder.shortcut.bias)
    # an image of one pixel stands in the middle of three windows of nine
    assert encoder(torch.ones(1, 3, 1, 1))[0, 0, 0].item() == pytest.approx(3 / 9**3)


def test_stage_without_context_is_diffusiondets() -> None:
    stage, plain = _stage(), _stage(context=False)
    plain.load_state_dict({name: t for name, t in stage.state_dict().items() if not name.startswith("context.")})
    boxes, time = to_corners(torch.rand(2, 5, 4)), torch.randn(2, 32)
    regions = torch.randn(2, 5, 8, 2, 2)
    for got, expected in zip(stage(regions, boxes, time), plain(regions, boxes, time)):
        assert torch.equal(got, expected)
    assert not torch.allclose(stage(regions, boxes, time, torch.randn(2, 1, 8)).logits_BNK, got[..., :1])
    with pytest.raises(ValueError, match="built with context=False"):
        plain(regions, boxes, time, torch.randn(2, 1, 8))


def test_order_of_proposals_does_not_matter() -> None:
    stage = _stage()
    boxes, time, regions = to_corners(torch.rand(2, 5, 4)), torch.randn(2, 32), torch.randn(2, 5, 8, 2, 2)
    context, order = torch.randn(2, 3, 8), torch.tensor([3, 0, 4, 1, 2])
    for got, expected in zip(stage(regions[:, order], boxes[:, order], time, context),
                             stage(regions, boxes, time, context)):  # fmt: skip
        torch.testing.assert_close(got, expected[:, order])


def test_proposals_begin_as_the_means_of_their_regions() -> None:
    stage = _stage()
    boxes, time, regions = to_corners(torch.rand(1, 5, 4)), torch.randn(1, 32), torch.randn(1, 5, 8, 2, 2)
    given = stage(regions, boxes, time, None, regions.mean((3, 4)))
    torch.testing.assert_close(stage(regions, boxes, time), given)


def test_deltas() -> None:
    box = torch.tensor([[[2.0, 2.0, 6.0, 10.0]]])
    torch.testing.assert_close(apply_deltas(box, torch.zeros(1, 1, 4)), box)
    moved = to_centres(apply_deltas(box, torch.tensor([[[1.0, -1.0, math.log(2), 99.0]]])))
    torch.testing.assert_close(moved, torch.tensor([[[6.0, 2.0, 8.0, 8 * 100000 / 16]]]), rtol=1e-4, atol=1e-2)


def test_ace() -> None:
    torch.manual_seed(0)
    block, x, order = ACEBlock(16, 4), torch.randn(2, 7, 16), torch.randperm(7)
    torch.testing.assert_close(block(x[:, order]), block(x)[:, order])
    gate = block(x) / x
    assert gate.min() > 0 and gate.max() < 1
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    torch.testing.assert_close(block(x), x / 2)


def test_ace_in_the_last_stage_of_swin() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2, out_features=["stage1", "stage2"]
    )
    swin, x = transformers.SwinBackbone(config).eval(), torch.randn(1, 3, 32, 32)
    before = maps_of(swin(x))
    gated = gate_last_stage(swin, reduction=4)
    after = maps_of(gated(x))
    torch.testing.assert_close(after[0], before[0])
    block = swin.hidden_states_norms["stage2"][1]
    torch.testing.assert_close(after[1].flatten(2).mT, block(before[1].flatten(2).mT))
    with pytest.raises(ValueError, match="a norm of each stage"):
        gate_last_stage(nn.Linear(2, 2))


def test_schedule_and_noise() -> None:
    alphas, diffusion = cosine_alphas(1000), BoxDiffusion()
    assert alphas[0] > 0.999 and alphas[-1] < 1e-5 and bool((alphas.diff() < 0).all())
    boxes, noise, times = torch.rand(2, 4, 4), torch.randn(2, 4, 4), torch.tensor([0, 999])
    noised = diffusion.noised(boxes, times, noise)
    torch.testing.assert_close(noised[0], diffusion.signal(boxes)[0], atol=0.05, rtol=0)
    torch.testing.assert_close(noised[1], noise[1], atol=0.01, rtol=0)
    torch.testing.assert_close(diffusion.boxes(diffusion.signal(boxes)), boxes)
    assert diffusion.boxes(torch.tensor([-9.0, 9.0])).tolist() == [0, 1]


def test_ddim_with_the_truth_arrives_there_and_keeps_the_process() -> None:
    diffusion, truth, noise = BoxDiffusion(), torch.rand(3, 4, 4), torch.randn(3, 4, 4)
    said = diffusion.sample(lambda x, t: (torch.full((3, 4, 2), 9.0), truth), noise, 4)
    assert len(said) == 4 and torch.equal(said[-1][1], truth)
    # without noise of its own, a step goes from x_t to x_s of the same eps
    start = diffusion.signal(truth)
    now, then = (diffusion.noised(truth, torch.full((3,), t), noise) for t in (700, 300))
    torch.testing.assert_close(diffusion.step(now, start, 700, 300, noise, 0.0), then)
    assert torch.equal(diffusion.step(now, start, 700, -1, noise, 1.0), start)
    # with all of it, mean and deviation over fresh noise are those of the process
    many = torch.randn(20000, 1, 4, generator=torch.Generator().manual_seed(0))
    one = truth[:1, :1].expand(20000, -1, -1)
    now = diffusion.noised(one, torch.full((20000,), 700), many)
    fresh = torch.randn(20000, 1, 4, generator=torch.Generator().manual_seed(1))
    out = diffusion.step(now, diffusion.signal(one), 700, 300, fresh, 1.0)
    alpha = diffusion.alphas_T[300].float()
    torch.testing.assert_close(out.mean((0, 1)), alpha.sqrt() * start[0, 0], atol=0.02, rtol=0)
    torch.testing.assert_close(out.std((0, 1)), (1 - alpha).sqrt().expand(4), atol=0.02, rtol=0)


def test_boxes_without_an_object_are_drawn_anew() -> None:
    seen: list[torch.Tensor] = []

    def predict(boxes: torch.Tensor, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(boxes)
        sure = torch.full((1, 2, 1), -9.0)
        sure[:, 0] = 9
        return sure, torch.full((1, 2, 4), 0.5)

    diffusion = BoxDiffusion()
    far = torch.full((1, 2, 4), 1.9)
    diffusion.sample(predict, far, 500, eta=0.0, generator=torch.Generator().manual_seed(0))
    assert (seen[-1][0, 0] - 0.5).abs().max() < 0.01  # what found an object is near it at the end
    assert (seen[-1][0, 1] - seen[-2][0, 1]).abs().max() > 0.1


def test_filling_up() -> None:
    objects = [torch.rand(2, 4), torch.rand(0, 4), torch.rand(9, 4)]
    filled = fill(objects, 6, torch.Generator().manual_seed(0))
    assert filled.shape == (3, 6, 4) and torch.equal(filled[0, :2], objects[0]) and filled[..., 2:].min() >= 1e-4
    assert all((row == objects[2]).all(1).any() for row in filled[2])


def test_focal_eiou() -> None:
    box = torch.tensor([[10.0, 10.0, 30.0, 40.0]])
    assert focal_eiou_loss(box, box).item() == pytest.approx(0, abs=1e-5)
    away = (box + 100).requires_grad_()
    loss = focal_eiou_loss(away, box).sum()
    loss.backward()
    assert loss.item() == 0 and not away.grad.any()
    # by hand: IoU 1/3, centres 10 apart in a box of 40 x 20, widths and heights alike
    a, b = torch.tensor([0.0, 0, 20, 20]), torch.tensor([10.0, 0, 30, 20])
    expected = (1 / 3) ** 0.5 * (1 - (1 / 3 - 100 / (900 + 400)))
    assert focal_eiou_loss(a, b).item() == pytest.approx(expected, abs=1e-5)
    # the factor has no gradient: that of the loss is the factor times that of 1 - EIoU
    moved = a.double().requires_grad_()
    (slope,) = torch.autograd.grad(focal_eiou_loss(moved, b.double()), moved)
    (plain,) = torch.autograd.grad(focal_eiou_loss(moved, b.double(), gamma=0.0), moved)
    torch.testing.assert_close(slope, plain * (1 / 3) ** 0.5, atol=1e-6, rtol=1e-5)


def test_focal_loss_is_the_definition() -> None:
    logits, targets = torch.tensor([0.3, -2.0]), torch.tensor([1.0, 0.0])
    p = logits.sigmoid()
    expected = torch.stack([-0.25 * (1 - p[0]) ** 2 * p[0].log(), -0.75 * p[1] ** 2 * (1 - p[1]).log()])
    torch.testing.assert_close(focal_loss(logits, targets), expected)


def _objects() -> Objects:
    boxes = [torch.tensor([[10.0, 10, 30, 30], [60, 60, 90, 90]]), torch.zeros(0, 4)]
    return Objects.of(boxes, [torch.tensor([0, 1]), torch.zeros(0, dtype=torch.long)])


def test_matching() -> None:
    objects, extent = _objects(), torch.tensor([100.0] * 4)
    assert objects.real_BG.tolist() == [[True, True], [False, False]]
    near = objects.boxes_BG4[0, 0] + torch.tensor([[0.0], [1.0], [2.0]])
    other, away = objects.boxes_BG4[0, 1] + 3, torch.tensor([40.0, 40, 50, 50])
    boxes = torch.stack([*near, other, away]).expand(2, -1, -1)
    matched = match(torch.zeros(2, 5, 2), boxes, objects, extent)
    # the IoU of the first object's best sum up to 2.5, of the second's to 0.7: two proposals, and one at least
    assert matched[0].int().tolist() == [[1, 0], [1, 0], [0, 0], [0, 1], [0, 0]] and not matched[1].any()
    assert matched.sum(2).max() == 1
    # of two equal boxes, the one that names the class has the lower cost
    logits = torch.zeros(1, 2, 2)
    logits[0, 1, 0] = 2
    one = Objects(objects.boxes_BG4[:1, :1], objects.labels_BG[:1, :1], objects.real_BG[:1, :1])
    chosen = match(logits, away.expand(1, 2, 4), one, extent)
    assert chosen[0, :, 0].tolist() == [False, True]


def test_loss_of_the_right_answer_and_of_no_objects() -> None:
    objects, extent = _objects(), torch.tensor([100.0] * 4)
    boxes = objects.boxes_BG4[:, [0, 1, 1]].clone()
    boxes[:, 2] = torch.tensor([40.0, 40, 50, 50])
    logits = torch.full((1, 2, 3, 2), -12.0)
    logits[0, 0, [0, 1], [0, 1]] = 12
    loss, terms = detection_loss(logits, boxes[None], objects, extent)
    assert set(terms) == {"class", "box", "giou", "eiou"} and loss.item() == pytest.approx(0, abs=1e-4)
    worse, _ = detection_loss(logits, boxes[None] + 4, objects, extent)
    assert worse > 1
    nothing = Objects.of([torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.long)] * 2)
    loss, terms = detection_loss(logits, boxes[None], nothing, extent)
    assert loss.isfinite() and terms["box"] == 0 and terms["class"] > 1


def test_network_trains_and_detects() -> None:
    model, image = _model(), torch.randn(2, 3, 40, 56)
    targets = [
        {"boxes": torch.tensor([[0.2, 0.4, 0.3, 0.6]]), "labels": torch.tensor([2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},
    ]
    loss, terms = model.train().objective(image, targets, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss, sum(WEIGHTS[name] * term for name, term in terms.items()))
    torch.manual_seed(0)
    assert model.loss(image, targets).isfinite()
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    for steps in (1, 3):
        model.steps = steps
        found, again = (model.detect(image, generator=torch.Generator().manual_seed(7)) for _ in range(2))
        assert all(torch.equal(a[name], b[name]) for a, b in zip(found, again) for name in a)
        for one in found:
            assert one["boxes"].shape == (len(one["scores"]), 4) and one["labels"].max() < 3
            assert len(one["scores"]) <= 5 * steps and bool((one["scores"].diff() <= 0).all())
    said = model(image)
    assert said.logits.shape == (2, 5, 3) and said.pred_boxes.shape == (2, 5, 4) and said.stage_logits.shape[0] == 2
    assert torch.equal(said.stage_logits[-1], said.logits)


def test_what_is_said_of_an_image_follows_from_the_image() -> None:
    model, image = _model(), torch.rand(3, 3, 40, 56)
    for steps in (1, 3):
        model.steps = steps
        torch.manual_seed(steps)
        said, alone = model(image), model(image[1:2])
        torch.testing.assert_close(alone.logits[0], said.logits[1])
        torch.testing.assert_close(alone.pred_boxes[0], said.pred_boxes[1])
        drawn = [model(image, generator=torch.Generator().manual_seed(seed)).logits for seed in (0, 1)]
        assert not torch.equal(*drawn)
    assert not torch.equal(model.train()(image).logits, model(image).logits)


def test_boxes_carry_no_gradient_between_stages() -> None:
    image, boxes, times = torch.randn(1, 3, 32, 32), torch.rand(1, 5, 4), torch.tensor([9])
    for detach in (True, False):
        model = _model(detach=detach)
        model(image, boxes, times).pred_boxes.sum().backward()
        first = model.head.stages[0].deltas.weight.grad
        assert (first is None or not first.any()) == detach


def test_context_is_what_the_scene_adds() -> None:
    model, plain = _model(), _model(context=False)
    assert plain.encoder is None and not [name for name in plain.state_dict() if "context" in name]
    image, boxes, times = torch.randn(1, 3, 32, 32), torch.rand(1, 5, 4), torch.tensor([9])
    before = model(image, boxes, times).logits
    nn.init.normal_(model.encoder.shortcut.bias)
    assert (model(image, boxes, times).logits - before).abs().max() > 1e-4
    assert _model(pooled_context=False)(image, boxes, times).logits.shape == (1, 5, 3)


def test_maps_of_backbones() -> None:
    maps = [torch.zeros(1, 2, 4, 4)]
    assert maps_of(ImageOutput(maps)) == maps_of(maps) == maps
    with pytest.raises(ValueError, match="a backbone must give maps"):
        maps_of(torch.zeros(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CDiffDet(proposals=0, **SMALL), "proposals must be positive and steps from 1 to 1000, got 0 and 1"),
        (lambda: CDiffDet(steps=0, **SMALL), "steps from 1 to 1000"),
        (lambda: CDiffDet(backbone=nn.Identity()), "backbone must have channels and strides, got Identity"),
        (lambda: _model(stages=0), "stages must be positive and dim even"),
        (lambda: _model(inner=0), "must be positive"),
        (lambda: _model(num_heads=3), "num_heads must divide dim"),
        (lambda: _model(scale=0.0), "times and scale must be positive"),
        (lambda: _model(depth=20), "depth must be one of 18, 34, 50, 101, 152, got 20"),
        (lambda: _model(dropout=1.0), "attn_drop must be at least 0 and below 1"),
        (lambda: ACEBlock(8, 9), r"reduction must be between 1 and dim \(8\), got 9"),
        (lambda: GlobalContextEncoder(0), "channels and in_channels must be positive"),
        (lambda: BoxDiffusion(10).sample(lambda x, t: (x, x), torch.zeros(1, 1, 4), 11), "steps must be between 1"),
        (lambda: Objects.of([torch.zeros(2, 4)], [torch.zeros(1)]), "boxes and labels must be"),
    ],
)
def test_refusals(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(1, 1, 8, 8)), r"x must be images \(batch, 3"),
        (lambda m: m(torch.zeros(1, 3, 8, 8), torch.zeros(1, 5, 4)), "times must be one for each image"),
        (lambda m: m(torch.zeros(1, 3, 8, 8), torch.zeros(2, 5, 4), torch.zeros(2)), r"boxes must be \(1, boxes, 4\)"),
        (lambda m: m.loss(torch.zeros(2, 3, 8, 8), []), "targets must be one for each of 2 images, got 0"),
        (lambda m: m.head.stages[0](torch.zeros(1, 5, 8, 3, 3), torch.zeros(1, 5, 4), torch.zeros(1, 32)),
         r"regions must be \(1, 5, 8, 2, 2\)"),
    ],
)  # fmt: skip
def test_bad_calls(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(_model())
