"""Working memory: what a lease promises, and that calls inside calls get memory of their own."""

from __future__ import annotations

from threading import Thread

import pytest
import torch
from torch import Tensor

from saccade import attend, masks
from saccade.ops import scratch as module
from saccade.ops.scratch import KEPT_BYTES, scratch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_free", module._Free())


def test_memory_is_used_again_for_the_same_purpose_and_dtype() -> None:
    places = []
    for purpose, dtype in (("a", torch.float32), ("a", torch.float32), ("b", torch.float32), ("a", torch.float64)):
        with scratch(purpose, dtype, CPU) as room:
            x = room("x", 4, 5)
            assert x.shape == (4, 5) and x.dtype == dtype and x.is_contiguous()
            assert room("x", 2, 3).data_ptr() == x.data_ptr() != room("y", 2).data_ptr()
            places.append(room)
    assert places[0] is places[1] and len(set(map(id, places))) == 3


def test_a_lease_inside_a_lease_gets_other_memory() -> None:
    with scratch("a", torch.float32, CPU) as outer:
        outer("x", 3).fill_(1.0)
        with scratch("a", torch.float32, CPU) as inner:
            inner("x", 3).fill_(2.0)
            assert inner is not outer
        assert outer("x", 3).tolist() == [1.0] * 3
    with scratch("a", torch.float32, CPU) as first, scratch("a", torch.float32, CPU) as second:
        assert {id(first), id(second)} == {id(outer), id(inner)}


def test_memory_comes_back_after_an_error_and_outside_of_inference() -> None:
    with pytest.raises(ZeroDivisionError), torch.inference_mode(), scratch("a", torch.float32, CPU) as room:
        assert not room("x", 3).is_inference()
        1 / 0  # noqa: B018
    with scratch("a", torch.float32, CPU) as again:
        again("x", 3).add_(1.0)
    assert again is room


def test_each_thread_has_its_own() -> None:
    rooms = []

    def lease() -> None:
        with scratch("a", torch.float32, CPU) as room:
            rooms.append(room)

    lease()
    thread = Thread(target=lease)
    thread.start()
    thread.join()
    assert rooms[0] is not rooms[1]


def test_only_so_much_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    with scratch("a", torch.float32, CPU) as room:
        large, small = room("large", KEPT_BYTES // 4 + 1), room("small", 7)
        room.bound["call"] = large
    assert room.trim() == 28 and not room.bound
    with scratch("a", torch.float32, CPU) as room:
        assert room("small", 7).data_ptr() == small.data_ptr()
    monkeypatch.setattr(module, "_ALL_BYTES", 100)
    for purpose in range(20):
        with scratch(purpose, torch.float32, CPU) as room:
            room("x", 10)
    assert [key[0] for key, _, _ in module._free.rooms] == [18, 19]


def test_what_is_made_of_a_buffer_is_forgotten_with_it() -> None:
    with scratch("a", torch.float32, CPU) as room:
        room.bound["view"] = room("x", 4)
        room("y", 100), room("x", 3)
        assert "view" in room.bound
        room("x", 5)
        assert not room.bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mask_function_may_attend(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, w = torch.randn(1, 2, 512, 16, dtype=dtype), torch.randn(1, 1, 512, 16, dtype=dtype) * 100
    blocks, whole = masks.blocks(torch.rand(1, 2, 8, 8) < 0.6, 64), masks.blocks(torch.ones(1, 1, 8, 8).bool(), 64)
    calls = 0

    def third(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i * 7 + j * 3) % 5 < 2

    def attending(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        attend(w, w, w, mask=whole, backend="blocksparse")
        return third(b, h, i, j)

    ours, theirs = (attend(q, q, q, mask=masks.function(f) & blocks, backend="blocksparse") for f in (attending, third))
    assert calls and torch.equal(ours, theirs)
