from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.compress.a_vl import (
    AVL,
    AVLDecoder,
    AVLLayerCache,
    AVLOptions,
    agreement,
    image_span,
    text_kept,
    tokens_left,
)

IMAGE = (3, 20)


def prompt(B: int = 1, H: int = 4, K: int = 2, M: int = 32, D: int = 8, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, heads, M, D, generator=g) for heads in (H, K, K)]


def following(steps: int, B: int = 1, H: int = 4, K: int = 2, D: int = 8, seed: int = 1) -> list[list[Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [[2 * torch.randn(B, heads, 1, D, generator=g) for heads in (H, K, K)] for _ in range(steps)]


def decoded(options: AVLOptions, steps: int = 9, image: tuple[int, int] = IMAGE, B: int = 1) -> list[Tensor]:
    cache = AVLLayerCache(options, image)
    return [cache.attend(*prompt(B)), *(cache.attend(*new) for new in following(steps, B))]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))


FULL = AVLOptions(rate=None, text_rate=None)


def test_nothing_dropped_is_the_full_cache() -> None:
    q, k, v = (torch.cat(x, 2) for x in zip(prompt(), *following(9)))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for options in (FULL, AVLOptions(rate=0.0, compute_rate=0.0, text_rate=None), AVLOptions(None, text_rate=0.0)):
        torch.testing.assert_close(torch.cat(decoded(options), 2), expected)


def test_eviction_alone_in_three_ways() -> None:
    once = decoded(AVLOptions(0.5, 0.5, 3, text_rate=None))
    assert same(once, decoded(AVLOptions(0.5, 0.7, -1, text_rate=None)))
    assert same(once, decoded(AVLOptions(0.5, 0.7, 1, text_rate=None)))
    assert not same(once, decoded(AVLOptions(0.5, 0.7, 3, text_rate=None)))


def test_eviction_equals_its_definition() -> None:
    (q, k, v), rounds = prompt(), following(4)
    weight = (q[:, :, -1:] @ k.repeat_interleave(2, 1).mT / 8**0.5).softmax(-1)
    best = weight[0, :, 0, 3:23].mean(0).topk(10).indices.sort().values + 3
    kept = torch.cat([torch.arange(3), best, torch.arange(23, 32)])
    k, v = k[:, :, kept], v[:, :, kept]
    for got, new in zip(decoded(AVLOptions(0.5, 0.7, -1, text_rate=None), 4)[1:], rounds, strict=True):
        k, v = torch.cat([k, new[1]], 2), torch.cat([v, new[2]], 2)
        expected = torch.nn.functional.scaled_dot_product_attention(new[0], k, v, enable_gqa=True)
        torch.testing.assert_close(got, expected)


def test_the_core_changes_at_a_refresh_and_the_output_a_step_later() -> None:
    options = AVLOptions(0.5, 0.75, 4, text_rate=None)
    cache = AVLLayerCache(options, IMAGE)
    first = cache.attend(*prompt())
    assert torch.equal(first, AVLLayerCache(FULL).attend(*prompt()))
    never = AVLLayerCache(AVLOptions(0.5, 0.75, 10**6, text_rate=None), IMAGE)
    every = AVLLayerCache(AVLOptions(0.5, 0.5, -1, text_rate=None), IMAGE)
    never.attend(*prompt()), every.attend(*prompt())
    core = cache.core_slots
    for step, new in enumerate(following(9), 1):
        out, still, whole = cache.attend(*new), never.attend(*new), every.attend(*new)
        assert torch.allclose(out, still, atol=1e-5) == (step < 4)
        assert torch.allclose(out, whole, atol=1e-5) == (step % 4 == 0)
        assert (cache.core_slots.shape, cache.stored) == ((1, 5), 10)
        assert cache.core_slots.max() < 10 and len(cache.core_slots[0].unique()) == 5
        assert torch.equal(cache.core_slots, core) or step % 4 == 0
        core = cache.core_slots


def test_rows_of_a_batch_keep_their_own_sets() -> None:
    options = AVLOptions(0.4, 0.8, 2, text_init=3)
    together = decoded(options, B=2)
    for row in range(2):
        cache = AVLLayerCache(options, IMAGE)
        alone = [cache.attend(*(x[row : row + 1] for x in new)) for new in [prompt(2), *following(9, 2)]]
        assert same(alone, [x[row : row + 1] for x in together])


def test_keys_stay_in_place() -> None:
    cache = AVLLayerCache(AVLOptions(0.5, 0.8, 2, text_rate=None), IMAGE)
    _, k, _ = prompt()
    cache.attend(*prompt())
    before = cache.ordered_keys()
    news = following(6)
    for new in news:
        cache.attend(*new)
    torch.testing.assert_close(cache.ordered_keys(), torch.cat([before, *(new[1] for new in news)], 2))
    assert torch.equal(before[:, :, :3], k[:, :, :3]) and torch.equal(before[:, :, -9:], k[:, :, 23:])


