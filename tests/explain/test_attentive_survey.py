"""The survey as software: identities of the table, distributions, positions, levels, axes, probes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from saccade import catalogue, masks
from saccade.explain.attentive_survey import (
    ALIGNMENTS,
    MEANINGS,
    WORKS,
    Alignment,
    AttentionPooling,
    AttentionReader,
    CoAttention,
    GeneralAttention,
    HierarchicalAttention,
    MetaEmbedding,
    Predicted,
    Window,
    alignment,
    describe,
    general_attend,
    interpretability,
    kendall,
    taxonomy,
)
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.ops.distributions import DISTRIBUTIONS, distribute

D = 6


def drawn(n: int = 7, m: int = 9, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, length, D) for length in (n, m, m))
    return q, k, v


def filled(name: str, **arguments: object) -> Alignment:
    """One with weights that are all different from 0."""
    torch.manual_seed(1)
    made = alignment(name, D, **arguments)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def copied(target: nn.Module, source: nn.Module, **more: Tensor) -> nn.Module:
    target.load_state_dict({**{k: v for k, v in source.state_dict().items() if k in target.state_dict()}, **more})
    return target


def test_the_table_s_identities() -> None:
    q, k, _ = drawn()
    dot, general = filled("dot"), filled("general")
    torch.testing.assert_close(dot(q, k), torch.einsum("bhnd,bhmd->bhnm", q, k))
    torch.testing.assert_close(filled("scaled-dot")(q, k) * D**0.5, dot(q, k))
    torch.testing.assert_close(general(q, k), torch.einsum("bhnd,de,bhme->bhnm", q, general.weight, k))
    torch.testing.assert_close(copied(filled("general"), general, weight=torch.eye(D))(q, k), dot(q, k))
    for name, zero in (("biased-general", torch.zeros(D)), ("activated-general", torch.zeros(1))):
        more = {"activation": "identity"} if name.startswith("act") else {}
        biased = filled(name, **more)
        assert not torch.allclose(biased(q, k), copied(filled("general"), biased)(q, k))
        torch.testing.assert_close(copied(biased, general, bias=zero)(q, k), general(q, k))
    additive, concat, deep = filled("additive"), filled("concat"), filled("deep", depth=2)
    weight = torch.cat([additive.query.weight, additive.key.weight], 1)
    copied(concat, additive, **{"both.weight": weight, "both.bias": additive.query.bias})
    torch.testing.assert_close(concat(q, k), additive(q, k))
    by_hand = concat.out(torch.tanh(concat.both(torch.cat([q[0, 0, 3], k[0, 0, 5]]))))
    torch.testing.assert_close(concat(q, k)[0, 0, 3, 5], by_hand[0])
    copied(deep, additive, **{"out.bias": torch.tensor([2.0])})
    torch.testing.assert_close(deep(q, k), additive(q, k) + 2)
    assert not torch.allclose(filled("deep", depth=3)(q, k), deep(q, k))
    torch.testing.assert_close(filled("kernel", features="identity")(q, k), dot(q, k))
    assert (filled("kernel", features="elu")(q, k) > 0).all()
    torch.testing.assert_close(filled("similarity")(q, q).diagonal(dim1=2, dim2=3), torch.ones(2, 2, 7))
    torch.testing.assert_close(filled("similarity", distance=True)(q, k), -torch.cdist(q, k))


def test_location_reads_no_key_and_feature_no_query() -> None:
    q, k, _ = drawn()
    location, feature = filled("location"), filled("feature")
    assert torch.equal(location(q, k), location(q, torch.randn_like(k)))
    torch.testing.assert_close(location(q, k), location.place(q)[..., :9])
    assert torch.equal(feature(q, k), feature(torch.randn_like(q), k))
    assert not torch.allclose(feature(q, k), feature(q, torch.cat([k[:, :, :-1], k[:, :, -1:] + 3], 2)))
    real = torch.ones(2, 1, 9, dtype=torch.bool)
    real[:, :, 7:] = False
    torch.testing.assert_close(feature(q, k, real)[..., :7], feature(q, k[:, :, :7]))


@pytest.mark.parametrize("name", ALIGNMENTS)
@pytest.mark.parametrize("distribution", [*DISTRIBUTIONS, 1.3])
def test_any_alignment_with_any_distribution(name: str, distribution: str | float) -> None:
    q, k, v = drawn()
    align = filled(name)
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, 6:] = False
    weights = distribute(align(q, k, real[:, None]), distribution, allowed=real[:, None, None])
    out = general_attend(q, k, v, align, distribution=distribution, mask=real)
    torch.testing.assert_close(out, weights @ v, atol=2e-6, rtol=1e-5)
    assert distribution == "sigmoid" or torch.allclose(weights.sum(-1), torch.ones(2, 2, 7))
    assert (weights[1, :, :, 6:] == 0).all()


@pytest.mark.parametrize("name", ["dot", "additive"])
@pytest.mark.parametrize("predicted", [False, True])
def test_a_window_over_all_keys_is_soft(name: str, predicted: bool) -> None:
    q, k, v = drawn(9, 9)
    align, place = filled(name), Predicted(D) if predicted else None
    soft = general_attend(q, k, v, align)
    wide = Window(20, gaussian=False)
    torch.testing.assert_close(
        general_attend(q, k, v, align, positions="local", window=wide, place=place), soft, atol=1e-5, rtol=1e-5
    )
    # sigma to infinity does the same
    very = general_attend(q, k, v, align, positions="local", window=Window(10**5), place=place)
    torch.testing.assert_close(very, soft, atol=1e-5, rtol=1e-5)


def test_local_attention_by_hand() -> None:
    q, k, v = drawn(9, 9)
    align, place = filled("scaled-dot"), Predicted(D)
    scores, number = align(q, k), torch.arange(9.0)
    for centre, given in ((number[:, None], None), (9 * place(q)[..., None], place)):
        near = (number - centre).abs() <= 2
        weights = scores.masked_fill(~near, -torch.inf).softmax(-1)
        shaped = weights * (-((number - centre) ** 2) / 2).exp()
        for window, expected in (
            (Window(2), shaped),
            (Window(2, gaussian=False), weights),
            (Window(2, renormalised=True), shaped / shaped.sum(-1, keepdim=True)),
        ):
            out = general_attend(q, k, v, align, positions="local", window=window, place=given)
            torch.testing.assert_close(out, expected @ v)
    # padding in front moves the window with the tokens; causal queries see nothing later
    real = torch.ones(2, 12, dtype=torch.bool)
    real[:, :3] = False
    padded = [torch.cat([torch.randn(2, 2, 3, D), x], 2) for x in (q, k, v)]
    for given in (None, place):
        out = general_attend(*padded, align, positions="local", window=Window(2), place=given, mask=real)
        whole = general_attend(q, k, v, align, positions="local", window=Window(2), place=given)
        torch.testing.assert_close(out[:, :, 3:], whole)
        first = general_attend(q, k, v, align, positions="local", place=given, mask=masks.causal())
        other = torch.cat([k[:, :, :5], torch.randn(2, 2, 4, D)], 2)
        again = general_attend(q, other, v, align, positions="local", place=given, mask=masks.causal())
        torch.testing.assert_close(first[:, :, :5], again[:, :, :5])


def test_hard_attention() -> None:
    q, k, v = drawn()
    align = filled("dot")
    best = align(q, k).argmax(-1)
    torch.testing.assert_close(
        general_attend(q, k, v, align, positions="hard"), v.gather(2, best[..., None].expand(-1, -1, -1, D))
    )
    # weights that are one-hot are the soft ones
    sharp = [100 * q, 100 * k, v]
    torch.testing.assert_close(general_attend(*sharp, align, positions="hard"), general_attend(*sharp, align))
    # drawn keys follow the weights, and the gradient is that of the soft ones
    weights = align(q, k).softmax(-1)[0, 0, 0]
    many = [x[:1, :1].expand(4000, -1, -1, -1) for x in (q[:, :, :1], k, torch.eye(9)[None, None])]
    drawn_keys = general_attend(*many, align, positions="hard", sample=True)[:, 0, 0]
    assert ((drawn_keys - drawn_keys.round()).abs() < 1e-5).all()
    torch.testing.assert_close(drawn_keys.mean(0), weights, atol=0.03, rtol=0)
    q.requires_grad_()
    grads = [
        torch.autograd.grad(general_attend(q, k, v, align, positions=p, sample=True).sum(), q)[0]
        for p in ("soft", "hard")
    ]
    torch.testing.assert_close(*grads)


def test_channels_with_one_row_are_scalar() -> None:
    q, k, v = drawn()
    for name in ("additive", "concat", "deep"):
        wide, narrow = filled(name, channels=D), filled(name)
        rows = {"out.weight": narrow.out.weight.expand(D, -1)}
        if name == "deep":
            rows["out.bias"] = narrow.out.bias.expand(D)
        state = {**narrow.state_dict(), **rows}
        wide.load_state_dict(state)
        for distribution in ("softmax", "sparsemax"):
            torch.testing.assert_close(
                general_attend(q, k, v, wide, distribution=distribution),
                general_attend(q, k, v, narrow, distribution=distribution),
            )
    by_hand = filled("additive", channels=D)
    weights = by_hand(q, k).softmax(3)
    torch.testing.assert_close(general_attend(q, k, v, by_hand), (weights * v[:, :, None]).sum(3))


FORMS = (
    {},
    {"alignment": "deep", "multi_dimensional": True},
    {"distribution": "sparsemax"},
    {"alignment": "location", "max_keys": 40},
    {"positions": "local", "window": 2, "predicted": True},
    {"positions": "hard", "alignment": "general"},
    {"positions": "local", "window": 3, "distribution": 1.3, "renormalised": True},
)


@pytest.mark.parametrize("arguments", FORMS)
def test_every_form_decodes_and_leaves_padding_out(arguments: dict[str, object]) -> None:
    torch.manual_seed(0)
    layer = GeneralAttention(12, 3, True, **arguments).eval()
    x = torch.randn(2, 11, 12)
    with torch.no_grad():
        whole, cache = layer(x), layer.new_cache(2)
        pieces = [layer(x[:, :5], cache=cache)] + [layer(x[:, i : i + 1], cache=cache) for i in range(5, 11)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-5)
        real = torch.ones(2, 11, dtype=torch.bool)
        real[:, 8:] = False
        torch.testing.assert_close(layer(x, mask=real)[:, :8], layer(x[:, :8]), atol=1e-5, rtol=1e-5)
        assert layer(x, mask=~real & real).isfinite().all()
    layer.train()(x).square().sum().backward()
    shared = {"align.out.bias"} if arguments.get("alignment") == "deep" else set()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and (name in shared or parameter.grad.abs().sum() > 0), name
    unread = {name for name, parameter in layer.named_parameters() if not parameter.requires_grad}
    assert unread == ({"k_proj.weight"} if arguments.get("alignment") == "location" else set())


def test_the_plain_layer_is_softmax_attention_and_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain, ours = SoftmaxAttention(12, 3, rope=False), GeneralAttention(12, 3)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 9, 12)
    torch.testing.assert_close(ours(x), plain(x))
    sparse = GeneralAttention(12, 3, distribution="entmax")
    whole = sparse(x)
    monkeypatch.setattr("saccade.explain.attentive_survey.attention._PIECE", 120)
    torch.testing.assert_close(sparse(x), whole)


def test_levels_sequences_and_representations() -> None:
    torch.manual_seed(0)
    words = torch.randn(2, 1, 7, D)
    model = HierarchicalAttention(D)
    one = model(words)
    torch.testing.assert_close(one.document, model.words(words[:, 0])[0])
    torch.testing.assert_close(one.sentences, torch.ones(2, 1))
    mask = torch.ones(2, 3, 5, dtype=torch.bool)
    mask[1, 1:] = False
    mask[0, 2, 3:] = False
    said = model(torch.randn(2, 3, 5, D), mask_BSN=mask)
    assert said.sentences[1].tolist() == [1.0, 0.0, 0.0] and (said.words[~mask] == 0).all()
    with pytest.raises(ValueError, match="sentences"):
        model(words[:, 0])
    pool, x = AttentionPooling(D, distribution="sparsemax"), torch.randn(2, 7, D)
    pooled, weights = pool(x)
    torch.testing.assert_close(pooled, torch.einsum("bn,bnc->bc", weights, x))
    assert torch.equal(pool(x, weights_BN=torch.eye(7)[:2])[0], x[torch.arange(2), torch.arange(2)])
    assert not torch.allclose(pool(x, query_BC=torch.randn(2, D))[1], weights)

    both, v, q = CoAttention(D, 4), torch.randn(2, 8, D), torch.randn(2, 5, D)
    said = both(v, q)
    affinity = torch.tanh(torch.einsum("btc,cd,bnd->btn", q, both.both.weight, v))
    h_v = torch.tanh(both.of_regions(v) + affinity.mT @ both.of_words(q))
    torch.testing.assert_close(said.regions, both.score_regions(h_v)[..., 0].softmax(-1))
    torch.testing.assert_close(said.question, (said.words[..., None] * q).sum(1))
    real = torch.arange(5) < 3
    masked = both(v, q, mask_BT=real.expand(2, -1), mask_BN=torch.ones(2, 8, dtype=torch.bool))
    torch.testing.assert_close(masked.image, both(v, q[:, :3]).image)
    torch.testing.assert_close(masked.words[:, :3], both(v, q[:, :3]).words)

    views = MetaEmbedding((3, 4, 5), D)
    made, weights = views(*(torch.randn(2, 7, width) for width in (3, 4, 5)))
    assert made.shape == (2, 7, D) and torch.allclose(weights.sum(-1), torch.ones(2, 7))
    with pytest.raises(ValueError, match="representations"):
        views(torch.randn(2, 7, 3))


def test_every_part_has_one_value_an_axis() -> None:
    whole = taxonomy()
    assert len(whole.entries) == len(catalogue.parts())
    assert all(len(entry.values(axis)) == 1 for entry in whole.entries for axis in catalogue.AXES)
    counts = whole.counts()
    assert all(sum(values.values()) == len(whole.entries) for values in counts.values())
    hard = whole.where(positions="hard")
    assert {entry.name for entry in hard.entries} == {part.slug for part in catalogue.select(positions="hard")}
    assert describe("softmax").positions == ("soft",)
    assert len(taxonomy("gate").entries) == len(catalogue.select(kind="gate"))
    assert {axis: set(values) for axis, values in MEANINGS.items()} == {
        axis: set(values) for axis, values in catalogue.AXES.items()
    }
    for work in WORKS:
        assert all(set(work.values(axis)) <= set(values) for axis, values in catalogue.AXES.items())
    assert "softmax" in whole.table() and whole.plot().axes
    with pytest.raises(ValueError, match="axes"):
        whole.where(colour="red")
    with pytest.raises(ValueError, match="'softmx'"):
        describe("softmx")


def test_kendall() -> None:
    scipy = pytest.importorskip("scipy.stats")
    torch.manual_seed(0)
    a, b = torch.randint(5, (6, 9)).float(), torch.randint(5, (6, 9)).float()
    expected = [scipy.kendalltau(x, y).statistic for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(kendall(a, b), torch.tensor(expected, dtype=torch.float))
    mask = torch.arange(9).expand(6, -1) < 6
    torch.testing.assert_close(kendall(a, b, mask), kendall(a[:, :6], b[:, :6]))
    assert kendall(torch.ones(1, 4), torch.rand(1, 4)).item() == 0


def test_probes_tell_weights_that_explain_from_those_that_do_not() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8, D)
    reader = AttentionReader(D, 3)
    mask = torch.arange(8).expand(4, -1) < torch.tensor([[8], [6], [8], [1]])
    found = interpretability(reader, x, mask_BN=mask, permutations=20, generator=torch.Generator().manual_seed(0))
    assert (found.weights[~mask] == 0).all() and (found.gradient[~mask] == 0).all()
    assert (found.left_out[~mask] == 0).all() and found.permuted[3] == 0
    leaf = x.clone().requires_grad_()
    logits, _ = reader(leaf, mask_BN=mask)
    (slope,) = torch.autograd.grad(logits.amax(-1).sum(), leaf)
    torch.testing.assert_close(found.gradient, (slope * x).sum(-1).abs() * mask)
    without = mask.clone()
    without[0, 2] = False
    moved = (reader(x, mask_BN=without)[0].softmax(-1) - logits.softmax(-1)).abs().sum(-1) / 2
    torch.testing.assert_close(found.left_out[0, 2], moved[0].detach())
    assert all(p.grad is None for p in reader.parameters())
    assert "Kendall" in found.table() and found.plot().axes

    class Mean(nn.Module):
        """All tokens are their mean: any weights say the same."""

        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1, keepdim=True).expand_as(x)

    blind = interpretability(AttentionReader(D, 3, encoder=Mean()), x, permutations=5)
    assert blind.permuted.max() < 1e-6
    sharp = AttentionReader(D, 3)
    with torch.no_grad():
        sharp.pool.align.out.weight.mul_(50)
        sharp.head.weight.mul_(20)
    strong = interpretability(sharp, x, permutations=20)
    assert strong.permuted.mean() > 0.1 and strong.adversarial.min() >= 0
    assert strong.figures()["permuted"] == pytest.approx(float(strong.permuted.mean()))


def test_refusals() -> None:
    q, k, v = drawn()
    with pytest.raises(ValueError, match="'cosine'"):
        GeneralAttention(12, 3, alignment="cosine")
    with pytest.raises(ValueError, match="depth"):
        GeneralAttention(12, 3, alignment="dot", depth=3)
    with pytest.raises(ValueError, match="depth must be at least 2"):
        GeneralAttention(12, 3, alignment="deep", depth=1)
    with pytest.raises(ValueError, match="one score"):
        GeneralAttention(12, 3, multi_dimensional=True)
    with pytest.raises(ValueError, match="reads all keys"):
        GeneralAttention(12, 3, True, alignment="feature")
    with pytest.raises(ValueError, match="distribution"):
        GeneralAttention(12, 3, distribution="hardmax")
    with pytest.raises(ValueError, match="positions"):
        GeneralAttention(12, 3, positions="global")
    with pytest.raises(ValueError, match="positions"):
        general_attend(q, k, v, filled("dot"), positions="global")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="predicted"):
        GeneralAttention(12, 3, predicted=True)
    with pytest.raises(ValueError, match="Feature"):
        general_attend(q, k, v, filled("feature"), mask=masks.window(2))
    with pytest.raises(ValueError, match="at most"):
        general_attend(q, k, v, filled("location", max_keys=4))
    for arguments in ({"activation": "sine"}, {"hidden": 3, "channels": 0}):
        with pytest.raises(ValueError, match="must be"):
            alignment("additive", D, **arguments)
    with pytest.raises(ValueError, match="must be"):
        alignment("kernel", D, features="sine")
    with pytest.raises(ValueError, match="permutations"):
        interpretability(AttentionReader(D, 2), torch.randn(2, 3, D), permutations=0)
