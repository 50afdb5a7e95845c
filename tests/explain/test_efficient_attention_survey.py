"""The tree holds every part; the recurrences agree in all their forms and reduce to each other."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade import catalogue
from saccade.explain import efficient_attention_survey as survey
from saccade.explain.efficient_attention_survey import (
    RecurrentAttention,
    delta_attend,
    generalised_delta_attend,
    memory_attend,
    mesa_attend,
)
from saccade.explain.efficient_attention_survey.operator import Update
from saccade.layers.cache import StateCache
from saccade.ops.linear import linear_attend

UPDATES = get_args(Update)


def tensors(n: int = 13) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, v = (torch.randn(2, 3, n, width, dtype=torch.float64) for width in (5, 4))
    k = F.normalize(torch.randn(2, 3, n, 5, dtype=torch.float64), dim=-1)
    beta = torch.rand(2, 3, n, dtype=torch.float64)
    return q, k, v, beta, F.logsigmoid(torch.randn(2, 3, n, dtype=torch.float64))


def step_by_step(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    outs = []
    for t in range(q.shape[2]):
        key, rate = k[:, :, t, :, None], beta[:, :, t, None, None]
        state = gate[:, :, t, None, None].exp() * (state - rate * key @ (key.mT @ state))
        state = state + rate * key * v[:, :, t, None]
        outs.append((q[:, :, t, None] @ state)[:, :, 0])
    return torch.stack(outs, 2), state


@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
def test_delta_by_chunks_is_the_recurrence(chunk: int) -> None:
    q, k, v, beta, gate = tensors()
    start = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    expected, last = step_by_step(q, k, v, beta, gate, start)
    out, state = delta_attend(q, k, v, beta, gate, state=start, return_state=True, chunk_size=chunk)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(state, last)
    first, middle = delta_attend(
        q[:, :, :6], k[:, :, :6], v[:, :, :6], beta[:, :, :6], gate[:, :, :6], state=start, return_state=True
    )
    rest = delta_attend(q[:, :, 6:], k[:, :, 6:], v[:, :, 6:], beta[:, :, 6:], gate[:, :, 6:], state=middle)
    torch.testing.assert_close(torch.cat([first, rest], 2), expected)


def test_reductions_of_the_delta_rule() -> None:
    q, k, v, beta, gate = tensors()
    start = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    _, untouched = delta_attend(q, k, v, beta * 0, state=start, return_state=True)
    torch.testing.assert_close(untouched, start)
    _, stored = delta_attend(q, k, v, beta * 0 + 1, state=start, return_state=True)
    torch.testing.assert_close(k[:, :, -1:] @ stored, v[:, :, -1:])
    torch.testing.assert_close(delta_attend(q, k, v, beta, gate * 0), delta_attend(q, k, v, beta))
    orthonormal = torch.linalg.qr(torch.randn(2, 3, 5, 5, dtype=torch.float64))[0]
    few = [x[:, :, :5] for x in (q, v, beta)]
    plain = linear_attend(few[0], orthonormal, few[1] * few[2][..., None])
    torch.testing.assert_close(delta_attend(few[0], orthonormal, few[1], few[2]), plain)
    # one token is one step of gradient descent
    S = start.clone().requires_grad_()
    loss = 0.5 * (k[:, :, :1] @ S - v[:, :, :1]).square().sum()
    (slope,) = torch.autograd.grad(loss, S)
    one = [x[:, :, :1] for x in (q, k, v, beta)]
    _, after = delta_attend(*one, state=start, return_state=True)
    torch.testing.assert_close(after, start - one[3][..., None] * slope)


def test_a_constant_gate_is_retnet_and_a_long_state_stays_bounded() -> None:
    torch.manual_seed(0)
    layer = RecurrentAttention(12, 3, update="gated").double()
    assert layer.gate is not None
    torch.nn.init.zeros_(layer.gate.weight)
    x = torch.randn(1, 9, 12, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (3, 4)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    gamma = (layer.gate.bias.sigmoid() ** (1 / 16)).detach()
    expected = layer.out_proj(linear_attend(q / 2, k, v, decay=gamma).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-6)
    norms = {}
    for update in ("kernel", "decay"):
        layer, cache = RecurrentAttention(12, 3, update=update), StateAt()
        for part in torch.randn(1, 600, 12).split(200, 1):
            cache.add(layer, part)
        norms[update] = cache.norms
    assert norms["kernel"][2] > 2.5 * norms["kernel"][0]  # sums grow without bound
    assert norms["decay"][2] < 1.5 * norms["decay"][1]


class StateAt:
    """Norms of the state after each part of a sequence."""

    def __init__(self) -> None:
        self.cache, self.norms = StateCache(), []

    def add(self, layer: RecurrentAttention, x: Tensor) -> None:
        with torch.no_grad():
            layer(x, cache=self.cache)
        state = self.cache.state
        self.norms.append((state if isinstance(state, Tensor) else state.kv).norm().item())


@pytest.mark.parametrize("update", UPDATES)
def test_every_update_decodes_and_leaves_padding_out(update: str) -> None:
    torch.manual_seed(0)
    layer = RecurrentAttention(12, 3, update=update, chunk_size=4, batch_size=4, hidden=6)  # type: ignore[arg-type]
    for matrix in layer.memory:
        torch.nn.init.normal_(matrix, std=0.3)
    x = torch.randn(2, 11, 12)
    with torch.no_grad():
        whole, cache = layer(x), layer.new_cache(2)
        pieces = [layer(x[:, :5], cache=cache)] + [layer(x[:, i : i + 1], cache=cache) for i in range(5, 11)]
        bytes_then = cache.nbytes
        layer(x, cache=cache)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=2e-6, rtol=1e-5)
        numbers = 3 * survey.state_size(update, 4, 4, 6)  # type: ignore[arg-type]
        count = 2 * 8 * bool(layer.memory)  # of the tokens of a mini-batch
        assert cache.length == 22 and cache.nbytes == bytes_then == 2 * 4 * numbers + count
        # padding in front of one row, and among the tokens of the other, changes nothing of what is real
        real = torch.ones(2, 14, dtype=torch.bool)
        real[0, :3] = real[1, [0, 5, 13]] = False
        mixed = torch.randn(2, 14, 12)
        mixed[real] = x.flatten(0, 1)
        cache = layer.new_cache(2)
        padded = [layer(mixed[:, part], mask=real[:, part], cache=cache) for part in (slice(6), slice(6, 14))]
    torch.testing.assert_close(torch.cat(padded, 1)[real], whole.flatten(0, 1), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 13])
def test_the_generalised_rule_by_chunks_is_its_recurrence(chunk: int) -> None:
    q, k, v, *_ = tensors()
    read, write, gate = (torch.randn(2, 3, 13, 5, dtype=torch.float64) for _ in range(3))
    gate, start = 3 * F.logsigmoid(gate), torch.randn(2, 3, 5, 4, dtype=torch.float64)
    S, outs = start, []
    for t in range(13):
        row = read[:, :, t, None] @ S
        S = gate[:, :, t, :, None].exp() * S + write[:, :, t, :, None] * row + k[:, :, t, :, None] * v[:, :, t, None]
        outs.append(q[:, :, t, None] @ S)
    given: dict[str, Any] = {"state": start, "return_state": True, "chunk_size": chunk}
    out, last = generalised_delta_attend(q, k, v, read, write, gate, **given)
    torch.testing.assert_close(out, torch.cat(outs, 2))
    torch.testing.assert_close(last, S)


def test_the_generalised_rule_holds_the_delta_rules() -> None:
    """And a channel that forgets all at once divides by nothing."""
    q, k, v, beta, gate = tensors()
    rate, by_channel = beta[..., None], gate[..., None].expand(-1, -1, -1, 5)
    found = generalised_delta_attend(q, rate * k, v, k, -rate * gate[..., None].exp() * k, by_channel)
    torch.testing.assert_close(found, delta_attend(q, k, v, beta, gate))
    gone = generalised_delta_attend(q, k, v, 0 * k, k, by_channel - 800, chunk_size=4)
    torch.testing.assert_close(gone, (q * k).sum(-1, keepdim=True) * v)


def slow_memory(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, matrices: list[Tensor], keep: Tensor, momentum: Tensor, size: int
) -> Tensor:
    """Titans as it is defined, by autograd, of one row and head: (N, D), (N, E), (N,)."""

    def read(x: Tensor, weights: list[Tensor]) -> Tensor:
        return x @ weights[0] if len(weights) == 1 else F.silu(x @ weights[0]) @ weights[1]

    now, still, outs = matrices, [torch.zeros_like(each) for each in matrices], []
    for t in range(len(q)):
        if t % size == 0:
            start = [each.detach().requires_grad_() for each in now]
        slopes = torch.autograd.grad(0.5 * (read(k[t], start) - v[t]).square().sum(), start)
        still = [momentum[t] * s - rate[t] * slope for s, slope in zip(still, slopes, strict=True)]
        now = [keep[t] * each + s for each, s in zip(now, still, strict=True)]
        outs.append(read(q[t], now))
    return torch.stack(outs)


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_memories_are_what_steps_of_autograd_make_them(depth: int, moving: bool, size: int) -> None:
    q, k, v, rate, keep = tensors()
    momentum = F.logsigmoid(torch.randn_like(rate))
    widths = [5, 4] if depth == 1 else [5, 7, 4]
    matrices = [torch.randn(3, a, b, dtype=torch.float64) / 2 for a, b in pairwise(widths)]
    rate = rate / 4  # two matrices with momentum run away in large steps, by either way
    given: dict[str, Any] = {"log_keep_BHN": keep, "log_momentum_BHN": momentum if moving else None}
    out = memory_attend(q, k, v, rate, matrices, batch_size=size, **given)
    for b in range(2):
        for h in range(3):
            one = [x[b, h] for x in (q, k, v, rate)]
            left = momentum[b, h].exp() * moving
            expected = slow_memory(*one, [each[h] for each in matrices], keep[b, h].exp(), left, size)
            torch.testing.assert_close(out[b, h], expected)


def test_a_linear_memory_without_mini_batches_is_the_delta_rule() -> None:
    q, k, v, beta, _ = tensors()
    empty = [torch.zeros(3, 5, 4, dtype=torch.float64)]
    torch.testing.assert_close(memory_attend(q, k, v, beta, empty, batch_size=1), delta_attend(q, k, v, beta))
    untouched = memory_attend(q, k, v, 0 * beta, [torch.ones(3, 5, 4, dtype=torch.float64)])
    torch.testing.assert_close(untouched, q.sum(-1, keepdim=True).expand_as(untouched))


def test_mesa_answers_as_least_squares() -> None:
    q, k, v, beta, gate = tensors()
    ridge = 0.1 + torch.rand(3, 5, dtype=torch.float64)
    whole: dict[str, Any] = {"return_state": True, "chunk_size": 4}
    out, state = mesa_attend(q, k, v, beta, ridge, gate, **whole)
    total = gate.cumsum(-1)
    for t in (0, 7, 12):
        weight = ((total[..., t, None] - total[..., : t + 1]).exp() * beta[..., : t + 1]).sqrt()[..., None]
        # rows sqrt(weight) k and, for the ridge, sqrt(lambda) of each channel, whose value is 0
        ridges = torch.diag_embed(ridge.sqrt()).expand(2, -1, -1, -1)
        keys = torch.cat([weight * k[:, :, : t + 1], ridges], 2)
        values = torch.cat([weight * v[:, :, : t + 1], torch.zeros(2, 3, 5, 4, dtype=torch.float64)], 2)
        answer = q[:, :, t, None] @ torch.linalg.lstsq(keys, values).solution
        torch.testing.assert_close(out[:, :, t, None], answer)
    # conjugate gradients are exact after as many steps as there are channels
    torch.testing.assert_close(mesa_attend(q, k, v, beta, ridge, gate, steps=5), out)
    (q1, k1, v1, beta1, gate1), (q2, k2, v2, beta2, gate2) = zip(
        *(x.split((6, 7), 2) for x in (q, k, v, beta, gate)), strict=True
    )
    first, middle = mesa_attend(q1, k1, v1, beta1, ridge, gate1, **whole)
    rest, last = mesa_attend(q2, k2, v2, beta2, ridge, gate2, state=middle, return_state=True, steps=5)
    torch.testing.assert_close(torch.cat([first, rest], 2), out)
    torch.testing.assert_close(last, state)
    # of a large ridge little but the plain sum is left
    far = mesa_attend(q, k, v, beta, 0 * ridge[:, :1] + 1e6) * 1e6
    torch.testing.assert_close(far, linear_attend(q, k * beta[..., None], v), atol=1e-4, rtol=1e-4)


def test_random_features_come_closer_with_their_number() -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(64, 4) / 4 for _ in range(2))
    errors = []
    for count in (16, 256, 4096):
        total = 0.0
        for seed in range(8):
            features = survey.random_features(4, count, seed=seed)
            total += (features(q) @ features(k).mT - (q @ k.mT).exp()).square().mean().item()
        errors.append((total / 8) ** 0.5)
    assert errors[0] > 2 * errors[1] > 4 * errors[2]  # 1 / sqrt m would be 4 each time
    assert (survey.elu_features(q) > 0).all()


def test_an_implicit_step_is_the_least_of_its_objective() -> None:
    q, k, v, beta, _ = tensors(1)
    k, start = 5 * k, torch.randn(2, 3, 5, 4, dtype=torch.float64)
    one = survey.implicit_rate(beta, k)
    _, after = delta_attend(q, k, v, one, state=start, return_state=True)
    after.requires_grad_()
    away = (after - start).square().sum((2, 3)) + beta[:, :, 0] * (k @ after - v).square().sum((2, 3))
    (slope,) = torch.autograd.grad(away.sum(), after)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-10, rtol=0)
    assert (one * k.square().sum(-1) < 1).all()


def test_feature_maps_are_their_kernels() -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(2, 9, 4) / 2 for _ in range(2))
    s = q @ k.mT
    torch.testing.assert_close(survey.taylor_features(q) @ survey.taylor_features(k).mT, 1 + s + s**2 / 2)
    spread = [
        ((features(q) @ features(k).mT - s.exp()) ** 2).mean().sqrt().item()
        for features in (survey.trigonometric_features(4, count) for count in (16, 4096))
    ]
    assert spread[0] > 4 * spread[1] and spread[1] < 0.1  # 1 / sqrt m would be 16 times
    apart = torch.arange(9)[:, None] - torch.arange(9)
    near = survey.cosine_features(q, 9) @ survey.cosine_features(k, 9).mT
    torch.testing.assert_close(near, (q.relu() @ k.relu().mT) * torch.cos(torch.pi * apart / 18))
    last = survey.cosine_features(q[:, 8:], 9, start=8)
    torch.testing.assert_close(last, survey.cosine_features(q, 9)[:, 8:])
    assert survey.hedgehog_features(q).sum(-1).allclose(torch.full((2, 9), 2.0))
    with pytest.raises(ValueError, match="at most"):
        survey.cosine_features(q, 8)


def test_models_are_made_of_the_tree_s_classes() -> None:
    assert {model.efficient for model in survey.MODELS} <= set(survey.CLASSES)
    shares = {model.name: model.cache_share() for model in survey.MODELS if model.ratio}
    assert shares["Jamba"] == pytest.approx(1 / 8) and shares["Gemma 2"] == 0.5
    by_name = {model.name: model for model in survey.MODELS}
    assert by_name["RWKV"].cache_share() == 0
    with pytest.raises(ValueError, match="Hymba"):
        by_name["Hymba"].cache_share()
    assert "5 : 1" in survey.models()


def test_every_part_has_its_place() -> None:
    placed = survey.place()
    assert sum(map(len, placed.values())) == sum(bool(part.efficiency) for part in catalogue.parts())
    assert {"moba"} <= {part.slug for part in placed["sparse/block/trained-routing"]}
    text = survey.tree()
    assert all(f"- {part.slug}" in text for part in catalogue.parts() if part.efficiency)
    stray = catalogue.Summary("x", "", "", "", "sequence", "", efficiency="quantum")
    with pytest.raises(ValueError, match="quantum"):
        survey.place([stray])


def test_refusals() -> None:
    for arguments in ({"causal": False}, {"update": "hope"}, {"chunk_size": 0}, {"batch_size": 0}, {"hidden": 0}):
        with pytest.raises(ValueError):
            RecurrentAttention(12, 3, **arguments)
    q, k, v, beta, _ = tensors()
    with pytest.raises(ValueError, match="beta"):
        delta_attend(q, k, v, beta[:, :1])
    with pytest.raises(ValueError, match="alike"):
        generalised_delta_attend(q, k, v, k, k, k[..., :1])
    with pytest.raises(ValueError, match="lead from width 5 to 4"):
        memory_attend(q, k, v, beta, [torch.zeros(3, 5, 5, dtype=torch.float64)])
    with pytest.raises(ValueError, match="ridge"):
        mesa_attend(q, k, v, beta, torch.ones(5, dtype=torch.float64))
    with pytest.raises(ValueError, match="no context"):
        RecurrentAttention(12, 3)(torch.randn(1, 2, 12), torch.randn(1, 2, 12))
