"""Deformable sampling: equal to grid sampling, its gradients, what lies outside, and what exporters see."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.deformable import (
    bias_at_points,
    crops,
    deformable_attend,
    deformable_attend_reference,
    deformable_conv,
    gather_dot,
    gather_sum,
    level_pixels,
    pixels,
    points,
    sample,
    samples,
    scatter_sum,
)

SHAPES, COUNTS = [(7, 9), (4, 3), (1, 2)], [4, 2, 1]


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    values = torch.randn(2, 63 + 12 + 2, 3, 5, dtype=dtype)
    locations = torch.rand(2, 6, 3, 7, 2, dtype=dtype) * 1.6 - 0.3
    return values, locations, torch.randn(2, 6, 3, 7, dtype=dtype)


@pytest.mark.parametrize("padding", points.PADDINGS)
@pytest.mark.parametrize("mode", points.MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_grid_sampling_forward_and_backward(mode: str, padding: str, dtype: torch.dtype) -> None:
    leaves = [x.requires_grad_() for x in inputs(dtype)]
    values, locations, weights = leaves
    ours = deformable_attend(values, SHAPES, locations, weights, COUNTS, mode=mode, padding=padding)
    usual = deformable_attend_reference(values, SHAPES, locations, weights, COUNTS, mode=mode, padding=padding)
    torch.testing.assert_close(ours, usual)
    grad = torch.randn_like(ours)
    found = torch.autograd.grad(ours, leaves, grad, allow_unused=True)
    expected = torch.autograd.grad(usual, leaves, grad, allow_unused=True)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[2], expected[2])
    if mode == "bilinear":
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)
    else:
        assert found[1] is None


def test_primitives_are_each_others_derivatives() -> None:
    torch.manual_seed(0)
    rows, query = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (5, 4))
    index = torch.randint(5, (4, 6), dtype=torch.int32)
    weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    for function in (
        lambda r, w: gather_sum(r, index, w),
        lambda r, w: gather_dot(query, r, index) * w,
        lambda r, w: scatter_sum(index, w, r[:4], 7),
    ):
        assert torch.autograd.gradcheck(function, (rows, weight))
        assert torch.autograd.gradgradcheck(function, (rows, weight))
    assert torch.autograd.gradcheck(lambda q: gather_dot(q, rows, index), (query,))
    torch.testing.assert_close(gather_sum(rows, index, weight), torch.einsum("ks,ksd->kd", weight, rows[index.long()]))


def test_gradients_in_locations() -> None:
    values, locations, weights = (x[:1] for x in inputs())
    leaves = [x.clone().requires_grad_() for x in (values[..., :1, :2], locations[:, :1, :1], weights[:, :1, :1])]
    assert torch.autograd.gradcheck(lambda v, p, w: deformable_attend(v, SHAPES, p, w, COUNTS), leaves)


def test_dots_with_samples_that_are_never_made() -> None:
    """Key-aware attention: the products of a query with its own samples."""
    keys, locations, _ = inputs()
    query = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    read = samples(level_pixels(locations, SHAPES, COUNTS), SHAPES, COUNTS)
    made = torch.stack(
        [read.sum(keys, F.one_hot(torch.tensor(s), 7).to(keys).expand(2, 6, 3, 7)) for s in range(7)],
        3,
    )
    torch.testing.assert_close(read.dot(query, keys), (query[:, :, :, None] * made).sum(-1))


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (6, 7)])
@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("padding", points.PADDINGS)
def test_one_map(size: tuple[int, int], align: bool, padding: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    points = torch.rand(2, 9, 3, 2, dtype=torch.float64) * 3 - 1.5
    ours = sample(x.permute(0, 2, 3, 1), pixels(points, size, align), padding=padding)
    for g in range(3):
        usual = F.grid_sample(
            x[:, 2 * g : 2 * g + 2], points[:, :, g : g + 1], align_corners=align, padding_mode=padding
        )
        torch.testing.assert_close(ours[..., 2 * g : 2 * g + 2], usual[..., 0].transpose(1, 2))


def test_far_outside_and_not_a_number() -> None:
    x = torch.randn(1, 3, 4, 2)
    points = torch.tensor([1e30, -1e30, float("inf"), -float("inf")]).repeat_interleave(2).view(1, 4, 1, 2)
    assert torch.equal(sample(x, points), torch.zeros(1, 4, 2))
    assert torch.equal(sample(x, points, padding="border")[0, 0], x[0, -1, -1])
    assert sample(x, torch.full((1, 1, 1, 2), float("nan"))).isnan().all()
    assert sample(x, points, mode="discrete").isfinite().all()


def test_half_precision_keeps_coordinates_in_single() -> None:
    values, locations, weights = inputs(torch.float32)
    exact = deformable_attend(values, SHAPES, locations, weights, COUNTS)
    ours = deformable_attend(values.bfloat16(), SHAPES, locations, weights.bfloat16(), COUNTS)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), exact, rtol=0.05, atol=0.05)


def test_nothing_to_read() -> None:
    values, locations, weights = inputs(torch.float32)
    assert deformable_attend(values, SHAPES, locations[:, :0], weights[:, :0], COUNTS).shape == (2, 0, 3, 5)
    assert not deformable_attend(values[:0], SHAPES, locations[:0], weights[:0], COUNTS).numel()
    none = deformable_attend(values, SHAPES, locations[..., :0, :], weights[..., :0], [0, 0, 0])
    assert torch.equal(none, torch.zeros(2, 6, 3, 5))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "groups"), [(3, 1, 1, 1, 1), (3, 2, 0, 2, 2), (2, 2, 0, 1, 1)]
)
def test_convolution_without_offsets(kernel: int, stride: int, padding: int, dilation: int, groups: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, dtype=torch.float64) for shape in ((2, 4, 7, 9), (5, 4, kernel, kernel), (5,))
    )
    plain = F.conv2d(x, weight, bias, stride, padding, dilation)
    offset = torch.zeros(2, 2 * groups * kernel**2, *plain.shape[2:], dtype=torch.float64)
    for layout in (torch.contiguous_format, torch.channels_last):
        ours = deformable_conv(
            x.contiguous(memory_format=layout), offset, weight, bias, stride=stride, padding=padding, dilation=dilation
        )
        torch.testing.assert_close(ours, plain)
        assert ours.is_contiguous(memory_format=layout)


def test_convolution_with_whole_offsets_and_mask() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 2, 8, 8, dtype=torch.float64), torch.randn(3, 2, 3, 3, dtype=torch.float64)
    offset = torch.zeros(1, 9, 2, 8, 8, dtype=torch.float64)
    offset[:, :, 0], offset[:, :, 1] = 1, -2
    mask = torch.full((1, 9, 8, 8), 0.5, dtype=torch.float64)
    ours = deformable_conv(x, offset.flatten(1, 2), weight, padding=1, mask_BkHW=mask)
    shifted = F.conv2d(F.pad(x, (2, 0, 0, 1))[:, :, 1:, :8], weight, padding=1)
    torch.testing.assert_close(ours[:, :, 1:-2, 3:-1], 0.5 * shifted[:, :, 1:-2, 3:-1])


@pytest.mark.parametrize(("size", "groups"), [((5, 7), 2), ((1, 1), 1), ((6, 1), 4)])
def test_bias_by_crops_equals_bias_pair_by_pair(size: tuple[int, int], groups: int) -> None:
    torch.manual_seed(0)
    H, W = size
    table = torch.randn(4, 2 * H - 1, 2 * W - 1, dtype=torch.float64, requires_grad=True)
    inside = torch.tensor([max(W - 1, 1), max(H - 1, 1)], dtype=torch.float64)
    points = ((torch.rand(2, 5, groups, 2, dtype=torch.float64) * 1.6 - 0.3) * inside).requires_grad_()
    ours = bias_at_points(table, points, size)
    usual = crops._stretched_bias(table.unflatten(0, (groups, -1)), points, size)
    torch.testing.assert_close(ours, usual)
    grad = torch.randn_like(ours)
    found, expected = (torch.autograd.grad(x, (table, points), grad) for x in (ours, usual))
    torch.testing.assert_close(found, expected)


def test_bias_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    table = torch.randn(2, 9, 9, requires_grad=True)
    points = (torch.rand(2, 7, 1, 2) * 4).requires_grad_()
    results = []
    for size in (2**20, 500, None):
        if size is None:  # all at once, in C where there is some
            monkeypatch.undo()
        else:
            monkeypatch.setattr(crops, "_PIECE_BYTES", size)
            monkeypatch.setattr(crops, "_in_c", lambda *_: False)
        out = bias_at_points(table, points, (5, 5))
        results.append((out, *torch.autograd.grad(out.square().sum(), (table, points))))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


def test_bias_on_pixels_is_the_table() -> None:
    table = torch.randn(1, 5, 7)
    bias = bias_at_points(table, torch.tensor([[[[2.0, 1.0]]]]), (3, 4)).view(3, 4)
    assert torch.equal(bias, table[0, 1:4, 1:5])  # query (i, j) at i - 1 + 2, j - 2 + 3


def test_compiles() -> None:
    values, locations, weights = (x.requires_grad_() for x in inputs(torch.float32))
    table = torch.randn(2, 9, 9)

    def run(values: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        out = deformable_attend(values, SHAPES, locations, weights, COUNTS)
        return out.sum() + bias_at_points(table, locations[:, :, :1, 0] * 4, (5, 5)).square().sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    ours, expected = compiled(values, locations, weights), run(values, locations, weights)
    torch.testing.assert_close(ours, expected)
    leaves = (values, locations, weights)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("mode", ["discrete", "bilinear"])
def test_exports_without_grid_sampling_or_operators_of_our_own(mode: str) -> None:
    class Attend(torch.nn.Module):
        def forward(self, values: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            return deformable_attend(values, SHAPES, locations, weights, COUNTS, mode=mode)

    example = inputs(torch.float32)
    program = torch.export.export(Attend(), example)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert names and not any("saccade" in name or "grid_sampl" in name or "embedding" in name for name in names)
    torch.testing.assert_close(program.module()(*example), Attend()(*example))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "cubic"}, "mode must be"),
        ({"padding": "reflection"}, "padding must be"),
        ({"counts": [4, 3]}, "counts must be"),
        ({"counts": None}, "equally many"),
        ({"shapes": [(7, 9), (4, 3), (1, 3)]}, "values must be"),
        ({"shapes": []}, "shapes must be"),
    ],
)
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    values, locations, weights = inputs(torch.float32)
    arguments = {"shapes": SHAPES, "counts": COUNTS} | change
    shapes, counts = arguments.pop("shapes"), arguments.pop("counts")
    with pytest.raises(ValueError, match=message):
        deformable_attend(values, shapes, locations, weights, counts, **arguments)


def test_bad_shapes() -> None:
    values, locations, weights = inputs(torch.float32)
    with pytest.raises(ValueError, match="weights must be"):
        deformable_attend(values, SHAPES, locations, weights[..., :3], COUNTS)
    with pytest.raises(ValueError, match="must divide the channels"):
        sample(torch.randn(1, 3, 3, 4), torch.zeros(1, 2, 3, 2))
    with pytest.raises(ValueError, match="x must be"):
        sample(torch.randn(3, 3, 4), torch.zeros(1, 2, 3, 2))
    with pytest.raises(ValueError, match="offset must be"):
        deformable_conv(torch.randn(1, 2, 4, 4), torch.zeros(1, 18, 3, 4), torch.randn(2, 2, 3, 3), padding=1)
    with pytest.raises(ValueError, match="must divide the heads"):
        bias_at_points(torch.randn(3, 3, 3), torch.zeros(1, 1, 2, 2), (2, 2))
