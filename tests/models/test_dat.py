"""DAT: what its card says of deformable attention, its blocks and networks, and checkpoints of the authors."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import saccade
from saccade import catalogue
from saccade.attention.neighborhood import neighborhood_attend
from saccade.models.dat import DAT, ConvMLP, DeformableAttention, NeighborhoodAttention, Stage
from saccade.models.dat.attention import ShiftedWindowAttention
from saccade.models.dat.authors import load_network


def attention(**changes: object) -> DeformableAttention:
    torch.manual_seed(0)
    arguments = {"dim": 8, "num_heads": 4, "map_size": 6, "groups": 2, "stride": 2, "kernel_size": 3} | changes
    module = DeformableAttention(**arguments).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def maps(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_points_on_every_pixel_are_dense_attention_with_relative_bias() -> None:
    module = attention(stride=1, reference="symmetric")
    nn.init.zeros_(module.offset_proj.weight)
    x = maps(2, 6, 6, 8)
    q, k, v = (p(x).flatten(1, 2).unflatten(2, (4, 2)).transpose(1, 2) for p in
               (module.q_proj, module.k_proj, module.v_proj))  # fmt: skip
    i = torch.arange(36)
    dy, dx = i[:, None] // 6 - i // 6, i[:, None] % 6 - i % 6
    bias = module.bias_table[:, dy + 5, dx + 5]
    dense = F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).reshape(2, 6, 6, 8)
    torch.testing.assert_close(module(x), module.out_proj(dense))


def test_published_references_lean_and_are_clamped() -> None:
    module = attention(stride=1)
    nn.init.zeros_(module.offset_proj.weight)
    _, position, reference = module.attend(maps(1, 6, 6, 8))
    i = torch.arange(6, dtype=torch.float64)
    torch.testing.assert_close(reference[0, 0, :, 0, 0].double(), (i + 0.5) / 5 * 2 - 1)
    assert reference.max() > 1 and position.max() == 1 and position[0, 0, 0, 0, 0] == reference[0, 0, 0, 0, 0]


@pytest.mark.parametrize("limit", [-1.0, 2.0])
def test_points_stay_where_they_may(limit: float) -> None:
    module = attention(offset_range=limit, map_size=8)
    nn.init.normal_(module.offset_proj.weight, std=20)
    _, position, reference = module.attend(maps(2, 8, 8, 8))
    assert position.shape == (2, 2, 4, 4, 2)
    if limit < 0:
        assert position.abs().max() <= 1
    else:
        assert 0 < (position - reference).abs().max() <= limit / 3 + 1e-6


def test_a_table_of_zeros_is_no_bias() -> None:
    with_table, without = attention(), attention(bias=None)
    nn.init.zeros_(with_table.bias_table)
    without.load_state_dict({k: v for k, v in with_table.state_dict().items() if k != "bias_table"})
    torch.testing.assert_close(with_table(maps(2, 6, 6, 8)), without(maps(2, 6, 6, 8)))


def test_groups_permute_with_their_weights() -> None:
    module, other = attention(), attention()
    turn = torch.arange(8).roll(4)  # exchanges the two groups of channels, of two heads each
    state = module.state_dict()
    for name in ("q_proj", "k_proj", "v_proj"):
        # k and v read sampled channels, which are exchanged too
        state[f"{name}.weight"] = state[f"{name}.weight"][turn][:, turn]
        state[f"{name}.bias"] = state[f"{name}.bias"][turn]
    state["out_proj.weight"] = state["out_proj.weight"][turn][:, turn]
    state["out_proj.bias"] = state["out_proj.bias"][turn]
    state["bias_table"] = state["bias_table"].roll(2, 0)
    other.load_state_dict(state)
    x = maps(2, 6, 6, 8)
    torch.testing.assert_close(other(x[..., turn]), module(x)[..., turn])


def test_gradients_reach_the_offset_network() -> None:
    module = attention()
    module(maps(2, 6, 6, 8)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in module.offset_conv.parameters())
    assert module.offset_proj.weight.grad.abs().sum() > 0


def test_without_offsets_reads_means() -> None:
    module = attention(offsets=False)
    x = maps(1, 6, 6, 8)
    means = F.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    q, k, v = (p(z).flatten(1, 2).unflatten(2, (4, 2)).transpose(1, 2) for p, z in
               ((module.q_proj, x), (module.k_proj, means), (module.v_proj, means)))  # fmt: skip
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 6, 6, 8)
    torch.testing.assert_close(module(x), module.out_proj(expected))
    assert module.bias_table is None


@pytest.mark.parametrize("size", [(1, 1), (3, 11), (12, 12)])
@pytest.mark.parametrize("bias", ["table", "log", "fixed", "convolution", None])
def test_other_sizes_than_the_table_s(bias: str | None, size: tuple[int, int]) -> None:
    y = attention(bias=bias)(maps(2, *size, 8))
    assert y.shape == (2, *size, 8) and y.isfinite().all()


def test_log_bias_is_that_of_the_card() -> None:
    module = attention(bias="log", reference="symmetric", stride=1)
    points = maps(1, 4, 2, 2) * 2 + 2.5
    bias = module._bias(points, (6, 6))
    query = torch.tensor([3.0, 1.0], dtype=torch.float64)  # (y, x)
    d = 4 * ((query / 5 * 2 - 1) - (points[0, 2, 1].flip(0) / 5 * 2 - 1))
    d = d.sign() * torch.log2(d.abs() + 1) / 3
    torch.testing.assert_close(bias[0, 2:, 3 * 6 + 1, 2], module.bias_network(d))


def test_neighbourhoods_are_those_of_their_own_room() -> None:
    module, x = NeighborhoodAttention(6, 2, 3).double(), maps(2, 9, 7, 6)
    q, k, v = module.qkv(x).flatten(1, 2).unflatten(2, (3, 2, 3)).permute(2, 0, 3, 1, 4)
    expected = neighborhood_attend(q, k, v, (9, 7), 3, bias=module.bias_table).transpose(1, 2).reshape(2, 9, 7, 6)
    torch.testing.assert_close(module(x), module.proj(expected))


def test_maps_smaller_than_the_neighbourhood_are_filled_up() -> None:
    module = NeighborhoodAttention(8, 2, 5).double()
    x = maps(1, 3, 6, 8)
    torch.testing.assert_close(module(x), module(F.pad(x, (0, 0, 0, 0, 0, 2)))[:, :3])


def small(**changes: object) -> DAT:
    torch.manual_seed(0)
    return catalogue.create("dat", **{**catalogue.part("dat").example, **changes}).eval()


def test_pyramid_of_the_published_network() -> None:
    model = DAT.from_config(
        "DAT-T++", dims=(4, 8, 16, 32), num_heads=(2, 2, 4, 8), groups=(1, 1, 2, 4), patterns=("ND",) * 4
    )
    out = model.eval()(torch.randn(1, 3, 70, 33))
    assert [tuple(m.shape) for m in out.features] == [(1, 4, 18, 9), (1, 8, 9, 5), (1, 16, 5, 3), (1, 32, 3, 2)]
    assert out.logits.shape == (1, 1000)
    assert model.channels == (4, 8, 16, 32) and model.strides == (4, 8, 16, 32)


@pytest.mark.parametrize("changes", [
    {"conv_stem": False, "conv_mlp": False, "local_perception": False},
    {"layer_scale": 0.1, "drop_path": 0.5, "offset_range": 2.0, "bias": "log"},
    {"num_classes": 0},
])  # fmt: skip
def test_options(changes: dict[str, object]) -> None:
    model = small(**changes).train()
    out = model(torch.randn(2, 3, 19, 26))
    assert all(m.isfinite().all() for m in out.features)
    assert (out.logits is None) == (changes.get("num_classes") == 0)


def test_points_of_the_published_sizes() -> None:
    """7 x 7 at every stage of DAT++ at 224."""
    for side, stride, kernel in zip((56, 28, 14, 7), (8, 4, 2, 1), (9, 7, 5, 3)):
        assert DeformableAttention(8, 2, side, stride=stride, kernel_size=kernel)._points(side) == 7


RECORDED = Path(__file__).parent.parent / "golden" / "dat" / "network.a.safetensors"


@pytest.fixture(scope="module")
def released() -> tuple[dict[str, Tensor], dict[str, object]]:
    """A checkpoint of the authors' network and its arguments."""
    with safe_open(RECORDED, "pt") as file:
        arguments = json.loads(file.metadata()["args"])
    recorded = load_file(RECORDED)
    return {k.removeprefix("param."): t for k, t in recorded.items() if k.startswith("param.")}, arguments


