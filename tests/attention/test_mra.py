from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade import masks
from saccade.attention import mra
from saccade.attention.mra import MRA, mra_attend, mra_pairs, patch_order
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.ops.selection import pool_blocks


def heads(B: int, H: int, N: int, D: int, *, K: int | None = None, M: int | None = None) -> list[Tensor]:
    torch.manual_seed(B + 10 * H + 100 * N)
    K, M = K or H, M or N
    shapes = (B, H, N, D), (B, K, M, D), (B, K, M, D)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def definition(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, b: int, mode: str = "full") -> Tensor:
    """Ahat V / D written out as a matrix, for whole blocks."""
    D = q.shape[3]
    scores = q @ k.mT / math.sqrt(D)
    means = [x.unflatten(2, (-1, b)).mean(3) for x in (q, k)]
    coarse = (means[0] @ means[1].mT / math.sqrt(D)).repeat_interleave(b, 2).repeat_interleave(b, 3)
    exact = chosen.repeat_interleave(b, 2).repeat_interleave(b, 3)
    weights = torch.where(exact, scores.exp(), coarse.exp() if mode == "full" else 0.0)
    return weights @ v / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize("resolutions", [(8, 1), (16, 4, 1), (8, 4, 2, 1)])
@pytest.mark.parametrize("N", [1, 37, 64])
def test_all_blocks_are_dense_attention(mode: str, resolutions: tuple[int, ...], N: int) -> None:
    q, k, v = heads(2, 4, N, 8, K=2)
    out = mra_attend(q, k, v, resolutions=resolutions, num_blocks=10**6, mode=mode)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_output_and_gradients_are_the_definitions(mode: str) -> None:
    q, k, v = heads(2, 2, 48, 8)
    options = {"resolutions": (8, 1), "num_blocks": 15, "diagonal_blocks": 1, "mode": mode}
    out, chosen = mra_attend(q, k, v, return_map=True, **options)
    assert chosen.sum((2, 3)).eq(15).all() and chosen.diagonal(dim1=2, dim2=3).all()
    expected = definition(q, k, v, chosen, 8, mode)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for ours, theirs in zip(*(torch.autograd.grad(x, (q, k, v), grad) for x in (out, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_ranking_is_that_of_the_block_means() -> None:
    q, k, v = heads(1, 2, 64, 8)
    _, chosen = mra_attend(q, k, v, resolutions=(8, 1), num_blocks=20, return_map=True)
    scores = pool_blocks(q, 8) @ pool_blocks(k, 8).mT / math.sqrt(8)
    ranks = (scores - scores.amax(-1, keepdim=True)).flatten(2)
    assert (ranks[chosen.flatten(2)].view(2, -1).amin(-1) >= ranks[~chosen.flatten(2)].view(2, -1).amax(-1)).all()
    _, forced = mra_attend(q, k, v, resolutions=(8, 1), num_blocks=15, first_blocks=1, return_map=True)
    assert forced[:, :, 0].all() and forced[..., 0].all() and forced.sum() == 2 * 15


def test_ranking_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = heads(2, 2, 200, 8)
    options = {"resolutions": (8, 1), "num_blocks": 40, "first_blocks": 1, "diagonal_blocks": 3, "return_map": True}
    real = torch.arange(200) < torch.tensor([[200], [90]])
    expected = mra_attend(q, k, v, **options)[1], mra_attend(q, k, v, **options, mask=real)[1]
    monkeypatch.setattr(mra.refinement, "_RANKED", 1)
    assert torch.equal(mra_attend(q, k, v, **options)[1], expected[0])
    assert torch.equal(mra_attend(q, k, v, **options, mask=real)[1], expected[1])


@pytest.mark.parametrize("resolutions", [(8, 1), (8, 2, 1), (8, 4), (16, 8, 2)])
@pytest.mark.parametrize("num_blocks", [0, 1, 9])
def test_constant_blocks_are_exact_for_any_choice(resolutions: tuple[int, ...], num_blocks: int) -> None:
    q, k, v = heads(1, 2, 6, 8)
    q, k = q.repeat_interleave(16, 2), k.repeat_interleave(16, 2)
    v = torch.randn(1, 2, 96, 8, dtype=torch.float64)
    out = mra_attend(q, k, v, resolutions=resolutions, num_blocks=num_blocks)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("resolutions", [(8, 1), (8, 2, 1), (8, 4)])
def test_weights_are_positive_and_sum_to_one(resolutions: tuple[int, ...]) -> None:
    q, k, _ = heads(1, 2, 45, 8)
    weights = mra_attend(
        q, k, torch.eye(45, dtype=torch.float64).expand(1, 2, -1, -1), resolutions=resolutions, num_blocks=5
    )
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 45, dtype=torch.float64))


def test_bounds_of_a_block() -> None:
    q, k, _ = heads(1, 4, 32, 8)
    scores = (q @ k.mT / math.sqrt(8)).unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4).flatten(4)
    mu = (pool_blocks(q, 8) @ pool_blocks(k, 8).mT / math.sqrt(8)).exp()
    alpha, r = scores.exp().mean(-1), scores.amax(-1) - scores.amin(-1)
    assert (mu <= alpha).all() and (alpha <= (2 + r.exp() - 2 * (r / 2).exp()) * mu).all()


