"""LIT: merging with and without offsets, blocks without attention, biases by position, sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from saccade import catalogue
from saccade.models.lit import LIT, DeformableTokenMerging, RelativeAttention
from saccade.report.sizes import count

GOLDEN = Path(__file__).parents[1] / "golden" / "lit"


def tiny(**changes: object) -> LIT:
    torch.manual_seed(0)
    arguments = {**catalogue.part("lit").example, **changes}
    return LIT(**arguments).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("training", [True, False])
def test_merging_starts_as_a_convolution(training: bool) -> None:
    torch.manual_seed(0)
    module, x = DeformableTokenMerging(6, 10).train(training), torch.randn(2, 6, 8, 4)
    nn.init.uniform_(module.norm.running_var, 0.5, 2)
    norm = F.batch_norm(
        module.conv(x),
        None if training else module.norm.running_mean,
        None if training else module.norm.running_var,
        training=training,
    )
    torch.testing.assert_close(module(x), F.gelu(norm))
    plain = DeformableTokenMerging(6, 10, deformable=False).train(training)
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if "offset" not in k})
    torch.testing.assert_close(plain(x), module(x), atol=1e-3, rtol=1e-3)
    assert plain.offsets(x) is None


def test_whole_offsets_read_shifted_pixels() -> None:
    torch.manual_seed(0)
    module, x = DeformableTokenMerging(3, 5).eval(), torch.randn(1, 3, 6, 8)
    assert module.offset_conv is not None
    with torch.no_grad():  # taps in row-major order, dy before dx: the left taps read their right neighbours
        module.offset_conv.bias.copy_(torch.tensor([0.0, 1, 0, 0, 0, 1, 0, 0]))
    doubled = x.clone()
    doubled[..., ::2] = x[..., 1::2]
    torch.testing.assert_close(module(x), F.gelu(module.norm(module.conv(doubled))))
    with torch.no_grad():  # all one row up, zeros above the map
        module.offset_conv.bias.copy_(torch.tensor([-1.0, 0, -1, 0, -1, 0, -1, 0]))
    up = F.pad(x, (0, 0, 1, 0))[:, :, :-1]
    torch.testing.assert_close(module(x), F.gelu(module.norm(module.conv(up))))


def test_odd_maps_are_filled_up() -> None:
    torch.manual_seed(0)
    module, x = DeformableTokenMerging(4).eval(), torch.randn(1, 4, 5, 1)
    nn.init.normal_(module.offset_conv.weight, std=0.1)  # type: ignore[union-attr]
    assert module(x).shape == (1, 8, 3, 1)
    torch.testing.assert_close(module(x), module(F.pad(x, (0, 1, 0, 1))))


def test_stages_without_attention_mix_nothing() -> None:
    model = tiny(depths=(2, 1))
    x = torch.randn(1, 6, 6, 8, requires_grad=True)
    model.stages[0](x)[0, 2, 3].square().sum().backward()
    touched = (x.grad != 0).any(-1)[0]
    assert touched[2, 3] and touched.sum() == 1
    y = torch.randn(1, 3, 3, 16, requires_grad=True)
    model.stages[1](y)[0, 1, 1].square().sum().backward()
    assert (y.grad != 0).any(-1).all()
    names = [name for name, _ in model.stages[0].named_parameters()]
    assert names and not any("norm1" in name or "attention" in name for name in names)


def test_attention_with_zero_biases_is_multi_head_attention() -> None:
    torch.manual_seed(0)
    module, x = RelativeAttention(12, 3, (3, 4)), torch.randn(2, 3, 4, 12)
    layer = nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        layer.in_proj_weight.copy_(module.qkv.weight)
        layer.in_proj_bias.copy_(module.qkv.bias)
        layer.out_proj.load_state_dict(module.proj.state_dict())
    tokens, table = x.flatten(1, 2), module.relative_position_bias_table
    nn.init.normal_(table)
    # entry by entry: the row (dy + H - 1) (2 W - 1) + dx + W - 1 of query - key
    places = [(i, j) for i in range(3) for j in range(4)]
    index = torch.tensor([[(a - c + 2) * 7 + b - d + 3 for c, d in places] for a, b in places])
    bias = table[index].permute(2, 0, 1)
    torch.testing.assert_close(module.bias((3, 4)), bias)
    expected = layer(tokens, tokens, tokens, attn_mask=bias.repeat(2, 1, 1))[0]
    torch.testing.assert_close(module(x).flatten(1, 2), expected)
    nn.init.zeros_(table)
    torch.testing.assert_close(module(x).flatten(1, 2), layer(tokens, tokens, tokens)[0])


def test_tables_are_stretched() -> None:
    module = RelativeAttention(4, 1, (4, 4))
    with torch.no_grad():  # a ramp in dy stays one
        module.relative_position_bias_table.copy_(torch.arange(-3.0, 4).repeat_interleave(7)[:, None])
    bias = module.bias((8, 2))[0].view(8, 2, 8, 2)
    assert bias.shape == (8, 2, 8, 2)
    torch.testing.assert_close(bias[4, 0, 4, 1], torch.tensor(0.0))
    # torch's cubic kernel bends lines a little
    torch.testing.assert_close(bias[5, 0, 4, 0], torch.tensor(7 / 15), atol=0.01, rtol=0)
    assert bias[7, 0, 0, 0] > bias[4, 0, 0, 0] > 0


@pytest.mark.parametrize("attention", [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("size", [(24, 24), (16, 40), (13, 3)])
def test_pyramid(attention: tuple[bool, bool], size: tuple[int, int]) -> None:
    model = tiny(attention=attention)
    out = model(torch.randn(2, 3, *size))
    expected = [(2, c, -(-size[0] // s), -(-size[1] // s)) for c, s in zip(model.channels, model.strides)]
    assert [tuple(m.shape) for m in out.features] == expected
    assert out.logits is not None and out.logits.shape == (2, 5)
    assert tiny(num_classes=0)(torch.randn(1, 3, *size)).logits is None


def test_training_options() -> None:
    model = tiny(drop_path=0.5, depths=(1, 2))
    assert [b.drop_path.rate for stage in model.stages for b in stage] == pytest.approx([0, 0.25, 0.5])
    assert sum(p.numel() for p in model.offset_parameters()) == 8 * 8 * 4 + 8
    assert not any(p.any() for p in model.offset_parameters())
    x = torch.randn(4, 3, 24, 24)
    assert torch.equal(model(x).logits, model(x).logits)
    model.train()
    assert not torch.equal(model(x).logits, model(x).logits)


@pytest.mark.parametrize(("name", "parameters"), [("LIT-S", 27_973_720), ("LIT-M", 49_372_264), ("LIT-B", 87_292_384)])
def test_published_sizes_exactly(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = LIT.from_config(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_smallest_size() -> None:
    """19 M in the authors' README, which counts less than their code at every size; 3.6 thousand million FLOPs."""
    size = count("lit", "LIT-Ti")
    assert size.flops == pytest.approx(3.6, rel=0.01)
    widths, hidden, depths, tokens = (64, 128, 320, 512), (512, 1024, 1280, 2048), (3, 4, 6, 3), (3136, 784, 196, 50)
    expected = 3 * 16 * 64 + 64 + 2 * 64 + 512 + 2 * 512 + 512 * 1000 + 1000  # embedding, class token, norm, head
    for i, (c, r, depth, n) in enumerate(zip(widths, hidden, depths, tokens)):
        expected += depth * (2 * c * r + r + c + 2 * c) + n * c
        if i > 1:
            expected += depth * (4 * c * c + 4 * c + 2 * c)
    for fine, coarse in zip(widths, widths[1:]):
        expected += 4 * fine * coarse + 3 * coarse + 4 * fine * 8 + 8
    assert size.parameters * 1e6 == expected


