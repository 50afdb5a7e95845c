"""What a wrapper puts on a model is gone afterwards, also after an exception, and is in its report."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saccade.layers.wrapping import Report, changing, footprint


class Network(nn.Module):
    factor = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.mode = "plain"

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.inner(x)


def double(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return tuple(2 * x for x in args), kwargs


def test_all_is_undone_also_after_an_exception() -> None:
    model, x = Network(), torch.randn(2, 3)
    before, y = footprint(model), model(x)
    with pytest.raises(RuntimeError, match="in the middle"), changing(model, Report("test")) as changes:
        changes.before(model.inner, double)
        changes.after(model, lambda module, args, kwargs, output: -output)
        assert changes.put(model, "factor", 1.0) == 2.0
        assert changes.put(model, "mode", "other") == "plain"
        former = changes.put(model, "forward", lambda x: former(x) + 1)
        assert changes.put(model, "inner", nn.Identity()) is not model.inner
        assert footprint(model) != before
        torch.testing.assert_close(model(x), -(x + 1))
        raise RuntimeError("in the middle")
    assert footprint(model) == before and torch.equal(model(x), y)
    assert "factor" not in vars(model) and "forward" not in vars(model)
    expected = ["before inner", "after Network"]
    expected += [f"in place of Network.{name}" for name in ("factor", "mode", "forward", "inner")]
    assert changes.report.places == expected
    assert "in place of Network.forward" in str(changes.report)


def test_the_last_change_is_undone_first() -> None:
    model = Network()
    with changing(model, Report("outer")) as outer, changing(model, Report("inner")) as inner:
        outer.put(model, "mode", "outer")
        inner.put(model, "mode", "inner")
        inner.put(model, "mode", "innermost")
        inner.finally_(outer.report.places.append, "done")
    assert model.mode == "plain" and outer.report.places[-1] == "done"


@pytest.mark.parametrize("change", ["weight", "mode", "hook", "gradient", "attribute"])
def test_a_footprint_sees_what_is_left_behind(change: str) -> None:
    model = Network()
    before = footprint(model)
    assert footprint(model) == before
    if change == "weight":
        with torch.no_grad():
            model.inner.weight.add_(1)
    elif change == "mode":
        model.inner.eval()
    elif change == "hook":
        model.inner.register_forward_hook(lambda *given: None)
    elif change == "gradient":
        model.inner.bias.requires_grad_(False)
    else:
        model.mode = "other"
    assert footprint(model) != before


def test_refusals() -> None:
    refused = pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module, got str")
    with refused, changing("gpt2", Report("test")):  # type: ignore[arg-type]
        pass
    with pytest.raises(AttributeError), changing(Network(), Report("test")) as changes:
        changes.put(changes, "nothing", 1)
