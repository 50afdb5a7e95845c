"""Twins: its two attentions at their limits, the position encoding, padding, sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import saccade
from saccade import catalogue
from saccade.layers.positions import ConditionalPosition
from saccade.models.twins import (
    GlobalSubsampledAttention,
    LocallyGroupedAttention,
    Twins,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "twins"


def tiny(**changes: object) -> Twins:
    torch.manual_seed(0)
    arguments = {**catalogue.part("twins").example, **changes}
    return Twins(**arguments).eval()  # type: ignore[arg-type]


def plain(qkv: tuple[Tensor, Tensor], out: nn.Linear, num_heads: int) -> nn.MultiheadAttention:
    layer = nn.MultiheadAttention(out.in_features, num_heads, batch_first=True)
    with torch.no_grad():
        layer.in_proj_weight.copy_(qkv[0])
        layer.in_proj_bias.copy_(qkv[1])
        layer.out_proj.weight.copy_(out.weight)
        layer.out_proj.bias.copy_(out.bias)
    return layer


def packed(module: GlobalSubsampledAttention) -> tuple[Tensor, Tensor]:
    return torch.cat([module.q.weight, module.kv.weight]), torch.cat([module.q.bias, module.kv.bias])


def test_one_window_is_multi_head_attention() -> None:
    torch.manual_seed(0)
    module, x = LocallyGroupedAttention(12, 3, 5), torch.randn(2, 5, 5, 12)
    tokens = x.flatten(1, 2)
    expected = plain((module.qkv.weight, module.qkv.bias), module.proj, 3)(tokens, tokens, tokens)[0]
    torch.testing.assert_close(module(x).flatten(1, 2), expected)


@pytest.mark.parametrize("padding", ["mask", "zeros"])
@pytest.mark.parametrize("size", [(6, 9), (7, 5), (1, 4), (2, 2)])
def test_windows_one_by_one(padding: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module, (H, W) = LocallyGroupedAttention(8, 2, 3, padding=padding, scale=0.3), size
    x = torch.randn(2, H, W, 8)
    # as the segmentation code: filled up after the norm, attention, cut, projection
    filled = F.pad(x, (0, 0, 0, -W % 3, 0, -H % 3))
    real = F.pad(torch.ones(H, W, dtype=torch.bool), (0, -W % 3, 0, -H % 3))
    mixed = torch.zeros_like(filled)
    for i in range(0, filled.shape[1], 3):
        for j in range(0, filled.shape[2], 3):
            window = filled[:, i : i + 3, j : j + 3].reshape(2, 9, 8)
            q, k, v = module.qkv(window).view(2, 9, 3, 2, 4).permute(2, 0, 3, 1, 4)
            seen = real[i : i + 3, j : j + 3].flatten()
            allowed = seen[:, None] == seen if padding == "mask" else torch.ones(9, 9, dtype=torch.bool)
            weights = (0.3 * q @ k.mT).masked_fill(~allowed, -1000).softmax(-1)
            mixed[:, i : i + 3, j : j + 3] = (weights @ v).transpose(1, 2).reshape(2, 3, 3, 8)
    torch.testing.assert_close(module(x), module.proj(mixed[:, :H, :W]))


def test_what_a_token_reaches() -> None:
    torch.manual_seed(0)
    local, everywhere = LocallyGroupedAttention(8, 2, 3), GlobalSubsampledAttention(8, 2, 2)
    x = torch.randn(1, 6, 6, 8)
    changed = x.clone()
    changed[:, 4, 1] += 1
    window = torch.zeros(6, 6, dtype=torch.bool)
    window[3:, :3] = True
    assert torch.equal((local(x) != local(changed)).any(-1)[0], window)
    assert (everywhere(x) != everywhere(changed)).any(-1).all()


def test_representatives_of_single_tokens_are_multi_head_attention() -> None:
    torch.manual_seed(0)
    module, x = GlobalSubsampledAttention(12, 3, 1), torch.randn(2, 4, 7, 12)
    tokens = x.flatten(1, 2)
    torch.testing.assert_close(
        module(x).flatten(1, 2), plain(packed(module), module.proj, 3)(tokens, tokens, tokens)[0]
    )


def test_averaging_representatives() -> None:
    torch.manual_seed(0)
    module, x = GlobalSubsampledAttention(12, 3, 2), torch.randn(2, 4, 7, 12)
    assert module.reduce is not None
    with torch.no_grad():
        module.reduce.weight.copy_(torch.eye(12)[:, :, None, None].expand(-1, -1, 2, 2) / 4)
        module.reduce.bias.zero_()
    means = x[:, :, :6].unflatten(1, (2, 2)).unflatten(3, (3, 2)).mean((2, 4)).flatten(1, 2)  # the odd column is left
    keys = F.layer_norm(means, (12,))
    torch.testing.assert_close(module.representatives(x), keys)
    expected = plain(packed(module), module.proj, 3)(x.flatten(1, 2), keys, keys)[0]
    torch.testing.assert_close(module(x).flatten(1, 2), expected)


def test_position_encoding() -> None:
    torch.manual_seed(0)
    module, x = ConditionalPosition(6), torch.randn(2, 7, 8, 6)
    moved = module(x.roll((1, 2), (1, 2)))
    torch.testing.assert_close(moved[:, 2:-1, 3:-1], module(x).roll((1, 2), (1, 2))[:, 2:-1, 3:-1])
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    assert torch.equal(module(x), x)


def test_positions_are_known_by_the_encoding_alone() -> None:
    model = tiny(windows=None, dims=(8,), num_heads=(2,), depths=(2,), mlp_ratios=(2,), reductions=(1,))
    x = torch.randn(1, 3, 16, 16)
    swapped = x.view(1, 3, 4, 4, 16).flip(2).reshape(x.shape)  # rows of patches, turned over
    unequal = (model(x).features[0].flip(2) - model(swapped).features[0]).abs().max()
    position = model.stages[0].position
    nn.init.zeros_(position.weight)
    torch.testing.assert_close(model(x).features[0].flip(2), model(swapped).features[0])
    assert unequal > 1e-2


@pytest.mark.parametrize("windows", [(3, 2), (1, 2), None])
@pytest.mark.parametrize("size", [(32, 48), (37, 41), (3, 70)])
def test_pyramid(windows: tuple[int, int] | None, size: tuple[int, int]) -> None:
    model = tiny(windows=windows)
    out = model(torch.randn(2, 3, *size))
    expected = [(2, c, max(1, size[0] // s), max(1, size[1] // s)) for c, s in zip(model.channels, model.strides)]
    assert [tuple(m.shape) for m in out.features] == expected
    assert out.logits is not None and out.logits.shape == (2, 5)
    kinds = {type(block.attention) for block in model.stages[0].blocks}
    assert (LocallyGroupedAttention in kinds) == (windows == (3, 2))


def test_windows_alone_see_no_further() -> None:
    model = tiny(dims=(8,), num_heads=(2,), depths=(2,), mlp_ratios=(2,), reductions=(2,), windows=(4,))
    alone = tiny(
        dims=(8,), num_heads=(2,), depths=(2,), mlp_ratios=(2,), reductions=(2,), windows=(4,), global_attention=False
    )
    for network, reached in ((model, True), (alone, False)):
        x = torch.randn(1, 3, 64, 64, requires_grad=True)
        network(x).features[0][0, :, 0, 0].square().sum().backward()
        assert bool((x.grad[:, :, 40:, 40:] != 0).any()) == reached


def test_options() -> None:
    normed, model = tiny(stage_norm=True), tiny()
    normed.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(1, 3, 24, 24)
    for ours, expected in zip(normed(x).features, model(x).features):
        torch.testing.assert_close(
            ours, F.layer_norm(expected.permute(0, 2, 3, 1), ours.shape[1:2]).permute(0, 3, 1, 2)
        )
    assert tiny(num_classes=0)(x).logits is None
    assert {name.rpartition(".")[0] for name in model.no_weight_decay()} == {"stages.0.position", "stages.1.position"}
    dropped = tiny(drop_path=0.5)
    rates = [block.drop_path.rate for stage in dropped.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 1 / 6, 1 / 3, 0.5])
    torch.testing.assert_close(dropped(x).logits, model(x).logits)
    dropped.train()
    assert not torch.equal(dropped(x).logits, dropped(x).logits)


def test_initialisation() -> None:
    model = tiny(dims=(32, 64), num_heads=(1, 2))
    position, embed = model.stages[1].position, model.stages[1].embed.proj
    assert position.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.15)
    assert embed.weight.std().item() == pytest.approx((2 / (4 * 64)) ** 0.5, rel=0.05)
    assert model.stages[1].blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


PARAMETERS = {
    "Twins-PCPVT-S": 24_106_216,
    "Twins-PCPVT-B": 43_828_456,
    "Twins-PCPVT-L": 60_989_672,
    "Twins-SVT-S": 24_060_776,
    "Twins-SVT-B": 56_070_952,
    "Twins-SVT-L": 99_271_400,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes_exactly(name: str) -> None:
    with torch.device("meta"):
        model, image = Twins.from_config(name).eval(), torch.empty(1, 3, 224, 224)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    counts = {str(operation): n / 2e9 for operation, n in counter.get_flop_counts()["Global"].items()}
    # the paper's table is of convolutions and linear layers, to one digit
    plain = sum(n for operation, n in counts.items() if "convolution" in operation or "addmm" in operation)
    size = next(s for s in catalogue.part("twins").published if s.name == name)
    assert size.flops == pytest.approx(plain, abs=0.05)


@pytest.mark.parametrize(
    ("module", "changes"),
    [
        ("svt", {"wss": [1, 4, 2, 2], "num_classes": 0, "in_chans": 1, "qk_scale": 0.3, "qkv_bias": False}),
        ("pcpvt", {"patch_size": 2, "sr_ratios": [1, 2, 2, 1], "norm_layer": "LayerNorm eps 1e-5"}),
    ],
)
def test_ports_take_other_arguments(module: str, changes: dict[str, object]) -> None:
    with safe_open(GOLDEN / f"{module}.a.safetensors", "pt") as file:
        arguments = json.loads(file.metadata()["args"])
    port = catalogue.port("twins", module)
    model = port.build({**arguments, **changes}).eval()
    images = torch.randn(1, changes.get("in_chans", 3), 64, 64)  # type: ignore[call-overload]
    out = port.run(model, {"x": images}, arguments)
    assert out["features"].shape == (1, 32) and out["logits"].shape[1] == (changes.get("num_classes", 5) or 32)
    if module == "svt":
        first = model.stages[0].blocks[0].attention
        assert isinstance(first, GlobalSubsampledAttention) and first.q.bias is None and first.scale == 0.3
    else:
        assert model.stages[0].blocks[0].attention.reduce is None
        assert model.norm.eps == model.stages[0].blocks[0].norm2.eps == 1e-5


def test_refusals() -> None:
    for changes, message in (
        ({"dims": (8,)}, "one entry per stage"),
        ({"depths": (0, 1)}, "depths"),
        ({"num_heads": (3, 2)}, "num_heads"),
        ({"reductions": (0, 1)}, "reduction"),
        ({"windows": (0, 1)}, "window"),
        ({"padding": "same"}, "padding"),
        ({"drop_path": 1.0}, "drop_path"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(**changes)
    with pytest.raises(ValueError, match="images"):
        tiny()(torch.rand(1, 4, 8, 8))
    with pytest.raises(ValueError, match="Twins-SVT-S"):
        Twins.from_config("Twins-XL")
    for module in (LocallyGroupedAttention(8, 2, 3), GlobalSubsampledAttention(8, 2, 2)):
        with pytest.raises(ValueError, match="height"):
            module(torch.randn(2, 9, 8))


def test_created_by_name() -> None:
    assert isinstance(saccade.create("twins", **catalogue.part("twins").example), Twins)
