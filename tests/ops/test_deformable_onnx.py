"""Deformable attention in ONNX: what onnxruntime computes is what torch does, for numbers of images left open too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from saccade.models.dat.attention import DeformableAttention
from saccade.models.dat.model import Block
from saccade.models.lit import DeformableTokenMerging
from saccade.ops.deformable import deformable_attend

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

SHAPES, COUNTS = [(5, 6), (3, 3), (1, 2)], [3, 2, 1]

Inputs = Callable[[int], tuple[Tensor, ...]]


def check(module: nn.Module, inputs: Inputs, *, open_batch: bool) -> set[str]:
    """Export, run elsewhere, compare; the operators of the graph."""
    module.eval()
    batch = {0: torch.export.Dim("batch", min=1)}
    shapes = (batch,) * len(inputs(1)) if open_batch else None
    with torch.no_grad():
        program = torch.onnx.export(module, inputs(2), dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    graph = program.model_proto.graph
    assert not {node.domain for node in graph.node} - {""}  # operators of the standard alone
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [x.name for x in session.get_inputs()]
    for images in (1, 2, 5) if open_batch else (2,):
        x = inputs(images)
        (found,) = session.run(None, {name: value.numpy() for name, value in zip(names, x, strict=True)})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), module(*x), rtol=0, atol=1e-5)
    return {node.op_type for node in graph.node}


class Attend(nn.Module):
    def forward(self, values: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return deformable_attend(values, SHAPES, locations, weights, COUNTS, mode="discrete")


def attention_inputs(images: int) -> tuple[Tensor, ...]:
    locations = torch.rand(images, 4, 2, 6, 2) * 1.6 - 0.3  # some outside of the map
    return torch.randn(images, 41, 2, 3), locations, torch.randn(images, 4, 2, 6)


@pytest.mark.parametrize("open_batch", [False, True])
def test_discrete_attention(open_batch: bool) -> None:
    torch.manual_seed(0)
    assert "GridSample" not in check(Attend(), attention_inputs, open_batch=open_batch)


class Network(nn.Module):
    """LIT's merging, a deformable convolution; then a block of DAT, bilinear with a table of biases."""

    def __init__(self) -> None:
        super().__init__()
        self.merging = DeformableTokenMerging(4)
        attention = DeformableAttention(8, 2, (3, 4), groups=2)
        self.block = Block(8, attention)
        assert self.merging.offset_conv is not None and attention.bias_table is not None
        for weight in (self.merging.offset_conv.weight, attention.bias_table, attention.offset_proj.weight):
            nn.init.normal_(weight)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.block(self.merging(x_BCHW).permute(0, 2, 3, 1))


def test_modules_that_read_between_pixels() -> None:
    torch.manual_seed(0)
    check(Network(), lambda images: (torch.randn(images, 4, 6, 8),), open_batch=True)