@pytest.mark.parametrize("prefill_rate", [None, 0.3])
def test_lengths_of_every_layer_and_what_the_first_token_sees(prefill_rate: float | None) -> None:
    torch.manual_seed(0)
    policy: dict[str, Any] = {"rate": 0.5, "compute_rate": 0.7, "text_rate": 0.4, "text_init": 4}
    model = AVLDecoder(16, 24, 4, 4, num_kv_heads=2, prefill_rate=prefill_rate, prefill_layer=2, **policy)
    plain = AVLDecoder(16, 24, 4, 4, num_kv_heads=2, rate=None, text_rate=None)
    plain.load_state_dict(model.state_dict())
    x, steps = torch.randn(1, 32, 16), torch.randn(1, 8, 16)
    cache = model.new_cache(IMAGE)
    with torch.no_grad():
        out, full = model(x, cache), plain(x, plain.new_cache(IMAGE))
        assert torch.allclose(out[:, -1], full[:, -1], atol=1e-5) == (prefill_rate is None)
        assert out.shape[1] == 32 - (0 if prefill_rate is None else 6)
        for step in range(9):
            text = 9 + step
            assert cache.kept == [3 + 10 + min(text, max(round(0.6 * text), 4))] * 4
            assert cache.dropped == [32 + step - kept for kept in cache.kept] and cache.length == 32 + step
            if step < 8:
                model(steps[:, step : step + 1], cache)
    assert 0 < cache.nbytes < 4 * (41 * 2 * 2 * 4 * 4)


def test_text_policies() -> None:
    options = AVLOptions(None, text_rate=0.5, text_init=3, heavy_rate=0.0)
    cache = AVLLayerCache(options, IMAGE)
    cache.attend(*prompt())
    news = following(6)
    for new in news:
        cache.attend(*new)
    every = torch.cat([prompt()[1][:, :, 23:], *(new[1] for new in news)], 2)
    assert torch.equal(cache.ordered_keys()[:, :, 23:], every[:, :, -round(0.5 * 15) :])
    heavy = AVLLayerCache(AVLOptions(None, text_rate=0.5, text_init=3, heavy_rate=0.5), IMAGE)
    heavy.attend(*prompt())
    for new in news:
        heavy.attend(*new)
    text = heavy.ordered_keys()[:, :, 23:]
    assert torch.equal(text[:, :, -4:], every[:, :, -4:])
    places = [(every[0, h] == text[0, h][:, None]).all(-1).int().argmax(-1).tolist() for h in range(2)]
    assert places[0] != places[1] and all(row == sorted(row) for row in places)


@pytest.mark.parametrize("policy", ["heavy-hitter", "direct", "history"])
def test_text_scores_by_their_definition(policy: Any) -> None:
    """One key head; a loop over queries, nothing clever."""
    rate, start = 0.5, 23
    options = AVLOptions(None, text_rate=rate, text_init=2, heavy_rate=0.7, text_policy=policy)
    tokens = [prompt(H=2, K=1), *following(7, H=2, K=1)]
    cache = AVLLayerCache(options, IMAGE)
    for new in tokens:
        cache.attend(*new)
    q, k, _ = (torch.cat(x, 2)[0] for x in zip(*tokens))
    scores: dict[int, float] = {}
    for t in range(start, q.shape[1]):
        seen = [*range(start), *scores, t] if t >= 32 else list(range(t + 1))
        weight = (q[:, t] @ k[0, seen].T / 8**0.5).softmax(-1).sum(0)
        new = {j: float(weight[seen.index(j)]) for j in seen if j >= start}
        if policy == "direct":
            scores = new
        else:
            earlier = torch.tensor([w for j, w in new.items() if j < t])
            off = float(earlier.quantile(rate)) if policy == "history" and len(earlier) else 0.0
            scores = {j: scores.get(j, 0.0) + w - (off if j < t else 0.0) for j, w in new.items()}
        if t < 31:
            continue  # the prompt is evicted from once
        budget = max(round((1 - rate) * (t - start + 1)), 2)
        best = {"heavy-hitter": int(0.7 * budget), "direct": budget, "history": -(-budget // 2)}[policy]
        order = sorted(scores)
        recent = order[len(order) - (budget - best) :] if budget > best else []
        rest = [j for j in order if j not in recent]
        heavy = sorted(rest, key=lambda j: -scores[j])[:best]
        scores = {j: scores[j] for j in sorted([*heavy, *recent])} if len(order) > budget else scores
    assert torch.equal(cache.ordered_keys()[0, 0, start:], k[0, sorted(scores)])


def test_refreshed_it_follows_what_is_looked_at() -> None:
    g = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, 32, 8, generator=g) * 0.1
    k[0, 0, 5], k[0, 0, 9] = 4 * torch.eye(8)[0], 4 * torch.eye(8)[1]
    v = torch.zeros(1, 1, 32, 2)
    v[0, 0, 5], v[0, 0, 9] = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    q = torch.zeros(1, 1, 32, 8)
    q[0, 0, -1, :2] = torch.tensor([4.0, 3.0])
    new = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 2)
    wrong = {}
    for interval in (3, 10**6):
        cache = AVLLayerCache(AVLOptions(0.5, 0.95, interval, text_rate=None), IMAGE)
        cache.attend(q, k, v)
        wrong[interval] = []
        for step in range(30):
            topic = step // 10 % 2
            out = cache.attend(8 * torch.eye(8)[topic].view(1, 1, 1, 8), *new)
            if out[0, 0, 0, topic] < 0.9:
                wrong[interval].append(step)
    assert all(step % 10 < 3 for step in wrong[3]) and wrong[3]
    assert wrong[10**6] == list(range(10, 20))


