"""Patterns: by hand, in attention, found in heads, put into encoders, and the two tasks."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.explain.human_guided_patterns import (
    BoundaryClassifier,
    GlobalRelevance,
    PatternAttention,
    PatternEncoder,
    ProjectedAttention,
    Relevance,
    SentenceScorer,
    assigned,
    by_head,
    chosen,
    density,
    matching,
    neighbours,
    pattern_attend,
    positional,
    segmentation,
    summarization,
    window_error,
    within_context,
    within_sentences,
    without_letters,
    written,
)

#: [CLS] 1, [SEP] 2
IDS = torch.tensor([[1, 5, 6, 2, 1, 6, 7, 2, 9, 0]])


def qkv(length: int = 6, heads: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return tuple(torch.randn(2, heads, length, 4) for _ in range(3))  # type: ignore[return-value]


def test_matching() -> None:
    plain = matching(IDS, fallback=False)[0]
    assert torch.equal(plain, plain.T) and not plain.diagonal().any()
    assert plain.nonzero().tolist() == [[0, 4], [2, 5], [3, 7], [4, 0], [5, 2], [7, 3]]
    filled = matching(IDS)[0]
    assert filled[[1, 6, 8, 9]].all() and torch.equal(filled[[0, 2, 3]], plain[[0, 2, 3]])
    without = matching(IDS, ignored=[0, 1, 2])[0]
    assert without[[0, 3, 4, 7]].all() and torch.equal(without[[2, 5]], plain[[2, 5]])
    itself = matching(IDS, diagonal=True, fallback=False)[0]
    assert torch.equal(itself, plain | torch.eye(10, dtype=torch.bool))


def test_sentences_are_blocks_and_go_where_the_sentences_go() -> None:
    found = within_sentences(IDS, 1, 2)[0]
    expected = torch.zeros(10, 10, dtype=torch.bool)
    expected[:4, :4] = expected[4:8, 4:8] = True
    assert torch.equal(found, expected)
    first, second = IDS[:, :4], torch.tensor([[1, 6, 7, 8, 2]])
    one, other = (within_sentences(torch.cat(pair, 1), 1, 2)[0] for pair in ((first, second), (second, first)))
    order = [*range(4, 9), *range(4)]
    assert torch.equal(one[order][:, order], other)
    # nested and unfinished spans: 0 to 2, 1 to 4, and one that never ends
    found = within_sentences(torch.tensor([[1, 1, 2, 5, 2, 1, 5]]), 1, 2)[0]
    expected = torch.zeros(7, 7, dtype=torch.bool)
    expected[:3, :3] = expected[1:5, 1:5] = True
    assert torch.equal(found, expected)


def test_context_positions_and_rules() -> None:
    found = within_context(torch.tensor([[1, 5, 2, 6, 7, 2]]), 2)[0]
    assert (
        found[0].all()
        and found[1].tolist() == [True] * 2 + [False] * 4
        and found[3].tolist() == [False] * 2 + [True] * 4
    )
    assert torch.equal(positional(IDS, -1)[0], torch.ones(10).diag()[:-1, :-1].new_ones(9).diag(-1).bool())
    assert torch.equal(positional(IDS, 1, 2), written(IDS, lambda xi, xj, i, j: (j - i == 1) | (j - i == 2)))
    assert torch.equal(written(IDS, lambda xi, xj, i, j: (xi == xj) & (i != j)), matching(IDS, fallback=False))
    assert float(density(positional(IDS, 1))) == pytest.approx(9 / 100)


def test_heads_and_their_patterns() -> None:
    patterns = summarization(1, 2)
    assert assigned(patterns, 12, 2) == dict(enumerate(list(patterns) * 2))
    found = by_head(IDS, patterns, {0: "matching", 2: "next"}, 4)
    assert torch.equal(found[:, 0], matching(IDS)) and torch.equal(found[:, 2], positional(IDS, 1))
    assert found[:, [1, 3]].all()
    with pytest.raises(ValueError, match="do not fit"):
        assigned(patterns, 7, 2)
    with pytest.raises(ValueError, match="patterns of"):
        by_head(IDS, patterns, {0: "nobody"}, 4)


def test_fixed_heads_of_position_are_shifts() -> None:
    q, k, v = qkv()
    ids = torch.zeros(2, 6, dtype=torch.long)
    pattern = torch.stack([positional(ids, -1), positional(ids, 1), torch.ones(2, 6, 6, dtype=torch.bool)], 1)
    out = pattern_attend(q, k, v, pattern, fixed=(0, 1)).out
    torch.testing.assert_close(out[:, 0, 1:], v[:, 0, :-1])
    torch.testing.assert_close(out[:, 1, :-1], v[:, 1, 1:])
    torch.testing.assert_close(out[:, 0, 0], v[:, 0].mean(1))  # nothing before the first: even
    torch.testing.assert_close(out[:, 2], pattern_attend(q, k, v).out[:, 2])
    q.requires_grad_(), v.requires_grad_()
    pattern_attend(q, k, v, pattern, fixed=(0, 1)).out.square().sum().backward()
    assert q.grad[:, :2].eq(0).all() and q.grad[:, 2].any() and v.grad[:, 0].any()


def test_masked_heads_see_the_pattern_alone_and_empty_rows_see_all() -> None:
    q, k, v = qkv()
    pattern = torch.rand(2, 1, 6, 6) < 0.5
    pattern[:, :, 2] = False
    out = pattern_attend(q, k, v, pattern).out
    rows = pattern.any(-1)[:, 0]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, pattern | ~pattern.any(-1, keepdim=True))
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=0)  # -10000 in single precision rounds an empty row
    torch.testing.assert_close(out.mT[..., rows[0]][0], expected.mT[..., rows[0]][0])
    everything = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    torch.testing.assert_close(pattern_attend(q, k, v, everything).out, pattern_attend(q, k, v).out)


def test_relevance() -> None:
    torch.manual_seed(0)
    ids = torch.randint(4, (2, 8))
    weights = torch.randn(2, 3, 8, 8).softmax(-1)
    parted = {
        "all": partial(written, rule=lambda xi, xj, i, j: torch.ones(8, 8, dtype=torch.bool)),
        "before": partial(written, rule=lambda xi, xj, i, j: j < i),
        "after": partial(written, rule=lambda xi, xj, i, j: j >= i),
    }
    found = GlobalRelevance(parted)(weights, ids)
    torch.testing.assert_close(found.relevance[0, :, 0], torch.ones(3))
    torch.testing.assert_close(found.relevance[0, :, 1:].sum(-1), torch.ones(3))
    torch.testing.assert_close(found.density, torch.tensor([1.0, 28 / 64, 36 / 64]))
    by_hand = (weights[:, 1] * torch.ones(8, 8).tril(-1)).sum((1, 2)).mean() / 8
    torch.testing.assert_close(found.relevance[0, 1, 1], by_hand)
    pattern = positional(ids, 1)
    q, k, v = qkv(8)
    own = GlobalRelevance(dict(neighbours()))(pattern_attend(q, k, v, pattern[:, None], fixed=(0, 1, 2)).weights, ids)
    torch.testing.assert_close(own.relevance[0, :, 1], torch.full((3,), 7 / 8))  # the last row has no next token
    # padding: rows and columns of it do not count
    real = torch.tensor([[True] * 5 + [False] * 3] * 2)
    ids[:, 5:] = 9
    short = GlobalRelevance()(weights[:, :, :5, :5], ids[:, :5])
    torch.testing.assert_close(GlobalRelevance()(weights, ids, real).relevance, short.relevance)


def test_what_is_kept_and_shown() -> None:
    relevance = torch.full((3, 4, 2), 0.1)
    relevance[1, 2, 0], relevance[0, 3, 0] = 0.9, 0.8
    found = Relevance(relevance, torch.tensor([0.1, 0.1]), ("a", "b"))
    assert found.kept() == {"a": [(1, 2), (0, 3)]} and found.kept(0.85) == {"a": [(1, 2)]}
    assert found.ordered()[:2] == [(1, 2), (0, 3)]
    found.relevance[1, 2, 1] = 0.3  # stands out by both, less by the second
    found.relevance[2, 2, 1] = 0.3
    assert found.kept()["b"] == [(1, 2), (2, 2)] and found.kept(alone=True)["b"] != found.kept()["b"]
    assert sum((1, 2) in places for places in found.kept(alone=True).values()) == 1
    found.importance = torch.zeros(3, 4)
    found.importance[2, 0] = 1.0
    assert found.ordered()[0] == (2, 0) and "2.0" in str(found) and "density" in found.table()
    pytest.importorskip("matplotlib")
    assert len(found.plot().axes) == 2


def test_projected_attention_and_padding_of_an_encoder() -> None:
    torch.manual_seed(0)
    layer, x = ProjectedAttention(8, 12, 3), torch.randn(2, 10, 8)
    torch.nn.init.zeros_(layer.up.weight), torch.nn.init.zeros_(layer.up.bias)
    assert layer(x).eq(0).all()
    ids = torch.randint(3, 12, (2, 10))
    ids[:, 0], ids[:, 6] = 1, 2
    sizes: dict[str, Any] = {"dim": 16, "depth": 2, "num_heads": 4, "positions": 12}
    encoder = PatternEncoder(12, segmentation(2), **sizes).eval()
    assert encoder.fixed == [2, 3]
    real = torch.ones(2, 10, dtype=torch.bool)
    real[:, 7:] = False
    other = ids.clone()
    other[:, 7:] = 11
    torch.testing.assert_close(encoder(ids, real)[:, :7], encoder(other, real)[:, :7])
    torch.testing.assert_close(encoder(ids, real)[:, :7], encoder(ids[:, :7]), atol=1e-5, rtol=1e-4)
    plain, none = (PatternEncoder(12, patterns, per_pattern=0, **sizes).eval() for patterns in (None, segmentation(2)))
    none.load_state_dict(plain.state_dict())
    assert torch.equal(plain(ids), none(ids)) and not torch.equal(plain(ids), encoder(ids))
    encoder.extend(20)
    assert encoder(torch.zeros(1, 20, dtype=torch.long)).shape == (1, 20, 16)
    assert torch.equal(encoder.embeddings.positions.weight[15], encoder.embeddings.positions.weight[11])
    encoder(ids).sum().backward()
    assert encoder.embeddings.positions.weight.grad is not None


def test_the_two_tasks() -> None:
    torch.manual_seed(0)
    states, starts = torch.randn(2, 10, 8), (IDS == 1).expand(2, -1)
    scorer, boundary = SentenceScorer(8), BoundaryClassifier(8, 4)
    logits, oracle = scorer(states), torch.zeros(2, 10)
    oracle[:, 4] = 1
    expected = -torch.cat([(-logits[:, 0]).sigmoid().log(), logits[:, 4].sigmoid().log()]).mean()
    torch.testing.assert_close(scorer.loss(logits, starts, oracle).loss, expected)
    assert boundary(states).shape == (2,) and boundary.out.bias.eq(0).all()
    loss, terms = boundary.loss(torch.zeros(2), torch.tensor([0, 1]))
    assert float(loss) == pytest.approx(0.6931, abs=1e-4) and set(terms) == {"boundaries"}
    words = [list(sentence) for sentence in ("abcd", "xabc", "ef", "g")]
    assert chosen([4, 3, 2, 1], words) == [0, 2, 3] and chosen([4, 3, 2, 1], words, ngram=0) == [0, 1, 2]
    assert window_error([1, 0, 0, 1, 0, 0], [1, 0, 0, 1, 0, 0]) == 0
    # segments of three: k = 2; places 0-2, 1-3, 2-4, 3-5 are truly of one, two, two, one
    assert window_error([1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0]) == pytest.approx(2 / 4)


def bert(**changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, **changes}
    return transformers.BertModel(transformers.BertConfig(vocab_size=12, **sizes)).eval()


def test_relevance_and_importance_of_a_model() -> None:
    from saccade.explain.human_guided_patterns import relevance
    from saccade.explain.recording import recorded
    from saccade.layers.wrapping import footprint

    model = bert().requires_grad_(False)
    ids = torch.randint(3, 12, (3, 8))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    before = footprint(model)
    batches = [{"input_ids": ids[:2], "attention_mask": mask[:2]}, {"input_ids": ids[2:], "attention_mask": mask[2:]}]
    found = relevance(model, batches, dict(neighbours()), loss=lambda said, batch: said.last_hidden_state[:, 0, 3])
    assert footprint(model) == before
    assert found.relevance.shape == (2, 4, 2) and found.importance.shape == (2, 4)
    torch.testing.assert_close(found.importance.norm(dim=1), torch.ones(2))
    with recorded(model) as recording, torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    weights = recording.layers[1].weights(heads=[2])[:, 0]
    shares = [float(weights[b].diagonal(-1)[: n - 1].sum()) / n for b, n in enumerate((8, 6, 8))]
    assert float(found.relevance[1, 2, 0]) == pytest.approx(sum(shares) / 3, abs=1e-5)
    # importance of the last layer by finite differences: a head's weights scaled by 1 + e
    one = relevance(model, batches[1:], dict(neighbours()), loss=lambda said, batch: said.last_hidden_state[:, 0, 3])
    layer = model.encoder.layer[1].attention.self
    slopes = []
    for head in range(4):
        values = []
        for factor in (1.01, 0.99):

            def scaled(module: Any, args: Any, output: Any, factor: float = factor, head: int = head) -> Any:
                out = output[0].clone()
                out[..., 4 * head : 4 * head + 4] *= factor
                return (out, *output[1:])

            handle = layer.register_forward_hook(scaled)
            with torch.no_grad():
                values.append(float(model(**batches[1]).last_hidden_state[:, 0, 3].sum()))
            handle.remove()
        slopes.append(abs(values[0] - values[1]))
    expected = torch.tensor(slopes)
    torch.testing.assert_close(one.importance[1], expected / expected.norm(), atol=2e-2, rtol=0)


def test_patterns_in_the_heads_of_a_model() -> None:
    from saccade.explain.human_guided_patterns import injected
    from saccade.layers.wrapping import footprint

    model = bert()
    ids = torch.randint(3, 12, (2, 9))
    ids[:, 5] = 2
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    plain, before = model(input_ids=ids, attention_mask=mask).last_hidden_state, footprint(model)
    with injected(model, segmentation(2)) as report:
        changed = model(input_ids=ids, attention_mask=mask).last_hidden_state
        other = ids.clone()
        other[1, 7:] = 11
        again = model(input_ids=other, attention_mask=mask).last_hidden_state
        with torch.no_grad():
            model(ids)
    assert footprint(model) == before and report.calls == 3 and report.heads[1] == assigned(segmentation(2), 4)
    assert "8" in str(report)
    torch.testing.assert_close(again[1, :7], changed[1, :7])  # padding stays hidden
    assert not torch.allclose(changed, plain)
    with injected(model, segmentation(2), per_pattern=0):
        torch.testing.assert_close(
            model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()], plain[mask.bool()]
        )
    # one head of one layer, against the same model with our own attention
    with injected(model, dict(neighbours()), heads={"previous": [(1, 3)]}):
        attended = []
        hook = model.encoder.layer[1].attention.self.register_forward_hook(
            lambda module, args, output: attended.append((args[0], output[0]))
        )
        model(input_ids=ids)
        hook.remove()
    x, out = attended[0]
    layer = PatternAttention(16, 4)
    theirs = model.encoder.layer[1].attention.self.state_dict()
    layer.load_state_dict({f"{name[0]}_proj.{name.split('.')[1]}": value for name, value in theirs.items()})
    pattern = by_head(ids, dict(neighbours()), {3: "previous"}, 4)
    torch.testing.assert_close(out, layer(x, pattern, fixed=(3,)).out)


def test_projected_layers_beside_a_model() -> None:
    from saccade.explain.human_guided_patterns import ProjectedLayers, projected
    from saccade.layers.wrapping import footprint

    model = bert()
    ids, mask = torch.randint(3, 12, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    ids[:, 5], mask[1, 7:] = 2, 0
    plain, before = model(input_ids=ids, attention_mask=mask).last_hidden_state, footprint(model)
    layers = ProjectedLayers.beside(model, 8, 4)
    with projected(model, layers, segmentation(2)) as report:
        changed = model(input_ids=ids, attention_mask=mask).last_hidden_state
        changed.square().sum().backward()
    assert report.calls == 1 and footprint(model).keys() == before.keys()
    assert all(p.grad is not None for layer in layers for p in (layer.up.weight, layer.down.weight))
    assert not torch.allclose(changed, plain)
    block = model.encoder.layer[0]
    with torch.no_grad():
        x = model.embeddings(ids)
        a = block.attention(x)
        a = a[0] if isinstance(a, tuple) else a
        heads = assigned(segmentation(2), 4)
        y = layers[0](x, by_head(ids, segmentation(2), heads, 4), fixed=(2, 3))
        by_hand = block.output.LayerNorm(block.output.dense(block.intermediate(a)) + a + y)
        with projected(model, layers, segmentation(2)):
            said = model(input_ids=ids, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(said, by_hand)
    for layer in layers:
        torch.nn.init.zeros_(layer.up.weight), torch.nn.init.zeros_(layer.up.bias)
    with projected(model, layers, segmentation(2)):
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).last_hidden_state, plain)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="must divide"):
        PatternAttention(8, 3)
    with pytest.raises(ValueError, match="x must be"):
        PatternAttention(8, 2)(torch.randn(1, 3, 7))
    with pytest.raises(ValueError, match="pattern must be bool"):
        PatternAttention(8, 2)(torch.randn(1, 3, 8), torch.ones(1, 1, 3, 3))
    with pytest.raises(ValueError, match="some"):
        GlobalRelevance({})
    with pytest.raises(ValueError, match="weights must be"):
        GlobalRelevance()(torch.rand(1, 2, 3, 3), torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="equally long"):
        window_error([1, 0], [1], 1)


def test_refusals_of_models() -> None:
    from saccade.explain.human_guided_patterns import ProjectedLayers, injected, projected, relevance

    transformers = pytest.importorskip("transformers")
    model, near = bert(), dict(neighbours())
    with pytest.raises(ValueError, match="no head 9"), injected(model, near, heads={"next": [(0, 9)]}):
        pass
    both = {"next": [(0, 1)], "previous": [(0, 1)]}
    with pytest.raises(ValueError, match="two patterns"), injected(model, near, heads=both):
        pass
    with pytest.raises(ValueError, match="input_ids"), injected(model, near):
        model(inputs_embeds=torch.randn(1, 3, 16))
    with pytest.raises(ValueError, match="one for each"), projected(model, ProjectedLayers(3, 16, 8, 4)):
        pass
    with pytest.raises(ValueError, match="some"):
        relevance(model, [], near)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    causal = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=12, **sizes))
    with pytest.raises(ValueError, match="causal"), injected(causal, near):
        causal(input_ids=IDS)
    with pytest.raises(ValueError, match="BERT"):
        ProjectedLayers.beside(causal)


def test_tokens_without_letters() -> None:
    class Tokenizer:
        all_special_ids = (0,)

        def get_vocab(self) -> dict[str, int]:
            return {"[PAD]": 0, "a1": 1, "12": 2, "##.": 3, "tree": 4}

    assert without_letters(Tokenizer()) == [0, 2, 3]
