"""Streamed matching against the plain forms: sizes over and under a tile, forward and backward, masks, and limits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from saccade.ops.matching import (
    Assignment,
    dual_softmax,
    expected_positions,
    local_correlation,
    local_correlation_reference,
    pixel_grid,
    row_column_lse,
    row_column_lse_reference,
    similarity,
    sinkhorn,
    window,
)
from saccade.ops.matching import lse as tiled

SIZES = [(1, 1), (1, 5), (7, 3), (13, 29), (16, 16)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "ROWS", 4)
    monkeypatch.setattr(tiled, "COLUMNS", 6)


def sides(N: int, M: int, B: int = 2, C: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(N + M)
    f0, f1 = (torch.randn(B, n, C, dtype=torch.float64, requires_grad=True) for n in (N, M))
    return f0, f1


def masks(N: int, M: int, B: int = 2) -> tuple[Tensor, Tensor]:
    """The first of each row stays, and the last of the second image are padding."""
    valid = [torch.ones(B, n, dtype=torch.bool) for n in (N, M)]
    for v in valid:
        v[-1, 1 + v.shape[1] // 2 :] = False
    return valid[0], valid[1]


def plain_dual_softmax(f0: Tensor, f1: Tensor, scale: float, valid: tuple[Tensor, Tensor]) -> Tensor:
    S = scale * f0 @ f1.mT
    pairs = valid[0][:, :, None] & valid[1][:, None]
    S = S.masked_fill(~pairs, -1e9)
    return (S.softmax(1) * S.softmax(2)).masked_fill(~pairs, 0.0)


def plain_sinkhorn(f0: Tensor, f1: Tensor, alpha: Tensor, scale: float, iterations: int) -> Tensor:
    """The whole matrix with its dustbins, as it is written in the paper."""
    (B, N, _), M = f0.shape, f1.shape[1]
    Z = alpha.expand(B, N + 1, M + 1).clone()
    Z[:, :N, :M] = scale * f0 @ f1.mT
    each = -math.log(N + M)
    mu, nu = torch.full((B, N + 1), each).to(Z), torch.full((B, M + 1), each).to(Z)
    mu[:, -1], nu[:, -1] = math.log(M) + each, math.log(N) + each
    v = torch.zeros_like(nu)
    for _ in range(iterations):
        u = mu - (Z + v[:, None]).logsumexp(2)
        v = nu - (Z + u[:, :, None]).logsumexp(1)
    return Z + u[:, :, None] + v[:, None] - each


def compare_gradients(ours: Tensor, expected: Tensor, given: list[Tensor]) -> None:
    weight = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype).view_as(ours).cos()
    torch.testing.assert_close(ours, expected)
    grads = [torch.autograd.grad((x * weight).sum(), given, retain_graph=True) for x in (ours, expected)]
    for pair in zip(*grads, strict=True):
        torch.testing.assert_close(*pair)


@pytest.mark.parametrize(("N", "M"), SIZES)
@pytest.mark.parametrize("biased", [False, True])
def test_sums_are_those_of_all_pairs(N: int, M: int, biased: bool) -> None:
    f0, f1 = sides(N, M)
    options: dict[str, Tensor] = {}
    if biased:
        options = {
            "bias0_BN": torch.randn(2, N).double().requires_grad_(),
            "bias1_BM": torch.randn(2, M).double().requires_grad_(),
        }
    given = [f0, f1, *options.values()]
    for ours, expected in zip(
        row_column_lse(f0, f1, scale=0.7, **options), row_column_lse_reference(f0, f1, scale=0.7, **options)
    ):
        compare_gradients(ours, expected, given[:2])
    ours = torch.cat([x.flatten() for x in row_column_lse(f0, f1, scale=0.7, **options)])
    plain = torch.cat([x.flatten() for x in row_column_lse_reference(f0, f1, scale=0.7, **options)])
    compare_gradients(ours, plain, given)
    row, column = row_column_lse(f0, f1, scale=0.7, columns=False)
    torch.testing.assert_close(row, row_column_lse_reference(f0, f1, scale=0.7)[0])
    assert column.shape == (2, 0)


def test_gradcheck_and_refusal_of_the_second_derivative() -> None:
    f0, f1 = sides(5, 7, 1, 3)
    bias0, bias1 = (torch.randn(1, n, dtype=torch.float64, requires_grad=True) for n in (5, 7))

    def sums(f0: Tensor, f1: Tensor, bias0: Tensor, bias1: Tensor) -> tuple[Tensor, Tensor]:
        return row_column_lse(f0, f1, scale=0.5, bias0_BN=bias0, bias1_BM=bias1)

    assert torch.autograd.gradcheck(sums, (f0, f1, bias0, bias1))
    (first,) = torch.autograd.grad(sums(f0, f1, bias0, bias1)[0].sum(), f0, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        first.sum().backward()


def test_large_scores_and_sums_of_nothing() -> None:
    f0, f1 = (1e3 * x for x in sides(6, 9))
    row, column = row_column_lse(f0, f1)
    torch.testing.assert_close((row, column), row_column_lse_reference(f0, f1))
    nothing = torch.full((2, 9), float("-inf"), dtype=torch.float64)
    row, column = row_column_lse(f0, f1, bias1_BM=nothing)
    assert torch.equal(row, torch.full_like(row, float("-inf"))) and column.isfinite().all()
    (grad,) = torch.autograd.grad(row.sum(), f0, allow_unused=True)
    assert torch.equal(grad, torch.zeros_like(f0))


@pytest.mark.parametrize(("N", "M"), SIZES)
@pytest.mark.parametrize("padded", [False, True])
def test_dual_softmax(N: int, M: int, padded: bool) -> None:
    f0, f1 = sides(N, M)
    valid = masks(N, M)
    options = {"valid0_BN": valid[0], "valid1_BM": valid[1]} if padded else {}
    every = (torch.ones_like(valid[0]), torch.ones_like(valid[1]))
    P = plain_dual_softmax(f0, f1, 1.3, valid if padded else every)
    found = dual_softmax(f0, f1, scale=1.3, **options)
    compare_gradients(found.matrix(), P, [f0, f1])
    assert (P.sum(1) <= 1 + 1e-9).all() and (P.sum(2) <= 1 + 1e-9).all()
    check_mutual(found, P, 0.05)
    batch, index0, index1 = (torch.tensor(x) for x in ([0, 1], [N - 1, 0], [M - 1, 0]))
    compare_gradients(found.log_at(batch, index0, index1).exp(), P[batch, index0, index1], [f0, f1])


def check_mutual(found: Assignment, share: Tensor, threshold: float) -> None:
    best = (share == share.amax(1, keepdim=True)) & (share == share.amax(2, keepdim=True)) & (share > threshold)
    expected = best.nonzero()
    for pairs in (found.mutual(threshold), found._mutual_of_all(threshold)):
        assert torch.equal(torch.stack(pairs[:3], 1), expected)
        torch.testing.assert_close(pairs.confidence, share[best], atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize(("N", "M"), SIZES)
@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn(N: int, M: int, iterations: int) -> None:
    f0, f1 = sides(N, M)
    alpha = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    found = sinkhorn(f0, f1, alpha, iterations=iterations, scale=0.8)
    logs = plain_sinkhorn(f0, f1, alpha, 0.8, iterations)
    compare_gradients(found.matrix(), logs.exp()[:, :-1, :-1], [f0, f1, alpha])
    assert found.bin0_BN is not None and found.bin1_BM is not None
    compare_gradients(found.bin0_BN, logs[:, :-1, -1], [f0, f1, alpha])
    compare_gradients(found.bin1_BM, logs[:, -1, :-1], [f0, f1, alpha])
    # what goes to a column, from the features and the dustbin, is one of N + M
    torch.testing.assert_close(found.matrix().sum(1) + found.bin1_BM.exp(), torch.ones(2, M).double())
    check_mutual(found, logs.exp()[:, :-1, :-1], 0.01)
    P = logs.exp().clone()
    rows, columns = P.argmax(2)[:, :-1] == M, P.argmax(1)[:, :-1] == N
    P = P[:, :-1, :-1].masked_fill(rows[:, :, None] | columns[:, None], 0.0)
    check_mutual(found.without_binned(), P, 0.01)


def test_sinkhorn_carries_padding_to_the_dustbins() -> None:
    f0, f1 = sides(7, 9)
    valid0, valid1 = masks(7, 9)
    found = sinkhorn(f0, f1, 0.5, iterations=4, valid0_BN=valid0, valid1_BM=valid1)
    P = found.matrix()
    assert P.isfinite().all() and not P[~(valid0[:, :, None] & valid1[:, None])].any()
    assert all(valid0[b, i] and valid1[b, j] for b, i, j in zip(*found.mutual()[:3]))


def test_the_same_features_match_themselves_and_swapping_sides_transposes() -> None:
    f0, f1 = sides(11, 8)
    torch.testing.assert_close(dual_softmax(f1, f0).matrix(), dual_softmax(f0, f1).matrix().mT)
    strong = 20 * torch.eye(12, dtype=torch.float64)[None]
    found = dual_softmax(strong, strong)
    torch.testing.assert_close(found.matrix()[0], torch.eye(12, dtype=torch.float64))
    assert torch.equal(found.mutual(0.2).index1, torch.arange(12)) and not len(found.mutual(1.0).batch)


def test_nearest_neighbours() -> None:
    f0, f1 = sides(15, 20)
    pairs = similarity(f0, f1).mutual()
    S = f0 @ f1.mT
    for b in range(2):
        of_b = {(i, int(S[b, i].argmax())) for i in range(15) if S[b, :, S[b, i].argmax()].argmax() == i}
        chosen = pairs.batch == b
        assert of_b == set(zip(pairs.index0[chosen].tolist(), pairs.index1[chosen].tolist()))


@pytest.mark.parametrize(("N", "M"), [(1, 1), (6, 12), (35, 20)])
def test_expected_positions(N: int, M: int) -> None:
    f0, f1 = sides(N, M)
    grid = torch.randn(M, 2, dtype=torch.float64)
    expected = (f0 @ f1.mT / 5**0.5).softmax(2) @ grid
    compare_gradients(expected_positions(f0, f1, grid), expected, [f0, f1])
    earlier = torch.ones(N, M).tril(M - N).bool() | (torch.arange(M) == 0)
    masked = (f0 @ f1.mT).masked_fill(~earlier, float("-inf")).softmax(2) @ grid
    torch.testing.assert_close(expected_positions(f0, f1, grid, scale=1.0, mask=earlier), masked)
    half = expected_positions(f0.bfloat16(), f1.bfloat16(), grid)
    assert half.dtype == torch.float32


def test_a_roll_is_found_everywhere_it_is_seen() -> None:
    f = 30 * torch.eye(20).view(1, 4, 5, 20)
    rolled = f.roll((1, 2), (1, 2))
    grid = pixel_grid(4, 5, f)
    flow = (expected_positions(f.flatten(1, 2), rolled.flatten(1, 2), grid) - grid).view(4, 5, 2)
    torch.testing.assert_close(flow[:3, :3], torch.tensor([2.0, 1.0]).expand(3, 3, 2))


@pytest.mark.parametrize("radius", [0, 1, (0, 2), (2, 1)])
@pytest.mark.parametrize(("size", "other"), [((1, 1), (1, 1)), ((3, 4), (5, 2)), ((6, 5), (6, 5))])
def test_local_correlation(radius: int | tuple[int, int], size: tuple[int, int], other: tuple[int, int]) -> None:
    torch.manual_seed(0)
    f0, f1 = (torch.randn(2, 3, *s, dtype=torch.float64, requires_grad=True) for s in (size, other))
    centre = (6 * torch.rand(2, *size, 2, dtype=torch.float64) - 1).requires_grad_()
    ours = local_correlation(f0, f1, centre, radius=radius)
    assert ours.shape[-1] == len(window(radius, ours))
    compare_gradients(ours, local_correlation_reference(f0, f1, centre, radius=radius), [f0, f1, centre])


def test_local_correlation_far_outside_and_at_whole_pixels() -> None:
    torch.manual_seed(0)
    f0, f1 = torch.randn(2, 1, 4, 5, 6).unbind(0)
    away = torch.tensor([[1e9, 0.0], [0.0, -1e9], [-1e9, 1e9], [1e4, 3.0]])
    for point in away:
        assert not local_correlation(f0, f1, point.expand(1, 5, 6, 2), radius=2).any()
    grid = pixel_grid(5, 6, f0).view(1, 5, 6, 2)
    found = local_correlation(f0, f1, grid, radius=(5, 6), scale=1.0)
    S = (f0.flatten(2).mT @ f1.flatten(2)).view(5, 6, 5, 6)
    for y, x in itertools.product(range(5), range(6)):
        whole = found[0, y, x].view(11, 13)[5 - y : 10 - y, 6 - x : 12 - x]
        torch.testing.assert_close(whole, S[y, x])


def test_under_autocast_and_in_half_precision_digits_are_kept() -> None:
    f0, f1 = (x.float() for x in sides(9, 12))
    expected = dual_softmax(f0, f1).matrix()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(dual_softmax(f0, f1).matrix(), expected)
    half = dual_softmax(f0.bfloat16(), f1.bfloat16())
    assert half.matrix().dtype == torch.float32
    torch.testing.assert_close(half.matrix(), expected, atol=0.05, rtol=0.1)


def test_compiles_as_one_graph() -> None:
    f0, f1 = sides(9, 12)

    def total(f0: Tensor, f1: Tensor) -> Tensor:
        return dual_softmax(f0, f1).log_at(*torch.zeros(3, 1, dtype=torch.long)).sum()

    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    for ours, expected in zip(*(torch.autograd.grad(f(f0, f1), (f0, f1)) for f in (compiled, total))):
        torch.testing.assert_close(ours, expected)


def test_refusals() -> None:
    f0, f1 = sides(3, 4)
    with pytest.raises(ValueError, match="one width"):
        dual_softmax(f0, f1[..., :2])
    with pytest.raises(ValueError, match="at least one"):
        similarity(f0, f1[:, :0])
    with pytest.raises(ValueError, match="valid0 must be bool"):
        dual_softmax(f0, f1, valid0_BN=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="iterations"):
        sinkhorn(f0, f1, 1.0, iterations=0)
    with pytest.raises(ValueError, match="sinkhorn"):
        dual_softmax(f0, f1).without_binned()
    maps = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="maps"):
        local_correlation(maps, torch.zeros(1, 3, 3, 4), torch.zeros(1, 3, 4, 2), radius=1)
    with pytest.raises(ValueError, match="centre"):
        local_correlation(maps, maps, torch.zeros(1, 4, 3, 2), radius=1)
    with pytest.raises(ValueError, match="radius"):
        local_correlation(maps, maps, torch.zeros(1, 3, 4, 2), radius=-1)
