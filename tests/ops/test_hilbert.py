from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.ops.hilbert import gilbert_order, hilbert_order, neighbor_blocks


def steps(order: Tensor, size: tuple[int, ...]) -> Tensor:
    """Per axis, how far each token is from the one before it."""
    places = torch.stack(torch.unravel_index(order, size), -1)
    return (places[1:] - places[:-1]).abs()


@pytest.mark.parametrize("order_of", [gilbert_order, hilbert_order])
@pytest.mark.parametrize("size", [(1,), (5,), (2, 3), (7, 2), (1, 6, 10), (5, 5, 5), (3, 8, 6), (4, 1, 2), (7, 9, 3)])
def test_an_order_is_a_permutation(order_of, size: tuple[int, ...]) -> None:
    order = order_of(size)
    assert torch.equal(order.sort().values, torch.arange(order.numel()))
    shifted = order_of(size, before=3, after=2)
    assert torch.equal(shifted[3:-2], order + 3) and shifted[:3].tolist() == [0, 1, 2]
    assert shifted[-2:].tolist() == [order.numel() + 3, order.numel() + 4]


@pytest.mark.parametrize("size", [(6,), (2, 4), (10, 6), (4, 4, 4), (2, 6, 10), (8, 6, 4), (12, 2, 2)])
def test_the_curve_of_even_sides_goes_from_neighbour_to_neighbour(size: tuple[int, ...]) -> None:
    assert (steps(gilbert_order(size), size).sum(1) == 1).all()


@pytest.mark.parametrize("size", [(2, 3), (5, 7), (5, 5, 5), (7, 9, 3), (13, 15, 26), (3, 1, 9)])
def test_the_curve_of_any_sides_goes_from_neighbour_to_neighbour_or_diagonally(size: tuple[int, ...]) -> None:
    step = steps(gilbert_order(size), size)
    assert step.max() == 1 and (step.sum(1) > 1).float().mean() <= 0.25


def test_the_curve_starts_along_the_longest_side() -> None:
    assert gilbert_order((1, 1, 5)).tolist() == [0, 1, 2, 3, 4]
    assert gilbert_order((2, 2)).tolist() == [0, 2, 3, 1]


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("block", [4, (3, 5)])
def test_neighbours_follow_the_definition(diagonal: bool, block: int | tuple[int, int]) -> None:
    size = (2, 3, 5)
    order = gilbert_order(size)
    block_q, block_k = (block, block) if isinstance(block, int) else block
    places = torch.stack(torch.unravel_index(order, size), -1)
    expected = torch.zeros(-(-30 // block_q), -(-30 // block_k), dtype=torch.bool)
    for i, a in enumerate(places):
        for j, b in enumerate(places):
            away = (a - b).abs()
            expected[i // block_q, j // block_k] |= bool(away.max() <= 1 and (diagonal or away.sum() <= 1))
    assert torch.equal(neighbor_blocks(size, order, block, diagonal=diagonal), expected)
    assert not expected.all()


def test_bad_arguments() -> None:
    for bad in ((), (0, 3), (1, 2, 3, 4)):
        with pytest.raises(ValueError, match="size must be one to three positive sides"):
            gilbert_order(bad)
    with pytest.raises(ValueError, match="before and after"):
        gilbert_order((2,), after=-1)
    with pytest.raises(ValueError, match="permutation of the grid's 6 tokens"):
        neighbor_blocks((2, 3), torch.arange(5), 2)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        neighbor_blocks((2, 3), None, 0)
