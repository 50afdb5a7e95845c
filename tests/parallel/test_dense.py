"""`attend` on a sequence in parts equals one process: outputs, LSEs and gradients, under every kind of mask."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from ranks import Ranks, check_forecast
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import saccade
from saccade import masks, parallel, score_mods
from saccade.ops.partitions import packed_window_attend
from saccade.parallel.counted import Traffic

B, H, K, D, E = 2, 4, 2, 8, 6


def _random(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def _ids(n: int) -> Tensor:
    return torch.stack([torch.arange(n) // 5, (torch.arange(n) > n // 3).long()])


def _valid(n: int) -> Tensor:
    return (torch.arange(n) >= torch.tensor([[3], [0]])) & (torch.arange(n) < torch.tensor([[n], [n - 6]]))


#: name -> the mask of n queries and m keys
MASKS: dict[str, Callable[[int, int], Any]] = {
    "none": lambda n, m: None,
    "causal": lambda n, m: masks.causal(),
    "window": lambda n, m: masks.window(3),
    "wide window": lambda n, m: masks.window(13, 4),
    "window with sinks": lambda n, m: masks.window(2, sinks=2),
    "prefix": lambda n, m: masks.prefix(n // 3) | masks.causal(),
    "prefixes": lambda n, m: masks.prefix(torch.tensor([1, n // 2])),
    "documents": lambda n, m: masks.documents(_ids(n)) & masks.causal(),
    "per document": lambda n, m: masks.per_document(torch.arange(n) // 9, masks.prefix(2) | masks.causal()),
    "padding": lambda n, m: masks.padding(_valid(m)) & masks.causal(),
    "blocks": lambda n, m: masks.blocks(_random(1, 1, H, -(-n // 4), -(-m // 4)) > 0.6, 4),
    "random": lambda n, m: _random(2, B, 1, n, m) > 0.5,
    "random and sparse": lambda n, m: masks.dense(_random(3, n, m) > 0.97),
    "function": lambda n, m: masks.function(lambda b, h, q, k: (q - k) % 3 == 0),
    "not": lambda n, m: ~(masks.causal() & masks.prefix(5)),
    "cu_seqlens": lambda n, m: torch.tensor([0, n // 4, n // 2 + 1, n]),
    "nothing": lambda n, m: masks.prefix(0),
    "neighbourhood": lambda n, m: masks.neighborhood(n, 7, dilation=2),
    "neighbourhood on a grid": lambda n, m: masks.neighborhood((n // 4, 4), (3, 3), causal=(True, False)),
    "shifted windows": lambda n, m: masks.documents((torch.arange(n) + 3) // 6),
    "tree": lambda n, m: masks.tree([-1, *(i // 2 for i in range(n - 1))]),
}


def _inputs(n: int, m: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(1)
    shapes = (B, H, n, D), (B, K, m, D), (B, K, m, E), (B, H, n, E), (B, H, n)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def _both(mesh: DeviceMesh, n: int, m: int, balance: str, **options: Any) -> tuple[list[Tensor], list[Tensor], Traffic]:
    """What one process computes, this rank's part of it, and what the ranks compute."""
    q, k, v, to_out, to_lse = _inputs(n, m, options.pop("dtype", torch.float32))
    lengths = options.pop("length", None)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = saccade.attend(*leaves, return_lse=True, **options)
    alone = [out, lse, *torch.autograd.grad([out, lse], leaves, [to_out, to_lse.nan_to_num() * lse.isfinite()])]

    with parallel(mesh, balance=balance, length=lengths) as shards:
        q, k, v, to_out, to_lse = (parallel.shard(x, shards, dim=2) for x in (q, k, v, to_out, to_lse))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, lse = saccade.attend(*leaves, return_lse=True, **options)
    together = [out, lse, *torch.autograd.grad([out, lse], leaves, [to_out, to_lse * lse.isfinite()])]
    return [parallel.shard(x, shards, dim=2) for x in alone], together, shards.traffic


