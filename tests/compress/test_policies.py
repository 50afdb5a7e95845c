"""Policies of caches: the ragged store, budgets, what stays, and a layer's attention against dense attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.attention.nats import NAtS, lifetimes
from saccade.compress.policies import (
    POLICIES,
    Budget,
    Full,
    HeavyHitters,
    Held,
    KeyNorm,
    Policy,
    PolicyCache,
    Random,
    Roles,
    Window,
    share_out,
)
from saccade.layers.ragged_tokens import PAGE, RaggedTokens
from saccade.ops import masks, score_mods
from saccade.ops.attend import attend
from saccade.ops.merge import add_sink
from saccade.ops.ragged import attend_pages, received_weights

SCORED: list[Policy] = [
    Window(sinks=2), HeavyHitters(), HeavyHitters(observe=4, spread=2), KeyNorm(), Random(seed=3)
]  # fmt: skip


def qkv(N: int, *, B: int = 2, H: int = 4, K: int = 2, D: int = 8, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(B, heads, N, D) for heads in (H, K, K)]


def pieces(tensors: list[Tensor], sizes: list[int]) -> Any:
    return zip(*(x.split(sizes, 2) for x in tensors))


def run(cache: PolicyCache, tensors: list[Tensor], sizes: list[int], **how: Any) -> Tensor:
    return torch.cat([cache.attend(*piece, **how) for piece in pieces(tensors, sizes)], 2)


@pytest.mark.parametrize("sizes", [[37], [1] * 37, [5, 1, 1, 20, 3, 7], [16, 16, 5]])
@pytest.mark.parametrize("policy", [Full(), *SCORED], ids=str)
def test_with_room_for_all_it_is_causal_attention(policy: Policy, sizes: list[int]) -> None:
    tensors = qkv(37)
    cache = PolicyCache(policy, None if policy == Full() else 37)
    out = run(cache, tensors, sizes)
    torch.testing.assert_close(out, attend(*tensors, mask=masks.causal()), atol=1e-5, rtol=1e-4)
    assert (cache.lengths == 37).all() and cache.length == 37
    assert cache.positions[..., :37].sort(-1).values.tolist() == [[list(range(37))] * 2] * 2


@pytest.mark.parametrize("budget", [1, 7, 16, 20])
def test_a_window_step_by_step_is_that_mask(budget: int) -> None:
    tensors, sinks = qkv(50), min(3, budget - 1)
    cache = PolicyCache(Window(sinks=3), budget)
    out = run(cache, tensors, [1] * 50)
    mask = masks.window(budget - sinks, sinks=sinks)
    torch.testing.assert_close(out, attend(*tensors, mask=mask & masks.causal()), atol=1e-5, rtol=1e-4)
    assert (cache.lengths == budget).all()


@pytest.mark.parametrize("policy", SCORED, ids=str)
@pytest.mark.parametrize("least", [None, 0.3])
def test_the_budget_holds_and_what_is_kept_is_what_is_seen(policy: Policy, least: float | None) -> None:
    """A step's output is dense attention to the positions that the cache says it holds, and to the token itself."""
    q, k, v = qkv(60)
    cache = PolicyCache(policy, 11, least=least)
    run(cache, [q[:, :, :40], k[:, :, :40], v[:, :, :40]], [30, 10])
    for i in range(40, 60):
        held = cache.positions
        out = cache.attend(*(x[:, :, i : i + 1] for x in (q, k, v)))
        seen = torch.zeros(2, 2, 61, dtype=torch.bool)
        seen = seen.scatter(2, torch.where(held < 0, 60, held).long(), True)[..., :60]
        seen[..., i] = True
        mask = seen.repeat_interleave(2, 1)[:, :, None]
        torch.testing.assert_close(out, attend(q[:, :, i : i + 1], k, v, mask=mask), atol=1e-5, rtol=1e-4)
        assert (cache.lengths.sum(1) == 22).all()
        assert least is not None or (cache.lengths == 11).all()
    if least is not None:
        # the lots of two heads may be equally good; the windows of two heads are
        assert (cache.lengths >= 3).all()
        assert (cache.lengths != 11).any() == (not isinstance(policy, (Window, Random)))
    places = PAGE * (-(-cache.lengths // PAGE)).sum()
    one = 2 * 8 * 4 + 4 + 4 * policy.numbers + 1
    assert 0 <= cache.nbytes - places * one <= 8 * (3 * 4 + places // PAGE)


def test_bytes_are_those_of_what_is_kept() -> None:
    q, k, v = qkv(640)
    sizes = {}
    for budget in (640, 160, 32):
        cache = PolicyCache(Window(), budget)
        cache.attend(q, k, v)
        sizes[budget] = cache.nbytes
    tables = 3 * 8 * 4
    assert [(sizes[b] - tables) / (sizes[640] - tables) for b in (640, 160, 32)] == [1.0, 0.25, 0.05]
    held = [getattr(cache.tokens, name) for name in ("keys_PpD", "values_PpE", "position_Pp")]
    assert sum(x.untyped_storage().nbytes() for x in held) == sizes[32] - tables - 4 * 32 == 4 * 32 * (64 + 4)


def test_heavy_hitters_are_the_most_looked_at() -> None:
    q, k, v = qkv(40)
    cache = PolicyCache(HeavyHitters(recent=0.5, sinks=0), 10)
    cache.attend(q[:, :, :39], k[:, :, :39], v[:, :, :39])
    weight = (q[:, :, :39] @ k.repeat_interleave(2, 1)[:, :, :39].mT / 8**0.5).masked_fill(
        ~torch.ones(39, 39, dtype=torch.bool).tril(), float("-inf")
    )
    given = weight.softmax(-1).sum(2).unflatten(1, (2, 2)).sum(2)
    best = given[..., :34].topk(5).indices
    expected = torch.cat([best, torch.arange(34, 39).expand(2, 2, -1)], -1)
    assert cache.positions[..., :10].sort(-1).values.equal(expected.sort(-1).values)
    before = cache.positions
    cache.attend(q[:, :, 39:], k[:, :, 39:], v[:, :, 39:])
    held = [set(row[row >= 0].tolist()) for x in (before, cache.positions) for row in x.flatten(0, 1)]
    # of those that were there the one that has been given least went, the latest apart
    for row, (old, new) in enumerate(zip(held[:4], held[4:])):
        b, h = divmod(row, 2)
        (gone,) = old - new
        step = (q[b, 2 * h : 2 * h + 2, 39] @ k[b, h, sorted(old) + [39]].T / 8**0.5).softmax(-1).sum(0)
        total = {j: float(given[b, h, j] + step[i]) for i, j in enumerate(sorted(old)) if j < 35}
        assert gone == min(total, key=total.__getitem__) and new - old == {39}


def test_what_stands_around_a_heavy_hitter_stays_with_it() -> None:
    """The last query looks at token 20 and, less, at 4: with neighbours 20's stay, without them 4 and any others."""
    k = torch.zeros(1, 1, 40, 8)
    k[..., 20, 0], k[..., 4, 0] = 30.0, 20.0
    q = torch.zeros(1, 2, 40, 8)
    q[..., 39, 0] = 1.0
    for spread, expected in ((0, {4, 20}), (2, {18, 19, 20, 21, 22})):
        cache = PolicyCache(HeavyHitters(sinks=0, recent=0.0, observe=1, spread=spread), 5)
        cache.attend(q, k, k)
        assert expected <= set(cache.positions.flatten().tolist())


def test_short_keys_and_lots() -> None:
    q, k, v = qkv(30)
    cache = PolicyCache(KeyNorm(sinks=0, recent=0.0), 5)
    cache.attend(q, k, v)
    assert cache.positions[..., :5].sort(-1).values.equal((-k.norm(dim=-1)).topk(5).indices.sort(-1).values)
    kept = []
    for sizes in ([30], [1] * 30, [13, 1, 16]):
        cache = PolicyCache(Random(seed=1), 9)
        run(cache, [q, k, v], sizes)
        kept.append(cache.positions[..., :9].sort(-1).values)
    assert kept[0].equal(kept[1]) and kept[0].equal(kept[2]) and not kept[0][0, 0].equal(kept[0][0, 1])


@pytest.mark.parametrize("policy", [Full(), *SCORED], ids=str)
@pytest.mark.parametrize("budget", [9, 0.4])
def test_padding_is_not_there(policy: Policy, budget: int | float) -> None:
    """A row with padding before it is the row alone, whatever else is in the batch."""
    given = None if policy == Full() else budget
    tensors = qkv(36, B=2)
    real = torch.ones(2, 36, dtype=torch.bool)
    real[1, :13] = False
    both, alone = PolicyCache(policy, given), PolicyCache(policy, given)
    mine = [x[1:, :, 13:] for x in tensors]
    for first, last in [(0, 30), (30, 31), (31, 32), (32, 36)]:
        out = both.attend(*(x[:, :, first:last] for x in tensors), real_BN=real[:, first:last])
        cut = slice(max(0, first - 13), last - 13)
        single = alone.attend(*(x[:, :, cut] for x in mine))
        torch.testing.assert_close(out[1:, :, -single.shape[2] :], single, atol=1e-5, rtol=1e-4)
    assert both.lengths[1].equal(alone.lengths[0])
    assert both.positions[1].sort(-1).values[..., -5:].equal(alone.positions[0].sort(-1).values[..., -5:])
    assert given != 0.4 or both.lengths.tolist() == [[14, 14], [9, 9]]
    # a row that has nothing to say for a step keeps what it has
    before = both.lengths.clone()
    both.attend(*(x[:, :, :1] for x in tensors), real_BN=torch.tensor([[True], [False]]))
    assert both.lengths[1].equal(before[1])


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [20, 1, 1, 1, 17]])
@pytest.mark.parametrize("budget", [None, 6])
def test_a_layer_with_a_window_of_its_own(sizes: list[int], budget: int | None) -> None:
    tensors = qkv(40)
    cache = PolicyCache(Full() if budget is None else Window(sinks=0), budget, window=9)
    out = run(cache, tensors, sizes)
    if budget is None:
        mask = masks.window(8) & masks.causal()
    elif len(sizes) == 40:
        mask = masks.window(6) & masks.causal()
    else:
        return
    torch.testing.assert_close(out, attend(*tensors, mask=mask), atol=1e-5, rtol=1e-4)
    assert (cache.lengths <= 9 + PAGE).all()


@pytest.mark.parametrize("sizes", [[33], [1] * 33, [12, 1, 20], [30, 3]])
def test_soft_caps_and_sinks_of_the_softmax(sizes: list[int]) -> None:
    tensors, sink = qkv(33), torch.randn(4)
    cache = PolicyCache(HeavyHitters(), 33)
    out = run(cache, tensors, sizes, soft_cap=2.0, sink_logits=sink, scale=0.7)
    how: dict[str, Any] = {"mask": masks.causal(), "scale": 0.7, "score_mod": score_mods.soft_cap(2.0)}
    dense = add_sink(*attend(*tensors, return_lse=True, **how), sink)[0]
    torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-4)


