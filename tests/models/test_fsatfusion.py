"""FSATFusion: its basis, its gates, what tokens see of each other, its losses, the authors' weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from saccade import catalogue
from saccade.models.fsatfusion import (
    TOP_COLUMNS,
    TOP_ROWS,
    FrequencyChannelGate,
    FrequencySpatialAttention,
    FSATFusion,
    FSATLayer,
    MeanTransformerBlock,
    fusion_loss,
    gradient_loss,
    structure_loss,
)
from saccade.ops.frequency import cosine_basis

GOLDEN = Path(__file__).parent.parent / "golden" / "fsatfusion"


def test_the_frequencies_are_the_authors() -> None:
    assert len(set(zip(TOP_ROWS, TOP_COLUMNS))) == 32
    gate = FrequencyChannelGate(16, grid=(14, 14))
    recorded = load_file(GOLDEN / "fca.a.safetensors")["param.dct_layer.weight"]
    rows, columns = (cosine_basis(f, 14).float() for f in (gate.rows, gate.columns))
    torch.testing.assert_close(rows[:, :, None] * columns[:, None], recorded, atol=1e-6, rtol=0)


def test_neighbouring_channels_share_a_frequency() -> None:
    gate = FrequencyChannelGate(12, grid=(14, 7), frequencies=4, reduction=2)
    assert gate.rows == [0, 0, 0, 0, 0, 0, 12, 12, 12, 0, 0, 0] and gate.columns == [0, 0, 0, 1, 1, 1, 0, 0, 0, 5, 5, 5]


@pytest.mark.parametrize("size", [(1, 1), (12, 8), (30, 17)])
def test_no_value_becomes_larger(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module, x = FrequencySpatialAttention(), 5 * torch.randn(2, 16, *size)
    y = module(x)
    assert (y.abs() <= x.abs()).all() and (y * x >= 0).all()


def test_tokens_meet_in_the_mean_alone() -> None:
    torch.manual_seed(0)
    block = MeanTransformerBlock().eval()
    x = torch.randn(1, 16, 5, 6)
    other = x.clone()
    other[:, :, 2, 3] = torch.randn(1, 16)
    moved = (block(other) - block(x)).flatten(2)
    elsewhere = moved[..., torch.arange(30) != 15]
    assert elsewhere.abs().max() > 1e-4  # all by the same, half the change of a mean over 30
    torch.testing.assert_close(elsewhere, elsewhere[..., :1].expand_as(elsewhere), atol=1e-5, rtol=0)
    torch.nn.init.zeros_(block.mlp.fc2.weight)
    moved = (block(other) - block(x)).flatten(2)
    assert moved[..., torch.arange(30) != 15].abs().max() < 1e-6 and moved[..., 15].abs().max() > 0.1


def test_the_mean_of_the_mixture_is_the_mean() -> None:
    torch.manual_seed(0)
    block, x = MeanTransformerBlock().eval(), torch.randn(2, 16, 4, 5)
    tokens = x.flatten(2).mT
    tokens = tokens + block.attn(block.norm1(tokens), (4, 5))
    expected = (tokens + block.mlp(block.norm2(tokens))).mean(1)
    torch.testing.assert_close(block(x).mean((2, 3)), expected, atol=1e-5, rtol=1e-5)


def test_windows_of_one_token_are_the_general_layer() -> None:
    torch.manual_seed(0)
    block, tokens = MeanTransformerBlock(), torch.randn(2, 20, 16)
    torch.testing.assert_close(block._attend(tokens, (4, 5)), block.attn(tokens, (4, 5)), atol=1e-6, rtol=1e-5)


def test_wider_windows_see_neighbours() -> None:
    torch.manual_seed(0)
    layer = FSATLayer(window_size=4, grid=(14, 14)).eval()
    assert [block.attn.shift for block in layer.blocks] == [(0, 0), (2, 2)]
    assert layer.blocks[0].attn.relative_position_bias_table.shape == (49, 8)
    assert layer(torch.randn(1, 16, 9, 6)).shape == (1, 16, 9, 6)


def test_layouts() -> None:
    torch.manual_seed(0)
    blocks = [MeanTransformerBlock(layout=layout).eval() for layout in ("tokens", "code")]
    blocks[1].load_state_dict(blocks[0].state_dict())
    x = torch.randn(1, 16, 4, 4)
    as_tokens = blocks[0](x.flatten().view(1, 16, 16).mT.reshape(1, 16, 4, 4))  # what "code" takes for a token
    torch.testing.assert_close(as_tokens.flatten(2).mT.reshape(x.shape), blocks[1](x), atol=1e-5, rtol=1e-5)


def test_losses() -> None:
    torch.manual_seed(0)
    infrared, visible = torch.rand(2, 2, 1, 16, 14)
    larger = torch.maximum(infrared, visible)
    assert structure_loss(larger, infrared, visible).item() == pytest.approx(0, abs=1e-5)
    assert gradient_loss(visible, visible, visible, of="pixels") == 0 == gradient_loss(visible, visible, visible)
    step = torch.zeros(1, 1, 4, 4)
    step[..., 2:] = 1.0
    flat = torch.zeros_like(step)
    # |d_x| of a row inside is 0, 4, 4, 4 (the last against the zeros past the border), with signs 0, 4, 4, -4
    rows, outer = torch.tensor([0, 4, 4, 4.0]).sum(), torch.tensor([0, 3, 3, 3.0]).sum()
    upright = torch.tensor([0, 1, 3, 3.0]).sum()
    expected = (2 * rows + 2 * outer + 2 * upright) / 16
    assert gradient_loss(flat, step, flat, of="pixels").item() == pytest.approx(expected.item())
    assert gradient_loss(flat, step, flat).item() == pytest.approx((2 * 4 + 2 * 3) / 16)  # upright ones cancel out
    fused = torch.rand(2, 1, 16, 14)
    near = F.mse_loss(fused, infrared) + F.mse_loss(fused, visible)
    expected = near + 10 * structure_loss(fused, infrared, visible) + 100 * gradient_loss(fused, infrared, visible)
    torch.testing.assert_close(fusion_loss(fused, infrared, visible), expected)
    dark = fused - 0.6  # the range is 2 where it goes below -0.5
    assert structure_loss(dark, infrared, visible) != structure_loss(dark.clamp(min=-0.5), infrared, visible)
    with pytest.raises(ValueError, match="of must be 'mean' or 'pixels'"):
        gradient_loss(fused, infrared, visible, of="sum")


def test_released_checkpoints_bring_their_layout(tmp_path: Path) -> None:
    recorded = load_file(GOLDEN / "model.a.safetensors")
    state = {name[6:]: tensor for name, tensor in recorded.items() if name.startswith("param.")}
    unused = {
        "FAM_attention.conv1.weight": torch.zeros(1, 2, 7, 7),
        "patch_embed.proj.weight": torch.zeros(3),
        "conv64_16.conv.weight": torch.zeros(16, 64, 1, 1),
        "basicLayer.FAM_Attention.channel_attention.dct_layer.weight": torch.zeros(16, 2, 2),
        "basicLayer.blocks.0.attn.relative_position_index": torch.zeros(1, 1, dtype=torch.long),
        "basicLayer.blocks.1.attn_mask": torch.zeros(4, 1, 1),
    }
    save_file({**state, **unused}, tmp_path / "released.safetensors")
    model = FSATFusion.from_authors(tmp_path / "released.safetensors")
    fused = model(*recorded["input.x"].split(1, 1)).image
    torch.testing.assert_close(fused, recorded["output.y"], atol=1e-5, rtol=1e-5)
    again = FSATFusion()
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    assert again.load(tmp_path / "own.safetensors").layer.blocks[0].layout == "tokens"


def test_the_size_that_the_card_gives() -> None:
    module = FSATFusion()
    blocks = [sum(p.numel() for p in block.parameters()) for block in module.layer.blocks]
    assert blocks == [3280, 3280]  # the card: about 3.4 k, with what does nothing
    assert sum(p.numel() for p in module.parameters()) == 9395


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frequencies": 5}, "frequencies must be between 1 and 32 and divide the 16 channels, got 5"),
        ({"grid": (6, 9)}, "grid must be at least 7 x 7, got 6 x 9"),
        ({"reduction": 17}, "reduction must be between 1 and the number of channels"),
        ({"depth": 0}, "depth must be positive"),
        ({"layout": "rows"}, "layout must be 'tokens' or 'code', got 'rows'"),
        ({"window_size": 0}, "window_size must be"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FSATFusion(**arguments)


def test_bad_images_and_unknown_methods() -> None:
    model, x = FSATFusion(grid=(14, 14)), torch.rand(1, 1, 8, 8)
    for pair, message in (
        ((x, x[..., :7]), "infrared and visible must have one shape"),
        ((x[0], x), "infrared must be grey images"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*pair)
    for method in ("low16", "top33", "top"):
        with pytest.raises(ValueError, match="freq_sel_method must be"):
            catalogue.port("fsatfusion", "fca").build(
                {"channel": 16, "dct_h": 14, "dct_w": 14, "freq_sel_method": method}
            )
    with pytest.raises(ValueError, match=r"x must be \(batch, 16, height, width\)"):
        FSATLayer(grid=(14, 14))(x)