def case(mesh: DeviceMesh, name: str, n: int, m: int, balance: str, length: Any = None) -> None:
    length = length or tuple({n, m})
    alone, together, traffic = _both(mesh, n, m, balance, mask=MASKS[name](n, m), length=length)
    shapes = [torch.empty(shape, requires_grad=True) for shape in ((B, H, n, D), (B, K, m, D), (B, K, m, E))]
    plan = saccade.plan(*shapes, mask=MASKS[name](n, m), return_lse=True, mesh=mesh, balance=balance)
    assert plan.parts is not None
    share, path = plan.parts.shares[mesh.get_local_rank()], plan.parts.path
    predicted = {
        (path, "forward"): (share.sent, share.received),
        (path, "backward"): (share.sent_backward, share.received_backward),
    }
    assert {way: count[:2] for way, count in traffic.counts.items()} == ({} if path == "alone" else predicted)
    for what, one, other in zip(("out", "lse", "dq", "dk", "dv"), alone, together):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5, msg=lambda text, what=what: f"{what}: {text}")


@pytest.mark.parametrize("balance", ["contiguous", "head-tail"])
@pytest.mark.parametrize("name", MASKS)
def test_parts_equal_the_whole(ranks: Ranks, name: str, balance: str) -> None:
    ranks(case, name, 44, 44, balance)


@pytest.mark.parametrize("name", ["causal", "window", "random", "documents"])
def test_two_ranks(ranks: Ranks, name: str) -> None:
    ranks(case, name, 24, 24, "contiguous", 24, size=2)


def crossing(mesh: DeviceMesh, name: str, n: int, m: int) -> None:
    case(mesh, name, n, m, "contiguous", (n, m))


@pytest.mark.parametrize(("n", "m"), [(21, 50), (50, 21), (3, 18)])
@pytest.mark.parametrize("name", ["none", "random", "padding"])
def test_cross_attention(ranks: Ranks, name: str, n: int, m: int) -> None:
    ranks(crossing, name, n, m)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_fewer_tokens_than_ranks(ranks: Ranks, n: int) -> None:
    ranks(case, "causal", n, n, "contiguous")


