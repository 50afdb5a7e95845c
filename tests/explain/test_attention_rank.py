"""Rank against number of heads: constructions that are exact, errors that a simulation repeats, the widened encoder."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from saccade import masks
from saccade.explain.attention_rank import (
    ErrorCurves,
    RankAttention,
    RankEncoder,
    RankProbe,
    WidenedAttention,
    best_weights,
    equally_spaced,
    exact_encoder,
    farthest,
    feature_curves,
    full_rank,
    head_ranks,
    heads_needed,
    least_squares,
    measured_curves,
    nearest,
    points,
    probe,
    random_features,
    random_subspaces,
    target_products,
    training,
)
from saccade.layers.softmax_attention import SoftmaxAttention


def drawn(batch: int, dim: int, count: int, queries: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return points(batch, dim, count, generator=generator), points(batch, dim, queries, generator=generator)


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_one_head_of_full_rank_is_the_target(count: int) -> None:
    x, y = drawn(3, 5, count, 11)
    assert torch.equal(full_rank(5)(x, y), nearest(x, y))
    by_hand = torch.stack([x[b, :, (x[b].T @ y[b]).argmax(0)] for b in range(3)])
    assert torch.equal(nearest(x, y), by_hand)


def test_soft_attention_comes_nearer_as_it_gets_sharper() -> None:
    x, y = drawn(4000, 8, 2, 1)
    # the card's figures, of other draws: .43, .14, .015, .0013
    for sharpness, expected in ((1, 0.43), (10, 0.14), (100, 0.015), (1000, 0.0013)):
        said = probe(full_rank(8, sharpness=sharpness, hard=False), x, y)
        error = float(said.mean_error(scaled=True).detach())
        assert error == pytest.approx(expected, rel=0.15)


def test_the_farthest_point_is_found_by_an_encoder() -> None:
    x, _ = drawn(3, 6, 9, 1)
    torch.testing.assert_close(exact_encoder(6, 3)(x), farthest(x), atol=1e-4, rtol=1e-4)
    said = probe(exact_encoder(6), x, target="farthest")
    assert float(said.mean_error().detach()) < 1e-6
    biased = nearest(x, x, torch.tensor([0.0] * 8 + [10.0]))
    assert torch.equal(biased, x[:, :, 8:].expand_as(x))


def test_any_rotation_of_full_rank_is_full_rank_and_equal_heads_are_one() -> None:
    x, y = drawn(3, 6, 9, 5)
    turned = random_subspaces(6, 6, 1, generator=torch.Generator().manual_seed(1))
    assert torch.equal(turned(x, y), nearest(x, y))
    one = RankAttention(6, 2, 1)
    many = RankAttention(6, 2, 4)
    with torch.no_grad():
        for name, parameter in many.named_parameters():
            parameter.copy_(one.get_parameter(name).expand_as(parameter))
        many.output.div_(4)
    torch.testing.assert_close(many(x, y), one(x, y))


def test_random_subspaces_err_as_the_card_says() -> None:
    curves = measured_curves(
        lambda rank, heads: random_subspaces(8, rank, heads, generator=torch.Generator().manual_seed(0)),
        (1, 2, 4, 8),
        (64,),
        dim=8,
        count=2,
    )
    found = [values[0] for values in curves.errors.values()]
    assert found == pytest.approx([0.33, 0.25, 0.15, 0.0], abs=0.04)
    in_plane = drawn(4000, 2, 2, 1)
    plane = [float(probe(equally_spaced(h), *in_plane).mean_error(scaled=True).detach()) for h in (1, 4, 64)]
    assert plane[0] > plane[1] > plane[2]


@pytest.mark.parametrize("dim", [2, 3, 4, 7])
def test_the_error_of_weighted_heads_is_that_of_a_simulation(dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    layer, expected = random_features(dim, 12, terms=40, generator=generator)
    x, y = drawn(200_000, dim, 2, 1)
    with torch.no_grad():
        said = probe(layer, x, y)
    assert float(said.mean_error()) == pytest.approx(expected, abs=0.01)
    found = best_weights(layer.query[:, 0].detach(), layer.key[:, 0].detach(), 40)
    heads = layer.gathered(x, y)[:, :, 0]
    products = torch.einsum("bgd,bhd->gh", heads, heads) / len(x)
    torch.testing.assert_close(found.products, products.double(), atol=0.01, rtol=0)
    in_common = torch.einsum("bhd,bd->h", heads, said.target[:, :, 0]) / len(x)
    torch.testing.assert_close(found.targets, in_common.double(), atol=0.01, rtol=0)
    assert torch.linalg.eigvalsh(found.products)[0] > 0
    # weights fitted to many queries are the best ones, and to these queries nothing is better
    few = (x[:5000], y[:5000])
    fitted = least_squares(layer, *few)
    torch.testing.assert_close(fitted.double(), found.weights, atol=0.15, rtol=0.15)
    before = float(probe(layer, *few).mean_error().detach())
    assert float(probe(layer.weigh(fitted), *few).mean_error().detach()) <= before


def test_more_heads_never_err_more_and_more_coordinates_do() -> None:
    layer, _ = random_features(6, 40, generator=torch.Generator().manual_seed(0))
    q, k = layer.query[:, 0].detach(), layer.key[:, 0].detach()
    errors = [float(best_weights(q[:h], k[:h]).error) for h in range(1, 41)]
    assert all(later <= earlier + 1e-9 for earlier, later in zip(errors, errors[1:]))
    curves = feature_curves((2, 4, 8, 16, 32), (16, 256))
    table = {2: (0.14, 0.041), 4: (0.41, 0.16), 8: (0.48, 0.25), 16: (0.52, 0.39), 32: (0.53, 0.47)}
    for (_, found), expected in zip(curves.errors.items(), table.values(), strict=True):
        assert found == pytest.approx(expected, abs=0.05)
    columns = list(zip(*curves.errors.values(), strict=True))
    assert all(list(column) == sorted(column) for column in columns)
    assert "d = 32" in curves.table() and "256" in curves.table() and curves.plot().axes


def test_heads_needed_grow_as_the_theorem_says() -> None:
    assert heads_needed(64, 1, 0.5) == pytest.approx(64**2)
    assert heads_needed(64, 64, 0.5) == pytest.approx(1.0)
    assert heads_needed(64, 1, 0.001) == pytest.approx(math.exp(64 - math.log(64)))


def test_the_widened_attention_is_the_mean_of_its_attentions() -> None:
    torch.manual_seed(0)
    theirs = [nn.MultiheadAttention(6, 2, batch_first=True) for _ in range(3)]
    ours, x = WidenedAttention(6, 2, 3), torch.randn(2, 5, 6)
    with torch.no_grad():
        for each in theirs:
            nn.init.normal_(each.in_proj_bias)
            nn.init.normal_(each.out_proj.bias)
        for number, linear in enumerate((ours.q_proj, ours.k_proj, ours.v_proj)):
            linear.weight.copy_(torch.cat([each.in_proj_weight.chunk(3)[number] for each in theirs]))
            linear.bias.copy_(torch.cat([each.in_proj_bias.chunk(3)[number] for each in theirs]))
        ours.out_proj.weight.copy_(torch.cat([each.out_proj.weight for each in theirs], 1) / 3)
        ours.out_proj.bias.copy_(sum(each.out_proj.bias for each in theirs) / 3)
        expected = sum(each(x, x, x)[0] for each in theirs) / 3
    torch.testing.assert_close(ours(x), expected)
    # one that is untrained says as much whatever its width
    sizes = [float(WidenedAttention(64, 8, width).out_proj.weight.abs().max()) * width for width in (1, 16)]
    assert sizes == pytest.approx([0.125, 0.125], rel=0.01)


@pytest.mark.parametrize("positions", [None, "appended", "added"])
def test_the_encoder_trains_with_any_positions(positions: str | None) -> None:
    torch.manual_seed(0)
    encoder = RankEncoder(6, 2, 2, width=2, hidden=8, positions=positions, position_dim=2 * (positions == "appended"))
    x, _ = drawn(2, 6, 7, 1)
    optimizer, schedule = training(encoder.parameters(), 40)
    rates = []
    for _ in range(40):
        loss = probe(encoder, x, target="farthest").mean_error()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    assert rates[0] == pytest.approx(0.005) and max(rates) == pytest.approx(0.01) and rates[-1] < 1e-4
    moved = encoder(x.roll(1, 2)).roll(-1, 2)
    assert torch.allclose(moved, encoder(x), atol=1e-5) == (positions is None)
    # what a mask hides changes nothing
    other = x.clone()
    other[:, :, -1] = 5.0
    hidden = torch.ones(2, 7, dtype=torch.bool)
    hidden[:, -1] = False
    torch.testing.assert_close(encoder(other, mask=hidden)[..., :6], encoder(x, mask=hidden)[..., :6])
    torch.testing.assert_close(encoder(other, mask=masks.causal())[..., :6], encoder(x, mask=masks.causal())[..., :6])


def test_ranks_are_read_off_layers() -> None:
    torch.manual_seed(0)
    layer = RankAttention(12, 3, 4)
    whole = torch.linalg.svdvals(layer.query.mT @ layer.key)
    found = head_ranks(layer)
    torch.testing.assert_close(found.singular, whole[:, :3].detach(), atol=1e-5, rtol=1e-4)
    assert found.dim == 12 and (whole[:, 3:] < 1e-5).all()
    grouped = head_ranks(SoftmaxAttention(16, 4, num_kv_heads=2))
    assert grouped.singular.shape == (4, 4) and (grouped.effective() <= 4).all() and (grouped.effective() > 1).all()
    assert head_ranks(nn.MultiheadAttention(8, 2)).singular.shape == (2, 4)
    torch.testing.assert_close(head_ranks(full_rank(5)).effective(), torch.tensor([5.0]))
    assert "4 of 16" in grouped.table() and grouped.plot().axes


def test_points_follow_their_laws() -> None:
    generator = torch.Generator().manual_seed(0)
    for law in ("uniform", "orthonormal", "doubled"):
        x = points(3, 8, 6, law=law, generator=generator)
        torch.testing.assert_close(x.norm(dim=1), torch.ones(3, 6))
        if law == "orthonormal":
            torch.testing.assert_close(x.mT @ x, torch.eye(6).expand(3, 6, 6), atol=1e-6, rtol=0)
        if law == "doubled":
            assert torch.equal(x[:, :, :3], -x[:, :, 3:])


def test_what_is_probed_is_shown() -> None:
    x, y = drawn(3, 6, 5, 4)
    zero = RankAttention(6, 2, 3).weigh(torch.zeros(3))
    said = probe(zero, x, y)
    torch.testing.assert_close(said.error, torch.ones(3, 4))
    half = probe(lambda x, y: nearest(x, y) / 2, x, y)  # type: ignore[arg-type]
    assert float(half.mean_error()) == pytest.approx(0.25) and float(half.mean_error(scaled=True)) < 1e-10
    assert "0.2500" in half.table() and half.plot().axes
    assert isinstance(ErrorCurves([1], {"a": [0.5]}).table(), str)


def test_refusals() -> None:
    x, y = drawn(2, 6, 5, 4)
    layer = RankAttention(6, 2, 3)
    for bad in ((x[:, :5], y), (x, y[:, :5]), (x[:1], y), (x[0], y), (x[:, :, :0], y)):
        with pytest.raises(ValueError, match="point"):
            layer(*bad)
    for wrong in ({"rank": 0}, {"num_heads": 0}):
        with pytest.raises(ValueError, match="positive"):
            RankAttention(6, **wrong)
    with pytest.raises(ValueError, match="rank"):
        random_subspaces(4, 5, 1)
    with pytest.raises(ValueError, match="law"):
        points(1, 3, 4, law="orthonormal")
    for call in (lambda: probe(layer, x, y, "middle"), lambda: RankProbe(6, target="middle")):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="target"):
            call()
    with pytest.raises(ValueError, match="coordinates"):
        target_products(torch.ones(2, 1), torch.ones(2, 1))
    with pytest.raises(ValueError, match="error"):
        heads_needed(8, 2, 1.5)
    for wrong in ({"positions": "both"}, {"position_dim": 2}, {"positions": "appended"}, {"num_layers": 0}):
        with pytest.raises(ValueError, match="position"):
            RankEncoder(6, 2, **{"num_layers": 1, **wrong})
    with pytest.raises(ValueError, match="divide"):
        RankEncoder(6, 4)
    with pytest.raises(ValueError, match="at most"):
        RankEncoder(6, 2, positions="added", max_points=3)(x)
    with pytest.raises(ValueError, match="number"):
        RankEncoder(5, 1)(x)
