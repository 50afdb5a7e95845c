"""Key-wise attention against its slow reference: any sizes of either map, forward and backward, and its limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.ops import keywise
from saccade.ops.keywise import (
    block,
    choose_regions,
    distributed_attention,
    distributed_reference,
    progressive_attention,
    progressive_reference,
    representatives,
    unblock,
)

SIZES = [((8, 8), (8, 8)), ((4, 12), (8, 4)), ((7, 5), (9, 6)), ((1, 1), (3, 2)), ((5, 4), (1, 1)), ((6, 13), (2, 11))]


def maps(size: tuple[int, int], other: tuple[int, int], C: int = 6, E: int = 4) -> list[Tensor]:
    torch.manual_seed(sum(size) + sum(other))
    return [torch.randn(2, c, *s, dtype=torch.float64) for c, s in ((C, size), (C, other), (E, other))]


def gradients(out: Tensor, given: list[Tensor]) -> tuple[Tensor, ...]:
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).cos()
    return torch.autograd.grad((out * weight).sum(), given)


@pytest.mark.parametrize(("size", "other"), SIZES)
@pytest.mark.parametrize("region", [1, 3, 4])
@pytest.mark.parametrize("num_heads", [1, 2])
def test_equals_the_reference_forward_and_backward(
    size: tuple[int, int], other: tuple[int, int], region: int, num_heads: int
) -> None:
    given = [x.requires_grad_() for x in maps(size, other)]
    options = {"region": region, "num_heads": num_heads}
    scales = {"alpha": 0.7, "beta": -0.2}
    ours, expected = (f(*given, **options, **scales) for f in (distributed_attention, distributed_reference))
    torch.testing.assert_close(ours, expected)
    for pair in zip(gradients(ours, given), gradients(expected, given), strict=True):
        torch.testing.assert_close(*pair)
    (ours, chosen), (expected, index) = (f(*given, **options) for f in (progressive_attention, progressive_reference))
    assert ours.shape == (2, 4, *size) and torch.equal(chosen, index)
    torch.testing.assert_close(ours, expected)
    for pair in zip(gradients(ours, given), gradients(expected, given), strict=True):
        torch.testing.assert_close(*pair)


def test_gradcheck() -> None:
    given = [x.requires_grad_() for x in maps((3, 4), (5, 2))]
    scales = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.8, 0.3)]

    def distributed(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        return distributed_attention(q, k, v, region=2, num_heads=2, alpha=alpha, beta=beta)

    assert torch.autograd.gradcheck(distributed, (*given, *scales))
    assert torch.autograd.gradcheck(lambda *x: progressive_attention(*x, region=2, num_heads=2)[0], given)


@pytest.mark.parametrize("size", [(4, 4), (8, 12), (5, 7), (1, 3), (9, 2)])
def test_regions_are_a_map_cut_up(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)
    regions = block(x, 4)
    assert regions.shape == (2, 3, -(-size[0] // 4) * -(-size[1] // 4), 16)
    assert torch.equal(unblock(regions, 4, size), x)
    assert torch.equal(regions[0, 0, 0, : min(4, size[1])], x[0, 0, 0, :4])


def test_one_region_of_keys() -> None:
    """The representative is all that there is; inside the one region attention is attention to the whole map."""
    q, k, v = maps((5, 6), (4, 4))
    _, value = representatives(k, v, region=4)
    torch.testing.assert_close(distributed_attention(q, k, v, region=4), value.mT.view(2, 4, 1, 1).expand(2, 4, 5, 6))
    weights = (q.flatten(2).mT @ k.flatten(2)).softmax(-1)
    whole = (v.flatten(2) @ weights.mT).view(2, 4, 5, 6)
    torch.testing.assert_close(progressive_attention(q, k, v, region=4)[0], whole)


def test_regions_of_one_position_copy_the_best_value() -> None:
    q, k, v = maps((5, 6), (4, 3))
    best = (q.flatten(2).mT @ k.flatten(2)).argmax(-1)
    out, chosen = progressive_attention(q, k, v, region=1)
    assert torch.equal(chosen[:, 0], best)
    torch.testing.assert_close(out.flatten(2), v.flatten(2).gather(2, best[:, None].expand(-1, 4, -1)))


def test_equal_regions_weigh_equally() -> None:
    q, k, v = maps((6, 6), (2, 2))
    k, v = k.repeat(1, 1, 3, 2), torch.arange(6.0, dtype=torch.float64).view(1, 1, 3, 2).repeat_interleave(2, 2)
    v = v.repeat_interleave(2, 3).expand(2, 4, -1, -1)
    out = distributed_attention(q, k, v, region=2, beta=50.0)
    torch.testing.assert_close(out, torch.full_like(out, 2.5))  # (4 x value + value) / 5 of each, their mean


@pytest.mark.parametrize(("beta", "share"), [(-1e4, 0.0), (1e4, 1.0)])
def test_similarity_at_its_limits(beta: float, share: float) -> None:
    _, k, v = maps((1, 1), (8, 4))
    for found, x in zip(representatives(k, v, region=4, alpha=0.0, beta=beta), (k, v), strict=True):
        regions = block(x, 4)
        expected = (share * regions.sum(-1) + regions.mean(-1)) / 17
        torch.testing.assert_close(found[:, 0].mT, expected)


def test_permuted_regions_are_found_and_undone() -> None:
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(1, 16, 12, 8), dim=1)
    order = torch.randperm(6)
    shuffled = unblock(block(x, 4)[:, :, order], 4, (12, 8))
    chosen = choose_regions(x, shuffled, region=4)
    assert torch.equal(order[chosen[0, 0]], torch.arange(6))
    out, _ = progressive_attention(50 * x, shuffled, shuffled, region=4)
    torch.testing.assert_close(out, x, atol=1e-3, rtol=0)


def test_regions_are_chosen_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = maps((9, 9), (12, 7))
    expected = choose_regions(q, k, region=2, num_heads=2)
    monkeypatch.setattr(keywise, "_TILE", 1)
    assert torch.equal(choose_regions(q, k, region=2, num_heads=2), expected)


def test_refusals() -> None:
    q, k, v = maps((4, 4), (4, 6))
    for wrong, options, message in (
        ((q[0], k, v), {}, "must be maps"),
        ((q[:, :2], k, v), {}, "agree in batch and channels"),
        ((q, k, v[..., 1:]), {}, "agree in batch and size"),
        ((q[..., :0], k, v), {}, "have positions"),
        ((q, k, v), {"region": 0}, "region must be"),
        ((q, k, v), {"num_heads": 4}, "num_heads must divide"),
    ):
        for function in (distributed_attention, progressive_attention, distributed_reference, progressive_reference):
            with pytest.raises(ValueError, match=message):
                function(*wrong, **{"region": 2, **options})
