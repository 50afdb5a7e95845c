"""What only very large inputs show: offsets of more than 32 bits, and more programs than an axis of a grid holds.

Memory that is never touched costs nothing: on the processor it is a file with holes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saccade.ops.linear import linear_attend
from saccade.ops.triton import launch, launching, linear, routed, selective_scan, wkv

pytest.importorskip("triton", reason="triton is not installed")

Room = Callable[[int], Tensor]


@pytest.fixture
def room(kernel_device: torch.device, tmp_path: Path) -> Room:
    """float32 numbers, so many, of which most are never touched."""
    if kernel_device.type == "cpu":
        return lambda size: torch.from_file(str(tmp_path / f"{size}"), shared=True, size=size)
    if torch.cuda.get_device_properties(kernel_device).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB on the device")
    return lambda size: torch.empty(size, device=kernel_device)


def test_linear_takes_tokens_and_heads_that_lie_far_apart(kernel_device: torch.device, room: Room) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 3, 5, device=kernel_device) for _ in range(3))
    expected = linear_attend(q, k, v, decay=0.5, backend="triton")
    whole = room(2**31 + 64)
    for strides in ((0, 8, 2**30, 1), (0, 2**31, 8, 1)):  # tokens; heads
        far = whole.as_strided(q.shape, strides).copy_(q)
        torch.testing.assert_close(linear_attend(far, k, v, decay=0.5, backend="triton"), expected)


def test_wkv_takes_sums_whose_rows_lie_far_apart(kernel_device: torch.device, room: Room) -> None:
    """Six rows of 2^29 numbers, of which one program reads the first batch row."""
    from saccade.ops.triton import wkv_kernels as kernels

    B, T, C = 2**20, 64, 8
    torch.manual_seed(0)
    few, w = torch.randn(6, 1, T, C, device=kernel_device), torch.rand(C, device=kernel_device)
    many = room(6 * B * T * C).view(6, B, T, C)
    many[:, :1] = few
    sums = []
    for tokens, rows in ((few, 1), (many, B)):
        last, first = (tokens.new_empty(6, rows, 1, C) for _ in range(2))
        launch(
            kernels.segment_sums, (1,), tokens, w, last, first, rows, T, C, T, 1, 1, T,
            SEGMENT=64, BLOCK=32, FLIP=False, MOMENTS=True, warps=1,
        )  # fmt: skip
        sums.append((last[:, 0].clone(), first[:, 0].clone()))
    torch.testing.assert_close(sums[1], sums[0])


def test_no_axis_of_a_grid_is_longer_than_cuda_has_them() -> None:
    """Many rows, many tokens, and many blocks; 2^31 - 1 programs along the first axis, 65,535 along the others."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    with launching.noted() as found:
        for B, T, C in ((2**17, 64, 32), (1, 2**23, 32)):
            wkv.around_in_triton(meta(6, B, T, C), meta(C), T, 1, True, False)
            x, b = meta(B, T, 1, C), meta(B, T, 1, 16)
            _, states = selective_scan.scan_in_triton(x, x, meta(1, 16, C), b, b, 64)
            selective_scan.scan_backward_in_triton(x, x, meta(1, 16, C), b, b, states, x, 64)
            q = meta(B, 1, T, C)
            linear.gradients(q, q, q, meta(B, 1, C, C), "token", meta(B, 1, T, 1), None, 1.0, q, meta(B, 1, C, C), True)
            chosen = meta(B, 1, T, 1, dtype=torch.long)
            out, lse = routed.attend_routes_in_triton(q, q, q, chosen, 16, 1.0, True)
            routed.route_gradients_in_triton(q, q, q, chosen, 16, 1.0, True, out, lse, q, None)
    assert {one.kernel.__name__ for one in found} >= {"merge_own", "key_gradients", "gradients", "token_sums", "states"}
    for one in found:
        x, *others = one.grid
        assert x < 2**31 and all(y <= 65535 for y in others), (one.kernel.__name__, one.grid)
