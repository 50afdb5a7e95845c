from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade
from saccade.attention.block_sparse_vggt import (
    BlockSparseGlobalAttention,
    GlobalAttention,
    block_sparse_vggt_attend,
    retrofit_global_attention,
    vggt_block_map,
)
from saccade.ops.attend import attend
from saccade.ops.hilbert import hilbert_order

SMALL = {"block_q": 16, "block_k": 8}


def heads(frames: int = 3, patches: int = 32, special: int = 5, *, H: int = 2, K: int | None = None) -> tuple:
    torch.manual_seed(patches)
    N = frames * (special + patches)
    return torch.randn(2, H, N, 8), torch.randn(2, K or H, N, 8), torch.randn(2, K or H, N, 8)


def positions(frames: int, rows: int, columns: int, special: int = 5) -> Tensor:
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) + 1
    frame = torch.cat([torch.zeros(special, 2, dtype=torch.long), grid])
    return frame.repeat(frames, 1)[None]


@pytest.mark.parametrize("patches", [0, 1, 13, 32])
@pytest.mark.parametrize("options", [{"cdf_threshold": 1.0}, {"sparse_ratio": 0.0}, {"top_k": 99}])
def test_keeping_everything_is_dense_attention(patches: int, options: dict[str, float]) -> None:
    q, k, v = heads(patches=patches, H=4, K=2)
    dense = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    for more in ({}, {"packed": True}, {"order": torch.arange(patches).flip(0)}):
        out = block_sparse_vggt_attend(q, k, v, frames=3, **SMALL, **options, **more)
        torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("patches", [13, 32])
@pytest.mark.parametrize("special", [0, 1, 5])
@pytest.mark.parametrize("curve", [False, True])
def test_the_output_is_masked_attention_with_the_map(patches: int, special: int, curve: bool) -> None:
    q, k, v = heads(patches=patches, special=special, H=4, K=2)
    order = torch.randperm(patches) if curve else None
    for packed in (False, True):
        out, kept = block_sparse_vggt_attend(
            q, k, v, frames=3, special_tokens=special, top_k=2, order=order, packed=packed, return_map=True, **SMALL
        )
        N = q.shape[2]
        expected = attend(q, k, v, mask=kept.dense(N, N), backend="reference")
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        assert not kept.dense(N, N).all() and kept.to("cpu").batch == 2 and "frame_blocks" in repr(kept)


