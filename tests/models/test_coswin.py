"""CoSwin: Swin where the local branch is silent, a convolution where the attention is; windows, maps, sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from saccade.models.coswin import (
    FUSIONS,
    LOCAL_BLOCKS,
    LOCAL_NORMS,
    CoSwin,
    CoSwinBlock,
    FusedAttention,
    LocalBranch,
    to_map,
    to_tokens,
)


def block(dim: int = 8, heads: int = 2, **arguments: object) -> CoSwinBlock:
    torch.manual_seed(0)
    made = CoSwinBlock(dim, heads, **arguments)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made.eval()


def silence(branch: LocalBranch) -> None:
    last = [layer for layer in branch if isinstance(layer, nn.Conv2d)][-1]
    for parameter in last.parameters():
        nn.init.zeros_(parameter)


@pytest.mark.parametrize("fusion", ["sum", "gate", "pre", "value"])
@pytest.mark.parametrize("shift", [0, 2])
def test_a_silent_local_branch_leaves_swin(fusion: str, shift: int) -> None:
    swin = pytest.importorskip("transformers.models.swin.modeling_swin")
    config = swin.SwinConfig(window_size=4, mlp_ratio=4.0)
    theirs = swin.SwinLayer(config, 8, (8, 12), 2, shift_size=shift).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = block(window_size=4, shift=shift, fusion=fusion)
    assert ours.attention.local is not None
    silence(ours.attention.local)
    state = theirs.state_dict()
    found: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        for ours_name, words in {
            "norm1": "layernorm_before", "norm2": "layernorm_after", "attention.proj": "o_proj",
            "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
        }.items():  # fmt: skip
            found[f"{ours_name}.{kind}"] = next(t for k, t in state.items() if f"{words}.{kind}" in k)
        parts = [next(t for k, t in state.items() if f"{p}_proj.{kind}" in k) for p in "qkv"]
        found[f"attention.qkv.{kind}"] = torch.cat(parts)
    table = next(t for k, t in state.items() if "bias_table" in k)  # by query - key
    found["attention.bias_table"] = table.T.unflatten(1, (7, 7)).flip(1, 2)
    missing, unexpected = ours.load_state_dict(found, strict=False)
    assert not unexpected and all("local" in key or "gate" in key for key in missing)
    x = torch.randn(2, 96, 8)
    torch.testing.assert_close(ours(x, size=(8, 12)), theirs(x, (8, 12))[0], atol=1e-5, rtol=1e-5)


def test_a_gate_of_zero_is_plain() -> None:
    fused = block(fusion="gate")
    plain = block(local=False)
    plain.load_state_dict({k: v for k, v in fused.state_dict().items() if "local" not in k and "gate" not in k})
    assert fused.attention.gate is not None
    nn.init.zeros_(fused.attention.gate)
    x = torch.randn(2, 35, 8)
    assert torch.equal(fused(x, size=(5, 7)), plain(x, size=(5, 7)))


def reached(module: CoSwinBlock, size: tuple[int, int], place: tuple[int, int]) -> Tensor:
    """Where a change of one token shows."""
    x = torch.randn(1, size[0] * size[1], 8)
    changed = x.clone()
    changed[0, place[0] * size[1] + place[1]] += torch.randn(8)  # a constant would vanish in the norm
    return (module(changed, size=size) != module(x, size=size)).any(-1)[0].view(size)


def test_convolutions_cross_windows_and_windows_do_not() -> None:
    size, place = (8, 8), (3, 4)  # in the upper right window, at its lower left corner
    alone = block()
    for parameter in alone.attention.proj.parameters():
        nn.init.zeros_(parameter)
    expected = torch.zeros(size, dtype=torch.bool)
    expected[2:5, 3:6] = True
    assert torch.equal(reached(alone, size, place), expected)
    expected[:] = False
    expected[:4, 4:] = True
    assert torch.equal(reached(block(local=False), size, place), expected)
    expected[:] = False
    expected[2:6, 2:6] = True
    assert torch.equal(reached(block(local=False, shift=2), size, place), expected)


def test_tokens_and_maps() -> None:
    x = torch.randn(2, 15, 4)
    image = to_map(x, (3, 5))
    assert torch.equal(to_tokens(image), x) and image.data_ptr() == x.data_ptr()
    assert torch.equal(image[:, :, 1, 2], x[:, 7])


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_constant_tokens_give_constant_attention(shift: int, size: tuple[int, int]) -> None:
    attention = block(shift=shift, local=False).attention
    out = attention(torch.randn(2, 1, 8).expand(-1, size[0] * size[1], -1), size)
    torch.testing.assert_close(out, out[:, :1].expand_as(out))


def dense(attention: FusedAttention, u: Tensor, size: tuple[int, int], window: int) -> Tensor:
    """Attention over all tokens, biases looked up pair by pair."""
    q, k, v = attention.qkv(u).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    y, x = torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij")
    dy, dx = (p.flatten() - p.flatten()[:, None] + window - 1 for p in (y, x))
    return attention.proj(
        F.scaled_dot_product_attention(q, k, v, attn_mask=attention.bias_table[:, dy, dx]).transpose(1, 2).flatten(2)
    )


@pytest.mark.parametrize("size", [(4, 4), (3, 2), (1, 1)])
def test_a_window_of_the_map_is_dense(size: tuple[int, int]) -> None:
    attention = block(shift=2, local=False).attention
    u = torch.randn(2, size[0] * size[1], 8)
    torch.testing.assert_close(attention(u, size), dense(attention, u, size, 4))


def test_windows_that_do_not_fill() -> None:
    attention = block(local=False).attention
    u = torch.randn(2, 30, 8)
    rest = to_tokens(to_map(u, (5, 6))[:, :, 4:, 4:])
    corner = to_tokens(to_map(attention(u, (5, 6)), (5, 6))[:, :, 4:, 4:])
    torch.testing.assert_close(corner, dense(attention, rest, (1, 2), 4))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_fusions(fusion: str) -> None:
    attention, u = block(fusion=fusion).attention, torch.randn(2, 35, 8)
    assert attention.local is not None
    plain = block(local=False).attention
    plain.load_state_dict({k: v for k, v in attention.state_dict().items() if k in plain.state_dict()})

    def local(x: Tensor) -> Tensor:
        return to_tokens(attention.local(to_map(x, (5, 7))))

    whole, branch = plain(u, (5, 7)), local(u)
    if fusion == "pre":
        expected = plain(u + branch, (5, 7))
    elif fusion == "value":
        value = u @ attention.qkv.weight[16:].T + attention.qkv.bias[16:]
        expected = whole + local(value) @ attention.proj.weight.T
    elif fusion == "concat":
        expected = attention.fuse(torch.cat([whole, branch], 2))
    else:
        expected = whole + branch * (1 if fusion == "sum" else attention.gate)
    torch.testing.assert_close(attention(u, (5, 7)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", LOCAL_BLOCKS)
@pytest.mark.parametrize("norm", LOCAL_NORMS)
def test_local_branches(kind: str, norm: str) -> None:
    branch = LocalBranch(8, kind, norm, 5).eval()
    norms = {"batch": nn.BatchNorm2d, "layer": nn.LayerNorm}
    assert any(isinstance(m, norms.get(norm, ())) for m in branch) == (kind != "dwonly" and norm != "none")
    assert branch(torch.randn(2, 8, 5, 3)).shape == (2, 8, 5, 3)
    weights = {"dw": 8 * 25 + 64, "conv": 64 * 25, "dwonly": 8 * 25}
    assert sum(m.weight.numel() for m in branch if isinstance(m, nn.Conv2d)) == weights[kind]


def flops(**arguments: object) -> float:
    with torch.device("meta"):
        model, image = CoSwin.from_config("small3", **arguments).eval(), torch.empty(1, 3, 32, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops() / 2e6


def test_published_flops_of_the_baseline() -> None:
    plain = flops(local=False)
    assert abs(plain / 242.3 - 1) <= 0.01
    local = sum(depth * (9 * n * c + n * c * c) for depth, n, c in ((2, 256, 96), (6, 64, 192), (4, 16, 384)))
    assert flops() - plain == pytest.approx(local / 1e6)


def test_pyramid_and_presets() -> None:
    with torch.device("meta"):
        model = CoSwin.from_config("cos4", num_classes=100)
        out = model.eval()(torch.empty(2, 3, 32, 32))
        assert CoSwin.from_config("small3", patch_size=4).strides == (4, 8, 16)
    assert model.channels == (96, 192, 384, 768) and model.strides == (2, 4, 8, 16)
    assert [tuple(x.shape) for x in out.features] == [(2, 96 * 2**i, 16 // 2**i, 16 // 2**i) for i in range(4)]
    assert out.logits is not None and out.logits.shape == (2, 100)
    assert CoSwin(0, embed_dim=8, depths=(1,), num_heads=(2,))(torch.rand(1, 3, 5, 4)).logits is None


def test_drop_path() -> None:
    torch.manual_seed(0)
    model = CoSwin(5, embed_dim=8, depths=(2, 2), num_heads=(2, 2), drop_path=0.6)
    assert [round(b.drop_path.rate, 6) for stage in model.stages for b in stage] == [0.0, 0.2, 0.4, 0.6]
    x = torch.randn(400, 4, 8)
    dropped = CoSwinBlock(8, 2, drop_path=0.25, local=False)
    share = (dropped.drop_path(x) == 0).all(-1).all(-1).float().mean()
    assert 0.18 < share < 0.32
    torch.testing.assert_close(dropped.drop_path(torch.ones(4000, 1, 1)).mean(), torch.tensor(1.0), atol=0.05, rtol=0)
    assert dropped.eval().drop_path(x) is x


def test_bad_arguments() -> None:
    small = {"embed_dim": 8, "depths": (1,), "num_heads": (2,)}
    for arguments, message in (
        ({"num_heads": (3,)}, r"num_heads must divide the channels \(8\), got 3"),
        ({"depths": (1, 1)}, "one positive entry per stage"),
        ({"fusion": "product"}, "fusion must be one of sum"),
        ({"local_block": "mbconv"}, "local_block must be one of dw"),
        ({"local_norm": "group"}, "local_norm must be one of batch"),
        ({"local_kernel": 4}, "local_kernel must be odd, got 4"),
        ({"window_size": 0}, "window_size must be positive"),
        ({"drop_path": 1.0}, "drop_path must be"),
        ({"patch_size": 0}, "must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            CoSwin(**{**small, **arguments})
    with pytest.raises(ValueError, match="name must be one of cos4, small3"):
        CoSwin.from_config("tiny")
    with pytest.raises(ValueError, match="x must be images"):
        CoSwin(**small)(torch.rand(1, 1, 8, 8))