def modified(mesh: DeviceMesh, name: str, balance: str) -> None:
    n, leaf = 31, torch.linspace(0.1, 0.4, H).requires_grad_()
    table = _random(4, H, 9).requires_grad_()
    bias = _random(5, 1, H, n, n).requires_grad_()
    mods: dict[str, tuple[Any, Tensor]] = {
        "alibi": (score_mods.compose(score_mods.soft_cap(5.0), score_mods.alibi(leaf)), leaf),
        "relative": (score_mods.relative_bias(table), table),
        "bias": (score_mods.bias(bias), bias),
        "closure": (lambda s, b, h, q, k: s + leaf[h] * (q - 2 * k), leaf),
    }
    mod, tensor = mods[name]
    q, k, v, to_out, _ = _inputs(n, n)
    options: dict[str, Any] = {"mask": masks.causal(), "score_mod": mod}
    (alone,) = torch.autograd.grad(saccade.attend(q, k, v, **options), tensor, to_out)
    with parallel(mesh, balance=balance) as shards:
        q, k, v, to_out = (parallel.shard(x, shards, dim=2) for x in (q, k, v, to_out))
        out = saccade.attend(q.requires_grad_(), k, v, **options)
        (share,) = torch.autograd.grad(out, tensor, to_out)
        shares = parallel.unshard(share.flatten()[None].expand(1, -1), shards.group).view(shards.ranks, *share.shape)
    torch.testing.assert_close(shares.sum(0), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("balance", ["contiguous", "head-tail"])
@pytest.mark.parametrize("name", ["alibi", "relative", "bias", "closure"])
def test_shares_of_a_modifications_gradient_add_up(ranks: Ranks, name: str, balance: str) -> None:
    ranks(modified, name, balance)


def otherwise(mesh: DeviceMesh, options: dict[str, Any], balance: str) -> None:
    q, k, v, to_out, _ = _inputs(29, 29)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = saccade.attend(*leaves, **options)
    alone = [out, *torch.autograd.grad(out, leaves, to_out)]
    with parallel(mesh, balance=balance) as shards:
        leaves = [parallel.shard(x, shards, dim=2).requires_grad_() for x in (q, k, v)]
        out = saccade.attend(*leaves, **options)
        together = [out, *torch.autograd.grad(out, leaves, parallel.shard(to_out, shards, dim=2))]
    for one, other in zip(alone, together):
        torch.testing.assert_close(other, parallel.shard(one, shards, dim=2), atol=1e-5, rtol=1e-5)


def distance(q: Tensor, k: Tensor) -> Tensor:
    return -torch.cdist(q, k)


@pytest.mark.parametrize(
    "options",
    [
        {"normalize": "sigmoid", "mask": masks.causal()},
        {"normalize": "relu", "mask": masks.window(2, 3)},
        {"normalize": "abs-sum", "mask": masks.window(3, sinks=2)},
        {"score": distance, "mask": masks.causal()},
        {"scale": 0.3, "mask": masks.causal(), "backend": "stream"},
        {"scale": -0.5, "mask": masks.window(9)},
    ],
)
def test_other_scores_and_normalisers(ranks: Ranks, options: dict[str, Any]) -> None:
    for balance in ("contiguous", "head-tail"):
        ranks(otherwise, options, balance)


def in_half(mesh: DeviceMesh, name: str) -> None:
    n = 40
    q, k, v, *_ = (x.bfloat16() for x in _inputs(n, n))
    exact = saccade.attend(*(x.double() for x in (q, k, v)), mask=MASKS[name](n, n))
    with parallel(mesh) as shards:
        out = saccade.attend(*(parallel.shard(x, shards, dim=2) for x in (q, k, v)), mask=MASKS[name](n, n))
    assert out.dtype == torch.bfloat16
    # a rounding of the output, and one of each part's
    torch.testing.assert_close(out.double(), parallel.shard(exact, shards, dim=2), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", ["causal", "window"])
def test_bfloat16(ranks: Ranks, name: str) -> None:
    ranks(in_half, name)


def dropping(mesh: DeviceMesh, mask: masks.Mask) -> list[Tensor]:
    q, k, v, to_out, _ = _inputs(40, 40)
    found = []
    with parallel(mesh) as shards:
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            leaves = [parallel.shard(x, shards, dim=2).requires_grad_() for x in (q, k, v)]
            out = saccade.attend(*leaves, mask=mask, dropout=0.5)
            torch.rand(7)  # the backward pass draws what the forward pass did, whatever is drawn in between
            found.append([out, *torch.autograd.grad(out, leaves, parallel.shard(to_out, shards, dim=2))])
        for one, other in zip(found[0], found[1]):
            assert torch.equal(one, other)
        assert not torch.equal(found[0][0], found[2][0])
        # dropout is linear in the values, so that the output says what their gradient has to be
        again = (parallel.shard(to_out, shards, dim=2) * found[0][0]).sum()
        ours = (found[0][3] * parallel.shard(v, shards, dim=2)).sum()
        return [again.detach(), ours]


@pytest.mark.parametrize("mask", [masks.causal(), masks.window(5)])
def test_dropout_is_the_same_again_and_backward(ranks: Ranks, mask: masks.Mask) -> None:
    forward, backward = (torch.stack(x).sum() for x in zip(*ranks(dropping, mask)))
    torch.testing.assert_close(forward, backward, atol=1e-4, rtol=1e-4)


def counted(mesh: DeviceMesh, name: str, n: int) -> tuple[int, int]:
    _, _, traffic = _both(mesh, n, n, "contiguous", mask=MASKS[name](n, n), length=n)
    assert parallel.traffic() is traffic
    return traffic.sent, traffic.received


def test_every_byte_is_counted(ranks: Ranks) -> None:
    token = B * K * (D + E) * 4
    # three keys before the part of each but the first; back go their gradients
    window = [(3, 3), (6, 6), (6, 6), (3, 3)]
    # ten keys of each to those behind, twice, and their gradients back
    causal = [(30 + 30, 30), (20 + 30, 10 + 30), (10 + 30, 20 + 30), (30, 30 + 30)]
    for name, n, keys in (("window", 40, window), ("window", 80, window), ("causal", 40, causal)):
        assert ranks(counted, name, n) == [(sent * token, received * token) for sent, received in keys]
    assert ranks(counted, "nothing", 40) == [(0, 0)] * 4


def windows(mesh: DeviceMesh, grid: tuple[int, ...], window: tuple[int, ...], shift: Any, balance: str) -> None:
    n, heads = prod(grid), 2
    torch.manual_seed(0)
    qkv, to_out = torch.randn(2, n, 3, heads, D), torch.randn(2, heads, n, D)
    bias = torch.randn(heads, prod(window), prod(window), requires_grad=True)
    leaf = qkv.clone().requires_grad_()
    out = packed_window_attend(leaf, grid, window, shift, bias)
    alone = [out, *torch.autograd.grad(out, [leaf, bias], to_out)]
    whole = leaf
    with parallel(mesh, unit=prod(grid[1:]), balance=balance, length=n) as shards:
        leaf = parallel.shard(qkv, shards).requires_grad_()
        out = packed_window_attend(leaf, grid, window, shift, bias)
        dqkv, of_bias = torch.autograd.grad(out, [leaf, bias], parallel.shard(to_out, shards, dim=2))
    torch.testing.assert_close(out, parallel.shard(alone[0], shards, dim=2), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dqkv, parallel.shard(alone[1], shards), atol=1e-5, rtol=1e-5)
    torch.distributed.all_reduce(of_bias, group=shards.group)
    torch.testing.assert_close(of_bias, alone[2], atol=1e-4, rtol=1e-4)
    parts = parallel.plan(packed_window_attend, whole, grid, window, shift, bias, mesh=shards)
    assert parts.exact
    check_forecast(parts, shards)


@pytest.mark.parametrize("balance", ["contiguous", "head-tail"])
@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [((26,), (4,), 0), ((26,), (4,), 1), ((12, 6), (4, 3), (2, 1)), ((9, 4), (2, 4), (1, 0)), ((3, 8), (4, 4), 2)],
)
def test_shifted_windows(ranks: Ranks, grid: Any, window: Any, shift: Any, balance: str) -> None:
    ranks(windows, grid, window, shift, balance)


def test_nothing_goes_home_that_has_no_gradient() -> None:
    q, k = torch.empty(1, 2, 64, 8, requires_grad=True), torch.empty(1, 2, 64, 8)
    halo, ring = (saccade.plan(q, k, k, mask=mask, mesh=4).parts for mask in (masks.window(3), masks.causal()))
    assert halo is not None and ring is not None
    assert [halo.path, ring.path] == ["halo", "ring"]
    assert halo.shares[1].sent and not halo.shares[1].sent_backward
    assert ring.shares[1].sent_backward == ring.shares[1].sent + ring.shares[1].received


def test_the_work_of_a_thin_mask_is_forecast() -> None:
    n, reach = 2**18, 1024
    q = torch.empty(1, 2, n, 8, device="meta")
    plan = saccade.plan(q, q, q, mask=masks.window(reach - 1), mesh=8)
    assert plan.parts is not None
    exact = 2 * 2 * (8 + 8) * (n // 8) * reach
    assert all(exact <= share.flops <= 1.3 * exact for share in plan.parts.shares[1:])