def test_a_whole_checkpoint_loads_in_any_order(released: tuple, tmp_path: Path) -> None:
    state, arguments = released
    shuffled = list(state)
    random.Random(0).shuffle(shuffled)
    torch.save({"model": {name: state[name] for name in shuffled}}, tmp_path / "shuffled.pth")
    loaded = saccade.load_authors("dat", tmp_path / "shuffled.pth", **arguments).eval()
    recorded = load_file(RECORDED)
    scale = recorded["output.logits"].abs().max()
    assert (loaded(recorded["input.x"]).logits - recorded["output.logits"]).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"stages.0.extra.weight": torch.zeros(3)}, "no place for stages.0.extra.weight"),
        (lambda s: {k: t for k, t in s.items() if k != "cls_norm.norm.bias"}, "missing norm.bias"),
        (lambda s: s | {"patch_proj.0.bias": torch.zeros(4)}, r"stem.0.bias is \(4,\).* expected \(3,\)"),
        # of the right size, but no 1 x 1 convolution
        (lambda s: s | {"stages.0.attns.1.proj_q.weight": torch.zeros(3, 3, 2, 2)}, "q_proj.weight is"),
        (lambda s: s | {"stages.0.layer_norms.x.norm.bias": torch.zeros(6)}, "must be numbered"),
    ],
)
def test_what_has_no_place_by_name_is_refused(released: tuple, tmp_path: Path, change: object, message: str) -> None:
    state, arguments = released
    save_file(change(state), tmp_path / "changed.safetensors")
    with pytest.raises(ValueError, match=message):
        saccade.load_authors("dat", tmp_path / "changed.safetensors", **arguments)