def test_rows_are_taken_along() -> None:
    q, k, v = qkv(40, B=3)
    cache = PolicyCache(KeyNorm(), 8, least=0.25)
    cache.attend(q[:, :, :39], k[:, :, :39], v[:, :, :39])
    index = torch.tensor([2, 0, 0, 2])
    expected = cache.positions[index]
    cache.take_rows(index)
    assert cache.positions.equal(expected[..., : cache.positions.shape[2]])
    last = [x[index, :, 39:] for x in (q, k, v)]
    out = cache.attend(*last)
    assert out[1].equal(out[2]) and out[0].equal(out[3]) and not out[0].equal(out[1])


def test_budgets() -> None:
    assert Budget.of("1.5KiB").bytes == 1536 and Budget.of("2 mb").bytes == 2_000_000
    assert str(Budget.of(3)) == "3 tokens" and str(Budget.of(0.5)) == "50%" and str(Budget()) == "all"
    q, k, v = qkv(500)
    for least in (None, 0.2):
        cache = PolicyCache(KeyNorm(), "40 KiB", least=least, layers=2)
        cache.attend(q, k, v)
        assert 0.6 * 20 * 1024 < cache.nbytes <= 20 * 1024
    for much in (2**70, "999999999999999 GiB"):
        for least in (None, 0.5):
            cache = PolicyCache(Random(seed=2**40 + 2), much, least=least)
            cache.attend(q[:, :, :9], k[:, :, :9], v[:, :, :9])
            assert (cache.lengths == 9).all()
    for bad, words in (
        (0, "at least 1"),
        (1.5, "at most 1"),
        ("12", "number and kB"),
        ("3 XB", "number and kB"),
        (True, "tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            Budget.of(bad)
    with pytest.raises(ValueError, match="tokens and share"):
        Budget(tokens=1, share=0.5)
    with pytest.raises(ValueError, match="no page"):
        PolicyCache(Window(), "1kB").attend(q, k, v)


def test_heads_share_by_rank() -> None:
    torch.manual_seed(0)
    priority = torch.randn(2, 3, 20)
    priority[0, 1] += 3
    shared = share_out(priority, torch.tensor([5, 5]), 0.4)
    assert shared.sum(1).tolist() == [15, 15] and shared[0, 1] == 11 and (shared >= 2).all()


def test_refusals() -> None:
    q, k, v = qkv(5)
    for make, words in (
        (lambda: PolicyCache(Window()), "needs a budget"),
        (lambda: PolicyCache(Full(), 3), "takes no budget"),
        (lambda: PolicyCache(Window(), 3, least=2.0), "least"),
        (lambda: Window(sinks=-1), "sinks"),
        (lambda: KeyNorm(recent=1.5), "recent"),
        (lambda: HeavyHitters(observe=0), "observe"),
        (lambda: HeavyHitters(spread=-1), "spread"),
        (lambda: HeavyHitters(spread=1.5), "spread"),  # type: ignore[arg-type]
        (lambda: PolicyCache(Window(), 3, least="a"), "least"),  # type: ignore[arg-type]
        (lambda: KeyNorm(recent="half"), "recent"),  # type: ignore[arg-type]
        (lambda: HeavyHitters(observe=2.5), "observe"),  # type: ignore[arg-type]
        (lambda: Random(seed=None), "seed"),  # type: ignore[arg-type]
        (lambda: PolicyCache(Window(), 3).lengths, "seen no token"),
        (lambda: PolicyCache(Window(), 3).positions, "seen no token"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
    cache = PolicyCache(Window(), 3)
    cache.attend(q, k, v)
    with pytest.raises(ValueError, match="holds 2 sequences, got 1"):
        cache.attend(q[:1], k[:1], v[:1])


def test_pages_against_the_definition() -> None:
    torch.manual_seed(0)
    R, n, m, E = 3, 4, 2, 5
    owner = torch.tensor([2, 0, 2, 2])
    q, keys, values = torch.randn(R, n, 6), torch.randn(4, PAGE, 6), torch.randn(4, PAGE, E)
    k, v, seen = torch.randn(R, m, 6), torch.randn(R, m, E), torch.rand(4, PAGE) < 0.5
    seen_new = torch.ones(1, n, m, dtype=torch.bool)
    seen_new[:, 0] = False  # row 1 has no page: its first query sees nothing
    _against_definition(q, keys, values, owner, seen, k, v, seen_new)
    _against_definition(q, keys[:R], values[:R], None, seen[:R], k, v, seen_new)


def _against_definition(
    q: Tensor, keys: Tensor, values: Tensor, owner: Tensor | None, seen: Tensor, k: Tensor, v: Tensor, seen_new: Tensor
) -> None:
    (R, n, _), m = q.shape, k.shape[1]
    found = attend_pages(q, keys, values, owner, seen, k, v, seen_new, scale=0.4)
    for r in range(R):
        mine = torch.arange(R) == r if owner is None else owner == r
        all_k, all_v = torch.cat([keys[mine].flatten(0, 1), k[r]]), torch.cat([values[mine].flatten(0, 1), v[r]])
        allowed = torch.cat([seen[mine].flatten().expand(n, -1), seen_new[0]], 1)
        weight = (0.4 * q[r] @ all_k.T).masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0.0)
        torch.testing.assert_close(found.out_RnE[r], weight @ all_v)
        torch.testing.assert_close(found.page_Pp[mine].flatten(), weight.sum(0)[:-m])
        torch.testing.assert_close(found.new_Rm[r], weight.sum(0)[-m:])


def test_received_weights_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = qkv(21)
    last = torch.randint(0, 25, (2, 2, 21))
    last[..., 0] = 30  # a key that all see
    real = torch.ones(2, 12, dtype=torch.bool)
    real[0, :3] = False
    row, key = torch.arange(12)[:, None], torch.arange(21)
    seen = ((key <= row + 9) & (row <= last[:, :, None])).repeat_interleave(2, 1)
    scores = (0.3 * q[:, :, 9:] @ k.repeat_interleave(2, 1).mT).masked_fill(~seen, float("-inf"))
    expected = (scores.softmax(-1) * real[:, None, :, None])[:, :, 4:].sum(2).unflatten(1, (2, 2)).sum(2)
    for tile in (2**20, 4 * 2 * 4 * 21 * 3):
        monkeypatch.setattr("saccade.ops.ragged._TILE", tile)
        given = received_weights(q[:, :, 9:], k, scores.logsumexp(-1), last, scale=0.3, start=4, real_BN=real)
        torch.testing.assert_close(given, expected)


def test_a_store_of_nothing_and_of_one() -> None:
    k = torch.randn(1, 2, 3, 4)
    store = RaggedTokens(k, k, 1)
    assert store.width == 0 and store.filled_BKM.shape == (1, 2, 0)
    keep = torch.tensor([[[False, False, False], [False, True, False]]])
    store.keep(keep, k, k, torch.arange(3)[None], torch.zeros(1, 2, 3, 1))
    assert store.length_BK.tolist() == [[0, 1]] and store.owner_P is not None and store.owner_P.tolist() == [1]
    assert store.in_rows(store.keys_PpD)[0, 1, 0].equal(k[0, 1, 1])


def test_a_policy_of_ones_own_and_the_names() -> None:
    class Loud(Policy):
        def score(self, held: Held) -> Tensor:
            return -held.position_BKM

    cache = PolicyCache(Loud(sinks=0, recent=0.0), 3)
    cache.attend(*qkv(9))
    assert cache.positions[..., :3].tolist() == [[[0, 1, 2]] * 2] * 2
    assert all(issubclass(kind, Policy) for kind in POLICIES.values())


@pytest.mark.parametrize("sizes", [[45], [1] * 45, [20, 1, 1, 1, 22], [9] * 5])
def test_trained_roles_are_nats(sizes: list[int]) -> None:
    torch.manual_seed(4)
    layer = NAtS(16, 4, num_kv_heads=2, window=3, chunk_size=1, rope=False).eval()
    x, real = torch.randn(2, 45, 16), torch.ones(2, 45, dtype=torch.bool)
    real[1, :7] = False
    cache, found = PolicyCache(Roles(router=[layer.role_proj], window=3)), []
    with torch.no_grad():
        expected = layer(x, mask=real)
        for piece, here in zip(x.split(sizes, 1), real.split(sizes, 1)):
            q, k, v, _ = layer.project(piece, None, None)
            found.append(layer.out(cache.attend(q, k, v, real_BN=here, hidden_BNC=piece)))
        torch.testing.assert_close(torch.cat(found, 1)[real], expected[real], atol=1e-5, rtol=1e-4)
        alive = lifetimes(layer.roles(x, mask=real).argmax(-1), 45, window=3) >= 45
        alive = (alive & real[:, None]).sum(-1)
    assert (alive < 25).all() and (cache.lengths - alive >= 0).all() and (cache.lengths - alive <= 20).all()
    assert len(sizes) == 45 or cache.lengths.equal(alive)


def test_roles_are_not_made_up() -> None:
    with pytest.raises(ValueError, match="NAtS learns its roles"):
        Roles()
    router = [torch.nn.Linear(8, 5)]
    for hidden, number, words in ((None, 0, "hidden_BNC"), (8, 1, "1 layers"), (8, 0, "3 x 2 logits, got 5")):
        cache = PolicyCache(Roles(router=router), number=number)
        with pytest.raises(ValueError, match=words):
            cache.attend(*qkv(5), hidden_BNC=None if hidden is None else torch.randn(2, 5, hidden))
    everything = torch.nn.Linear(8, 6)
    torch.nn.init.zeros_(everything.weight), torch.nn.init.zeros_(everything.bias)  # ties are Global
    cache = PolicyCache(Roles(router=[everything]), 4)
    cache.attend(*qkv(9), hidden_BNC=torch.randn(2, 9, 8))
    assert (cache.lengths == 4).all()
