"""Maps from recorded attention: hand-made layers, and the chain rule."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.explain.maps import flow, gradient_attention, raw, rollout
from saccade.explain.recording import AttentionRecord


def layer(weights_BHNM: Tensor, number: int = 0) -> AttentionRecord:
    """A layer whose attention is given."""
    B, H, _, M = weights_BHNM.shape
    eye = torch.eye(M).expand(B, H, M, M)
    out = (weights_BHNM @ eye).transpose(1, 2)
    return AttentionRecord(
        str(number), number, None, weights_BHNM.log().clamp(min=-60.0), eye, eye, None, 1.0, None, out
    )  # fmt: skip


def attention(*shape: int) -> Tensor:
    return torch.randn(*shape).softmax(-1)


def test_raw_and_rollout_are_products_of_what_stands_in_the_layers() -> None:
    torch.manual_seed(0)
    weights = [attention(2, 3, 5, 5) for _ in range(3)]
    records = [layer(each, i) for i, each in enumerate(weights)]
    torch.testing.assert_close(raw(records), weights[2].mean(1))
    torch.testing.assert_close(raw(records, 0), weights[0].mean(1))
    steps = [(each.mean(1) + torch.eye(5)) / 2 for each in weights]
    torch.testing.assert_close(rollout(records), steps[2] @ steps[1] @ steps[0])
    torch.testing.assert_close(rollout(records, start=1), steps[2] @ steps[1])
    torch.testing.assert_close(rollout(records, kept=0.0), weights[2].mean(1) @ weights[1].mean(1) @ weights[0].mean(1))
    torch.testing.assert_close(rollout(records).sum(-1), torch.ones(2, 5))


def test_flow_of_one_layer_is_its_attention_and_of_two_what_fits_through() -> None:
    pytest.importorskip("scipy")
    first = torch.tensor([[[[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.2, 0.2, 0.6]]]])
    second = torch.tensor([[[[1.0, 0.0, 0.0], [0.4, 0.6, 0.0], [0.0, 0.9, 0.1]]]])
    one = flow([layer(first)], 2)
    torch.testing.assert_close(one[0], torch.tensor([0.1, 0.1, 0.8]), atol=1e-5, rtol=0)
    # to token 2 lead: itself .55 wide, token 1 .45, token 0 nothing; into those from token 1 .1 and 1
    two = flow([layer(first), layer(second, 1)], 2)
    torch.testing.assert_close(two[0], torch.tensor([0.1, 0.55, 0.55]), atol=1e-5, rtol=0)
    torch.testing.assert_close(flow([layer(first), layer(second, 1)]), two)
    # read by halves, no more than a half fits through each; token 0 has .1 and .2 + .1 x 1 of the ways to it
    reads = torch.tensor([0.0, 0.5, 0.5])
    both = flow([layer(first), layer(second, 1)], reads)
    assert bool((both <= reads.sum() + 1e-5).all()) and float(both[0, 1]) == pytest.approx(1.0, abs=1e-5)


def test_gradients_weigh_attention() -> None:
    torch.manual_seed(0)
    weights = [attention(1, 2, 4, 4) for _ in range(2)]
    records = [layer(each, i) for i, each in enumerate(weights)]
    with pytest.raises(RuntimeError, match="backward"):
        gradient_attention(records)
    for record in records:
        record.out_BNHE.grad = torch.randn_like(record.out_BNHE)
    steps = [
        torch.eye(4) + (w * r.out_BNHE.grad.transpose(1, 2)).clamp(min=0).mean(1) for w, r in zip(weights, records)
    ]
    torch.testing.assert_close(gradient_attention(records), steps[1] @ steps[0])


def test_some_rows_are_those_of_all_of_them_in_bounded_memory() -> None:
    torch.manual_seed(0)
    records = [layer(attention(2, 2, 5, 5), i) for i in range(3)]
    for record in records:
        record.out_BNHE.grad = torch.randn_like(record.out_BNHE)
    mean = torch.full((1, 5), 0.2)
    for make in (raw, rollout, gradient_attention):
        whole = make(records)
        torch.testing.assert_close(make(records, rows=[3, -1]), whole[:, [3, 4]])
        torch.testing.assert_close(make(records, rows=mean), whole.mean(1, keepdim=True))
        torch.testing.assert_close(make(records, memory_mb=1e-6), whole)  # a row at a time


def test_rows_of_a_long_input_need_little_memory() -> None:
    from saccade.ops.measure import peak_bytes

    N = 2048
    q = torch.randn(1, 4, N, 8)
    long = [AttentionRecord(str(i), i, None, q, q, q, None, 0.35, None, q.mT, causal=True) for i in range(2)]
    found = rollout(long, rows=[-1])
    assert found.shape == (1, 1, N)
    torch.testing.assert_close(found.sum(-1), torch.ones(1, 1))
    # all of A would be 4 heads of 16 MiB
    assert peak_bytes(lambda: rollout(long, rows=[-1], memory_mb=2.0)) < 8 * 2**20


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no layer was recorded"):
        rollout([])
    with pytest.raises(ValueError, match="same tokens"):
        raw([layer(attention(1, 1, 3, 3)), layer(attention(1, 1, 4, 4))])
    with pytest.raises(ValueError, match="self-attention"):
        rollout([layer(attention(1, 1, 3, 5))])
