"""Block-sparse attention against the reference, forward and backward, whatever the mask and the sizes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import saccade
from saccade.ops import blocks, masks
from saccade.ops.backends import BACKENDS
from saccade.ops.backends.blocksparse import blocksparse_attend
from saccade.ops.masks import Mask

INF = float("inf")


def inputs(B: int, H: int, K: int, N: int, M: int, D: int, E: int, dtype=torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, N, D), (B, K, M, D), (B, K, M, E)
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def random_keep(B: int, H: int, n: int, m: int, density: float, seed: int = 1) -> Tensor:
    return torch.rand(B, H, n, m, generator=torch.Generator().manual_seed(seed)) < density


def with_gradients(function, tensors: list[Tensor]) -> list[Tensor]:
    """out, lse and the gradients of a weighted sum of both; rows without keys have no gradient through their LSE."""
    out, lse = function(*tensors)
    generator = torch.Generator().manual_seed(2)
    loss = (out.double() * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum()
    weight = torch.randn(lse.shape, generator=generator, dtype=torch.float64)
    loss = loss + (lse.masked_fill(lse == -INF, 0.0) * weight).sum()
    return [out, lse, *torch.autograd.grad(loss, tensors)]


def assert_like_reference(
    mask: Mask | Tensor | None, tensors: list[Tensor], tolerance: float = 1e-10, **options
) -> None:
    """`options` go to `blocksparse_attend`; with none of them the call goes through the front door."""

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if options or isinstance(mask, (masks.Band, masks.Neighborhood)):  # the front door has a faster way for these
            return blocksparse_attend(q, k, v, mask, return_lse=True, **options)
        return saccade.attend(q, k, v, mask=mask, return_lse=True, backend="blocksparse")

    def reference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return saccade.attend(q, k, v, mask=mask, return_lse=True, backend="reference")

    for got, expected in zip(with_gradients(ours, tensors), with_gradients(reference, tensors)):
        assert got.shape == expected.shape and got.dtype == expected.dtype
        assert torch.equal(got == -INF, expected == -INF)
        torch.testing.assert_close(
            got.masked_fill(got == -INF, 0), expected.masked_fill(expected == -INF, 0), atol=tolerance, rtol=tolerance
        )


@pytest.mark.parametrize("block", [16, 64, 256, (16, 32), (48, 20)])
@pytest.mark.parametrize(("N", "M"), [(150, 200), (257, 64), (1, 300)])
def test_any_block_size_and_odd_lengths(block, N, M):
    bq, bk = (block, block) if isinstance(block, int) else block
    mask = masks.blocks(random_keep(2, 4, -(-N // bq), -(-M // bk), 0.4), block)
    assert_like_reference(mask, inputs(2, 4, 2, N, M, 8, 12))


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("widths", [(8, 8), (8, 20), (24, 4)])
def test_grouped_heads_and_value_widths(heads, widths):
    H, K = heads
    mask = masks.blocks(random_keep(1, H, 5, 7, 0.4), 16) & masks.causal(20)
    assert_like_reference(mask, inputs(1, H, K, 75, 101, *widths))


MASKS = {
    "causal": masks.causal(),
    "causal, queries last": masks.causal(40),
    "window": masks.window(20, 3),
    "prefix or causal": masks.prefix(30) | masks.causal(),
    "prefix per row": masks.prefix(torch.tensor([0, 77])),
    "documents": masks.documents(torch.arange(120) // 37, torch.arange(160) // 37),
    "not documents": ~masks.documents(torch.arange(120) // 37, torch.arange(160) // 37),
    "unsorted documents": masks.documents(torch.arange(120) * 7 % 5, torch.arange(160) * 3 % 5),
    "padding": masks.padding(torch.rand(2, 160, generator=torch.Generator().manual_seed(0)) < 0.3),
    "padding and causal": masks.padding(torch.arange(160) < torch.tensor([[100], [9]])) & masks.causal(),
    "blocks smaller than 16": masks.blocks(random_keep(2, 1, 15, 20, 0.3), 8),
    "blocks of two sizes": (
        masks.blocks(random_keep(1, 4, 4, 5, 0.5), 32) & masks.blocks(random_keep(1, 1, 8, 10, 0.5), 16)
    ),
    "bool": masks.dense(random_keep(2, 4, 120, 160, 0.02)),
    "bool, one for all": masks.dense(random_keep(1, 1, 120, 160, 0.2)),
    "bool per key": masks.dense(random_keep(2, 1, 1, 160, 0.5)),
    "nothing": masks.dense(torch.zeros(1, 1, 120, 160, dtype=torch.bool)),
    "everything": masks.dense(torch.ones(1, 1, 120, 160, dtype=torch.bool)),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_every_mask(name):
    assert_like_reference(MASKS[name], inputs(2, 4, 2, 120, 160, 8, 8))


def test_bool_tensor_whose_length_is_a_multiple_of_the_block():
    assert_like_reference(random_keep(2, 4, 128, 64, 0.1), inputs(2, 4, 4, 128, 64, 8, 8))


@pytest.mark.parametrize("dilation", [1, 2])
def test_neighborhood_by_the_general_path(dilation):
    mask = masks.neighborhood((9, 14), 3, dilation, causal=(True, False))
    assert_like_reference(mask, inputs(1, 2, 2, 126, 126, 8, 8), block_size=(16, 32))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)],
)
def test_dtypes(dtype, tolerance):
    mask = masks.blocks(random_keep(1, 2, 5, 6, 0.5), 32) & masks.causal(30)
    assert_like_reference(mask, inputs(1, 2, 2, 150, 180, 16, 16, dtype), tolerance)


def test_long_rows_are_cut_to_the_memory_allowed():
    mask = masks.blocks(random_keep(2, 2, 5, 40, 0.7), 16) & masks.causal(500)
    tensors = inputs(2, 2, 1, 70, 640, 8, 8)
    assert_like_reference(mask, tensors, memory_mb=0.05)
    structure = blocks.BlockStructure(mask.block_map(70, 640, 16), mask, 2, 2, 1, 70, 640, 16, 16, 3, 6)
    (work,) = structure.work_lists()
    assert any(piece.cut for piece in work.pieces)
    assert max(piece.width for piece in work.pieces) == 3
    assert max(piece.pairs for piece in work.pieces) <= 6


@pytest.mark.parametrize("states_per_list", [2**20, 100])
@pytest.mark.parametrize("heads_per_group", [1, 3])
def test_work_lists_cover_each_kept_block_once(states_per_list, heads_per_group, monkeypatch):
    monkeypatch.setattr(blocks, "STATES_PER_LIST", states_per_list)
    keep = random_keep(2, 4, 9, 11, 0.4)
    states = keep.to(torch.int8) * masks.FULL
    structure = blocks.BlockStructure(states, None, 2, 4, 2, 144, 176, 16, 16, 3, 12, heads_per_group)
    seen = torch.cat([work.map_P for work in structure.work_lists()])
    assert torch.equal(seen.sort().values, keep.flatten().nonzero()[:, 0])


def test_long_maps_are_listed_in_parts(monkeypatch):
    monkeypatch.setattr(blocks, "STATES_PER_LIST", 20)
    mask = masks.blocks(random_keep(1, 3, 7, 6, 0.5), 16)
    assert_like_reference(mask, inputs(1, 3, 3, 100, 90, 8, 8))


def test_the_elementwise_mask_is_evaluated_in_partial_blocks_only(monkeypatch):
    asked = []
    plain = masks.Band.allowed
    monkeypatch.setattr(
        masks.Band, "allowed", lambda self, b, h, q, k: asked.append(q.shape[0]) or plain(self, b, h, q, k)
    )
    q, k, v = inputs(1, 2, 2, 256, 256, 8, 8)
    blocksparse_attend(q, k, v, masks.blocks(torch.ones(1, 1, 8, 8, dtype=torch.bool), 32) & masks.causal())
    assert sum(asked) == 1  # of the diagonal blocks of two heads, which are alike
    asked.clear()
    keep = torch.ones(1, 1, 4, 8, dtype=torch.bool)
    blocksparse_attend(q, k, v, masks.blocks(keep, (64, 32)) & masks.causal())
    assert sum(asked) == 2 * 4 * 2  # of two heads, the two on each row's diagonal


@pytest.mark.parametrize("N, M", [(64, 64), (61, 64), (64, 61), (50, 90)])
@pytest.mark.parametrize("block", [(16, 16), (8, 16), (16, 8)])
def test_one_mask_serves_blocks_that_are_alike(N, M, block):
    n, m = -(-N // block[0]), -(-M // block[1])
    keep = random_keep(1, 2, n, m, 0.6)
    keep[..., -1] = True  # the last block, which may be short or padded, is in every row
    kept = masks.blocks(keep, block)
    padded = torch.arange(M)[None] < M - 3
    both = torch.stack([torch.arange(M) < M - 3, torch.arange(M) < M - 6])
    for mask in (
        kept,
        kept & masks.causal(),
        kept & masks.causal(M - N) & masks.padding(padded),
        kept & masks.padding(padded),
        kept & masks.padding(both),
        kept & masks.window(11, 5),
        masks.blocks(keep, 4 * block[0]) & masks.causal() if n <= 2 else kept & ~masks.causal(),
    ):
        assert_like_reference(mask, inputs(2, 2, 1, N, M, 8, 8), block_size=block)


def test_gradcheck_with_lse_and_block_bias():
    q, k, v = inputs(1, 2, 1, 10, 11, 3, 4)
    bias = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([[[[1, 1], [0, 1], [0, 0]], [[1, 0], [1, 1], [1, 1]]]], dtype=torch.bool)

    def function(q, k, v, bias):
        out, lse = blocksparse_attend(q, k, v, keep, block_size=(4, 6), block_bias=bias, return_lse=True)
        return out, lse.masked_fill(lse == -INF, 0.0)

    assert torch.autograd.gradcheck(function, (q, k, v, bias))


@pytest.mark.parametrize("shape", [(2, 4), (1, 4), (1, 1)])
def test_block_bias_equals_an_elementwise_bias(shape):
    q, k, v = inputs(2, 4, 2, 50, 70, 8, 8)
    bias = torch.randn(*shape, 4, 5, dtype=torch.float64).requires_grad_()
    with torch.no_grad():
        bias[0, 0, 1, 2] = -INF
    mask = masks.causal(30)

    def by_scores(q, k, v, bias):
        def score_mod(score, b, h, i, j):
            return score + bias[b * (shape[0] > 1), h * (shape[1] > 1), i // 16, j // 16]

        return saccade.attend(q, k, v, mask=mask, score_mod=score_mod, return_lse=True, backend="reference")

    def ours(q, k, v, bias):
        return blocksparse_attend(q, k, v, mask, block_size=16, block_bias=bias, return_lse=True)

    for got, expected in zip(with_gradients(ours, [q, k, v, bias]), with_gradients(by_scores, [q, k, v, bias])):
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


def test_large_scores_neither_overflow_nor_vanish():
    q, k, v = inputs(1, 2, 2, 64, 96, 8, 8, torch.float32)
    with torch.no_grad():
        q *= 60.0
    mask = masks.blocks(random_keep(1, 2, 4, 6, 0.6), 16)
    out, lse = blocksparse_attend(q, k, v, mask, return_lse=True)
    expected, expected_lse = saccade.attend(q, k, v, mask=mask, return_lse=True, backend="reference")
    assert expected_lse.amax() > 100
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lse, expected_lse, atol=1e-3, rtol=1e-5)
    shifted, _ = blocksparse_attend(q, k, v, mask, block_bias=torch.full((1, 1, 4, 6), -500.0), return_lse=True)
    torch.testing.assert_close(shifted, out, atol=1e-4, rtol=1e-4)


def test_empty_rows_give_zeros_and_finite_gradients():
    q, k, v = inputs(1, 2, 2, 64, 64, 8, 8)
    keep = random_keep(1, 2, 64, 64, 0.2)
    keep[:, :, 3], keep[:, 0, 16:32] = False, False  # one row of a block, and a whole block
    out, lse = blocksparse_attend(q, k, v, masks.dense(keep), block_size=16, return_lse=True)
    assert (out[:, :, 3] == 0).all() and (out[:, 0, 16:32] == 0).all()
    assert (lse[:, :, 3] == -INF).all() and torch.isfinite(lse[:, 1, 16:32]).all()
    # a careless loss: the gradient of logsumexp of -inf is NaN on those rows
    grads = torch.autograd.grad(out.sum() + lse.exp().log1p().sum(), (q, k, v))
    assert all(torch.isfinite(g).all() for g in grads)
    assert (grads[0][:, :, 3] == 0).all()


def test_not_a_number_reaches_only_the_rows_that_attend_to_its_block():
    q, k, v = inputs(1, 1, 1, 64, 64, 8, 8)
    with torch.no_grad():
        k[0, 0, 20] = float("nan")
        v[0, 0, 20] = float("nan")
    keep = ~torch.eye(4, dtype=torch.bool).roll(1, 1)
    out = blocksparse_attend(q, k, v, keep, block_size=16)
    assert torch.isfinite(out[0, 0, :16]).all() and out[0, 0, 16:].isnan().all()


def test_two_halves_merge_to_the_whole_with_its_gradients():
    tensors = inputs(2, 4, 2, 90, 110, 8, 8)
    keep = random_keep(2, 4, 6, 7, 0.6)
    half = random_keep(2, 4, 6, 7, 0.5, seed=3)

    def part(chosen):
        return lambda q, k, v: blocksparse_attend(q, k, v, chosen, block_size=16, return_lse=True)

    def merged(q, k, v):
        return saccade.merge(*part(keep & half)(q, k, v), *part(keep & ~half)(q, k, v))

    for got, expected in zip(with_gradients(merged, tensors), with_gradients(part(keep), tensors)):
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


def test_inference_mode_and_gradient_mode_do_not_disturb_each_other():
    q, k, v = inputs(1, 2, 2, 64, 64, 8, 8)
    mask = masks.blocks(random_keep(1, 2, 4, 4, 0.6), 16)
    with torch.inference_mode():
        first = blocksparse_attend(q, k, v, mask)
    second = blocksparse_attend(q, k, v, mask)
    second.sum().backward()
    torch.testing.assert_close(first.clone(), second)


def test_no_mask_is_every_block():
    assert_like_reference(None, inputs(1, 2, 2, 70, 130, 8, 8))


@pytest.mark.parametrize(("B", "N", "M"), [(0, 5, 5), (1, 0, 5), (1, 5, 0)])
def test_nothing_in_gives_nothing_out(B, N, M):
    q, k, v = inputs(B, 2, 1, N, M, 4, 6)
    out, lse = blocksparse_attend(q, k, v, masks.causal(), block_size=16, return_lse=True)
    assert out.shape == (B, 2, N, 6) and (out == 0).all() and (lse == -INF).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize(("N", "density", "expected"), [(4096, 0.05, "blocksparse"), (256, 1.0, "sdpa")])
def test_plan_and_attend_agree(N, density, expected, monkeypatch):
    q = torch.randn(1, 2, N, 16)
    mask = masks.blocks(random_keep(1, 2, N // 64, N // 64, density), 64)
    ran = []
    for name in ("blocksparse", "sdpa"):
        module = BACKENDS[name]
        monkeypatch.setattr(module, "run", partial(lambda name, run, *a: ran.append(name) or run(*a), name, module.run))
    saccade.attend(q, q, q, mask=mask)
    assert saccade.plan(q, q, q, mask=mask).backend == expected
    assert ran == [expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": lambda q, k: q @ k.mT}, "scores are dot products"),
        ({"score_mod": lambda s, b, h, i, j: s}, "only those of saccade.score_mods"),
        ({"normalize": "sigmoid"}, "softmax only"),
        ({"dropout": 0.1}, "no dropout"),
    ],
)
def test_it_says_what_it_cannot_do(options, message):
    q = torch.randn(1, 1, 32, 4)
    with pytest.raises(ValueError, match=message):
        saccade.attend(q, q, q, **{"mask": masks.causal(1), **options}, backend="blocksparse")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": torch.ones(1, 1, 2, 2, dtype=torch.bool)}, "block_size"),
        ({"mask": torch.ones(1, 1, 2, 3, dtype=torch.bool), "block_size": 16}, "2 x 2 blocks"),
        ({"mask": torch.ones(3, 1, 2, 2, dtype=torch.bool), "block_size": 16}, "3 batch rows"),
        ({"mask": masks.causal(), "block_size": 0}, "block_size"),
        ({"mask": masks.causal(), "block_size": 16, "block_bias": torch.zeros(2, 2)}, "block_bias must have shape"),
        ({"mask": masks.causal(), "memory_mb": 0}, "memory_mb must be positive"),
    ],
)
def test_bad_arguments(arguments, message):
    q = torch.randn(1, 1, 32, 4)
    mask = arguments.pop("mask") if "mask" in arguments else None
    with pytest.raises(ValueError, match=message):
        blocksparse_attend(q, q, q, mask, **arguments)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_random_problems(data):
    draw = data.draw
    B, K, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    H, N, M = K * group, draw(st.integers(1, 90)), draw(st.integers(1, 90))
    bq, bk = draw(st.integers(16, 64)), draw(st.integers(16, 64))
    keep = random_keep(
        draw(st.sampled_from([1, B])), draw(st.sampled_from([1, H])), -(-N // bq), -(-M // bk),
        draw(st.floats(0, 1)), draw(st.integers(0, 99)),
    )  # fmt: skip
    mask = masks.blocks(keep, (bq, bk))
    other = draw(
        st.sampled_from(
            [
                masks.causal(M - N),
                masks.window(draw(st.integers(0, 40)), 5),
                masks.prefix(draw(st.integers(0, M))),
                masks.documents(torch.arange(N) // 13, torch.arange(M) // 13),
                masks.dense(random_keep(1, H, N, M, 0.5)),
            ]
        )
    )
    combine = draw(st.sampled_from(["and", "or", "but not", "alone"]))
    combined = {"and": mask & other, "or": mask | other, "but not": mask & ~other, "alone": mask}[combine]
    memory = draw(st.sampled_from([64.0, 0.03]))
    assert_like_reference(combined, inputs(B, H, K, N, M, 4, draw(st.sampled_from([4, 7]))), memory_mb=memory)


@pytest.mark.parametrize("shape", [(0, 5, 5), (1, 0, 5), (1, 5, 0)])
def test_nothing_to_attend_to(shape) -> None:
    B, N, M = shape
    inputs = [torch.randn(B, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (N, M, M)]
    out, lse = blocksparse_attend(*inputs, None, return_lse=True)
    assert out.shape == (B, 2, N, 4) and not out.any() and (lse == -torch.inf).all() and lse.dtype == torch.float64
    (out.sum() + lse.sum()).backward()
    assert all(x.grad is not None and not x.grad.any() for x in inputs)