def test_several_tokens_are_taken_one_by_one_and_grown_buffers_hold_all() -> None:
    news = following(150)
    for options in (AVLOptions(0.5, 0.7, 3), FULL):
        one, many = AVLLayerCache(options, IMAGE), AVLLayerCache(options, IMAGE)
        one.attend(*prompt()), many.attend(*prompt())
        out = torch.cat([one.attend(*new) for new in news], 2)
        torch.testing.assert_close(many.attend(*(torch.cat(x, 2) for x in zip(*news))), out)


def test_layer_decodes_as_the_parallel_form_with_nothing_dropped() -> None:
    torch.manual_seed(0)
    layer = AVL(16, 4, num_kv_heads=2, rate=None, text_rate=None)
    x = torch.randn(2, 21, 16)
    cache = layer.new_cache(2)
    with torch.no_grad():
        out = torch.cat([layer(x[:, :7], cache=cache), layer(x[:, 7:9], cache=cache), layer(x[:, 9:], cache=cache)], 1)
        torch.testing.assert_close(out, layer(x))
    assert cache.nbytes > 0 and cache.length == 21 and cache.dropped == 0
    mask = torch.ones(2, 21, dtype=torch.bool)
    mask[:, 15:] = False
    torch.testing.assert_close(layer(x, mask=mask)[:, :15], layer(x[:, :15]))


def test_numbers() -> None:
    assert (tokens_left(10, 0.9), tokens_left(20, 0.6), tokens_left(576, 0.5)) == (0, 8, 288)
    scores = torch.arange(10.0)
    assert agreement(scores, scores, 0.3) == 1 and agreement(scores, -scores, 0.5) == 0
    noise = torch.rand(2, 200, 100, generator=torch.Generator().manual_seed(0))
    assert abs(agreement(noise[0], noise[1], 0.3).mean() - 0.3) < 0.03
    assert text_kept(torch.rand(1, 2, 5), 2, 3) is None
    assert text_kept(torch.tensor([5.0, 1, 3, 2, 0]), 2, 1).tolist() == [0, 2, 4]  # type: ignore[union-attr]
    assert image_span(torch.tensor([[0, 1, 0, 1, 0]]).bool()) == (1, 3)
    assert image_span(torch.zeros(1, 3, dtype=torch.bool)) == (0, 0)


def test_bad_arguments() -> None:
    wrong: list[dict[str, Any]] = [{"rate": 1.0}, {"rate": 0.8}, {"text_rate": -0.1}, {"prefill_rate": 0.6}]
    wrong += [{"text_init": 0}, {"prefill_layer": 0}, {"heavy_rate": 1.5}, {"text_policy": "none"}]
    for options in wrong:
        with pytest.raises(ValueError, match="got"):
            AVL(16, 4, **options)
    layer = AVL(16, 4)
    with pytest.raises(ValueError, match="must hold the image"):
        layer(torch.randn(1, 8, 16), cache=layer.new_cache(1, image=(3, 6)))
    with pytest.raises(ValueError, match="with a cache takes no mask"):
        layer(torch.randn(1, 3, 16), mask=torch.ones(1, 3, dtype=torch.bool), cache=layer.new_cache(1))
    with pytest.raises(ValueError, match="causal"):
        AVL(16, 4, causal=False)
    with pytest.raises(ValueError, match="first position"):
        AVLLayerCache(image=(-1, 3))
    cache = AVLLayerCache()
    cache.attend(*prompt())
    with pytest.raises(ValueError, match="holds 1 sequences"):
        cache.attend(*following(1, 2)[0])
    with pytest.raises(ValueError, match="same positions"):
        image_span(torch.tensor([[0, 1, 0], [0, 0, 1]]).bool())
