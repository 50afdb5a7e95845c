"""Mechanisms that choose blocks equal one process on a sequence in parts, and send the blocks chosen and no others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from functools import partial
from typing import Any

import pytest
import torch
from ranks import Ranks, check_forecast
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from saccade import masks, parallel
from saccade.attention.moba import MoBA, moba_attend, moba_route
from saccade.attention.prism import PrismAttention, prism_attend
from saccade.attention.spargeattn import SpargeAttention, spargeattn_attend
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.ops.attend import attend
from saccade.ops.pattern import Pattern
from saccade.ops.routed import block_layout
from saccade.ops.sequences import attend_apart, documents_of
from saccade.ops.sharding import Layout
from saccade.parallel.routed import laid_out

B, H, K, D, E = 2, 4, 2, 8, 6

CASES: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "moba": (moba_attend, 4, {"block_size": 4, "top_k": 3}),
    "moba of all": (moba_attend, 4, {"block_size": 4, "top_k": 30}),
    "moba with sinks": (moba_attend, 8, {"block_size": 4, "top_k": 2, "sinks": 3, "scale": 0.2}),
    "prism": (prism_attend, 4, {"block_size": 4, "low_freq_threshold": 0.3, "high_freq_threshold": 0.3}),
    "prism, uncalibrated": (
        prism_attend,
        4,
        {"block_size": 4, "calibrate": False, "low_freq_threshold": 0.2, "sinks": 5},
    ),
    "spargeattn": (spargeattn_attend, 8, {"block_q": 8, "block_k": 4, "similarity_threshold": -1.0, "top_k": 0.3}),
    "spargeattn, causal": (
        spargeattn_attend,
        8,
        {"block_q": 8, "block_k": 4, "causal": True, "similarity_threshold": 0.1, "cdf_threshold": 0.4},
    ),
    "spargeattn, short kept": (
        spargeattn_attend,
        8,
        {"block_q": 4, "block_k": 8, "similarity_threshold": -1.0, "top_k": 0.2, "short_blocks": "keep"},
    ),
}


def _map(function: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda q, k, v, options: function(q, k, v, return_map=True, **options)[1]


def _routes(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    size, rows = options["block_size"], laid_out(options.get("mask"), B, q.shape[2], options["block_size"])
    if rows is None:
        q, k = (torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % size)) for x in (q, k))
    else:
        q, k = rows.align(q), rows.align(k)
    given = {"first_blocks": -(-options.get("sinks", 0) // size), "start_Bn": None if rows is None else rows.start_Bn}
    return moba_route(q, k, block_size=size, top_k=options["top_k"], **given)


#: the blocks that one process chooses
CHOICES: dict[Any, Callable[..., Tensor]] = {
    moba_attend: _routes,
    prism_attend: _map(prism_attend),
    spargeattn_attend: _map(spargeattn_attend),
}


def _padding(n: int) -> masks.Mask:
    """On the left of one row, on the right of the other."""
    return masks.padding(
        (torch.arange(n) >= torch.tensor([[5], [0]])) & (torch.arange(n) < torch.tensor([[n], [n - 9]]))
    )


def _documents(n: int) -> masks.Mask:
    return masks.documents(torch.stack([torch.arange(n) // 11, (torch.arange(n) > n // 3).long()]))


#: name -> a case of the above, and the mask of n tokens
MASKED: dict[str, tuple[str, Callable[[int], masks.Mask]]] = {
    "moba, padding": ("moba", _padding),
    "moba with sinks, documents": ("moba with sinks", _documents),
    "moba, documents": ("moba", _documents),
    "moba, documents and padding": ("moba", lambda n: _documents(n) & _padding(n)),
    "moba of all, documents": ("moba of all", _documents),
    "prism, padding": ("prism", _padding),
    "prism, uncalibrated, padding": ("prism, uncalibrated", _padding),
}


def _inputs(n: int) -> list[Tensor]:
    torch.manual_seed(2)
    q, k, v, to_out = (torch.randn(s) for s in ((B, H, n, D), (B, K, n, D), (B, K, n, E), (B, H, n, E)))
    return [q, k, v, to_out]


def case(
    mesh: DeviceMesh, name: str, n: int, unit: int | None = None, balance: str = "contiguous"
) -> dict[str, tuple[int, int]]:
    name, mask = MASKED.get(name, (name, None))
    function, own_unit, options = CASES[name]
    options = options if mask is None else {**options, "mask": mask(n)}
    q, k, v, to_out = _inputs(n)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = function(*leaves, **options)
    alone = [out, *torch.autograd.grad(out, leaves, to_out)]
    with parallel(mesh, unit=own_unit if unit is None else unit, length=n, balance=balance) as shards:
        leaves = [parallel.shard(x, shards, dim=2).requires_grad_() for x in (q, k, v)]
        out = function(*leaves, **options)
        together = [out, *torch.autograd.grad(out, leaves, parallel.shard(to_out, shards, dim=2))]
    for what, one, other in zip(("out", "dq", "dk", "dv"), alone, together):
        expected = parallel.shard(one, shards, dim=2)
        torch.testing.assert_close(other, expected, atol=1e-5, rtol=1e-5, msg=lambda text, what=what: f"{what}: {text}")
    _foreseen(name, options, [q, k, v], shards)
    return {f"{kind} {way}": count[:2] for (kind, way), count in shards.traffic.counts.items()}


def _foreseen(name: str, options: dict[str, Any], qkv: list[Tensor], shards: Any) -> None:
    """What was counted is the forecast."""
    function = CASES[name][0]
    whole = [x.clone().requires_grad_() for x in qkv]
    predicted = parallel.plan(function, *whole, mesh=shards, chosen=CHOICES[function](*qkv, options), **options)
    assert predicted.exact
    check_forecast(predicted, shards)
    bound = parallel.plan(function, *whole, mesh=shards, **options)
    for one, most in zip(predicted.shares, bound.shares):
        assert all(a <= b for a, b in zip(astuple(one), astuple(most)))


@pytest.mark.parametrize("n", [64, 53])
@pytest.mark.parametrize("name", [*CASES, *MASKED])
def test_parts_equal_the_whole(ranks: Ranks, name: str, n: int) -> None:
    ranks(case, name, n)


@pytest.mark.parametrize("name", ["moba", "prism", "spargeattn", "moba, documents", "prism, padding"])
def test_blocks_that_parts_would_cut_are_made_whole(ranks: Ranks, name: str) -> None:
    ranks(case, name, 53, 1)
    ranks(case, name, 53, 1, "head-tail")
    ranks(case, name, 37, 3, size=2)


@pytest.mark.parametrize("name", ["moba", "prism", "spargeattn, causal", "moba, documents", "prism, padding"])
def test_fewer_blocks_than_ranks(ranks: Ranks, name: str) -> None:
    ranks(case, name, 11)
    ranks(case, name, 3, size=2)


def test_tokens_that_get_another_rank_are_sent_and_no_others(ranks: Ranks) -> None:
    n, size = 64, 4
    _, unit, options = CASES["moba"]
    ids_BM = Pattern.of(_documents(n), B, n, n, causal=True).sequence_ids(B, n)
    assert ids_BM is not None and size == options["block_size"]
    place_BM = block_layout(ids_BM, size).place_BN
    before = torch.arange(n) // (n // 4)
    cut = Layout(len(block_layout(ids_BM, size).source_BL[0]), 4, unit=unit)
    after_BM = torch.cat([torch.full((cut.share(rank),), rank) for rank in range(4)])[place_BM]
    ranks_of = [(before == rank, after_BM == rank) for rank in range(4)]
    found = ranks(case, "moba, documents", n)
    for (was, will_be), one in zip(ranks_of, found):
        left, came = int((was & ~will_be).sum()), int((will_be & ~was).sum())
        # queries, keys and values there, outputs back
        there, back = 4 * (H * D + K * (D + E)), 4 * H * E
        sent, received = left * there + came * back, came * there + left * back
        assert one["tokens forward"] == (sent, received) and one["tokens backward"] == (received, sent)


def _blocks_sent(wanted: list[Tensor], layout: Layout, size: int) -> list[tuple[int, int]]:
    """Bytes of the blocks that each rank sends and receives, where `wanted[r]` (B, K, m) is what rank r keeps."""
    block = size * (D + E) * 4
    firsts = [piece.start // size for rank in range(4) for piece in layout.pieces(rank)] + [wanted[0].shape[2]]
    table = [[int(one[..., firsts[p] : firsts[p + 1]].sum()) * block for p in range(4)] for one in wanted]
    return [
        (sum(table[r][p] for r in range(4) if r != p), sum(table[p][r] for r in range(4) if r != p)) for p in range(4)
    ]


@pytest.mark.parametrize("name", ["moba", "prism"])
def test_chosen_blocks_are_sent_and_no_others(ranks: Ranks, name: str) -> None:
    n, size = 64, 4
    function, unit, options = CASES[name]
    q, k, v, _ = _inputs(n)
    layout = Layout(n, 4, unit=unit)
    if name == "moba":
        chosen = moba_route(q, k, **options)
        keep = torch.zeros(B, H, n, n // size + 1, dtype=torch.bool).scatter_(3, chosen.remainder(n // size + 1), True)
        keep = keep[..., :-1].unflatten(2, (-1, size)).any(3)
    else:
        keep = function(q, k, v, return_map=True, **options)[1]
    rows = [slice(piece.start // size, piece.stop // size) for rank in range(4) for piece in layout.pieces(rank)]
    wanted = [keep[:, :, here].unflatten(1, (K, -1)).any(2).any(2) for here in rows]
    found = ranks(case, name, n)
    expected = _blocks_sent(wanted, layout, size)
    assert [one["blocks forward"] for one in found] == expected
    assert [one["blocks backward"] for one in found] == [(received, sent) for sent, received in expected]
    # a byte for each block and key head that another rank holds, and has
    assert [one["choice forward"] for one in found] == [(B * K * 12, B * K * 12)] * 4


def apart(mesh: DeviceMesh, name: str, n: int, packed: bool) -> None:
    function, unit, options = (attend, 1, {"mask": masks.causal()}) if name == "softmax" else CASES[name]
    q, k, v, to_out = _inputs(n)
    pattern = Pattern.of(_documents(n) & _padding(n) if packed else _padding(n), B, n, n)
    given = pattern.valid_BM, pattern.ids_BM
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend_apart(partial(function, **options), *leaves, *given)
    alone = [out, *torch.autograd.grad(out, leaves, to_out)]
    with parallel(mesh, unit=unit, length=n) as shards:
        leaves = [parallel.shard(x, shards, dim=2).requires_grad_() for x in (q, k, v)]
        out = attend_apart(partial(function, **options), *leaves, *given)
        together = [out, *torch.autograd.grad(out, leaves, parallel.shard(to_out, shards, dim=2))]
    for one, other in zip(alone, together):
        torch.testing.assert_close(other, parallel.shard(one, shards, dim=2), atol=1e-5, rtol=1e-5)
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    parts = parallel.plan(attend_apart, partial(function, **options), *whole, *given, mesh=shards)
    # where a rank has each sequence whole, no block that is chosen is sent
    assert parts.exact == (name == "softmax" or "blocks" not in parts.path)
    assert sum(share.flops for share in parts.shares) > 0
    check_forecast(parts, shards)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["softmax", "prism", "spargeattn"])
def test_sequences_each_for_itself(ranks: Ranks, name: str, packed: bool) -> None:
    ranks(apart, name, 71, packed)
    ranks(apart, name, 40, packed, size=2)


def packed(mesh: DeviceMesh, rows: str, balance: str) -> None:
    n = 26
    positions = torch.arange(n).expand(2, -1)
    if rows == "begin inside":
        positions = torch.stack([torch.arange(n) % 7, torch.arange(n)])
    elif rows == "begin where a part does":
        first = next(iter(Layout(n, mesh.size(), balance).pieces(1))).start
        positions = torch.cat([torch.arange(first), torch.arange(n - first)]).expand(2, -1)
    whole = documents_of(positions)
    with parallel(mesh, balance=balance) as shards:
        ids = documents_of(parallel.shard(positions, shards))
    assert (ids is None) == (whole is None) == (rows == "whole")
    if ids is not None and whole is not None:
        assert torch.equal(ids, whole)
    check_forecast(parallel.plan(documents_of, positions, mesh=shards), shards)
    with pytest.raises(ValueError, match="must not lie on the"):
        parallel.plan(documents_of, positions.to("meta"), mesh=shards)


@pytest.mark.parametrize("balance", ["contiguous", "head-tail"])
@pytest.mark.parametrize("rows", ["whole", "begin inside", "begin where a part does"])
def test_packed_rows_are_known_by_their_positions(ranks: Ranks, rows: str, balance: str) -> None:
    ranks(packed, rows, balance)
    ranks(packed, rows, balance, size=2)


LAYERS: dict[str, Callable[[], Any]] = {
    "softmax": lambda: SoftmaxAttention(32, 4, True, num_kv_heads=2),
    "moba": lambda: MoBA(32, 4, num_kv_heads=2, block_size=4, top_k=3),
    "prism": lambda: PrismAttention(32, 4, num_kv_heads=2, block_size=4, low_freq_threshold=0.5),
    "spargeattn": lambda: SpargeAttention(32, 4, True, block_q=4, block_k=4, similarity_threshold=-1.0, top_k=0.4),
}


def layer(mesh: DeviceMesh, name: str) -> None:
    torch.manual_seed(0)
    module = LAYERS[name]()
    x = torch.randn(2, 48, 32)
    alone = module(x)
    with parallel(mesh, unit=4) as shards:
        out = module(parallel.shard(x, shards))
    torch.testing.assert_close(out, parallel.shard(alone, shards), atol=1e-5, rtol=1e-5)


def with_heads_apart(mesh: DeviceMesh, name: str) -> None:
    """Heads on two ranks, the sequence on two."""
    torch.manual_seed(0)
    module = LAYERS[name]()
    x = torch.randn(2, 48, 32)
    alone = module(x)
    (weight,) = torch.autograd.grad(alone.square().sum(), module.q_proj.weight)
    plan = {"q_proj": ColwiseParallel(), "k_proj": ColwiseParallel(), "v_proj": ColwiseParallel()}
    module = parallelize_module(module, mesh["data"], {**plan, "out_proj": RowwiseParallel()})
    with parallel(mesh["sequence"], unit=4) as shards:
        out = module(parallel.shard(x, shards))
    torch.testing.assert_close(out, parallel.shard(alone, shards), atol=1e-5, rtol=1e-5)
    out.square().sum().backward()
    share = module.q_proj.weight.grad.to_local()
    torch.distributed.all_reduce(share, group=shards.group)
    rows = weight.chunk(2)[mesh["data"].get_local_rank()]
    torch.testing.assert_close(share, rows, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_tensor_parallel_plans(ranks: Ranks, name: str) -> None:
    ranks(with_heads_apart, name, size=0)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(ranks: Ranks, name: str) -> None:
    ranks(layer, name)


def refusing(mesh: DeviceMesh) -> None:
    x = torch.randn(1, 2, 8, 4)
    with parallel(mesh, length=32, unit=4), pytest.raises(ValueError, match=r"MoBA takes padding .* got a window"):
        moba_attend(x, x, x, block_size=4, mask=masks.window(3))
    with parallel(mesh, length=32, unit=4), pytest.raises(ValueError, match=r"Prism takes padding .* got packed"):
        prism_attend(x, x, x, block_size=4, mask=masks.documents(torch.arange(32) // 9))
    with parallel(mesh, length=32, unit=4), pytest.raises(ValueError, match="takes no return_map"):
        spargeattn_attend(x, x, x, block_q=4, block_k=4, return_map=True)
    with parallel(mesh, length=32, unit=4), pytest.raises(ValueError, match="top_k must be an integer of at least 1"):
        moba_attend(x, x, x, block_size=4, top_k=0)


def test_what_cannot_be_done_is_refused(ranks: Ranks) -> None:
    ranks(refusing)
