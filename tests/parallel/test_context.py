"""The context itself: lengths, refusals, batches, layers, and what happens when a rank fails."""

from __future__ import annotations

import os
import time
from math import prod

import pytest
import torch
from ranks import Ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import saccade
from saccade import masks, parallel
from saccade.attention.neighborhood import NeighborhoodAttention
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.ops.pattern import Pattern
from saccade.ops.routed import routed_attend
from saccade.ops.sharding import Layout


@pytest.mark.parametrize("balance", ["contiguous", "head-tail"])
@pytest.mark.parametrize("length", [0, 1, 7, 8, 41])
def test_a_layout_deals_every_token_once(length: int, balance: str) -> None:
    layout = Layout(length, 4, balance)
    held = [token for rank in range(4) for piece in layout.pieces(rank) for token in piece]
    assert sorted(held) == list(range(length))
    assert max(layout.shares) - min(layout.shares) <= (1 if balance == "contiguous" else 2)
    by_rows = Layout(length, 4, balance, unit=5)
    pieces = [piece for rank in range(4) for piece in by_rows.pieces(rank)]
    assert sorted(token for piece in pieces for token in piece) == list(range(length))
    assert all(piece.start % 5 == 0 for piece in pieces)


def test_the_plan_says_what_falls_to_each_rank() -> None:
    q, k = torch.empty(1, 4, 4096, 8, device="meta"), torch.empty(1, 2, 4096, 8, device="meta")
    plans = {
        balance: saccade.plan(q, k, k, mask=masks.causal(), mesh=8, balance=balance).parts
        for balance in ("contiguous", "head-tail")
    }
    contiguous, head_tail = plans["contiguous"], plans["head-tail"]
    assert contiguous is not None and head_tail is not None
    assert contiguous.balance < 0.6 and head_tail.balance > 0.97
    assert [share.received for share in contiguous.shares] == [rank * 512 * 2 * 16 * 4 for rank in range(8)]
    # the first of two mirrored pieces needs what is before it, the last all that is not its own
    assert head_tail.shares[0].received == (4096 - 512) * 2 * 16 * 4
    assert str(contiguous).startswith("8 ranks, ring: at most ")
    window = saccade.plan(q, k, k, mask=masks.window(99), mesh=8).parts
    assert window is not None and window.path == "halo"
    assert [share.received for share in window.shares] == [0] + [99 * 2 * 16 * 4] * 7
    alone = saccade.plan(q, k, k, mask=masks.documents(torch.arange(4096) // 256), mesh=8).parts
    assert alone is not None and alone.path == "alone" and alone.balance == 1.0
    with pytest.raises(ValueError, match="mesh must have at least 1 rank, got 0"):
        saccade.plan(q, k, k, mesh=0)


@pytest.mark.parametrize("slug", ["mega", "prism", "spargeattn"])
def test_a_layer_is_forecast_where_nothing_is_computed(slug: str) -> None:
    options = {"chunk_size": 12} if slug == "mega" else {}
    found = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            layer, x = saccade.create(slug, dim=16, **options), torch.zeros(2, 700, 16)
        found.append(parallel.plan(layer, x, mesh=4))
    assert found[0] == found[1] and found[0].path == ("states and tokens" if slug == "mega" else "tokens and blocks")


def cut(mesh: DeviceMesh, n: int, balance: str) -> None:
    x = torch.arange(2.0 * n * 3).view(2, n, 3)
    with parallel(mesh, balance=balance) as shards:
        part = parallel.shard(x, shards).requires_grad_()
        whole = parallel.unshard(part, shards)
        assert torch.equal(whole, x)
        (grad,) = torch.autograd.grad((whole * x).sum(), part)
    torch.testing.assert_close(grad, shards.ranks * part)
    with pytest.raises(ValueError, match="the ranks hold"):
        parallel.unshard(torch.zeros(1, shards.rank), mesh)


@pytest.mark.parametrize("balance", ["contiguous", "head-tail"])
def test_parts_come_together_again(ranks: Ranks, balance: str) -> None:
    for n in (3, 14):
        ranks(cut, n, balance)


def batch(mesh: DeviceMesh) -> dict[str, Tensor]:
    tokens = torch.arange(20).view(2, 10)
    labels = tokens.masked_fill(tokens % 3 == 0, -100)
    found = parallel.shard({"input_ids": tokens, "labels": labels, "attention_mask": tokens > 1}, mesh)
    return {name: x for name, x in found.items() if isinstance(x, Tensor)}


def test_a_batch_is_cut_so_that_losses_add_up(ranks: Ranks) -> None:
    parts = ranks(batch)
    assert torch.cat([part["input_ids"] for part in parts], 1).tolist() == torch.arange(20).view(2, 10).tolist()
    assert torch.cat([part["position_ids"] for part in parts], 1).tolist() == [list(range(10))] * 2
    following = torch.cat([part["shift_labels"] for part in parts], 1)
    assert following[0].tolist() == [1, 2, -100, 4, 5, -100, 7, 8, -100, -100]
    assert all(part["num_items_in_batch"] == (following != -100).sum() for part in parts)
    assert all(part["attention_mask"].shape == (2, 10) and part["labels"].shape[1] < 4 for part in parts)


def layer(mesh: DeviceMesh, crosses: bool) -> None:
    torch.manual_seed(0)
    module = SoftmaxAttention(16, 4, causal=not crosses, num_kv_heads=2, rope=not crosses)
    x, context = torch.randn(2, 22, 16), torch.randn(2, 30, 16) if crosses else None
    real = torch.arange(30 if crosses else 22) < torch.tensor([[20], [17]])
    alone = module(x, context, mask=real)
    weights = torch.autograd.grad(alone.square().sum(), list(module.parameters()))
    with parallel(mesh, length=(22, 30) if crosses else 22) as shards:
        part = None if context is None else parallel.shard(context, shards)
        out = module(parallel.shard(x, shards), part, mask=real)
        shares = torch.autograd.grad(out.square().sum(), list(module.parameters()))
    torch.testing.assert_close(out, parallel.shard(alone, shards), atol=1e-5, rtol=1e-5)
    for share, weight in zip(shares, weights):
        torch.distributed.all_reduce(share, group=shards.group)
        torch.testing.assert_close(share, weight, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("crosses", [False, True])
def test_a_layer(ranks: Ranks, crosses: bool) -> None:
    ranks(layer, crosses)


def grid(mesh: DeviceMesh, n: tuple[int, ...], options: dict[str, object]) -> dict[tuple[str, str], tuple[int, ...]]:
    torch.manual_seed(0)
    module = NeighborhoodAttention(16, 2, **options)  # type: ignore[arg-type]
    for table in [] if module.bias is None else [module.bias]:
        torch.nn.init.normal_(table)
    x = torch.randn(2, *n, 16)
    alone = module(x)
    row, tokens = prod(n[1:]), prod(n)
    weights = torch.autograd.grad(alone.square().sum(), list(module.parameters()))
    with parallel(mesh, unit=row, length=tokens) as shards:
        part = parallel.shard(x.flatten(1, -2), shards).unflatten(1, (-1, *n[1:]))
        out = module(part)
        shares = torch.autograd.grad(out.square().sum(), list(module.parameters()))
    expected = parallel.shard(alone.flatten(1, -2), shards).unflatten(1, (-1, *n[1:]))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    for share, weight in zip(shares, weights):
        torch.distributed.all_reduce(share, group=shards.group)
        torch.testing.assert_close(share, weight, atol=1e-4, rtol=1e-4)
    return {way: tuple(count) for way, count in shards.traffic.counts.items()}


@pytest.mark.parametrize(
    ("n", "options"),
    [
        ((23,), {"kernel_size": 5}),
        ((9, 6), {"kernel_size": (3, 3), "relative_bias": True}),
        ((12, 4), {"kernel_size": (3, 3), "dilation": (2, 1), "causal": (True, False)}),
        ((8, 3, 4), {"kernel_size": (3, 3, 1)}),
    ],
)
def test_neighbourhoods_on_any_axes(ranks: Ranks, n: tuple[int, ...], options: dict[str, object]) -> None:
    ranks(grid, n, options)


def test_the_halo_of_a_grid_does_not_grow_with_it(ranks: Ranks) -> None:
    small, large = (ranks(grid, (rows, 4), {"kernel_size": (3, 3)}) for rows in (12, 24))
    assert small == large
    assert small[1]["halo", "forward"][:2] == (2 * 4 * 2 * 16 * 2 * 4, 2 * 4 * 2 * 16 * 2 * 4)


class Unsaid(SoftmaxAttention):
    """A mechanism of its own, of which nobody said that it takes parts."""

    def attend(self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern) -> Tensor:
        return v_BKME


def refusing(mesh: DeviceMesh) -> None:
    x = torch.randn(1, 2, 4, 8)
    with parallel(mesh, length=16), pytest.raises(ValueError, match="does not take a sequence in parts"):
        routed_attend(x, x, x, torch.zeros(1, 2, 4, 1, dtype=torch.long), 4)
    with parallel(mesh, length=16), pytest.raises(ValueError, match="Unsaid does not take a sequence in parts"):
        Unsaid(16, 2)(torch.randn(1, 4, 16))
    with parallel(mesh, length=16), pytest.raises(ValueError, match="its share of no length of 16"):
        saccade.attend(x[:, :, :3], x, x)
    with parallel(mesh, length=16), pytest.raises(ValueError, match="the padding mask is for 4 keys, got 16"):
        saccade.attend(x, x, x, mask=masks.padding(torch.ones(1, 4, dtype=torch.bool)))
    with parallel(mesh, length=16), pytest.raises(ValueError, match="decode outside"):
        module = SoftmaxAttention(16, 2, causal=True)
        module(torch.randn(1, 4, 16), cache=module.new_cache(1))
    with pytest.raises(ValueError, match="same share"), parallel(mesh, length=(16, 17)):
        pass
    with pytest.raises(ValueError, match="balance must be"), parallel(mesh, balance="even"):
        pass
    with parallel(mesh), pytest.raises(ValueError, match="this rank's part alone"):
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
    for layer in (torch.nn.MultiheadAttention(8, 2, batch_first=True), torch.nn.TransformerEncoderLayer(8, 2, 8)):
        inputs = [torch.randn(1, 4, 8)] * (3 if isinstance(layer, torch.nn.MultiheadAttention) else 1)
        for grad in (True, False):  # torch has other functions where no gradients are wanted
            alone = pytest.raises(ValueError, match="this rank's part alone")
            with torch.set_grad_enabled(grad), parallel(mesh), alone:
                layer.train(grad)(*inputs)
            with parallel(mesh), parallel.replicated():
                layer(*inputs)
    for wrong in ({"length": -1}, {"length": 2.5}, {"length": "x"}, {"unit": 2.5}, {"timeout": float("inf")}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"), parallel(mesh, **wrong):  # type: ignore[arg-type]
            pass
    with parallel(mesh), parallel.replicated():
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
        torch.testing.assert_close(saccade.attend(x, x, x), saccade.attend(x, x, x, backend="reference"))
    with pytest.raises(ValueError, match="shared along one dimension"):
        parallel.shard(x, torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")))


def test_without_a_group_of_processes_it_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="none was initialised"), parallel(torch.distributed.group.WORLD):
        pass


def test_what_cannot_be_done_is_refused(ranks: Ranks) -> None:
    ranks(refusing)


def impatient(mesh: DeviceMesh) -> None:
    said = lambda: mesh.get_group()._get_backend(torch.device("cpu")).options._timeout.total_seconds()  # noqa: E731
    own, x = said(), torch.randn(1, 2, 4, 8)
    with parallel(mesh, length=16, timeout=9):
        assert said() == 9
        with parallel(mesh, length=16, timeout=7):
            assert said() == 7
        assert said() == 9
        saccade.attend(x, x, x)
    with pytest.raises(KeyError), parallel(mesh, timeout=9):
        raise KeyError
    assert said() == own != 9


def test_a_timeout_ends_with_its_context(ranks: Ranks) -> None:
    ranks(impatient)


def failing(mesh: DeviceMesh, how: str) -> float:
    x = torch.randn(1, 2, 4, 8)
    with parallel(mesh, length=16, timeout=2):
        saccade.attend(x, x, x)
        if mesh.get_local_rank() == 1:
            if how == "dies":
                os._exit(1)
            time.sleep(5)
        began = time.monotonic()
        saccade.attend(x, x, x)
    return time.monotonic() - began


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_rank_that_is_lost_is_an_error_on_all_others(ranks: Ranks, how: str) -> None:
    with pytest.raises(AssertionError) as error:
        ranks(failing, how)
    for rank in (0, 2, 3):
        assert f"RuntimeError: rank {rank} of 4 lost the others (ring)" in str(error.value)
