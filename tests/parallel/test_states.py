"""Recurrences on a sequence in parts equal one process, outputs, states and gradients; what is sent does not grow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from ranks import WORLD, Ranks, check_forecast
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from saccade import parallel
from saccade.ops.ema import ema
from saccade.ops.expansion import Polynomial, expanded_attend
from saccade.ops.linear import LinearState, elu_plus_one, linear_attend
from saccade.ops.selective_scan import selective_scan
from saccade.ops.wkv import wkv

B, H, K, D, E, C, S = 2, 4, 2, 3, 5, 4, 3

Inputs = dict[str, Tensor]


def _random(**shapes: tuple[int, ...]) -> Inputs:
    torch.manual_seed(2)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def _qkv(n: int) -> Inputs:
    return _random(q=(B, H, n, D), k=(B, K, n, D), v=(B, K, n, E))


def _linear(**options: Any) -> Callable[..., Any]:
    def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, **more: Any) -> Any:
        decay = None if decay is None else decay.sigmoid()
        return linear_attend(q, k, v, decay=decay, **options, **more)

    return run


def _per_token(*axes: int) -> Callable[[int], Inputs]:
    def inputs(n: int) -> Inputs:
        whole = _qkv(n) | _random(decay=(B, H, n, D))
        cut = tuple(slice(None) if axis in axes else slice(1) for axis in range(4))
        return whole | {"decay": whole["decay"][cut]}

    return inputs


def _forgetting(n: int) -> Inputs:
    decay = torch.full((B, H, n), 2.0)
    decay[:, :, n // 3] = decay[:, 1:3, -2] = float("-inf")  # whose sigmoid is 0
    return _qkv(n) | {"decay": decay}


def _scanned(n: int) -> Inputs:
    inputs = _random(u=(B, n, C), delta=(B, n, C), a=(C, S), b=(B, n, 2, S), c=(B, n, 2, S), skip=(C,))
    return inputs | {"delta": inputs["delta"].abs(), "a": -inputs["a"].abs()}


def _alike(n: int) -> Inputs:
    return _random(q=(B, H, n, D), k=(B, H, n, D), v=(B, H, n, E))


def _averaged(n: int) -> Inputs:
    inputs = _random(x=(B, n, C), q=(C, S), w=(C, S), c=(C, S))
    return inputs | {"q": inputs["q"].sigmoid()}


def _keyed(n: int) -> Inputs:
    return _random(k=(B, n, C), v=(B, n, C), w=(C,), u=(C,))


#: name -> inputs of n tokens, the function, and the axis of tokens of each input that has one
CASES: dict[str, tuple[Callable[[int], Inputs], Callable[..., Any], dict[str, int]]] = {
    "plain": (_qkv, _linear(), {"q": 2, "k": 2, "v": 2}),
    "normalised": (
        _qkv,
        _linear(feature_map=elu_plus_one, normalize=True),
        {"q": 2, "k": 2, "v": 2},
    ),
    "number": (_qkv, lambda q, k, v, **more: linear_attend(q, k, v, decay=0.7, **more), {"q": 2, "k": 2, "v": 2}),
    "per head": (
        lambda n: _qkv(n) | _random(decay=(H,)),
        _linear(scale=0.5),
        {"q": 2, "k": 2, "v": 2},
    ),
    "per channel": (lambda n: _qkv(n) | _random(decay=(H, D)), _linear(), {"q": 2, "k": 2, "v": 2}),
    "per token": (
        lambda n: _qkv(n) | _random(decay=(B, H, n)),
        _linear(feature_map=elu_plus_one, normalize=True),
        {"q": 2, "k": 2, "v": 2, "decay": 2},
    ),
    "per token and channel": (_per_token(0, 1, 2, 3), _linear(), {"q": 2, "k": 2, "v": 2, "decay": 2}),
    "per token, alike for heads": (_per_token(0, 2), _linear(), {"q": 2, "k": 2, "v": 2, "decay": 2}),
    "alike for tokens": (_per_token(1, 3), _linear(), {"q": 2, "k": 2, "v": 2}),
    "forgetting": (_forgetting, _linear(), {"q": 2, "k": 2, "v": 2, "decay": 2}),
    "both directions": (_qkv, _linear(causal=False), {"q": 2, "k": 2, "v": 2}),
    "both directions, normalised": (
        _qkv,
        _linear(causal=False, normalize=True, feature_map=elu_plus_one, eps=0.1),
        {"q": 2, "k": 2, "v": 2},
    ),
    "expanded": (_alike, partial(expanded_attend, expansion=Polynomial()), {"q": 2, "k": 2, "v": 2}),
    "expanded, both directions": (
        _alike,
        partial(expanded_attend, expansion=Polynomial(), causal=False),
        {"q": 2, "k": 2, "v": 2},
    ),
    "ema": (_averaged, ema, {"x": 1}),
    "ema, two channels backwards": (_averaged, partial(ema, backwards=2), {"x": 1}),
    "ema, cut": (_averaged, partial(ema, taps=12), {"x": 1}),
    "ema, cut, one channel backwards": (_averaged, partial(ema, taps=4, backwards=1), {"x": 1}),
    "selective scan": (_scanned, selective_scan, {"u": 1, "delta": 1, "b": 1, "c": 1}),
    "wkv": (_keyed, wkv, {"k": 1, "v": 1}),
}


def _gradients(outs: list[Tensor], leaves: Inputs, to_outs: list[Tensor]) -> Inputs:
    return dict(zip(leaves, torch.autograd.grad(outs, list(leaves.values()), to_outs), strict=True))


def case(mesh: DeviceMesh, name: str, n: int, balance: str, length: Any = None) -> None:
    make, function, axes = CASES[name]
    inputs = make(n)
    axis = next(iter(axes.values()))
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    call = ((), leaves) if "decay" in leaves else (leaves.values(), {})
    alone = function(*call[0], **call[1])
    predicted = parallel.plan(partial(function, *call[0], **call[1]), mesh=mesh, balance=balance)
    to_out = torch.randn(alone.shape, generator=torch.Generator().manual_seed(3))
    expected = _gradients([alone], leaves, [to_out])
    with parallel(mesh, balance=balance, length=length) as shards:
        cut = lambda key, x: parallel.shard(x, shards, dim=axes[key]) if key in axes else x  # noqa: E731
        leaves = {name: cut(name, x).clone().requires_grad_() for name, x in inputs.items()}
        out = function(**leaves) if "decay" in leaves else function(*leaves.values())
        found = _gradients([out], leaves, [parallel.shard(to_out, shards, dim=axis)])
        torch.testing.assert_close(out, parallel.shard(alone, shards, dim=axis), atol=1e-5, rtol=1e-5)
        for key, gradient in found.items():
            if key in axes:
                wanted = parallel.shard(expected[key], shards, dim=axes[key])
            else:  # each rank has its share
                shares = parallel.unshard(gradient.flatten()[None].expand(1, -1), shards.group)
                gradient, wanted = shares.view(shards.ranks, *gradient.shape).sum(0), expected[key]
            torch.testing.assert_close(
                gradient, wanted, atol=2e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
            )
    check_forecast(predicted, shards)
    assert predicted.path == ("halo" if "cut" in name else "states")
    assert predicted.exact and sum(one.flops for one in predicted.shares) > 0


@pytest.mark.parametrize("name", CASES)
def test_parts_equal_the_whole(ranks: Ranks, name: str) -> None:
    for balance in ("contiguous", "head-tail"):
        ranks(case, name, 37, balance)
    ranks(case, name, 3, "contiguous", 3)  # a rank has no token
    ranks(case, name, 10, "contiguous", 10, size=2)


def with_state(mesh: DeviceMesh, balance: str) -> None:
    n = 22
    q, k, v = _qkv(n).values()
    before = torch.randn(B, H, D, E + 1)
    for options in (
        {"decay": 0.9},
        {"feature_map": elu_plus_one, "normalize": True},
        {"feature_map": elu_plus_one, "normalize": True, "causal": False},
    ):
        joined = before.abs() if options.get("normalize") else before[..., :-1]
        given: Any = LinearState(joined[..., :-1], joined[..., -1]) if options.get("normalize") else joined
        alone, left = linear_attend(q, k, v, state=given, return_state=True, **options)
        with parallel(mesh, balance=balance) as shards:
            mine = (parallel.shard(x, shards, dim=2) for x in (q, k, v))
            out, after = linear_attend(*mine, state=given, return_state=True, **options)
            torch.testing.assert_close(out, parallel.shard(alone, shards, dim=2), atol=1e-5, rtol=1e-5)
        for one, other in zip(left, after):
            torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)
    x, decay, weight, mix = _averaged(n).values()
    state = torch.randn(B, C, S)
    alone, left = ema(x, decay, weight, mix, state=state, return_state=True)
    with parallel(mesh, balance=balance) as shards:
        mine = parallel.shard(x, shards, dim=1)
        out, after = ema(mine, decay, weight, mix, state=state, return_state=True)
        torch.testing.assert_close(out, parallel.shard(alone, shards, dim=1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after, left, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("balance", ["contiguous", "head-tail"])
def test_a_state_is_of_the_whole_sequence(ranks: Ranks, balance: str) -> None:
    ranks(with_state, balance)


def counted(mesh: DeviceMesh, n: int) -> list[dict[tuple[str, str], Any]]:
    found = []
    for name in ("plain", "per channel", "ema", "selective scan", "wkv"):
        make, function, axes = CASES[name]
        with parallel(mesh, length=n) as shards:
            inputs = [parallel.shard(x, shards, dim=axes[key]) if key in axes else x for key, x in make(n).items()]
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = function(*leaves)
            out.sum().backward()
        found.append({way: tuple(count)[:2] for way, count in shards.traffic.counts.items()})
    return found


def test_what_is_sent_is_the_states_whatever_the_length(ranks: Ranks) -> None:
    numbers = [
        B * K * D * E,
        B * H * D * E + H * D,
        B * C * S + C * S,
        2 * B * C * S,
        4 * B * C,
    ]
    sent = [(WORLD - 1) * 4 * number for number in numbers]
    expected = [{("states", way): (size, size) for way in ("forward", "backward")} for size in sent]
    for n in (16, 64):
        assert ranks(counted, n) == [expected] * WORLD


def in_half(mesh: DeviceMesh) -> None:
    q, k, v = (x.bfloat16() for x in _qkv(40).values())
    exact = linear_attend(q.double(), k.double(), v.double(), decay=0.9)
    with parallel(mesh) as shards:
        out = linear_attend(*(parallel.shard(x, shards, dim=2) for x in (q, k, v)), decay=0.9)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), parallel.shard(exact, shards, dim=2), atol=5e-2, rtol=2e-2)


def test_bfloat16(ranks: Ranks) -> None:
    ranks(in_half)


def refused(mesh: DeviceMesh) -> None:
    x, decay, weight, mix = _averaged(16).values()
    k, v, w, u = _keyed(16).values()
    with parallel(mesh):
        with pytest.raises(ValueError, match="cut to taps has no state"):
            ema(x[:, :4], decay, weight, mix, taps=3, return_state=True)
        with pytest.raises(ValueError, match="runs backwards has no state"):
            ema(x[:, :4], decay, weight, mix, backwards=1, return_state=True)
        with pytest.raises(ValueError, match="chunks of"):
            wkv(k[:, :4], v[:, :4], w, u, distance="kernel")
        with pytest.raises(ValueError, match="decay must be in"):
            linear_attend(*_qkv(4).values(), decay=2.0)


def test_what_no_part_can_know_is_refused(ranks: Ranks) -> None:
    ranks(refused)