def test_our_names_are_not_the_authors() -> None:
    """Sorted by a file and matched by shape, these once landed in other layers."""
    state = {name: torch.randn_like(tensor) for name, tensor in small().state_dict().items()}
    with pytest.raises(ValueError, match="no place for"):
        load_network(dict(sorted(state.items())), small())


def test_tables_are_stretched_to_another_map(released: tuple) -> None:
    state, arguments = released
    model = load_network(state, catalogue.port("dat", "network").build({**arguments, "img_size": 128}))
    table = model.stages[0].blocks[1].attention.bias_table
    assert table.shape == (2, 63, 63) and table.mean().item() == pytest.approx(
        state["stages.0.attns.1.rpe_table"].mean().item(), abs=0.02
    )
    assert torch.equal(model.stages[0].blocks[0].attention.bias_table, state["stages.0.attns.0.rpb"])


def test_each_stage_has_its_own_kinds() -> None:
    port = catalogue.port("dat", "network")
    model = port.build({
        "img_size": 64, "dim_stem": 4, "dims": [8, 16, 32, 64], "depths": [2] * 4, "heads": [2] * 4,
        "stage_spec": [["N", "D"], ["S", "D"], ["L", "D"], ["D", "D"]], "groups": [1, 2, 1, 2],
        "strides": [4, 2, 1, 1], "ksizes": [5, 4, 3, 1], "offset_range_factor": [-1, 2, 1, -1],
        "window_sizes": [4, 2, 4, 2], "nat_ksizes": [3, 5, 5, 5], "use_pes": [True, True, False, True],
        "dwc_pes": [True, False, False, False], "fixed_pes": [False, True, True, False],
        "log_cpb": [False, False, False, True], "no_offs": [False, False, False, False],
        "use_dwc_mlps": [True, False, True, False], "use_lpus": [False, True, True, False],
        "layer_scale_values": [-1, 0.5, 0.1, -1], "expansion": 2, "num_classes": 3,
    })  # fmt: skip
    assert [stage.blocks[1].attention.bias for stage in model.stages] == ["convolution", "fixed", None, "log"]
    assert [stage.blocks[1].attention.offset_range for stage in model.stages] == [-1, 2, 1, -1]
    assert [stage.blocks[0].mlp.conv is None for stage in model.stages] == [False, True, False, True]
    assert [stage.blocks[0].scale1 is None for stage in model.stages] == [True, False, False, True]
    assert model.stages[0].blocks[0].attention.kernel_size == 3
    assert [model.stages[i].blocks[0].attention.window_size for i in (1, 2)] == [(2, 2), (4, 4)]
    assert model.stages[0].proj.weight.shape == (8, 4)
    theirs = {"stages.0.proj.weight": torch.randn(8, 4, 1, 1), "stages.0.proj.bias": torch.randn(8),
              "stages.1.layer_scales.3.weight": torch.randn(16), "stages.1.mlps.1.chunk.linear1.bias": torch.randn(32),
              "stages.3.attns.0.rpe_table.2.weight": torch.randn(1, 32),
              "stages.0.attns.1.rpe_table.weight": torch.randn(8, 1, 3, 3)}  # fmt: skip
    ours, own = port.convert(theirs), model.state_dict()
    assert {name: tuple(t.shape) for name, t in ours.items()} == {name: tuple(own[name].shape) for name in ours}
    assert len(ours) == len(theirs) and torch.equal(ours["stages.1.blocks.1.scale2"], theirs[list(theirs)[2]])
    assert model(torch.randn(1, 3, 64, 64)).logits.isfinite().all()


