"""Products of few rows with large matrices, as a language model makes them while it decodes, from packed weights.

    with packed(model):
        model.generate(...)

`torch.nn.Linear` lays its matrix out anew in each call of more than one row, and reads it slowly for one row on some
processors. oneDNN, which is part of torch, can keep the matrix in its own layout instead: on two cores of an AMD EPYC a
pass of SmolLM2-135M over 8 tokens takes 48 ms in place of 86, over one token 46 in place of 65
(`benchmarks/language_vision.py`, case `dream`). The copies cost as much memory as the matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saccade.layers.wrapping import Report, changing

__all__ = ["Packed", "can_pack", "packed"]


@dataclass
class Packed(Report):
    """What was packed.

    Attributes:
        layers: linear layers that compute from packed weights.
        nbytes: of the copies.
    """

    layers: int = 0
    nbytes: int = 0

    def figures(self) -> dict[str, str]:
        return {"layers": str(self.layers), "memory": f"{self.nbytes / 1e6:.1f} MB"}


def can_pack(weight: Tensor) -> bool:
    """Whether this torch keeps such a matrix in a layout of its own: on a CPU, in float32 or bfloat16, with oneDNN.

    Args:
        weight: of a linear layer.
    """
    ops = torch.ops.mkldnn
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(ops, "_reorder_linear_weight") or not hasattr(ops, "_linear_pointwise"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(ops._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


class _Product:
    """One layer's product; the copy is made anew when the weight was written."""

    def __init__(self, linear: nn.Linear, usual: Callable[[Tensor], Tensor], rows: int) -> None:
        self.linear, self.usual, self.rows = linear, usual, rows
        self.of: tuple[int, int] = (-1, -1)
        self.matrix = torch.empty(0)

    def pack(self) -> None:
        weight = self.linear.weight
        self.of = (weight.data_ptr(), weight._version)
        self.matrix = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), self.rows)

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.linear.weight
        wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if wanted or not x.numel() or x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
            return self.usual(x)
        if (weight.data_ptr(), weight._version) != self.of:
            self.pack()
        return torch.ops.mkldnn._linear_pointwise(x, self.matrix, self.linear.bias, "none", [], "")


@contextmanager
def packed(model: nn.Module, *, rows: int = 8) -> Iterator[Packed]:
    """A model whose linear layers compute from packed weights, within the `with`; afterwards it is as before.

    What it gives differs from what it gave by rounding alone. Where gradients are wanted, under autocast, and for
    inputs of another type, layers compute as before.

    Args:
        model: any network; its modules of type `torch.nn.Linear` are meant, not those of derived types.
        rows: of the products, about; the layout is chosen for them.

    Raises:
        ValueError: if `rows` is not positive, or no layer's matrix can be packed.

    >>> model, x = nn.Linear(64, 32), torch.randn(3, 64)
    >>> with torch.no_grad(), packed(model) as report:
    ...     close = torch.allclose(model(x), x @ model.weight.T + model.bias, atol=1e-5)
    >>> close, report.layers, report.nbytes
    (True, 1, 8192)
    """
    if rows < 1:
        raise ValueError(f"rows must be positive, got {rows}")
    with changing(model, Packed("packed")) as changes:
        for module in model.modules():
            if type(module) is nn.Linear and can_pack(module.weight):
                product = _Product(module, module.forward, rows)
                product.pack()
                changes.put(module, "forward", product)
                changes.report.layers += 1
                changes.report.nbytes += module.weight.nbytes
        if not changes.report.layers:
            raise ValueError(f"{type(model).__name__} has no linear layer on a CPU in float32 or bfloat16 to pack")
        yield changes.report
