"""DFYP: the gate of bands, the operators by hand, who gets which, the branches, bad arguments."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saccade.catalogue import load_authors
from saccade.models.dfyp import (
    CROPS,
    OPERATORS,
    YEARS,
    BandGate,
    CropGate,
    DFYPModis,
    DFYPSentinel,
    EdgeOperators,
    SameBlock,
    VisionTransformer,
    YearRouter,
    errors,
    select,
    yield_loss,
)

SMALL = {"widths": (4, 6, 8), "dim": 8, "depth": 2, "num_heads": 2, "hidden": 12}


def _modis(**changes: object) -> DFYPModis:
    torch.manual_seed(0)
    return DFYPModis(3, (8, 8), **{**SMALL, "dense": 12, **changes}).eval()


def _sentinel(**changes: object) -> DFYPSentinel:
    torch.manual_seed(0)
    return DFYPSentinel(**{**SMALL, "image_size": 16, "patch": 8, **changes}).eval()


def _edges(x: torch.Tensor, operator: str, operators: EdgeOperators | None = None) -> torch.Tensor:
    return (operators or EdgeOperators())(x, torch.full((len(x),), OPERATORS.index(operator))).detach()


def test_gate_of_bands() -> None:
    torch.manual_seed(0)
    coarse, fine = BandGate(6, 2), BandGate(6, 2, "avg")
    fine.load_state_dict(coarse.state_dict())
    x = torch.randn(2, 6, 5, 4)
    assert not torch.allclose(coarse(x), fine(x))
    constant = torch.randn(2, 6, 1, 1).expand(-1, -1, 5, 4)
    torch.testing.assert_close(coarse(constant), fine(constant))
    for parameter in coarse.parameters():
        nn.init.zeros_(parameter)
    torch.testing.assert_close(coarse(x), x / 2)
    assert BandGate(3, 8).mlp.fc1.weight.shape == (1, 3)


@pytest.mark.parametrize(("operator", "step"), [("sobel", 4.0), ("scharr", 16.0)])
def test_fixed_operators(operator: str, step: float) -> None:
    assert (_edges(torch.ones(1, 2, 6, 6), operator)[..., 1:-1, 1:-1] - 1e-4).abs().max() < 1e-9
    image = torch.zeros(1, 1, 6, 6)
    image[..., 3:] = 1
    found = _edges(image, operator)[0, 0, 2]
    torch.testing.assert_close(found[1:5], torch.tensor([1e-4, step, step, 1e-4]))
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(_edges(x.rot90(1, (2, 3)), operator), _edges(x, operator).rot90(1, (2, 3)))


def test_the_learned_operator_and_its_ends() -> None:
    operators, x = EdgeOperators(), torch.randn(2, 3, 6, 5)
    gain = torch.tensor(0.1).sigmoid()
    a = torch.tensor(0.5).sigmoid()
    kernel = a * operators.kernels_4133[0] + (1 - a) * operators.kernels_4133[2]
    kernel = torch.stack([kernel, kernel.mT]) / kernel.abs().max()
    slope = F.conv2d(x.flatten(0, 1)[:, None], kernel, padding=1).unflatten(0, (2, 3))
    expected = (slope.square().sum(2) + 1e-6).sqrt() * gain
    torch.testing.assert_close(_edges(x, "learnable", operators), expected)
    for alpha, operator, size in ((40.0, "sobel", 2), (-40.0, "scharr", 10)):
        nn.init.constant_(operators.alpha, alpha)
        torch.testing.assert_close(
            _edges(x, "learnable", operators), _edges(x, operator) / size * gain, atol=2e-3, rtol=1e-3
        )


def test_each_sample_gets_the_operator_of_its_year() -> None:
    router, x = YearRouter({2009: "scharr", 2011: "sobel"}), torch.randn(3, 2, 6, 5)
    routed = router(x, torch.tensor([2011, 2009, 1990]))
    for i, operator in enumerate(("sobel", "scharr", "learnable")):
        torch.testing.assert_close(routed[i : i + 1], _edges(x[i : i + 1], operator, router.operators))
    fixed = YearRouter({}, "sobel")
    torch.testing.assert_close(fixed(x, torch.tensor([1, 2, 3])), _edges(x, "sobel"))
    assert set(YEARS) == set(range(2009, 2016)) and set(CROPS.values()) == {"sobel", "scharr"}


def test_gate_of_a_crop() -> None:
    gate, x = CropGate("scharr"), torch.rand(2, 3, 6, 5)
    grey = (x * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    torch.testing.assert_close(gate(x), 0.5 * _edges(grey, "scharr") + 0.5 * x)
    nn.init.zeros_(gate.weight)
    assert torch.equal(gate(x), x)


def test_selection_is_by_the_lowest_error() -> None:
    scores = {2009: {"sobel": 2.0, "scharr": 1.0}, 2010: {"learnable": 3.0}}
    assert select(scores) == {2009: "scharr", 2010: "learnable"}
    for bad, message in (({2009: {}}, "at least one operator"), ({2009: {"prewitt": 1.0}}, "operator must be one of")):
        with pytest.raises(ValueError, match=message):
            select(bad)


def test_padding_is_tensorflows() -> None:
    block = SameBlock(2, 3, 2).eval()
    for size in (1, 2, 5, 8):
        assert block(torch.randn(1, 2, size, size)).shape[2] == -(-size // 2)
    x = torch.randn(1, 2, 4, 4)
    expected = F.conv2d(F.pad(x, (0, 1, 0, 1)), block.conv.weight, block.conv.bias, 2)
    torch.testing.assert_close(block(x), F.relu(block.norm(expected)))


def test_branches_and_their_sum() -> None:
    model, x, year = _modis(), torch.randn(3, 3, 8, 8), torch.tensor([2009, 2011, 2012])
    said = model(x, year)
    torch.testing.assert_close(said.values, (said.cnn + said.transformer) / 2)
    nn.init.zeros_(model.transformer_weight)
    nn.init.ones_(model.cnn_weight)
    torch.testing.assert_close(model(x, year).values, said.cnn)
    nn.init.zeros_(model.operator_weight)
    again = model(x, torch.tensor([1, 2, 3]))
    assert not torch.allclose(again.cnn, said.cnn)
    torch.testing.assert_close(again.cnn, model(x, year).cnn)  # without edges the year does not matter
    torch.testing.assert_close(again.transformer, said.transformer)


def test_dates_and_tiles_are_averaged_whatever_the_chunk() -> None:
    model, x = _sentinel(), torch.rand(2, 2, 3, 3, 16, 16)
    said = model(x)
    assert said.values.shape == (2, 2) and model.cnn_weight.shape == (2,)
    model.chunk = 5
    torch.testing.assert_close(model(x).values, said.values)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(model(x[:, :, order].flip(1)).values, said.values)
    torch.testing.assert_close(model(x.repeat(1, 2, 1, 1, 1, 1)).values, said.values)
    apart = model(x[:, :1]).transformer + model(x[:, 1:]).transformer
    torch.testing.assert_close(apart / 2, said.transformer)


def test_sentinel_trains() -> None:
    model = _sentinel().train()
    loss = yield_loss(model(torch.rand(2, 1, 2, 3, 16, 16)).values, torch.zeros(2, 2), absolute=0.5)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    linears = [layer for layer in _sentinel().modules() if isinstance(layer, nn.Linear)]
    assert all(layer.bias is None or not layer.bias.any() for layer in linears)


def test_default_sizes_are_the_checkpoints() -> None:
    with torch.device("meta"):
        modis, sentinel = DFYPModis(), DFYPSentinel()
    assert modis.dense[0].weight.shape == (2048, 8192) and modis.transformer.positions.shape == (1, 65, 256)
    assert modis.transformer.blocks[0].attention.q_proj.weight.shape == (512, 256)
    assert sentinel.transformer.positions.shape == (1, 197, 128) and sentinel.gate.mlp.fc1.weight.shape == (1, 3)
    assert sentinel.transformer.blocks[0].attention.q_proj.weight.shape == (192, 128)
    assert [m.out_channels for m in sentinel.convs if isinstance(m, nn.Conv2d)] == [32, 64, 128, 128]


def test_a_released_file_is_loaded(tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    for name in ("modis_network", "sentinel_network"):
        with safetensors.safe_open(f"tests/golden/dfyp/{name}.a.safetensors", "pt") as file:
            state = {k[6:]: file.get_tensor(k) for k in file.keys() if k.startswith("param.")}  # noqa: SIM118
            args = json.loads(file.metadata()["args"])
        safetensors.save_file(state, tmp_path / f"{name}.safetensors")
        loaded = load_authors("dfyp", tmp_path / f"{name}.safetensors", module=name, **args)
        torch.testing.assert_close(loaded.cnn_weight.detach(), state["a1"])


def test_losses_and_errors() -> None:
    predicted, target = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 5.0])
    assert yield_loss(predicted, target).item() == pytest.approx(5 / 3)
    assert yield_loss(predicted, target, absolute=2.0).item() == pytest.approx(5 / 3 + 2)
    found = errors(predicted, target)
    assert found == pytest.approx({"rmse": (5 / 3) ** 0.5, "me": -1.0, "mae": 1.0, "r2": 1 - 5 / 8})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BandGate(0), "channels and reduction must be positive, got 0 and 16"),
        (lambda: BandGate(3, 2, "mean"), "statistics must be some of"),
        (lambda: YearRouter({2009: "prewitt"}), "operator must be one of sobel, scharr, learnable, got 'prewitt'"),
        (lambda: CropGate("learnable"), "operator must be one of sobel, scharr, got 'learnable'"),
        (lambda: VisionTransformer((8, 6), 4, 3, 1), "patches fill the size"),
        (lambda: _modis(widths=(4, 6)), "widths must be 3 positive numbers"),
        (lambda: _modis(num_heads=0), "num_heads must be positive"),
        (lambda: _sentinel(chunk=0), "chunk must be 1 positive numbers"),
        (lambda: _sentinel(image_size=4), "image_size must be at least 8, got 4"),
        (lambda: _modis()(torch.zeros(1, 4, 8, 8), torch.zeros(1)), r"x must be \(batch, 3, height, width\)"),
        (lambda: _modis()(torch.zeros(1, 3, 8, 9), torch.zeros(1)), "images must be 8 x 8, got"),
        (lambda: _modis()(torch.zeros(2, 3, 8, 8), torch.zeros(1)), "year must be one for each of 2 maps"),
        (lambda: _sentinel()(torch.zeros(1, 1, 3, 16, 16)), r"x must be \(batch, dates, tiles, 3"),
        (lambda: _sentinel()(torch.zeros(1, 0, 1, 3, 16, 16)), r"x must be \(batch, dates, tiles, 3"),
        (lambda: _sentinel()(torch.zeros(1, 1, 1, 2, 16, 16)), r"x must be \(batch, 3, height, width\)"),
        (lambda: CropGate()(torch.zeros(1, 2, 4, 4)), r"x must be \(batch, 3, height, width\)"),
    ],
)
def test_refusals(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
