"""iFAM: faithful stages, the mask and its gradient, parts taken out, thresholds, losses at their limits, training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade import catalogue
from saccade.models.faithful_attention_maps import (
    MODULATIONS,
    PartFinder,
    RegisterTransformer,
    TwoStageLoss,
    TwoStageViT,
    background_presence,
    concentration,
    equivariance,
    foreground,
    learning_rates,
    moved,
    orthogonality,
    part_thresholds,
    pixel_entropy,
    presence,
    random_motion,
    total_variation,
    without,
)

EXAMPLE = catalogue.part("faithful-attention-maps").example


def _model(**changes: Any) -> TwoStageViT:
    torch.manual_seed(0)
    model = TwoStageViT(**{**EXAMPLE, **changes})
    for parameter in model.first.parameters():  # so that the maps are not all alike
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def _images(seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(3, 3, 24, 24)


def _seen() -> Tensor:
    torch.manual_seed(2)
    seen = torch.rand(3, 4, 4) > 0.5
    seen[1] = torch.arange(4) > 2
    return seen


@pytest.mark.parametrize("prune", [False, True])
def test_hidden_pixels_do_not_move_the_answer(prune: bool) -> None:
    model, image, seen = _model(), _images(), _seen()
    hidden = ~seen.repeat_interleave(6, 1).repeat_interleave(6, 2)[:, None]
    other = torch.where(hidden, 100 * torch.randn(3, 3, 24, 24), image)
    given = model.masked(image, seen, prune=prune)
    torch.testing.assert_close(model.masked(other, seen, prune=prune), given, atol=1e-6, rtol=0)
    shown = torch.where(hidden, image, image + 1)
    assert (model.masked(shown, seen, prune=prune) - given).abs().amax(1).min() > 1e-3
    torch.testing.assert_close(model.masked(image, seen, prune=not prune), given)
    factors = model.second(image, seen.flatten(1).float())[:, 0]  # as in training
    torch.testing.assert_close(model.head(model.head_norm(factors)), given)


def test_pixels_that_are_pruned_are_not_computed_at_all() -> None:
    model, image = _model(), _images()
    seen = torch.zeros(3, 4, 4, dtype=torch.bool)
    seen[:, 1:3, 1:3] = True
    other = image.clone()
    other[:, :, :6] = torch.nan
    assert torch.equal(model.masked(other, seen, prune=True), model.masked(image, seen, prune=True))


def test_a_mask_of_ones_is_the_plain_transformer() -> None:
    model, image = _model(), _images()
    plain = model.head(model.head_norm(model.second(image)[:, 0]))
    everything = torch.ones(3, 4, 4, dtype=torch.bool)
    torch.testing.assert_close(model.masked(image, everything), plain)
    torch.testing.assert_close(model.masked(image, everything, prune=True), plain)
    nothing = model.masked(image, ~everything), model.masked(image, ~everything, prune=True)
    torch.testing.assert_close(*nothing)
    assert nothing[0].isfinite().all() and torch.equal(nothing[0][0], nothing[0][1])


def test_the_call_uses_its_mask_and_needs_no_noise() -> None:
    model, image = _model(), _images()
    said = model(image)
    assert said.mask is not None and said.part_maps is not None and said.part_scores is not None
    assert set(said.mask.unique().tolist()) == {0.0, 1.0} and torch.equal(said.mask.sum(1), torch.ones(3, 4, 4))
    torch.testing.assert_close(said.part_maps.sum(1), torch.ones(3, 4, 4))
    best = said.part_maps[:, :-1].amax(1) >= said.part_maps[:, -1]
    assert torch.equal(said.mask[:, 0] > 0.5, best)
    torch.testing.assert_close(said.logits, model.masked(image, best))
    torch.testing.assert_close(model.classify(said.features[0]), said.part_scores.mean(2))
    model.prune = False
    torch.testing.assert_close(model(image).logits, said.logits)
    noise = torch.zeros(3, 4, 4, 4)
    noise[:, -1] = 1e4
    assert not model(image, noise=noise).mask[:, 0].any()
    one = _model(parts=1)
    one.parts.prototypes.weight.data[1] += 100
    assert one(image).mask[:, 0].all()


def test_a_soft_mask_is_not_faithful() -> None:
    model, image = _model(soft=True), _images()
    said = model(image)
    share = said.soft_mask[:, 0].flatten(1)
    logits = model.second(image, share + 1e-10)[:, 0]
    torch.testing.assert_close(said.logits, model.head(model.head_norm(logits)))
    hidden = (share < share.median()).view(3, 1, 4, 4).repeat_interleave(6, 2).repeat_interleave(6, 3)
    other = model.second(torch.where(hidden, image + 1, image), share + 1e-10)[:, 0]
    assert (other - logits).abs().max() > 1e-3


def test_the_factors_are_a_bias_of_the_scores() -> None:
    torch.manual_seed(0)
    attention = RegisterTransformer(image_size=24, patch=6, dim=16, depth=1, num_heads=2).blocks[0].attention
    x, gate = torch.randn(2, 5, 16), torch.rand(2, 5)
    q, k, v = (attention.split_heads(proj(x), 2) for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=gate.log()[:, None, None])
    torch.testing.assert_close(attention(x, gate_BM=gate), attention.out(expected))


def test_the_mask_s_gradient_is_that_of_the_parts_sum() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 3, 5, requires_grad=True)
    for channel in (0, 1):
        found, _ = foreground(logits.softmax(1))
        (ours,) = torch.autograd.grad((found[:, channel] * torch.arange(5.0)).sum(), logits)
        (expected,) = torch.autograd.grad((logits.softmax(1)[:, :-1].sum(1) * torch.arange(5.0)).sum(), logits)
        torch.testing.assert_close(ours, expected)
    tied = foreground(torch.full((1, 2, 1, 1), 0.5)).hard
    assert tied.flatten().tolist() == [1, 0]
    torch.manual_seed(3)
    maps = logits.softmax(1).detach()
    dropped = foreground(maps, 0.5).soft[:, 0]
    whole = maps[:, :-1].flatten(2)
    assert all((whole == value).any() or value == 0 for value in dropped.flatten())  # what stays keeps its value
    for through, reached in ((True, True), (False, False)):
        model = _model(through=through).train()
        model(_images()).logits.square().sum().backward()
        assert (model.parts.prototypes.weight.grad is not None) == reached


def test_parts_are_taken_out() -> None:
    maps = torch.tensor([[[[0.5, 0.1, 0.1, 0.4]], [[0.3, 0.6, 0.1, 0.1]], [[0.2, 0.3, 0.8, 0.5]]]])
    assert foreground(maps).hard[0, 0, 0].tolist() == [1, 1, 0, 0]
    assert without(maps, [0]).hard[0, 0, 0].tolist() == [0, 1, 0, 0]
    assert without(maps, [1]).hard[0, 0, 0].tolist() == [1, 0, 0, 0]
    assert not without(maps, [0, 1]).hard[:, 0].any()
    nowhere = torch.cat([maps[:, :1], torch.zeros(1, 1, 1, 4), maps[:, 1:]], 1)
    assert torch.equal(without(nowhere, [1]).hard, foreground(maps).hard)
    model, image = _model(), _images()
    torch.testing.assert_close(
        model(image, removed=[0, 1, 2]).logits, model.masked(image, torch.zeros(3, 4, 4, dtype=torch.bool))
    )


def test_thresholds() -> None:
    plain, image = _model(), _images()
    said = plain(image)
    values = part_thresholds(said.part_dots, said.part_maps, 0.5)
    best = said.part_maps.argmax(1)
    for k, value in enumerate(values):
        own = said.part_dots[:, k][best == k]
        assert value == -math.inf if not own.numel() else value == own.quantile(0.5)
    model = _model(thresholds=values.tolist())
    maps = model(image).part_maps
    below = said.part_dots[:, :-1] < values[:, None, None]
    assert not maps[:, :-1][below].any() and below.any()
    kept = said.part_dots[:, :-1].masked_fill(below, -torch.inf)
    torch.testing.assert_close(maps, torch.cat([kept, said.part_dots[:, -1:]], 1).softmax(1))
    with pytest.raises(ValueError, match="quantile must be between"):
        part_thresholds(said.part_dots, said.part_maps, 2.0)


def test_maps_of_parts_are_distances() -> None:
    torch.manual_seed(0)
    finder = PartFinder(6, 2, 5, temperature=0.5).eval()
    x = torch.randn(2, 6, 3, 4)
    prototypes = finder.prototypes.weight[:, :, 0, 0]
    distance = (x[:, None] - prototypes[None, :, :, None, None]).square().sum(2)
    logits = finder.logits(x, finder.dots(x))
    torch.testing.assert_close(logits, -distance, atol=1e-5, rtol=1e-5)
    maps = finder.maps(logits)
    torch.testing.assert_close(maps, (-distance / 0.5).softmax(1), atol=1e-5, rtol=1e-5)
    expected = (maps[:, None] * x[:, :, None]).mean((3, 4))
    for modulation in MODULATIONS:
        finder = PartFinder(6, 2, 5, modulation=modulation).eval()
        features = finder.features(x, maps)
        assert features.shape == (2, 6, 3)
        if modulation in ("none", "weight"):
            torch.testing.assert_close(features, expected)
        if modulation == "layer-norm":
            torch.testing.assert_close(features, F.layer_norm(expected, [6, 3]))
        torch.testing.assert_close(
            finder.classify(features), torch.einsum("yd,bdk->byk", finder.head.weight, features[..., :-1])
        )


def test_losses_at_their_limits() -> None:
    maps = torch.zeros(2, 3, 6, 6)
    maps[0, 0, :3, :3] = maps[1, 1, 2:5, 2:5] = 1
    assert presence(maps[:, :-1]) == 0 and presence(maps[:1, :-1]) == 0.5
    maps[:, 2, :3, :3] = 1
    torch.testing.assert_close(background_presence(maps), torch.tensor(0.0))
    centre = torch.zeros(1, 2, 7, 7)
    centre[:, 1, 2:5, 2:5] = 1
    assert background_presence(centre) > 1 and background_presence(torch.zeros(1, 2, 7, 7)) == 100
    assert total_variation(torch.ones(2, 3, 4, 5)) == 0
    step = torch.zeros(1, 1, 4, 5)
    step[..., 2:] = 1
    torch.testing.assert_close(total_variation(step), torch.tensor(4 / 20))
    torch.testing.assert_close(pixel_entropy(torch.full((1, 4, 2, 2), 0.25)), torch.tensor(4.0).log())
    assert pixel_entropy(F.one_hot(torch.arange(4)).float().view(1, 4, 2, 2)) == 0
    assert orthogonality(torch.eye(5)[None, :, :3]) == 0
    torch.testing.assert_close(orthogonality(torch.ones(1, 5, 3)), torch.tensor(6 / 9))
    point, spread = torch.zeros(1, 1, 5, 5), torch.full((1, 1, 5, 5), 1 / 25)
    point[..., 2, 3] = 1
    assert concentration(point) == 0
    torch.testing.assert_close(concentration(spread), torch.tensor(1.0))  # 1/2 along each axis
    for loss in (presence, background_presence, total_variation, pixel_entropy, concentration):
        assert loss(torch.full((2, 2, 1, 2), 0.5)).isfinite()


def test_motions_are_undone() -> None:
    generator = torch.Generator().manual_seed(0)
    motion = random_motion(50, generator)
    size = torch.linalg.det(motion[..., :2]).rsqrt()
    assert size.min() >= 0.8 - 1e-6 and size.max() <= 1.4 + 1e-6 and motion[..., 2].abs().max() <= 0.22
    assert (motion[:, 0, 0] >= -1e-6).all() and motion[:, 0, 1].min() < 0 < motion[:, 0, 1].max()
    at = torch.linspace(-1, 1, 101)
    blob = torch.exp(-30 * ((at[:, None] - 0.1).square() + (at - 0.05).square())).expand(50, 2, -1, -1)
    there = moved(blob, motion)
    assert (there - blob).abs().max() > 0.1
    torch.testing.assert_close(moved(there, motion, back=True), blob, atol=0.03, rtol=0)
    assert equivariance(blob, there, motion) < 1e-3 < equivariance(blob, blob, motion)
    quarter = torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]])
    picture = torch.randn(1, 1, 5, 5)
    torch.testing.assert_close(moved(picture, quarter), picture.rot90(1, (2, 3)), atol=1e-5, rtol=0)


def test_the_loss_trains_everything_and_is_the_weighted_sum() -> None:
    model, image, label = _model(drop=0.0, mask_drop=0.0, gumbel=False).train(), _images(), torch.tensor([0, 4, 2])
    objective = TwoStageLoss(concentration=0.5, background=3.0)
    loss, terms = objective(model, image, label, random_motion(3, torch.Generator().manual_seed(0)))
    twice = {"concentration": 0.5, "background": 3.0}
    torch.testing.assert_close(loss, sum(twice.get(name, 1.0) * term for name, term in terms.items()))
    assert set(terms) == {*objective.weights, "first", "second"}
    loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert "equivariance" not in TwoStageLoss(equivariance=0.0)(model, image, label).terms
    with pytest.raises(ValueError, match="weights must be of presence"):
        TwoStageLoss(beauty=1.0)


def test_learning_rates() -> None:
    model = _model()
    groups = learning_rates(model, batch=64)
    assert [group["lr"] for group in groups] == pytest.approx([2e-6, 2e-3, 2e-2, 2e-2])
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0, 0.0, 0.05]
    listed = [p for group in groups for p in group["params"]]
    assert {id(p) for p in listed} == {id(p) for p in model.parameters() if p.requires_grad}
    assert not model.first.blocks[0].norm1.weight.requires_grad and model.first.registers.requires_grad


def test_other_sizes_and_layouts() -> None:
    for changes in ({}, {"class_positions": True}, {"registers": 0, "layer_scale": None}):
        model = _model(**changes)
        said = model(torch.randn(2, 3, 31, 17))
        assert said.part_maps.shape == (2, 4, 6, 3) and said.features[0].shape == (2, 16, 6, 3)
        assert said.logits.shape == (2, 5) and said.logits.isfinite().all()


def test_refusals() -> None:
    for changes, message in (
        ({"image_size": 25}, "image_size must be whole patches"),
        ({"parts": 0}, "parts, num_classes and temperature must be positive"),
        ({"temperature": 0.0}, "must be positive"),
        ({"modulation": "loud"}, "modulation must be one of layer-norm"),
        ({"mask_drop": 1.0}, "mask_drop must be at least 0 and below 1"),
        ({"thresholds": [0.1]}, "thresholds must be 3"),
    ):
        with pytest.raises(ValueError, match=message):
            TwoStageViT(**{**EXAMPLE, **changes})
    model, image = _model(), _images()
    with pytest.raises(ValueError, match=r"x must be images \(batch, 3"):
        model(image[:, :2])
    with pytest.raises(ValueError, match="removed must be parts from 0 to 2"):
        model(image, removed=[3])
    with pytest.raises(ValueError, match=r"noise must be \(3, 4, 4, 4\)"):
        model(image, noise=torch.zeros(3, 4, 2, 2))
    with pytest.raises(ValueError, match=r"seen must be bool \(3, 4, 4\)"):
        model.masked(image, torch.ones(3, 4, 4))
