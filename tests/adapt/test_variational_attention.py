"""Variational attention: bounds and their limits, estimators on average, padding, posteriors, the translator."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.adapt.variational_attention import (
    OBJECTIVES,
    READERS,
    AnswerPosterior,
    Halving,
    InferenceNetwork,
    Translator,
    VariationalAttention,
    categorical_kl,
    dirichlet_kl,
    dirichlet_sample,
    gumbel_weights,
    log_weights,
)
from saccade.models.beams import Said, search

CATEGORICAL = [name for name in OBJECTIVES if not name.startswith("dirichlet")]


def _attention(objective: str = "enumerate", **options: Any) -> VariationalAttention:
    torch.manual_seed(0)
    return VariationalAttention(6, 4, 9, objective, **options).double()


def _batch(places: int = 5, steps: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    h, x = 2 * torch.randn(2, steps, 6).double(), 2 * torch.randn(2, places, 4).double()
    return h, x, torch.randint(9, (2, steps)), torch.randn(2, steps, places).double()


@pytest.mark.parametrize("objective", CATEGORICAL)
def test_with_one_place_all_objectives_are_one(objective: str) -> None:
    h, x, y, scores = _batch(places=1)
    expected = _attention("soft")(h, x, y).loss
    attention = _attention(objective, samples=2)
    for mode in (True, False):
        loss, terms = attention.train(mode)(h, x, y, scores)
        torch.testing.assert_close(loss, expected)
        assert all(float(term.detach()) == 0 for name, term in terms.items() if name != "emission")
    torch.testing.assert_close(attention.predict(h, x), _attention("soft").predict(h, x))


def test_the_bound_and_its_limits() -> None:
    h, x, y, scores = _batch()
    bound, exact = _attention("enumerate"), _attention("exact")(h, x, y).loss
    assert bound(h, x, y, scores).loss > exact
    p = bound.scores(h, x)
    at_prior = bound(h, x, y, p)
    assert at_prior.terms["kl"].eq(0)
    torch.testing.assert_close(at_prior.loss, _attention("hard")(h, x, y).loss)
    logs = bound.log_word(h[:, :, None], x[:, None], y[:, :, None])
    torch.testing.assert_close(bound(h, x, y, p + logs).loss, exact)
    torch.testing.assert_close(bound.predict(h, x).gather(2, y[..., None]).sum() / 2, -exact)
    double = _attention("enumerate", kl=2.0)(h, x, y, scores)
    torch.testing.assert_close(double.loss, double.terms["emission"] + 2 * double.terms["kl"])


def test_a_sure_prior_and_a_linear_emission() -> None:
    h, x, y, _ = _batch()
    soft, exact = _attention("soft"), _attention("exact")
    for attention in (soft, exact):
        assert attention.energy is not None
        attention.energy.weight.data *= 1e4
    torch.testing.assert_close(soft(h, x, y).loss, exact(h, x, y).loss)
    p, words = _attention().prior(h, x), torch.rand(2, 5, 9).double()
    torch.testing.assert_close(p @ words, torch.einsum("bts,bsv->btv", p, words))


@pytest.mark.parametrize("objective", ["sample", "hard-sample"])
def test_the_estimator_is_right_on_average_and_the_baseline_calms_it(objective: str) -> None:
    h, x, y, scores = _batch(places=3, steps=1)
    h, x, y, scores = h[:1], x[:1], y[:1], scores[:1].requires_grad_()

    def gradient(attention: VariationalAttention, draws: Tensor | None) -> Tensor:
        leaves = [*attention.parameters(), scores]
        found = torch.autograd.grad(attention(h, x, y, scores, draws=draws).loss, leaves, allow_unused=True)
        return torch.cat([torch.zeros(0) if g is None else g.flatten() for g in found])

    expected = gradient(_attention("enumerate" if objective == "sample" else "hard"), None)
    variance = {}
    for baseline in ("soft", "none"):
        attention = _attention(objective, baseline=baseline)
        logs = scores if objective == "sample" else attention.scores(h, x)
        weight = logs.softmax(-1)[0, 0].detach()
        each = torch.stack([gradient(attention, torch.tensor([[[place]]])) for place in range(3)])
        torch.testing.assert_close(weight @ each, expected)
        variance[baseline] = float((weight @ (each - expected).square()).sum())
    assert variance["soft"] < variance["none"]
    two = _attention(objective, samples=2, baseline="leave-one-out")
    each = [(weight[i] * weight[j], torch.tensor([[[i]], [[j]]])) for i, j in itertools.product(range(3), repeat=2)]
    torch.testing.assert_close(sum(w * gradient(two, draws) for w, draws in each), expected)


def test_the_baseline_is_trained_where_that_is_asked() -> None:
    h, x, y, scores = _batch()
    draws = torch.zeros(1, 2, 3, dtype=torch.long)
    plain = _attention("sample")(h, x, y, scores, draws=draws)
    trained = _attention("sample", train_baseline=True)(h, x, y, scores, draws=draws)
    torch.testing.assert_close(trained.loss - plain.loss, _attention("soft")(h, x, y).loss)


def test_wake_sleep_weighs_its_draws() -> None:
    h, x, y, scores = _batch()
    attention = _attention("wake-sleep", samples=3)
    draws = torch.randint(5, (3, 2, 3))
    loss, terms = attention(h, x, y, scores, draws=draws)
    log_p, log_q = log_weights(attention.scores(h, x)), log_weights(scores)
    log_f = attention.log_word(h[:, :, None], x[:, None], y[:, :, None])
    f, p, q = (logs.gather(2, draws.permute(1, 2, 0)) for logs in (log_f, log_p, log_q))
    weight = (p - q + f).softmax(-1)
    torch.testing.assert_close(loss, -(weight * (f + p + q)).sum() / 2)
    assert set(terms) == {"emission", "prior", "posterior"}


def test_gumbel_draws_are_one_place_each_with_the_frequencies_of_q() -> None:
    torch.manual_seed(0)
    log_q = torch.tensor([[[0.1, 0.6, 0.0, 0.3]]]).log()
    weights = gumbel_weights(log_q, torch.rand(20000, 1, 1, 4), 1e-3)
    assert weights.amax(-1).gt(0.99).float().mean() > 0.98
    torch.testing.assert_close(weights.mean(0), log_q.exp(), atol=0.02, rtol=0)
    h, x, y, scores = _batch()
    uniform = torch.rand(2, 2, 3, 5).double()
    cold = _attention("gumbel", temperature=1e-9, samples=2)
    place = (log_weights(scores) - (-uniform.log()).log()).argmax(-1)
    sampled = _attention("sample", samples=2)(h, x, y, scores, draws=place)
    found = cold(h, x, y, scores, draws=uniform)
    torch.testing.assert_close(found.terms["emission"], sampled.terms["emission"])
    torch.testing.assert_close(found.terms["kl"], sampled.terms["kl"])


def test_dirichlet() -> None:
    torch.manual_seed(0)
    a, b = torch.rand(2, 3, 5) + 0.5, torch.rand(2, 3, 5) + 0.5
    expected = torch.distributions.kl_divergence(torch.distributions.Dirichlet(a), torch.distributions.Dirichlet(b))
    torch.testing.assert_close(dirichlet_kl(a, b), expected)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    torch.testing.assert_close(dirichlet_kl(a, b, mask)[0], expected[0])
    torch.testing.assert_close(dirichlet_kl(a, b, mask)[1], dirichlet_kl(a[1:, :, mask[1]], b[1:, :, mask[1]])[0])
    z = dirichlet_sample(a, 4000, mask)
    assert not z[:, 1, :, ~mask[1]].any()
    real = a * mask[:, None]
    torch.testing.assert_close(z.mean(0), real / real.sum(-1, keepdim=True), atol=0.02, rtol=0)
    h, x, y, scores = _batch()
    loss, terms = _attention("dirichlet", samples=2)(h, x, y, scores.requires_grad_(), mask=mask)
    loss.backward()
    assert set(terms) == {"emission", "kl"} and scores.grad is not None
    assert scores.grad[0].abs().min() > 0 and not scores.grad[1, :, ~mask[1]].any()
    assert set(_attention("dirichlet-hard")(h, x, y).terms) == {"emission"}
    torch.testing.assert_close(_attention("dirichlet").predict(h, x).exp().sum(-1), torch.ones(2, 3).double())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_padding_counts_nowhere(objective: str) -> None:
    h, x, y, scores = _batch()
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    attention = _attention(objective, pad=7, samples=2)
    y[0, 2] = y[1, 1] = 7
    found = []
    for changed in (False, True):
        if changed:
            x, scores, h = x.clone(), scores.clone(), h.clone()
            x[1, 3:], scores[1, :, 3:] = 99.0, 9.0
            if objective != "dirichlet-hard":  # its draws there, which count nowhere, move the generator
                h[0, 2], h[1, 1] = 5.0, 5.0
        torch.manual_seed(3)
        x, scores, h = (t.detach().requires_grad_() for t in (x, scores, h))
        loss = attention(h, x, y, scores, mask=mask).loss
        gradients = torch.autograd.grad(loss, [x, h, scores, *attention.parameters()], allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in gradients)
        assert not gradients[0][1, 3:].any() and not gradients[1][0, 2].any()
        assert gradients[2] is None or not gradients[2][1, :, 3:].any()
        found.append(loss)
    torch.testing.assert_close(*found)
    short = attention.predict(h[1:, :1], x[1:, :3])
    if not objective.startswith("dirichlet"):
        torch.testing.assert_close(attention.predict(h, x, mask=mask)[1:, :1], short)
    q = log_weights(scores, mask)
    assert categorical_kl(q, q).eq(0).all() and log_weights(q, mask).allclose(q)


def test_the_likeliest_places_alone() -> None:
    h, x, _, _ = _batch()
    attention = _attention("soft")
    exact = _attention("exact").predict(h, x)
    torch.testing.assert_close(attention.predict(h, x, top=5), exact)
    torch.testing.assert_close(attention.predict(h, x, top=9), exact)
    first = attention.prior(h, x).argmax(-1)
    chosen = x[torch.arange(2)[:, None], first]
    torch.testing.assert_close(attention.predict(h, x, top=1), attention.log_words(h, chosen))
    two = attention.predict(h, x, top=2)
    torch.testing.assert_close(two.exp().sum(-1), torch.ones(2, 3).double())
    mask = torch.tensor([[True] * 5, [False, True, False, False, False]])
    torch.testing.assert_close(attention.predict(h, x, mask=mask, top=3)[1], attention.log_words(h, x[:, 1:2])[1])


def test_places_in_slices_are_the_same() -> None:
    h, x, y, scores = _batch()
    for objective in ("exact", "enumerate"):
        whole, sliced = _attention(objective), _attention(objective, at_once=2)
        losses = [attention(h, x, y, scores).loss for attention in (whole, sliced)]
        torch.testing.assert_close(*losses)
        gradients = [
            torch.autograd.grad(loss, attention.out.weight)[0]
            for loss, attention in zip(losses, (whole, sliced), strict=True)
        ]
        torch.testing.assert_close(*gradients)
        torch.testing.assert_close(whole.predict(h, x), sliced.predict(h, x))


def test_estimators_enumerate_in_evaluation() -> None:
    h, x, y, scores = _batch()
    for objective, bound in (("sample", "enumerate"), ("hard-sample", "hard"), ("gumbel", "enumerate")):
        torch.testing.assert_close(
            _attention(objective).eval()(h, x, y, scores).loss, _attention(bound)(h, x, y, scores).loss
        )


@pytest.mark.parametrize("reader", READERS)
def test_inference_networks_read_both_sides(reader: str) -> None:
    torch.manual_seed(0)
    network = InferenceNetwork(6, 4, reader=reader)
    source, target = torch.randn(2, 5, 6), torch.randn(2, 3, 6)
    assert network.proj.in_features == {"bigbrnn": 8, "brnn": 4, "rnn": 4, "embedding": 6}[reader]
    lengths = torch.tensor([5, 3]), torch.tensor([3, 2])
    found = network(source, target, *lengths)
    assert found.shape == (2, 3, 5)
    alone = network(source[1:, :3], target[1:, :2])
    torch.testing.assert_close(found[1:, :2, :3], alone)  # what follows as padding is not read
    changed = target.clone()
    changed[0, 2] += 1
    assert bool((network(source, changed)[0, 0] != network(source, target)[0, 0]).any()) == ("brnn" in reader)


def test_posterior_of_answers() -> None:
    torch.manual_seed(0)
    network = AnswerPosterior(6, 4, 9, answer_dim=5, hidden=7)
    h, x, y = torch.randn(2, 1, 6), torch.randn(2, 3, 4), torch.tensor([[1], [8]])
    answer = network.embed(y)[:, 0]
    place = network.memory_proj(x * torch.relu(network.of_place(answer))[:, None])
    query = network.query_proj(h[:, 0] * torch.relu(network.of_query(answer)))
    expected = network.energy((place + query[:, None]).tanh())[..., 0]
    torch.testing.assert_close(network(h, x, y)[:, 0], expected)


def _translator(objective: str = "sample", **options: Any) -> Translator:
    torch.manual_seed(0)
    sizes = {"word_dim": 6, "memory_dim": 8, "dim": 10, "layers": 2, "posterior_dim": 4, "attention_dim": 5}
    return Translator(11, 9, objective, **{**sizes, "spread": 0.5, **options})


SOURCE, LENGTHS = torch.tensor([[4, 5, 6, 7], [8, 9, 0, 0]]), torch.tensor([4, 2])
TARGET = torch.tensor([[2, 4, 5, 6, 3], [2, 7, 3, 1, 1]])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_translator_trains_under_every_objective(objective: str) -> None:
    model = _translator(objective)
    assert (model.posterior is not None) == model.attention.needs_posterior
    model(SOURCE, TARGET, LENGTHS).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_sentences_do_not_meet_and_steps_agree_with_the_loss() -> None:
    model = _translator("exact").eval()
    both = model(SOURCE, TARGET, LENGTHS).loss
    one = model(SOURCE[:1], TARGET[:1]).loss, model(SOURCE[1:, :2], TARGET[1:, :3]).loss
    torch.testing.assert_close(2 * both, sum(one))
    state, total = model.begin(SOURCE, LENGTHS), torch.zeros(2)
    for before, word in itertools.pairwise(TARGET.unbind(1)):
        logs, state = model.advance(before, state)
        total = total + logs.gather(1, word[:, None])[:, 0] * (word != 1)
    torch.testing.assert_close(-total.sum() / 2, both)


def test_it_learns_to_translate_word_by_word() -> None:
    model = _translator(drop=0.0, spread=None, word_dim=16, memory_dim=16, dim=24, layers=1, posterior_dim=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    halving = Halving(optimizer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        words = torch.randint(4, 9, (32, 3), generator=generator)
        target = torch.cat([torch.full((32, 1), 2), words, torch.full((32, 1), 3)], 1)
        loss = model(words + 2, target).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    words = torch.randint(4, 9, (16, 3), generator=generator)
    said = model.translate(words + 2, most=6)
    assert (said[:, :3] == words).float().mean() > 0.8
    found = search(
        lambda before, state: (lambda logs, after: (Said(logs), after))(*model.advance(before, state)),
        model.begin(words + 2), torch.full((16,), 2), end=3, pad=1, most=6, beams=3, length_power=1.0,
    )  # fmt: skip
    assert (found.words[:, :3] == words).float().mean() > 0.8
    assert halving.step(1.0) == halving.step(2.0) == 1e-2 and halving.step(1.0) == 5e-3


def test_refusals() -> None:
    for options, message in (
        ({"objective": "softer"}, "objective must be one of soft"),
        ({"baseline": "hope"}, "baseline must be one of soft"),
        ({"samples": 0}, "samples, temperature and at_once must be positive"),
        ({"temperature": 0.0}, "must be positive"),
        ({"baseline": "leave-one-out"}, "samples must be 2 or more"),
        ({"score": "dot"}, "score must be one of mlp, general"),
        ({"attention_dim": 0}, "must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            VariationalAttention(6, 4, 9, **options)
    attention, (h, x, y, scores) = _attention(), _batch()
    none_left = torch.tensor([[True] * 5, [False] * 5])
    for arguments, named, message in (
        ((h[..., :5], x, y, scores), {}, r"queries must be \(batch, steps, 6\)"),
        ((h, x[..., :3], y, scores), {}, r"the memory must be \(2, places, 4\)"),
        ((h, x[:, :0], y, scores), {}, "a place at least"),
        ((h, x, y[:, :2], scores), {}, r"words must be \(2, 3\)"),
        ((h, x, y), {}, r"posterior must be \(2, 3, 5\) for 'enumerate', got None"),
        ((h, x, y, scores[..., :4]), {}, "posterior must be"),
        ((h, x, y, scores), {"mask": none_left.float()}, "mask must be bool"),
        ((h, x, y, scores), {"mask": none_left}, "a real place in each row"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(*arguments, **named)
    with pytest.raises(ValueError, match="top must be positive"):
        attention.predict(h, x, top=0)
    with pytest.raises(ValueError, match="reader must be one of"):
        InferenceNetwork(4, reader="book")
    with pytest.raises(ValueError, match="hidden even"):
        InferenceNetwork(4, 3, reader="brnn")
    with pytest.raises(ValueError, match="memory_dim even"):
        _translator(memory_dim=7)
    with pytest.raises(ValueError, match="must be words below 9"):
        _translator(pad=9)
    with pytest.raises(ValueError, match="with 2 words at least"):
        _translator()(SOURCE, TARGET[:, :1])