def test_sparse_mode_of_the_diagonal_is_block_diagonal() -> None:
    q, k, v = heads(2, 2, 40, 8)
    out = mra_attend(q, k, v, resolutions=(8, 1), num_blocks=5, diagonal_blocks=1, mode="sparse")
    same = torch.arange(40)[:, None] // 8 == torch.arange(40) // 8
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=same))


def test_sparse_mode_without_a_block_is_zero() -> None:
    q, k, v = heads(1, 1, 32, 8)
    out, chosen = mra_attend(q, k, v, resolutions=(8, 1), num_blocks=2, mode="sparse", return_map=True)
    rows = chosen.any(-1).repeat_interleave(8, 2)
    assert not out[~rows].any() and out[rows].all() and not rows.all()
    out.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("resolutions", [(8, 1), (8, 2, 1)])
def test_padding_equals_the_sequence_alone(resolutions: tuple[int, ...]) -> None:
    q, k, v = (x.detach() for x in heads(3, 2, 64, 8))
    lengths = torch.tensor([64, 43, 0])
    real = torch.arange(64) < lengths[:, None]
    q[~real[:, None].expand(-1, 2, -1)] = math.nan
    k[~real[:, None].expand(-1, 2, -1)] = math.nan
    v[~real[:, None].expand(-1, 2, -1)] = math.nan
    for mask in (real, masks.padding(real), real[:, None, None]):
        out = mra_attend(q, k, v, resolutions=resolutions, blocks_per_row=2, mask=mask)
        for row, length in enumerate(lengths.tolist()):
            alone = (x[row : row + 1, :, :length] for x in (q, k, v))
            expected = mra_attend(*alone, resolutions=resolutions, blocks_per_row=2)
            torch.testing.assert_close(out[row : row + 1, :, :length], expected)
            assert not out[row, :, length:].any()


def test_permuting_the_tokens_of_a_block_permutes_the_outputs() -> None:
    q, k, v = heads(1, 2, 48, 8)
    order = torch.cat([torch.randperm(8) + 8 * block for block in range(6)])
    out = mra_attend(q, k, v, resolutions=(8, 1), num_blocks=12)
    moved = mra_attend(*(x[:, :, order] for x in (q, k, v)), resolutions=(8, 1), num_blocks=12)
    torch.testing.assert_close(moved, out[:, :, order])


def test_error_falls_with_the_number_of_blocks() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 256, 8, dtype=torch.float64).cumsum(3) * 0.3
    dense = F.scaled_dot_product_attention(q, k, v)
    for resolutions in ((16, 1), (16, 4, 1)):
        errors = [
            (mra_attend(q, k, v, resolutions=resolutions, num_blocks=n) - dense).norm().item()
            for n in ((0, 32, 96, 200, 256) if len(resolutions) == 2 else ((32, 64), (128, 1024), (256, 4096)))
        ]
        assert all(a > b for a, b in zip(errors, errors[1:])) and errors[-1] < 1e-9


def test_full_mode_is_better_for_flat_weights() -> None:
    q, k, v = heads(1, 2, 256, 8)
    q = q * 0.1
    dense = F.scaled_dot_product_attention(q, k, v)
    errors = [
        (mra_attend(q, k, v, resolutions=(16, 1), num_blocks=64, mode=mode) - dense).norm()
        for mode in ("full", "sparse")
    ]
    assert errors[0] < 0.5 * errors[1]


