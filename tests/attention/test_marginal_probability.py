"""The framework against known forms and the sum over all structures; paths, expanding windows, radii; the layers."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade
from saccade.attention import marginal_probability as marginal
from saccade.attention.marginal_probability import (
    EM,
    DotProduct,
    ExpandingAttention,
    Gaussian,
    MarginalAttention,
    Mechanism,
    Prior,
    ToyHead,
)
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.ops import masks, score_mods

close = torch.testing.assert_close
N, M, D = 7, 11, 6


def tensors(n: int = N, m: int = M, *, heads: int = 3, values: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    sizes = ((n, D), (m, D), (m, values))
    return tuple(torch.randn(2, heads, tokens, width, dtype=torch.float64) for tokens, width in sizes)  # type: ignore[return-value]


def both(mechanism: Mechanism, q: Tensor, k: Tensor, v: Tensor, **given: object) -> Tensor:
    """What the engine gives, which must be what the posterior gives."""
    found, posterior = mechanism(q, k, v, **given), mechanism.posterior(q, k, **given)
    close(found.out, posterior.log_weights.exp() @ v)
    close(found.log_marginal, posterior.log_marginal)
    return found.out


# instances, each by its known form


def test_softmax_is_sdpa() -> None:
    q, k, v = tensors()
    close(both(marginal.softmax(), q, k, v), F.scaled_dot_product_attention(q, k, v))
    close(both(marginal.softmax(0.3), q, k, v), F.scaled_dot_product_attention(q, k, v, scale=0.3))
    shared = F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)
    close(marginal.softmax()(q, k[:, :1], v[:, :1]).out, shared)


def test_a_masked_prior_is_sdpa_with_a_mask() -> None:
    q, k, v = tensors(M)
    below = torch.ones(M, M, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=below)
    close(both(marginal.masked(masks.causal()), q, k, v), expected)
    close(both(marginal.softmax(), q, k, v, mask=below[None, None]), expected)
    near = below & ~below.tril(-3)
    joined = Mechanism(Prior(masks.causal()) & Prior(masks.window(2, 2)))
    close(both(joined, q, k, v), F.scaled_dot_product_attention(q, k, v, attn_mask=near))


def test_a_relative_prior_is_sdpa_with_a_bias() -> None:
    q, k, v = tensors(M)
    table = torch.randn(3, 2 * M - 1, dtype=torch.float64)
    distance = torch.arange(M) - torch.arange(M)[:, None]
    bias = table[:, distance + M - 1]
    close(both(marginal.relative(table), q, k, v), F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
    slopes = torch.tensor([0.5, 0.25, 0.1], dtype=torch.float64)
    bias = -slopes[:, None, None] * distance.abs()
    found = both(marginal.alibi(slopes, symmetric=True), q, k, v)
    close(found, F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
    # the last three queries by themselves, as in decoding
    last = marginal.alibi(slopes, symmetric=True)(q[:, :, -3:], k, v, offset=M - 3).out
    close(last, found[:, :, -3:])


def test_hard_attention_is_the_best_key_or_a_draw() -> None:
    q, k, v = tensors()
    best = (q @ k.mT).argmax(-1)
    expected = v.gather(2, best[..., None].expand(-1, -1, -1, v.shape[-1]))
    close(marginal.hard()(q, k, v).out, expected)
    close(marginal.softmax(1e4)(q, k, v).out, expected)  # the limit of large scales
    generator = torch.Generator().manual_seed(0)
    draw = marginal.hard(sample=True, generator=generator)
    mean = torch.stack([draw(q, k, v).out for _ in range(3000)]).mean(0)
    close(mean, F.scaled_dot_product_attention(q, k, v), atol=0.12, rtol=0)  # five standard errors of a draw
    q.requires_grad_()
    drawn, soft = (torch.autograd.grad(form(q, k, v).out.sum(), q)[0] for form in (draw, marginal.softmax()))
    close(drawn, soft)  # straight through
    silent = Mechanism(inference=marginal.Sample(straight_through=False))(q, k, v).out
    assert not silent.requires_grad


def test_linear_gaussian_attention_is_a_mixture() -> None:
    q, k, v = tensors(heads=1)
    log_pi = torch.randn(M, dtype=torch.float64).log_softmax(0)
    alpha = 1.7
    found = both(marginal.mixture(alpha, log_pi), q, k, v)
    for b in range(2):
        mixture = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(logits=log_pi),
            torch.distributions.Independent(torch.distributions.Normal(k[b, 0], alpha**-0.5), 1),
        )
        close(marginal.mixture(alpha, log_pi)(q, k, v).log_marginal[b, 0], mixture.log_prob(q[b, 0]))
        parts = mixture.component_distribution.log_prob(q[b, 0, :, None]) + log_pi
        close(found[b, 0], parts.softmax(-1) @ v[b, 0])
    unit = F.normalize(k, dim=-1)
    close(both(marginal.mixture(alpha), q, unit, v), F.scaled_dot_product_attention(q, unit, v, scale=alpha))
    with pytest.raises(ValueError, match="precision"):
        Gaussian(0.0)


def test_slots_are_slot_attention() -> None:
    slots, x, v = tensors(3)
    expected = slots
    for _ in range(2):  # Locatello et al., Algorithm 1, without its recurrent unit
        weights = (expected @ x.mT * D**-0.5).softmax(-2)
        expected = weights / weights.sum(-1, keepdim=True) @ x
    found = marginal.slot(2)(slots, x, v)
    close(found.queries, expected)
    weights = (expected @ x.mT * D**-0.5).softmax(-2)
    close(found.out, weights / weights.sum(-1, keepdim=True) @ v)
    posterior = marginal.slot(2).posterior(slots, x)
    close(posterior.log_weights.exp().sum(-2), torch.ones(2, 3, M, dtype=torch.float64))
    assert posterior.log_marginal.shape == (2, 3, M)


def test_slots_find_clusters_and_climb_the_likelihood() -> None:
    torch.manual_seed(1)
    means = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 6.0]])
    x = (means[:, None] + 0.3 * torch.randn(3, 60, 2)).view(1, 1, -1, 2)
    start = means[None, None] + torch.tensor([1.0, -1.0])
    found = marginal.slot(3, precision=4.0)(start, x, x)
    close(found.queries[0, 0], means, atol=0.15, rtol=0)
    poor = torch.randn(1, 1, 3, 2)
    likelihoods = [marginal.slot(steps, precision=1.0)(poor, x, x).log_marginal.sum().item() for steps in range(6)]
    assert all(later >= earlier - 1e-4 for earlier, later in zip(likelihoods, likelihoods[1:]))
    assert likelihoods[-1] > likelihoods[0]


def test_a_hopfield_update_is_the_gradient_of_the_log_marginal() -> None:
    q, k, _ = tensors()
    q.requires_grad_()
    beta = 0.7
    found = marginal.hopfield(beta, 0)(q, k, k)
    close(torch.autograd.grad(found.log_marginal.sum(), q)[0], beta * found.out)
    close(marginal.hopfield(beta)(q, k, k).queries, found.out)
    patterns = F.normalize(torch.randn(1, 1, 5, 32), dim=-1)
    near = patterns + 0.05 * torch.randn_like(patterns)
    close(marginal.hopfield(40.0)(near, patterns, patterns).queries, patterns, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="steps"):
        EM(-1)


def test_the_gradient_of_any_log_marginal_is_attention_to_gradients() -> None:
    q, k, v = tensors()
    q.requires_grad_()
    potential = Gaussian(1.3)
    mechanism = Mechanism(Prior(log=score_mods.alibi(3)), potential)
    z = mechanism(q, k, v).log_marginal
    slopes = 1.3 * (k[:, :, None] - q[:, :, :, None])  # d log psi / d q of each pair
    expected = mechanism(q, k, slopes.detach()).out
    close(torch.autograd.grad(z.sum(), q)[0], expected)


def test_prior_and_potential_are_exchangeable() -> None:
    q, k, v = tensors()
    b = torch.randn(N, M, dtype=torch.float64)
    in_the_potential = Mechanism(potential=lambda q, k: DotProduct()(q, k) + b)
    log_weights = in_the_potential.posterior(q, k).log_weights
    close(Mechanism(Prior(log=score_mods.bias(b)))(q, k, v).out, log_weights.exp() @ v)


def test_the_factorised_expectation_is_the_sum_over_structures() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 2, D, dtype=torch.float64), torch.randn(1, 1, 3, D, dtype=torch.float64)
    pairs = torch.randn(1, 1, 2, 3, 4, dtype=torch.float64)
    log = DotProduct()(q, k)[0, 0]
    out, marginal_of_all = marginal.by_enumeration(log, lambda phi: pairs[0, 0, torch.arange(2), phi])
    found = marginal.softmax()(q, k, pairs)
    close(found.out[0, 0], out, atol=1e-10, rtol=0)
    close(found.log_marginal.sum(), marginal_of_all, atol=1e-10, rtol=0)
    with pytest.raises(ValueError, match="too many"):
        marginal.by_enumeration(torch.zeros(20, 20), lambda phi: phi)


def test_nothing_to_choose_gives_zeros() -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    none = torch.ones(2, 1, N, M, dtype=torch.bool)
    none[:, :, 2] = False
    for inference in (marginal.Exact(), marginal.Map(), marginal.Sample()):
        found = Mechanism(inference=inference)(q, k, v, mask=none)
        assert not found.out[:, :, 2].any() and (found.log_marginal[:, :, 2] == -math.inf).all()
        gradients = torch.autograd.grad(found.out.sum(), (q, v) if found.out.requires_grad else (v,), allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in gradients)


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = tensors()
    for bad in ((q, k, v[:, :, 1:]), (q, k[..., 1:], v), (q[:, :2], k, v), (q, k, torch.zeros(2, 3, N, M + 1, 4))):
        with pytest.raises(ValueError, match=r"fit|divide|values of pairs"):
            marginal.softmax()(*bad)
    with pytest.raises(ValueError, match="over must be"):
        Mechanism(over="heads")  # type: ignore[arg-type]


# paths


def test_paths_are_powers_of_the_weights() -> None:
    q, k, v = tensors(M)
    A = (q @ k.mT * D**-0.5).softmax(-1)
    close(marginal.multi_hop_attend(q, k, v), (v + A @ v + A @ A @ v) / 3)
    close(marginal.multi_hop_attend(q, k, v, weights=(0, 1, 0)), F.scaled_dot_product_attention(q, k, v))
    w = torch.randn(4, dtype=torch.float64)
    powers = [v, A @ v, A @ A @ v, A @ A @ A @ v]
    close(marginal.multi_hop_attend(q, k, v, weights=w), sum(x * y for x, y in zip(w, powers)))
    rows = marginal.multi_hop_attend(q, k, torch.ones_like(v), causal=True)
    close(rows, torch.ones_like(v))
    alone = torch.eye(M, dtype=torch.bool)[None, None]
    close(marginal.multi_hop_attend(q, k, v, mask=alone), v)
    changed = v.clone()
    changed[:, :, 6:] += 1
    before, after = (marginal.multi_hop_attend(q, k, x, causal=True)[:, :, :6] for x in (v, changed))
    assert torch.equal(before, after)
    with pytest.raises(ValueError, match="weights"):
        marginal.multi_hop_attend(q, k, v, weights=())


def test_paths_are_expectations_where_no_token_chooses_itself() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 4, D, dtype=torch.float64) for _ in range(3))
    other = ~torch.eye(4, dtype=torch.bool)
    log = DotProduct()(q, k)[0, 0].masked_fill(~other, -math.inf)
    values = v[0, 0]
    expected, _ = marginal.by_enumeration(log, lambda phi: (values + values[phi] + values[phi[phi]]) / 3)
    close(marginal.multi_hop_attend(q, k, v, mask=other[None, None])[0, 0], expected)


# expanding windows


def test_windows_begin_at_the_quantile_and_grow_until_a_stop() -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(3, 2, 20, D) for _ in range(2))
    first = math.log(0.05) / math.log(0.9)
    found = marginal.expanding_windows(q[:, :, -1:], k)
    assert abs(first - 28.43) < 0.01
    close(found.reach, torch.full((3, 2, 1), first))  # 20 tokens are fewer: one pass over all
    assert (found.passes == 1).all()
    long = torch.randn(8, 2, 200, D)
    reaches = [marginal.expanding_windows(long[:, :, -1:], long, max_passes=p).reach for p in range(1, 30)]
    passes = marginal.expanding_windows(long[:, :, -1:], long).passes
    assert passes.min() > 1
    for number, (earlier, later) in enumerate(zip(reaches, reaches[1:]), 2):
        goes_on = passes > number
        assert (later >= earlier + 0.0099)[goes_on].all() and torch.equal(
            later[passes < number], earlier[passes < number]
        )


def test_an_expanding_window_as_the_card_writes_it() -> None:
    torch.manual_seed(3)
    q, k, v = (1.5 * torch.randn(1, 1, n, D, dtype=torch.float64) for n in (1, 70, 70))
    s = (q @ k.mT)[0, 0, 0] * D**-0.5
    for slope in ("code", "exact"):
        a, b, old = 0.1, 0.9, 0.0
        for _ in range(100):
            reach = math.log(0.05) / math.log(1 - a / (a + b))
            d = torch.arange(69, -1, -1, dtype=torch.float64)
            inside = (d > 0) & (d < math.ceil(reach))
            logits = s - d * (1 / reach if slope == "code" else -math.log(1 - a / (a + b)))
            P = logits.masked_fill(~inside, -math.inf).softmax(-1)
            a, b = a + 1, b + (P * d).sum().item()
            if reach > 70 or reach < old or reach - old < 0.01:
                break
            old = reach
        close(marginal.expanding_attend(q, k, v, slope=slope)[0, 0, 0], P @ v[0, 0])  # type: ignore[arg-type]


def test_rows_of_a_batch_have_windows_of_their_own() -> None:
    torch.manual_seed(0)
    q, k, v = (2 * torch.randn(4, 3, 90, D, dtype=torch.float64) for _ in range(3))
    whole = marginal.expanding_attend(q, k, v)
    windows = marginal.expanding_windows(q, k)
    for place in (0, 1, 50, 89):
        alone = marginal.expanding_attend(q[:, :, place : place + 1], k[:, :, : place + 1], v[:, :, : place + 1])
        close(whole[:, :, place : place + 1], alone)
    assert not whole[:, :, 0].any() and len(windows.reach[:, :, -1].unique()) > 3
    diagonal = windows.weights.diagonal(dim1=-2, dim2=-1)
    assert not diagonal.any()  # the asking token
    last = marginal.expanding_windows(q[:, :, -1:], k)
    assert last.weights.shape[-1] == min(90, int(last.reach.ceil().amax()))


def test_equal_scores_without_slope_are_a_mean() -> None:
    v = torch.randn(1, 1, 20, 3, dtype=torch.float64)
    q = torch.zeros(1, 1, 1, D, dtype=torch.float64)
    k = torch.zeros(1, 1, 20, D, dtype=torch.float64)
    # a hyper-prior of very long distances has hardly any slope
    found = marginal.expanding_attend(q, k, v, alpha=1e-9, beta=1.0)
    close(found, v[:, :, :-1].mean(2, keepdim=True), atol=1e-6, rtol=0)


def test_windows_grow_with_the_distance_of_what_is_looked_for() -> None:
    torch.manual_seed(0)
    q = F.normalize(torch.randn(64, 1, 1, 16), dim=-1)
    means = []
    for distance in (2, 8, 16, 24):
        k = torch.randn(64, 1, 120, 16) * 0.1
        k[:, :, 119 - distance] = 10 * q[:, :, 0]
        means.append(marginal.expanding_windows(q, k, scale=1.0).reach.mean().item())
    assert means == sorted(means) and means[-1] > means[0] + 10


def test_expanding_arguments() -> None:
    q, k, v = tensors(M)
    for bad in ({"slope": "steep"}, {"alpha": 0.0}, {"max_passes": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            marginal.expanding_attend(q, k, v, **bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at most"):
        marginal.expanding_attend(q, k[:, :, 1:], v[:, :, 1:])
    q.requires_grad_()
    assert torch.autograd.gradcheck(lambda q: marginal.expanding_attend(q[:1, :1], k[:1, :1], v[:1, :1]), (q,))


# radii


def test_a_mixture_of_radii() -> None:
    q, k, v = tensors(M)
    out, posterior = marginal.radius_attend(q, k, v, (M,))
    close(out, F.scaled_dot_product_attention(q, k, v))
    prior = torch.tensor([-math.inf, -math.inf, 0.0], dtype=torch.float64)
    close(marginal.radius_attend(q, k, v, (0, 2, M), log_prior_R=prior)[0], F.scaled_dot_product_attention(q, k, v))
    log_prior = torch.randn(2, dtype=torch.float64, requires_grad=True)
    out, posterior = marginal.radius_attend(q, k, v, (1, 4), log_prior_R=log_prior, mask=masks.causal())
    distance = torch.arange(M)[:, None] - torch.arange(M)
    psi, expected, weight = (q @ k.mT * D**-0.5).exp(), 0.0, 0.0
    for r, radius in enumerate((1, 4)):
        near = ((distance >= 0) & (distance <= radius)).double()
        mean = (psi * near).sum(-1) / near.sum(-1) * log_prior[r].exp()
        expected = expected + mean[..., None] * ((psi * near) @ v / (psi * near).sum(-1, keepdim=True))
        weight = weight + mean[..., None]
    close(out, expected / weight)
    close(posterior.exp().sum(-1), torch.ones(2, 3, M, dtype=torch.float64))
    assert torch.autograd.grad(out.sum(), log_prior)[0].abs().min() > 0
    nothing = masks.padding(torch.zeros(2, M, dtype=torch.bool))
    assert not marginal.radius_attend(q, k, v, (1, 4), mask=nothing)[0].any()
    with pytest.raises(ValueError, match="radii"):
        marginal.radius_attend(q, k, v, ())


# layers


def test_a_layer_of_one_edge_is_softmax_attention() -> None:
    torch.manual_seed(0)
    ours, plain = MarginalAttention(16, 4, hops=(0, 1)), SoftmaxAttention(16, 4)
    plain.load_state_dict(ours.state_dict())
    x, context = torch.randn(2, 9, 16), torch.randn(2, 5, 16)
    close(ours(x), plain(x))
    close(ours(x, context), plain(x, context))
    with pytest.raises(ValueError, match="hops"):
        MarginalAttention(16, 4)(x, context)


@pytest.mark.parametrize(
    "options",
    [
        {"hop_values": True, "learned_hops": True},
        {"mechanism": marginal.alibi(4), "rope": False},
        {"mechanism": marginal.mixture(0.5)},
        {"mechanism": marginal.hard()},
        {"mechanism": marginal.hopfield(0.5)},
        {"hops": (0.0, 1.0)},
        {"hops": (0.1, 0.2, 0.3, 0.4)},
    ],
)
def test_layers_of_the_framework_decode(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    layer = MarginalAttention(16, 4, True, num_kv_heads=2, **options).eval()  # type: ignore[arg-type]
    x = torch.randn(2, 12, 16)
    with torch.no_grad():
        expected, cache = layer(x), layer.new_cache(2)
        pieces = [layer(x[:, :5], cache=cache)] + [layer(x[:, i : i + 1], cache=cache) for i in range(5, 12)]
        close(torch.cat(pieces, 1), expected, atol=1e-5, rtol=1e-4)
        weights = saccade.attention_map(layer, x)
        assert not weights.triu(1).any()
        close(weights.sum(-1), torch.full(weights.shape[:-1], sum(layer.hops)), atol=1e-5, rtol=0)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_values_of_their_own_are_read_at_their_length() -> None:
    torch.manual_seed(0)
    layer = MarginalAttention(8, 1, hops=(0, 0.5, 0.5), hop_values=True, rope=False)
    x = torch.randn(2, 6, 8)
    A = saccade.attention_map(MarginalAttention.from_softmax(layer_of(layer), hops=(0.0, 1.0), rope=False), x)[:, 0]
    _, first, second = (each(x) for each in (layer.v_proj, *layer.hop_projections))
    close(layer(x), layer.out_proj((A @ first + A @ A @ second) / 2))


def layer_of(layer: MarginalAttention) -> SoftmaxAttention:
    plain = SoftmaxAttention(layer.dim, layer.num_heads, rope=False)
    plain.load_state_dict({name: t for name, t in layer.state_dict().items() if not name.startswith("hop_")})
    return plain


def test_a_potential_that_learns_is_a_part_of_the_layer() -> None:
    class Bilinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return q @ self.weight @ k.mT

    layer = MarginalAttention(16, 4, mechanism=Mechanism(potential=Bilinear()))
    layer(torch.randn(2, 5, 16)).square().sum().backward()
    assert "potential.weight" in dict(layer.named_parameters()) and layer.potential.weight.grad.any()


def test_the_expanding_layer() -> None:
    torch.manual_seed(0)
    layer = ExpandingAttention(16, 4, num_kv_heads=2).eval()
    x = torch.randn(2, 40, 16)
    with torch.no_grad():
        expected, cache = layer(x), layer.new_cache(2)
        pieces = [layer(x[:, :33], cache=cache)] + [layer(x[:, i : i + 1], cache=cache) for i in range(33, 40)]
        close(torch.cat(pieces, 1), expected, atol=1e-5, rtol=1e-4)
        real = torch.ones(2, 40, dtype=torch.bool)
        real[:, 30:] = False
        close(layer(x, mask=real)[:, :30], layer(x[:, :30]), atol=1e-5, rtol=1e-4)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert {"alpha", "beta"} <= set(layer.state_dict())
    layer.bfloat16()(x.bfloat16())
    for bad in ({"causal": False}, {"alpha": -1.0}, {"slope": "other"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ExpandingAttention(16, 4, **bad)  # type: ignore[arg-type]


def test_layers_refuse_what_they_cannot_be() -> None:
    for bad, word in (
        ({"hops": ()}, "hops"),
        ({"mechanism": marginal.slot()}, "over queries"),
        ({"mechanism": marginal.masked(masks.causal())}, "mask"),
    ):
        with pytest.raises(ValueError, match=word):
            MarginalAttention(16, 4, **bad)  # type: ignore[arg-type]
    for bad, word in (({"structure": "tree"}, "structure"), ({"value_dim": 0}, "value_dim"), ({"beta": 0.0}, "beta")):
        with pytest.raises(ValueError, match=word):
            ToyHead(4, **bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x must be"):
        ToyHead(4)(torch.randn(2, 5, 3))