@pytest.mark.parametrize(("window", "size"), [(3, (6, 9)), (4, (4, 8)), (5, (5, 5)), (2, (8, 2))])
def test_shifted_windows_are_those_of_the_card(window: int, size: tuple[int, int]) -> None:
    """Shifted by half a window, rounded up, with Swin's regions, where a window covers the map too."""
    torch.manual_seed(0)
    module, x, (H, W) = ShiftedWindowAttention(8, 2, window_size=window).double(), maps(2, *size, 8), size
    nn.init.normal_(module.relative_position_bias_table)
    s = -(-window // 2)
    regions = torch.zeros(1, H, W, 1)
    for i, rows in enumerate((slice(-window, -s), slice(-s, None))):
        regions[:, rows] += 3 * (i + 1)
    for i, columns in enumerate((slice(-window, -s), slice(-s, None))):
        regions[:, :, columns] += i + 1

    def cut(map_BHWC: Tensor) -> Tensor:
        return (
            map_BHWC.unflatten(1, (-1, window)).unflatten(3, (-1, window)).transpose(2, 3).flatten(3, 4).flatten(0, 2)
        )

    mask = torch.where(cut(regions) != cut(regions).mT, -100.0, 0.0).double()
    q, k, v = module.qkv(cut(x.roll((-s, -s), (1, 2)))).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT / 2 + module.position_bias() + mask.repeat(2, 1, 1)[:, None]
    out = module.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    out = out.view(2, H // window, W // window, window, window, 8).transpose(2, 3).reshape(2, H, W, 8)
    torch.testing.assert_close(module(x), out.roll((s, s), (1, 2)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: attention(groups=3), "groups must be"),
        (lambda: attention(num_heads=3), "num_heads must be"),
        (lambda: attention(stride=0), "stride and kernel_size"),
        (lambda: attention(bias="rotary"), "bias must be"),
        (lambda: attention(reference="left"), "reference must be"),
        (lambda: attention(map_size=0), "map_size must be"),
        (lambda: attention()(torch.randn(1, 4, 4, 9)), "x must be"),
        (lambda: NeighborhoodAttention(8, 2, 4), "kernel_size must be odd"),
        (lambda: ConvMLP(8, 0), "expansion must be"),
        (lambda: Stage(8, "DX", 7, num_heads=2), "pattern must be"),
        (lambda: small(strides=(1,)), "strides must have an entry per stage"),
        (lambda: small()(torch.randn(1, 4, 8, 8)), "x must be images"),
        (lambda: DAT.from_config("DAT-X"), "was published as"),
    ],
)
def test_bad_arguments(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_growth_with_pixels() -> None:
    """Linear with as many points; a grid of points that grows with the map is quadratic, as dense attention is."""

    def flops(size: int, stride: int) -> int:
        with torch.device("meta"):
            module, x = DeformableAttention(8, 2, size, stride=stride, kernel_size=3), torch.empty(1, size, size, 8)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(x)
        return sum(
            n for name, n in counter.get_flop_counts()["Global"].items() if "scaled" in str(name) or "bmm" in str(name)
        )

    assert flops(32, 8) == 4 * flops(16, 4) > 0
    assert flops(32, 4) == 16 * flops(16, 4)