def test_queries_and_keys_of_different_lengths() -> None:
    q, k, v = heads(2, 4, 21, 8, K=2, M=50)
    real = torch.arange(50) < torch.tensor([[50], [30]])
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None], enable_gqa=True)
    torch.testing.assert_close(mra_attend(q, k, v, resolutions=(8, 1), num_blocks=99, mask=real), dense)
    assert mra_attend(q, k, v, resolutions=(8, 1), num_blocks=5, mask=real).isfinite().all()


def test_layer_takes_a_softmax_layers_weights() -> None:
    torch.manual_seed(0)
    dense = SoftmaxAttention(32, 4, qkv_bias=True)
    x, context = torch.randn(2, 50, 32), torch.randn(2, 20, 32)
    exact = MRA.from_softmax(dense, resolutions=(8, 1), blocks_per_row=100)
    torch.testing.assert_close(exact(x), dense(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(exact(x, context), dense(x, context), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(MRA.from_softmax(dense, resolutions=(8, 1), blocks_per_row=1)(x), dense(x))


def test_image_blocks_are_patches() -> None:
    torch.manual_seed(0)
    order = patch_order((8, 16))
    assert order[:32].tolist() == [16 * row + column for row in range(4) for column in range(8)]
    layer = MRA(16, 2, grid=(8, 16), blocks_per_row=1, diagonal_blocks=1, mode="sparse", rope=False)
    x = torch.randn(1, 128, 16)
    image = layer(x).view(8, 16, 16)
    changed = x.clone().view(8, 16, 16)
    changed[4:] += 1
    moved = layer(changed.view(1, 128, 16)).view(8, 16, 16)
    assert torch.equal(moved[:4], image[:4]) and not torch.allclose(moved[4:], image[4:])
    with pytest.raises(ValueError, match="must divide the grid"):
        MRA(16, 2, grid=(9, 16))
    with pytest.raises(ValueError, match="the grid has 128 tokens"):
        layer(x[:, :64])


def test_pairs_are_those_of_the_map() -> None:
    options = {"resolutions": (8, 1), "num_blocks": None, "blocks_per_row": 2}
    assert mra_pairs(64, 64, False, 0, options) == 64 + 16 * 64
    assert mra_pairs(64, 64, False, 0, options | {"num_blocks": 10**6}) == 64 * 64


def test_bad_arguments() -> None:
    q, k, v = heads(1, 2, 16, 8)
    for bad, message in (
        ({"resolutions": (32,)}, "resolutions must fall"),
        ({"resolutions": (32, 5)}, "resolutions must fall"),
        ({"resolutions": (1, 32)}, "resolutions must fall"),
        ({"num_blocks": (1, 2)}, "num_blocks must be one number >= 0 or one per cut"),
        ({"blocks_per_row": -1}, "blocks_per_row must be one number"),
        ({"mode": "half"}, "mode must be 'full' or 'sparse'"),
        ({"released_ranking": True, "resolutions": (8, 2)}, "released_ranking is for two resolutions"),
        ({"first_blocks": -1}, "must be at least 0"),
        ({"mask": masks.causal()}, "takes padding .* as its mask"),
        ({"mask": torch.ones(1, 9, dtype=torch.bool)}, "mask must be"),
    ):
        with pytest.raises(ValueError, match=message):
            mra_attend(q, k, v, **bad)
    with pytest.raises(ValueError, match="do not fit"):
        mra_attend(q, k, v[:, :, :5])
    with pytest.raises(ValueError, match="must divide the query heads"):
        mra_attend(q, torch.cat([k, k[:, :1]], 1), torch.cat([v, v[:, :1]], 1))
    with pytest.raises(ValueError, match="MRA is bidirectional"):
        MRA(16, 2, causal=True)


def test_the_released_ranking_differs_with_few_tiles_alone() -> None:
    differs = {True: 0, False: 0}
    for seed in range(60):
        torch.manual_seed(seed)
        X, diagonal = 2 + seed % 5, seed % 4
        q, k, v = torch.randn(3, 1, 2, 4 * X, 8)
        tiles = int(torch.randint(1, X * X + 1, ()))
        options = {"resolutions": (4, 1), "num_blocks": tiles, "diagonal_blocks": diagonal}
        ours, released = (mra_attend(q, k, v, **options, released_ranking=which) for which in (False, True))
        forced = sum(abs(x - y) <= diagonal // 2 for x in range(X) for y in range(X)) if diagonal else 0
        differs[tiles < forced + X] += not torch.allclose(ours, released, atol=1e-5)
    assert differs[True] > 0 and differs[False] == 0