def test_the_map_in_words() -> None:
    """The mask says what the paper's sentence says, token by token."""
    q, k, v = heads(patches=16)
    _, kept = block_sparse_vggt_attend(q, k, v, frames=3, top_k=1, return_map=True, **SMALL)
    allowed = kept.dense(63, 63)
    blocks = kept.keep_BHnm[..., : 48 // 8]
    for i in range(63):
        for j in range(63):
            if i % 21 < 5 or j % 21 < 5:
                assert allowed[:, :, i, j].all()
            else:
                patch_i, patch_j = (t // 21 * 16 + t % 21 - 5 for t in (i, j))
                assert torch.equal(allowed[:, :, i, j], blocks[:, :, patch_i // 16, patch_j // 8])


def test_rows_of_special_tokens_are_those_of_dense_attention() -> None:
    q, k, v = heads()
    dense = attend(q, k, v)
    special = torch.arange(q.shape[2]) % 37 < 5
    for options in ({"top_k": 1}, {"cdf_threshold": 0.3}, {"sparse_ratio": 0.9, "pool": "max"}):
        out = block_sparse_vggt_attend(q, k, v, frames=3, **SMALL, **options)
        torch.testing.assert_close(out[:, :, special], dense[:, :, special], atol=1e-5, rtol=1e-5)
        assert (out - dense)[:, :, ~special].abs().max() > 1e-3


@pytest.mark.parametrize("patches", [13, 32])
def test_patches_see_all_special_keys(patches: int) -> None:
    q, k, v = heads(patches=patches)
    _, kept = block_sparse_vggt_attend(q, k, v, frames=3, top_k=1, return_map=True, **SMALL)
    N = q.shape[2]
    assert kept.dense(N, N)[..., torch.arange(N) % (5 + patches) < 5].all()
    _, packed = block_sparse_vggt_attend(q, k, v, frames=3, top_k=1, packed=True, return_map=True, **SMALL)
    assert packed.dense(N, N)[..., torch.arange(N) % (5 + patches) < 5].all() == (patches == 32)


def test_counts_follow_the_definition() -> None:
    q, k, _ = heads(frames=1, patches=100, special=0)
    n, m = 7, 13
    q_means, k_means = (torch.stack([b.mean(2) for b in x.split(size, 2)], 2) for x, size in ((q, 16), (k, 8)))
    share = (q_means @ k_means.mT / math.sqrt(8)).softmax(-1)
    counts = (share.sort(-1, descending=True).values.cumsum(-1) <= 0.6 + 1e-5).sum(-1)
    options = {"cdf": {"cdf_threshold": 0.6}, "ratio": {"sparse_ratio": 0.7}, "top": {"top_k": 4}}
    keep = {name: vggt_block_map(q, k, **SMALL, **more) for name, more in options.items()}
    keep["both"] = vggt_block_map(q, k, cdf_threshold=0.6, sparse_ratio=0.7, **SMALL)
    assert keep["cdf"].shape == (2, 2, n, m)
    assert torch.equal(keep["cdf"].sum(-1), counts.clamp(min=1))
    assert (keep["ratio"].sum(-1) == int(m * (1 - 0.7))).all() and (keep["top"].sum(-1) == 4).all()
    assert torch.equal(keep["both"], keep["cdf"] | keep["ratio"])
    own = vggt_block_map(q, k, cdf_threshold=(0.0, 0.6), **SMALL)
    assert torch.equal(own[:, 1], keep["cdf"][:, 1]) and (own[:, 0].sum(-1) == 1).all()
    assert (vggt_block_map(q, k, cdf_threshold=0.0, **SMALL).sum(-1) == 1).all()
    assert (vggt_block_map(q, k, sparse_ratio=1.0, **SMALL).sum(-1) == 1).all()
    for row, expected in zip(keep["top"].flatten(0, 2), share.topk(4, -1).indices.flatten(0, 2), strict=True):
        assert row.nonzero()[:, 0].tolist() == sorted(expected.tolist())
    largest = vggt_block_map(q, k, top_k=1, pool="max", **SMALL).int().argmax(-1)
    q_max, k_max = (torch.stack([b.amax(2) for b in x.split(size, 2)], 2) for x, size in ((q, 16), (k, 8)))
    assert torch.equal(largest, (q_max @ k_max.mT).argmax(-1))


def test_a_larger_tau_keeps_a_superset_at_a_smaller_error() -> None:
    q, k, v = (3 * x for x in heads())
    dense, before, errors = attend(q, k, v), None, []
    for tau in (0.2, 0.5, 0.8, 0.99):
        out, kept = block_sparse_vggt_attend(q, k, v, frames=3, cdf_threshold=tau, return_map=True, **SMALL)
        assert before is None or not (before & ~kept.keep_BHnm).any()
        before = kept.keep_BHnm
        errors.append(float((out - dense).abs().sum()))
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1]


def test_permuting_frames_of_whole_blocks_permutes_the_output() -> None:
    torch.manual_seed(0)
    layer = BlockSparseGlobalAttention(32, 4, tokens_per_frame=37, top_k=3, rope=True, **SMALL)
    x, pos = torch.randn(1, 3 * 37, 32), positions(3, 4, 8)
    order = torch.cat([torch.arange(37) + 37 * f for f in (2, 0, 1)])
    out = layer(x, pos=pos)
    torch.testing.assert_close(layer(x[:, order], pos=pos[:, order]), out[:, order], atol=1e-5, rtol=1e-5)


def test_a_curve_over_the_patches() -> None:
    q, k, v = heads()
    order = hilbert_order((4, 8))
    assert torch.equal(torch.arange(32)[order][order.argsort()], torch.arange(32))
    dense, plain = attend(q, k, v), block_sparse_vggt_attend(q, k, v, frames=3, top_k=2, **SMALL)
    out = block_sparse_vggt_attend(q, k, v, frames=3, top_k=2, order=order, **SMALL)
    special = torch.arange(q.shape[2]) % 37 < 5
    torch.testing.assert_close(out[:, :, special], dense[:, :, special], atol=1e-5, rtol=1e-5)
    assert (out - plain).abs().max() > 1e-3

    # the same as patches that stand in the curve's order to begin with
    def curved(x: Tensor) -> Tensor:
        x = x.unflatten(2, (3, 37))
        return torch.cat([x[:, :, :, :5], x[:, :, :, 5:][:, :, :, order]], 3).flatten(2, 3)

    there = block_sparse_vggt_attend(*(curved(x) for x in (q, k, v)), frames=3, top_k=2, **SMALL)
    torch.testing.assert_close(curved(out), there, atol=1e-5, rtol=1e-5)
    layer = BlockSparseGlobalAttention(16, 2, tokens_per_frame=37, grid=(4, 8), top_k=2, **SMALL)
    assert torch.equal(layer.order, order) and "order" not in layer.state_dict()


def test_gradients_flow_through_the_kept_blocks() -> None:
    q, k, v = (x.double().requires_grad_() for x in heads(patches=13))
    out, kept = block_sparse_vggt_attend(q, k, v, frames=3, top_k=2, return_map=True, **SMALL)
    expected = attend(q, k, v, mask=kept.dense(54, 54), backend="reference")
    grad = torch.randn_like(out)
    for ours, theirs in zip(*(torch.autograd.grad(x, (q, k, v), grad) for x in (out, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = GlobalAttention(32, 4, rope=True, rope_base=100.0)

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        return x + self.attn(x, pos=pos)


class Aggregator(nn.Module):
    """A VGGT-like tree: attention within frames and over all of them, in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.frame_blocks = nn.ModuleList(Block() for _ in range(2))
        self.global_blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        for within, over in zip(self.frame_blocks, self.global_blocks, strict=True):
            x = within(x.unflatten(1, (3, -1)).flatten(0, 1), pos.unflatten(1, (3, -1)).flatten(0, 1))
            x = over(x.unflatten(0, (-1, 3)).flatten(1, 2), pos)
        return x


def test_retrofit() -> None:
    torch.manual_seed(0)
    model = Aggregator().eval()
    x, pos = torch.randn(1, 3 * 37, 32), positions(3, 4, 8)
    weights, dense = {name: p for name, p in model.named_parameters()}, model(x, pos)
    found = retrofit_global_attention(model, sparse_ratio=0.0, **SMALL)
    assert list(found) == ["global_blocks.0.attn", "global_blocks.1.attn"]
    assert all(weights[name] is p for name, p in model.named_parameters()) and len(weights) == len(model.state_dict())
    assert (
        isinstance(model.global_blocks[0].attn, BlockSparseGlobalAttention) and not model.global_blocks[0].attn.training
    )
    assert model.global_blocks[0].attn.rope.base == 100.0
    assert type(model.frame_blocks[0].attn) is GlobalAttention
    torch.testing.assert_close(model(x, pos), dense, atol=1e-5, rtol=1e-5)
    for path, layer in found.items():
        model.set_submodule(path, layer)
    assert torch.equal(model(x, pos), dense)
    retrofit_global_attention(model, "global_blocks.1.attn", top_k=1, **SMALL)
    assert type(model.global_blocks[0].attn) is GlobalAttention
    # the frames are read from the positions, or said
    sparse = model(x, pos)
    model.global_blocks[1].attn.tokens_per_frame = 37
    assert torch.equal(model(x, pos), sparse) and (sparse - dense).abs().max() > 1e-3
    with pytest.raises(ValueError, match="no module's path fits 'decoder"):
        retrofit_global_attention(model, "decoder.*")
    with pytest.raises(ValueError, match="Linear is no VGGT-style attention: it has no qkv, proj, num_heads"):
        retrofit_global_attention(model, "frame_blocks.0.attn.proj")


def test_the_effective_weights_are_those_of_the_map() -> None:
    torch.manual_seed(0)
    layer = BlockSparseGlobalAttention(32, 4, tokens_per_frame=21, top_k=1, **SMALL)
    x = torch.randn(1, 42, 32)
    weights = saccade.attention_map(layer, x)
    q, k, v = layer._project(x, None)
    _, kept = block_sparse_vggt_attend(q, k, v, frames=2, return_map=True, **layer.options)
    assert torch.equal(weights > 0, kept.dense(42, 42))
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 42))


def test_in_a_transformers_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=24, patch_size=4
    )
    model, images = transformers.ViTModel(config).eval(), torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        dense = model(images).last_hidden_state
        options = {"special_tokens": 1, "block_q": 8, "block_k": 4}
        with saccade.switch(model, "block-sparse-vggt", report=True, cdf_threshold=1.0, **options) as report:
            torch.testing.assert_close(model(images).last_hidden_state, dense, atol=1e-4, rtol=0)
        assert report.density == 1.0
        with saccade.switch(model, "block-sparse-vggt", report=True, top_k=3, **options) as report:
            assert (model(images).last_hidden_state - dense).abs().max() > 1e-3
    # a special row, and 36 rows of 3 blocks of 4 keys and the special one
    assert report.density == pytest.approx((37 + 36 * 13) / 37**2)


def test_half_precision() -> None:
    q, k, v = heads()
    out = block_sparse_vggt_attend(*(x.bfloat16() for x in (q, k, v)), frames=3, cdf_threshold=1.0, **SMALL)
    exact = attend(q, k, v)
    assert out.dtype == torch.bfloat16 and (out.float() - exact).abs().sum() / exact.abs().sum() < 0.02


def test_bad_arguments() -> None:
    q, k, v = heads()
    for bad, message in (
        ({"frames": 2}, r"frames must divide the number of tokens \(111\), got 2"),
        ({"special_tokens": -1}, "special_tokens must not be negative"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_k": 2, "cdf_threshold": 0.9}, "either top_k"),
        ({"sparse_ratio": 1.5}, "sparse_ratio must be from 0 to 1"),
        ({"cdf_threshold": -0.5}, "cdf_threshold must be a number of at least 0"),
        ({"block_k": 0}, "at least 1"),
        ({"pool": "median"}, "mode must be"),
        ({"order": torch.arange(3)}, "order must be a permutation of a frame's 32 patches"),
        ({"causal": True}, "bidirectional"),
    ):
        with pytest.raises(ValueError, match=message):
            block_sparse_vggt_attend(q, k, v, **{"frames": 3, **bad})
    with pytest.raises(ValueError, match="do not fit"):
        block_sparse_vggt_attend(q, k[:, :, :-1], v)
    with pytest.raises(ValueError, match="4 axes"):
        block_sparse_vggt_attend(q[0], k, v)
    x = torch.randn(1, 37, 32)
    layer = BlockSparseGlobalAttention(32, 4, tokens_per_frame=36, rope=True)
    for call, message in (
        ({}, "need pos"),
        ({"pos": positions(1, 4, 8)}, "frames of 36, got 37"),
        ({"pos": positions(1, 4, 7)}, "pos must be"),
        ({"mask": torch.ones(1, 37, dtype=torch.bool)}, "takes no mask"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x, **call)
    for bad, message in (
        ({"causal": True}, "bidirectional"),
        ({"num_heads": 5}, "num_heads must divide dim"),
        ({"num_heads": 16, "rope": True}, "multiple of 4"),
        ({"tokens_per_frame": 0}, "tokens_per_frame must be at least 1"),
        ({"top_k": 0}, "top_k must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            BlockSparseGlobalAttention(32, **bad)
