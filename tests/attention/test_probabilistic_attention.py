"""The mixture against its definition and softmax attention; EM of keys and values; the layer."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade
from saccade.attention.probabilistic_attention import (
    Annotations,
    Mixture,
    ProbabilisticAttention,
    RelativePositions,
    adapt_keys,
    probabilistic_attend,
    propagate_values,
)
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.ops import masks

close = torch.testing.assert_close
B, H, N, M, D, E = 2, 3, 7, 9, 4, 5


def tensors(n: int = N, m: int = M) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((n, D), (m, D), (m, E))
    return tuple(torch.randn(B, H, tokens, width, dtype=torch.float64) for tokens, width in shapes)  # type: ignore[return-value]


def directly(q: Tensor, zeta: Tensor, mu: Tensor, mixture: Mixture, initial: Tensor | None = None) -> Tensor:
    """The log joint as the page writes it, on differences of pairs."""
    alpha, beta = (
        x[..., None, :] if isinstance(x, Tensor) and x.ndim else torch.as_tensor(x, dtype=q.dtype)
        for x in (mixture.alpha, mixture.beta)
    )
    where = mixture.positions
    joint = -alpha / 2 * (q[..., :, None, :] - zeta[..., None, :, :]).square().sum(-1)
    if where.query is not None:
        joint = joint - alpha / 2 * (q[..., :, None, :] - where.query).square().sum(-1)
    if where.key is not None:
        joint = joint - alpha / 2 * (zeta[..., :, None, :] - where.key).square().sum(-1).mT
    if initial is not None:
        joint = joint - beta / 2 * (initial[..., :, None, :] - mu[..., None, :, :]).square().sum(-1)
    if mixture.log_prior is not None:
        return joint + mixture.log_prior
    if mixture.magnitude_priors:
        size = zeta.square().sum(-1)[..., None, :]
        joint = joint + alpha / 2 * size
        if where.query is not None:
            joint = joint + alpha / 2 * where.query.square().sum(-1)
        if where.key is not None:
            joint = joint + alpha / 2 * (size + where.key.square().sum(-1).mT)
        values = mu[..., None, :, :] if where.value is None else mu[..., None, :, :] + where.value
        joint = joint + beta / 2 * values.square().sum(-1)
    return joint


def test_softmax_attention_is_the_standard_case() -> None:
    q, zeta, mu = tensors()
    close(probabilistic_attend(q, zeta, mu).out, F.scaled_dot_product_attention(q, zeta, mu))
    close(probabilistic_attend(q, zeta, mu, return_weights=True).out, F.scaled_dot_product_attention(q, zeta, mu))
    shared = probabilistic_attend(q, zeta[:, :1], mu[:, :1]).out
    close(shared, F.scaled_dot_product_attention(q, zeta[:, :1], mu[:, :1], enable_gqa=True))
    unit = F.normalize(zeta, dim=-1)
    found = probabilistic_attend(q, unit, mu, Mixture(0.7, magnitude_priors=False)).out
    close(found, F.scaled_dot_product_attention(q, unit, mu, scale=0.7))


PRECISIONS = (
    0.5,
    torch.tensor(0.5, dtype=torch.float64),
    torch.linspace(0.2, 1.4, B * H * M, dtype=torch.float64).view(B, H, M),
)


@pytest.mark.parametrize("alpha", PRECISIONS)
@pytest.mark.parametrize("beta", (0.0, *PRECISIONS))
def test_the_log_joint_is_its_definition(alpha: float | Tensor, beta: float | Tensor) -> None:
    q, zeta, mu = tensors()
    initial = torch.randn(B, H, N, E, dtype=torch.float64)
    log_prior = torch.randn(B, H, N, M, dtype=torch.float64)
    r = (torch.randn(N, M, D).double(), torch.randn(M, N, D).double(), torch.randn(N, M, E).double())
    everywhere = [
        RelativePositions(*(x if use else None for x, use in zip(r, uses)))
        for uses in itertools.product((0, 1), repeat=3)
    ]
    for prior, magnitude, first, positions in itertools.product(
        (None, log_prior), (True, False), (None, initial), everywhere
    ):
        mixture = Mixture(alpha, beta, prior, magnitude, positions)
        weights = directly(q, zeta, mu, mixture, first).softmax(-1)
        found = probabilistic_attend(q, zeta, mu, mixture, initial=first)
        close(found.out, weights @ mu)
        if positions.value is not None:
            close(found.offsets, torch.einsum("bhnm,nme->bhne", weights, positions.value))


def test_priors_that_are_magnitudes() -> None:
    q, zeta, mu = tensors()
    alpha, beta = 0.8, 0.3
    log_prior = (alpha / 2 * zeta.square().sum(-1) + beta / 2 * mu.square().sum(-1)).log_softmax(-1)[..., None, :]
    given = probabilistic_attend(q, zeta, mu, Mixture(alpha, beta, log_prior, False)).out
    close(given, probabilistic_attend(q, zeta, mu, Mixture(alpha, beta)).out)


def test_masks_hide_units_and_none_gives_zeros() -> None:
    q, zeta, mu = tensors()
    allowed = torch.rand(B, 1, N, M) > 0.4
    allowed[:, :, 3] = False
    for options in ({}, {"return_weights": True}, {"key_iterations": 1, "key_precision": 1e12}):
        found = probabilistic_attend(q, zeta, mu, mask=allowed, **options).out  # type: ignore[arg-type]
        close(found, saccade.attend(q, zeta, mu, mask=allowed), atol=1e-7, rtol=1e-6)
        assert not found[:, :, 3].any()


def test_what_changes_nothing() -> None:
    q, zeta, mu = tensors()
    mixture = Mixture(0.5, 0.4)
    plain = probabilistic_attend(q, zeta, mu, mixture).out
    values, some = torch.randn(B, H, N, E).double(), torch.rand(B, H, N) > 0.5
    for options in (
        {"key_iterations": 3, "key_precision": 1e14},
        {"annotations": Annotations(values, some), "value_iterations": 3, "value_precision": 1e14},
        {"annotations": Annotations(values, some & False), "value_iterations": 3},
        {"annotations": Annotations(values, some)},
        {"value_iterations": 2},
    ):
        close(probabilistic_attend(q, zeta, mu, mixture, **options).out, plain)  # type: ignore[arg-type]


def test_a_step_of_the_keys_never_lowers_the_likelihood() -> None:
    q, zeta, mu = tensors(60, 5)
    mixture = Mixture(1.3, magnitude_priors=False)

    def likelihood(zeta: Tensor) -> Tensor:
        return (-1.3 / 2 * torch.cdist(q, zeta).square()).logsumexp(-1).sum(-1)

    keys = [
        probabilistic_attend(q, zeta, mu, mixture, key_iterations=steps, return_weights=True).keys for steps in range(8)
    ]
    values = torch.stack([likelihood(each) for each in keys])
    assert (values.diff(dim=0) >= -1e-9).all() and (values[-1] > values[0] + 1).all()


def test_updates_are_their_formulas() -> None:
    q, zeta, mu = tensors()
    w = torch.rand(B, H, N, M, dtype=torch.float64)
    alpha = torch.rand(B, H, M, dtype=torch.float64)
    hold = torch.rand(B, H, M, D, dtype=torch.float64)
    prior = torch.randn_like(zeta)
    found = adapt_keys(w, q, zeta, alpha, hold, prior)
    for b, h, j in itertools.product(range(B), range(H), range(M)):
        total = hold[b, h, j] * prior[b, h, j] + alpha[b, h, j] * sum(w[b, h, i, j] * q[b, h, i] for i in range(N))
        close(found[b, h, j], total / (hold[b, h, j] + alpha[b, h, j] * w[b, h, :, j].sum()))
    w[..., 2] = 0
    close(adapt_keys(w, q, zeta)[:, :, 2], zeta[:, :, 2])  # no query uses it
    some = torch.rand(B, H, N) > 0.4
    values = torch.randn(B, H, N, E).double()
    found = propagate_values(w, mu, Annotations(values, some), alpha, hold[..., :1])
    m = some.double()[..., None]
    expected = (hold[..., :1] * mu + alpha[..., None] * (w.mT @ (m * values))) / (
        hold[..., :1] + alpha[..., None] * (w.mT @ m)
    )
    close(found, expected)
    other = torch.where(some[..., None], values, 7.0)  # what is not given does not count
    close(propagate_values(w, mu, Annotations(other, some), alpha, hold[..., :1]), expected)


def test_a_prior_may_hold_or_move_along() -> None:
    q, zeta, mu = tensors()
    hold = {"key_precision": 2.0, "key_iterations": 30, "return_weights": True}
    moves = probabilistic_attend(q, zeta, mu, **hold).keys  # type: ignore[arg-type]
    fixed = probabilistic_attend(q, zeta, mu, fixed_prior=True, **hold).keys  # type: ignore[arg-type]
    assert (fixed - zeta).norm() < (moves - zeta).norm()


def test_annotations_alike_are_read_everywhere() -> None:
    q, zeta, mu = tensors()
    value = torch.randn(E).double()
    everywhere = Annotations(value.expand(B, H, N, E), torch.ones(B, 1, N, dtype=torch.bool))
    found = probabilistic_attend(q, zeta, mu, annotations=everywhere, value_iterations=1)
    close(found.out, value.expand_as(found.out))


def test_learnt_offsets_are_read_beside_the_positions() -> None:
    q, zeta, mu = tensors()
    r_v, offsets = torch.randn(N, M, E).double(), torch.randn(B, H, M, E).double()
    given = Annotations(torch.randn(B, H, N, E).double(), torch.rand(B, H, N) > 0.5, offsets)
    mixture = Mixture(0.5, positions=RelativePositions(value=r_v))
    plain = probabilistic_attend(q, zeta, mu, mixture)
    found = probabilistic_attend(q, zeta, mu, mixture, annotations=given, value_iterations=2)
    assert plain.offsets is not None and found.offsets is not None and plain.weights is not None
    close(found.offsets, plain.offsets + 2 * plain.weights @ offsets)  # beta is 0: weights stay


def test_a_precise_guess_draws_its_unit() -> None:
    q, zeta, mu = tensors()
    guess = mu[:, :, :N] + 0.01
    found = probabilistic_attend(q, zeta, mu, Mixture(0.5, 1e4, magnitude_priors=False), initial=guess)
    close(found.out, mu[:, :, :N], atol=1e-3, rtol=0)
    # further passes take the values of the last as their guess
    once = probabilistic_attend(q, zeta, mu, Mixture(0.5, 2.0))
    twice = probabilistic_attend(q, zeta, mu, Mixture(0.5, 2.0), initial=once.out)
    close(probabilistic_attend(q, zeta, mu, Mixture(0.5, 2.0), map_iterations=2).out, twice.out)


def test_two_textures_by_one_click_each() -> None:
    torch.manual_seed(0)
    kind = torch.arange(40) % 2
    x = (torch.tensor([[-3.0, 0.0], [3.0, 0.0]])[kind] + 0.3 * torch.randn(40, 2))[None, None]
    neutral, labels = torch.zeros(1, 1, 40, 1), (2.0 * kind - 1).view(1, 1, 40, 1)
    where = (torch.arange(40) < 2).view(1, 1, 40)
    mixture = Mixture(2.0, magnitude_priors=False)
    found = probabilistic_attend(x, x, neutral, mixture, annotations=Annotations(labels, where), value_iterations=1)
    assert torch.equal(found.out.sign(), labels)
    assert not probabilistic_attend(x, x, neutral, mixture).out.any()


def test_gradients_through_all_steps() -> None:
    q, zeta, mu = (x[:1, :1].requires_grad_() for x in tensors(4, 5))
    alpha, hold = (torch.rand(1, 1, 5, dtype=torch.float64) + 0.5).requires_grad_(), torch.rand(1, 1, 5, D).double()
    given = Annotations(torch.randn(1, 1, 4, E).double(), torch.tensor([[[True, False, True, False]]]))

    def read(q: Tensor, zeta: Tensor, mu: Tensor, alpha: Tensor) -> Tensor:
        return probabilistic_attend(
            q, zeta, mu, Mixture(alpha, 0.3), key_iterations=2, key_precision=hold, annotations=given,
            value_iterations=2, value_precision=0.4, map_iterations=2,
        ).out  # fmt: skip

    assert torch.autograd.gradcheck(read, (q, zeta, mu, alpha))


def test_function_arguments() -> None:
    q, zeta, mu = tensors()
    given = Annotations(torch.zeros(B, H, N + 1, E).double(), torch.ones(B, H, N + 1, dtype=torch.bool))
    for options, word in (
        ({"key_iterations": -1}, "iterations"),
        ({"map_iterations": 0}, "iterations"),
        ({"initial": mu}, "initial"),
        ({"annotations": given}, "annotations"),
    ):
        with pytest.raises(ValueError, match=word):
            probabilistic_attend(q, zeta, mu, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fit"):
        probabilistic_attend(q, zeta, mu[:, :, 1:])


# the layer


def test_the_layer_starts_as_softmax_attention() -> None:
    torch.manual_seed(0)
    plain = SoftmaxAttention(16, 4, num_kv_heads=2)
    x = torch.randn(2, 9, 16)
    for options in ({}, {"learned_alpha": True}):
        ours = ProbabilisticAttention.from_softmax(plain, **options)
        close(ours(x), plain(x), atol=1e-5, rtol=1e-4)
    ours.key_iterations = 2  # of a trained layer, untrained
    assert not torch.allclose(ours(x), plain(x), atol=1e-3)


def test_layers_iterate_and_read_annotations() -> None:
    torch.manual_seed(0)
    layer = ProbabilisticAttention(
        16, 4, num_kv_heads=2, learned_alpha=True, beta=0.5, magnitude_priors=False, key_iterations=2,
        key_precision=1.0, value_iterations=1, value_precision=0.5, map_iterations=2, fixed_prior=True,
    )  # fmt: skip
    x, values = torch.randn(2, 9, 16), torch.randn(2, 4, 9, 4)
    where = torch.zeros(2, 1, 9, dtype=torch.bool)
    where[:, :, 2] = True
    given = Annotations(values, where)
    out = layer(x, annotations=given)
    assert not torch.allclose(out, layer(x))
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    # padding: its queries move no key, its keys are not read
    real = torch.ones(2, 9, dtype=torch.bool)
    real[:, 6:] = False
    cut = Annotations(values[:, :, :6], where[..., :6])
    close(layer(x, mask=real, annotations=given)[:, :6], layer(x[:, :6], annotations=cut), atol=1e-5, rtol=1e-4)
    # the map is that of the layer's own values
    layer.value_iterations = 0
    layer.map_iterations = 1
    weights = saccade.attention_map(layer, x)
    v = layer.split_heads(layer.v_proj(x), 2).repeat_interleave(2, 1)
    close(layer.out(weights @ v), layer(x), atol=1e-5, rtol=1e-4)


def test_layer_arguments() -> None:
    for options, word in (
        ({"alpha": 0.0}, "alpha"),
        ({"beta": -1.0}, "beta"),
        ({"key_iterations": -1}, "iterations"),
        ({"map_iterations": 0}, "iterations"),
        ({"value_precision": -1.0}, "value_precision"),
        ({"causal": True, "key_iterations": 1}, "causal"),
    ):
        with pytest.raises(ValueError, match=word):
            ProbabilisticAttention(16, 4, **options)  # type: ignore[arg-type]
    given = Annotations(torch.zeros(1, 4, 3, 4), torch.ones(1, 1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="annotations"):
        ProbabilisticAttention(16, 4)(torch.randn(1, 3, 16), annotations=given)
    x = torch.randn(2, 8, 16)
    layer = ProbabilisticAttention(16, 4, key_iterations=1, key_precision=0.5)
    near = layer(x, mask=masks.window(2, 2))
    assert near.shape == x.shape and near.isfinite().all()
