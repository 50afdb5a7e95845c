"""SMAFormer: the modulator at its limits, which axis is attended, sizes, the authors' files, loss, bad arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import saccade
from saccade.models.smaformer import (
    ConvolutionalMLP,
    Modulator,
    PatchEmbedding,
    SMAFormer,
    SMAFormerBlock,
    SynergisticAttention,
    segmentation_loss,
    to_map,
    to_tokens,
)

TINY: dict[str, Any] = {"filters": (4, 4, 4, 4, 4, 8), "num_heads": 2, "reduction": 2, "rates": (1, 2)}


def test_rows_of_weights_sum_to_one() -> None:
    torch.manual_seed(0)
    module, x = Modulator(16).eval(), torch.randn(2, 16, 5, 5)
    weights = module.weights(x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 16, 5))
    # by hand, one row of one channel
    pixel, channel = module.pixel_attention(x)[1, 3], module.channel_attention(x)[1, 3]
    scores = torch.stack([(pixel[2] * channel[:, column]).sum() for column in range(5)])
    torch.testing.assert_close(weights[1, 3, 2], scores.softmax(0))


def test_modulator_without_its_last_norm_adds_its_bias() -> None:
    torch.manual_seed(0)
    module, x = Modulator(16).eval(), torch.randn(2, 16, 5, 5)
    nn.init.zeros_(module.norm.weight)
    nn.init.normal_(module.bias)
    torch.testing.assert_close(module(x), x + module.bias)


def test_equal_rows_are_mixed_into_themselves() -> None:
    torch.manual_seed(0)
    module, x = Modulator(4).eval(), torch.randn(2, 4, 5, 5)
    rows = torch.randn(2, 4, 1, 5).expand(-1, -1, 5, -1)
    torch.testing.assert_close(module.weights(x) @ rows, rows)


def test_spatial_attention_is_dilated() -> None:
    torch.manual_seed(0)
    module = Modulator(2, rates=(1, 3)).eval()
    x = torch.zeros(1, 2, 9, 9, requires_grad=True)
    module.spatial_attention(x)[0, 0, 4, 4].backward()
    seen = x.grad[0, 0] != 0
    assert {(int(r) - 4, int(c) - 4) for r, c in seen.nonzero()} <= {
        (reach * r, reach * c) for reach in (1, 3) for r in (-1, 0, 1) for c in (-1, 0, 1)
    }


def test_patch_embedding() -> None:
    torch.manual_seed(0)
    module, x = PatchEmbedding(3, 8), torch.randn(2, 3, 8, 6)
    tokens = module(x)
    assert tokens.shape == (2, 12, 8)
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 12), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.var(-1, correction=0), torch.ones(2, 12), atol=1e-3, rtol=0)


@pytest.mark.parametrize("over", ["tokens", "batch"])
def test_which_axis_is_attended(over: Any) -> None:
    torch.manual_seed(0)
    module = SMAFormerBlock(8, 2, over=over, reduction=2).eval()
    x = torch.randn(3, 9, 8)
    other = x.clone()
    other[2] = torch.randn(9, 8)
    alone = torch.equal(module(x)[0], module(other)[0])
    assert alone == (over == "tokens")
    torch.testing.assert_close(module(x.flip(0)), module(x).flip(0))


@pytest.mark.parametrize("over", ["tokens", "batch"])
def test_attention_is_pytorchs(over: Any) -> None:
    """Queries and keys of one sequence, values of the other."""
    torch.manual_seed(0)
    module, theirs = (
        SynergisticAttention(8, 2, over=over).eval(),
        nn.MultiheadAttention(8, 2, batch_first=over == "tokens"),
    )
    theirs.load_state_dict({
        "in_proj_weight": module.in_proj.weight, "in_proj_bias": module.in_proj.bias,
        "out_proj.weight": module.out_proj.weight, "out_proj.bias": module.out_proj.bias,
    })  # fmt: skip
    x, source = torch.randn(2, 9, 8), torch.randn(2, 9, 8)
    torch.testing.assert_close(module.attention(x, source), theirs(source, source, x)[0])


def test_plain_attention_has_no_modulator() -> None:
    torch.manual_seed(0)
    module, x = SynergisticAttention(8, 2, fusion_gate=False).eval(), torch.randn(2, 7, 8)
    torch.testing.assert_close(module(x), module.attention(x, x))


def test_block_is_post_norm() -> None:
    torch.manual_seed(0)
    block, x, source = SMAFormerBlock(8, 2, reduction=2).eval(), torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    q = block.norm1(block.attention(x, source) + x)
    torch.testing.assert_close(block(x, source), block.norm2(block.mlp(q) + q))
    torch.testing.assert_close(block(x), block(x, x))
    mlp = ConvolutionalMLP(4, 2)
    y = mlp.conv2(mlp.conv1(F.gelu(mlp.fc1(x[..., :4])).transpose(1, 2).reshape(2, 8, 2, 2)))
    torch.testing.assert_close(mlp(x[..., :4]), mlp.fc2(y.reshape(2, 8, 4).transpose(1, 2)))


def test_tokens_and_maps() -> None:
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(to_map(to_tokens(x)), x)
    assert torch.equal(to_map(to_tokens(x), scrambled=True), to_tokens(x).reshape(2, 3, 4, 4))
    with pytest.raises(ValueError, match="square number, got 5"):
        to_map(torch.zeros(1, 5, 2))


@pytest.mark.parametrize("size", [(1, 1), (32, 32), (33, 50), (64, 31)])
def test_sizes(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = SMAFormer(3, **TINY).eval()
    x = torch.randn(2, 3, *size)
    y = model(x).logits
    assert y.shape == (2, 3, *size) and y.isfinite().all()
    if size == (33, 50):
        torch.testing.assert_close(y, model.logits(F.pad(x, (0, 14, 0, 31)))[..., :33, :50])


def test_images_of_a_batch_do_not_meet() -> None:
    torch.manual_seed(0)
    model, x = SMAFormer(3, **TINY).eval(), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x).logits[1:], model(x[1:]).logits, atol=1e-4, rtol=1e-4)
    model.as_released()
    assert (model(x).logits[1:] - model(x[1:]).logits).abs().max() > 1e-3


def test_decoders_second_stage_drops_nothing() -> None:
    model = SMAFormer(3, **TINY, dropout=0.3)
    assert [stage[0].drop.p for stage in (*model.encoder, *model.decoder)] == [0.3] * 5 + [0.0] + [0.3] * 2
    for stage in (*model.encoder, *model.decoder):
        assert stage[0].attention.dropout == 0.1


def test_a_released_file_computes_as_released(tmp_path: Path) -> None:
    """With the leftovers that such a file has."""
    tensors = load_file("tests/golden/smaformer/network.a.safetensors")
    state = {name.removeprefix("param."): t for name, t in tensors.items() if name.startswith("param.")}
    unused = {
        "EncoderBlock1.layers.0.MSA.attention.in_proj_weight": torch.zeros(3),
        "EncoderBlock2.layers.0.e_mlp.feed_forward.0.weight": torch.zeros(3),
        "EncoderBlock2.layers.0.synergistic_multi_attention.combined_modulator.pj_conv.weight": torch.zeros(3),
        "patch_embedding1.CA_fc.0.weight": torch.zeros(3),
        "patch_embedding1.SA_blocks.0.0.weight": torch.zeros(3),
    }
    save_file({**state, **unused}, tmp_path / "released.safetensors")
    filters = (2, 4, 4, 8, 4, 8)
    model = SMAFormer.from_authors(
        tmp_path / "released.safetensors", num_classes=3, filters=filters, num_heads=2, reduction=4
    )
    expected = tensors["output.logits"]
    with torch.no_grad():
        found = model(tensors["input.x"]).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    loaded = saccade.load_authors(
        "smaformer", tmp_path / "released.safetensors", filters=list(filters), heads=2, n_classes=3
    )
    assert isinstance(loaded, SMAFormer) and torch.equal(loaded.head[1].weight, model.head[1].weight)
    with pytest.raises(ValueError, match=r"no place for strange\.weight"):
        saccade.catalogue.port("smaformer", "network").convert({"strange.weight": torch.zeros(1)})


def test_loss() -> None:
    torch.manual_seed(0)
    model, x = SMAFormer(3, **TINY), torch.randn(2, 3, 32, 32)
    labels = torch.randint(3, (2, 32, 32))
    segmentation_loss(model(x), labels, weights=(1, 2, 1)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    output = model(x)
    output.logits = 50.0 * F.one_hot(labels, 3).movedim(-1, 1)
    assert segmentation_loss(output, labels) < 1e-4


def test_refusals() -> None:
    for bad, message in (
        ({"filters": (4, 4)}, "six filters"),
        ({"filters": (4, 4, 4, 4, 4, 4)}, "twice"),
        ({"num_heads": 3}, r"num_heads must divide dim \(4\), got 3"),
        ({"over": "images"}, "over must be one of tokens, batch"),
        ({"expansion": 0}, "expansion must be positive"),
        ({"rates": (0,)}, "rates must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            SMAFormer(3, **{**TINY, **bad})
    with pytest.raises(ValueError, match="images"):
        SMAFormer(3, **TINY)(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match="square map"):
        Modulator(4)(torch.zeros(1, 4, 3, 5))
    with pytest.raises(ValueError, match=r"x and source must be \(batch, tokens, 8\)"):
        SMAFormerBlock(8, 2)(torch.zeros(1, 4, 8), torch.zeros(1, 9, 8))
