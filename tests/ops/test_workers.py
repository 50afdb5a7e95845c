"""Pieces of work on several threads: side by side, each once, failures come back."""

from __future__ import annotations

import threading

import pytest
import torch

from saccade.ops import native, workers


@pytest.fixture(params=["the team's threads", "threads of its own"])
def two_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    if request.param == "threads of its own":
        monkeypatch.setattr(native, "refusal", lambda device, dtype: "switched off")
    elif native.refusal(torch.device("cpu"), torch.float32):
        pytest.skip("no compiler")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_pieces_run_side_by_side_and_each_once(two_threads: None) -> None:
    both, done = threading.Barrier(2), []

    def piece(i: int) -> None:
        if i < 2:
            both.wait(timeout=30)  # the two only pass together
        assert not torch.is_grad_enabled()
        done.append((i, float(torch.ones(300, 300) @ torch.ones(300) @ torch.ones(300))))

    workers.each(piece, range(9))
    assert sorted(done) == [(i, 90_000.0) for i in range(9)]
    assert torch.is_grad_enabled() and torch.get_num_threads() == 2


def test_pieces_may_have_pieces(two_threads: None) -> None:
    done = []
    workers.each(lambda i: workers.each(lambda j: done.append((i, j)), range(3)), range(4))
    assert sorted(done) == [(i, j) for i in range(4) for j in range(3)]


def test_a_failure_comes_back_and_ends_the_rest(two_threads: None) -> None:
    done = []

    def piece(i: int) -> None:
        if i == 3:
            raise ZeroDivisionError("third")
        done.append(i)

    with pytest.raises(ZeroDivisionError, match="third"):
        workers.each(piece, range(10_000))
    assert len(done) < 9_999