@pytest.mark.parametrize("size", [(24, 24), (16, 40), (13, 3)])
def test_positions_and_class_token(size: tuple[int, int]) -> None:
    model = tiny(dim=(8, 24), mlp_ratio=(3, 2), num_heads=(1, 2), positions="absolute", class_token=True)
    assert model.stages[0][0].mlp.fc1.out_features == 24 and model.stages[1][0].mlp.fc1.out_features == 48
    assert [tuple(p.shape) for p in model.positions] == [(36, 8), (10, 24)]
    x = torch.randn(2, 3, *size)
    maps, token = model.pyramid(x)
    assert [tuple(m.shape) for m in maps] == [
        (2, c, -(-size[0] // s), -(-size[1] // s)) for c, s in zip(model.channels, model.strides)
    ]
    assert all(torch.equal(a, b) for a, b in zip(maps, model.features(x)))
    torch.testing.assert_close(model(x).logits, model.head(model.norm(token)))
    # the token sees the map of the last stage, and that map the token
    fine = torch.autograd.grad(token.square().sum(), model.stages[0].parameters(), retain_graph=True)
    assert all(g.abs().sum() > 0 for g in fine)
    (of_token,) = torch.autograd.grad(maps[1].square().sum(), model.class_token, retain_graph=True)
    assert of_token.any()
    assert torch.autograd.grad(maps[0].sum(), model.class_token, allow_unused=True) == (None,)
    with pytest.raises(ValueError, match="pyramid"):
        model.classify(maps[-1])


def test_last_stage_with_a_class_token_is_a_transformer_of_tokens() -> None:
    """Token by token: the class token first, positions added, one block of multi-head attention and MLP."""
    model = tiny(dim=8, positions="absolute", class_token=True)
    block, x = model.stages[1][0], torch.randn(2, 3, 24, 24)
    maps, token = model.pyramid(x)
    merged = model.mergings[0](maps[0]).flatten(2).mT
    tokens = torch.cat([model.class_token.expand(2, 1, -1), merged], 1) + model.positions[1]
    layer = nn.MultiheadAttention(16, 2, batch_first=True)
    with torch.no_grad():
        layer.in_proj_weight.copy_(block.attention.qkv.weight)
        layer.in_proj_bias.copy_(block.attention.qkv.bias)
        layer.out_proj.load_state_dict(block.attention.proj.state_dict())
    y = block.norm1(tokens)
    tokens = tokens + layer(y, y, y)[0]
    tokens = tokens + block.mlp(block.norm2(tokens))
    torch.testing.assert_close(token, tokens[:, 0])
    torch.testing.assert_close(maps[1].flatten(2).mT, tokens[:, 1:])


def test_port_takes_other_arguments() -> None:
    with safe_open(GOLDEN / "lit.a.safetensors", "pt") as file:
        arguments = json.loads(file.metadata()["args"])
    port = catalogue.port("lit", "lit")
    changes = {"has_msa": [1, 0, 1, 0], "qkv_bias": False, "qk_scale": 0.3, "num_classes": 0, "in_chans": 1}
    model = port.build({**arguments, **changes, "img_size": [64, 32]}).eval()
    assert [stage[0].attention is not None for stage in model.stages] == [True, False, True, False]
    first = model.stages[0][0].attention
    assert first.qkv.bias is None and first.scale == 0.3 and first.map_size == (16, 8)
    out = port.run(model, {"x": torch.randn(1, 1, 64, 32)}, arguments)
    assert out["features"].shape == out["logits"].shape == (1, 64)


def test_refusals() -> None:
    for changes, message in (
        ({"depths": (1,)}, "one entry per stage"),
        ({"depths": (0, 1)}, "depths"),
        ({"num_heads": (1, 3)}, "num_heads"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"image_size": 0}, "image_size"),
        ({"dim": (8, 16, 32)}, "dim and mlp_ratio"),
        ({"mlp_ratio": (2,)}, "dim and mlp_ratio"),
        ({"positions": "rotary"}, "positions"),
        ({"class_token": True}, "class_token"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(**changes)
    with pytest.raises(ValueError, match="images"):
        tiny()(torch.rand(1, 4, 8, 8))
    with pytest.raises(ValueError, match="dim"):
        DeformableTokenMerging(0)
