"""Packed products are the layers' own, and leave the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from saccade.layers.packed import can_pack, packed
from saccade.layers.wrapping import footprint


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 7, bias=False)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (3, 24), (2, 0, 24), (2, 5, 24), (2, 1, 3, 24)])
def test_the_same_but_for_rounding(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    model, x = network(dtype), torch.randn(shape).to(dtype)
    if not can_pack(model[0].weight):
        pytest.skip("this torch or processor does not pack")
    with torch.no_grad():
        expected = model(x)
        before = footprint(model)
        with packed(model) as report:
            assert footprint(model) != before
            got = model(x)
        again = model(x)
    assert report.layers == 2 and report.nbytes == sum(m.weight.nbytes for m in (model[0], model[2]))
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got, expected, atol=bound, rtol=bound)
    assert footprint(model) == before and torch.equal(again, expected)


def test_rows_of_another_layout_in_memory() -> None:
    model, x = network(), torch.randn(24, 6).t()
    with torch.no_grad(), packed(model):
        torch.testing.assert_close(model(x), model(x.contiguous()), atol=1e-6, rtol=1e-5)


def test_a_weight_that_is_written_meanwhile_counts() -> None:
    model, x = network(), torch.randn(3, 24)
    with torch.no_grad(), packed(model):
        model[2].weight.mul_(2)
        model[0].weight = nn.Parameter(torch.randn(40, 24))
        got = model(x)
    torch.testing.assert_close(got, model(x).detach(), atol=1e-5, rtol=1e-5)


def test_gradients_and_autocast_go_the_usual_way() -> None:
    model, x = network(), torch.randn(3, 24)
    with packed(model):
        model(x).square().sum().backward()
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        with torch.no_grad(), pytest.raises(RuntimeError):
            model(x.double())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_derived_layers_are_left_alone() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), Doubled(4, 4)), torch.randn(2, 4)
    with torch.no_grad(), packed(model) as report:
        assert report.layers == 1
        got = model(x)
    torch.testing.assert_close(got, model(x), atol=1e-6, rtol=1e-5)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="rows must be positive"), packed(network(), rows=0):
        pass
    with pytest.raises(ValueError, match="no linear layer"), packed(nn.Conv1d(2, 2, 1)):
        pass
    with pytest.raises(ValueError, match="no linear layer"), packed(network(torch.float64)):
        pass
    assert not can_pack(torch.empty(2, 2, device="meta"))
