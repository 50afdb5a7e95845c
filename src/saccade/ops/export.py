"""Whether a graph is being taken that has to run without this library.

`torch.export` and `torch.onnx.export` take operators of our own as they stand, and no runtime knows them. While they
look, the functions of `ops` compute in torch's operators: the same result, often by way of all pairs of a block.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.export
from torch import Tensor

T = TypeVar("T")


def exporting() -> bool:
    """`torch.export` or an ONNX exporter is at work."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


def output(kind: type[T]) -> type[T]:
    """Let exporters, and whatever else looks for tensors in what a model returns, take a dataclass apart."""
    torch.export.register_dataclass(kind)
    return kind


def weigh(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(scores) @ values and the LSE (..., rows), in torch's operators; a row of -inf gives 0 and -inf."""
    lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - lse.masked_fill(lse == float("-inf"), 0.0)).exp()
    return weights @ values, lse[..., 0]
