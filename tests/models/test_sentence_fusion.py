"""Two sentences to one: markers, chains, the shared head, who sees whom, and the search."""

from __future__ import annotations

import pytest
import torch

from saccade.layers.wrapping import footprint
from saccade.models.sentence_fusion import (
    SentenceFuser,
    chain_members,
    fusion_loss,
    link,
    masked,
    prepared,
    shared_weights,
    sharing,
    unlinked,
    visible,
)
from saccade.models.sentence_fusion.network import IGNORE, SharedAttention, _repeating

SIZES = {"vocabulary": 20, "dim": 8, "depth": 3, "num_heads": 2, "hidden": 12, "positions": 48, "drop": 0.0}
WORDS = ["ann", "sang", "for", "bob", "she", "left"]
CHAINS = [[(0, 1), (4, 5)], [(3, 4), (4, 6)]]


def pieces(word: str) -> list[int]:
    """A piece for each two letters."""
    return [100 + ord(word[i]) for i in range(0, len(word), 2)]


def built(**changes: object) -> SentenceFuser:
    torch.manual_seed(0)
    model = SentenceFuser(**{**SIZES, "share_layer": 1, "share_head": 1, **changes}).eval()
    torch.nn.init.normal_(model.bias)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4) if p.ndim > 1 else None
    return model


def batch() -> dict[str, torch.Tensor]:
    chains = torch.zeros(2, 2, 12, dtype=torch.bool)
    chains[0, 0, [1, 4]], chains[0, 1, [4, 5]], chains[1, 0, [2, 3]] = True, True, True
    real = torch.ones(2, 12, dtype=torch.bool)
    real[1, 10:] = False
    ids = torch.randint(7, 20, (2, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "source_lengths": torch.tensor([7, 6]), "attention_mask": real, "chains": chains}


def test_markers_stand_around_mentions_and_ends_before_starts() -> None:
    linked = link(WORDS, CHAINS, pieces)
    plain = link(WORDS, [], pieces)
    a = {word: pieces(word) for word in WORDS}
    assert linked.ids == [
        1, *a["ann"], 2, *a["sang"], *a["for"], 3, *a["bob"], 4, 1, 3, *a["she"], 2, *a["left"], 4
    ]  # fmt: skip
    assert unlinked(linked.ids) == plain.ids == [piece for word in WORDS for piece in a[word]]
    assert all(linked.ids.count(1 + 2 * k) == linked.ids.count(2 + 2 * k) == 2 for k in range(2))
    assert [word for word in linked.words if word >= 0] == plain.words


def test_which_mentions_are_marked() -> None:
    assert link(WORDS, CHAINS, pieces, max_chains=0).ids == link(WORDS, [], pieces).ids
    one = link(WORDS, CHAINS, pieces, first_chain_only=True).ids
    assert 3 not in one and one.count(1) == 2
    chains = [[(0, 1), (3, 4), (4, 5), (5, 6)], [(1, 2), (2, 3)]]
    firsts = link(WORDS, chains, pieces, first_mentions_of=4)
    assert firsts.ids.count(1) == 2 and firsts.ids.count(3) == 2  # the second chain has none in sentence 2
    assert firsts.words[firsts.ids.index(2) - 1] == 0
    ends = link(WORDS, [[(0, 1)]], pieces, published_ends=True)
    sang = pieces("sang")
    assert ends.ids[: 1 + 2 + 3] == [1, *pieces("ann"), sang[0], 2, sang[1]]


def test_members_of_chains_are_pieces_of_both_sentences_and_no_markers() -> None:
    linked = link(WORDS, CHAINS, pieces)
    members = chain_members(linked, CHAINS)
    assert [[linked.ids[place] for place in chain] for chain in members] == [
        pieces("ann") + pieces("she"),
        pieces("bob") + pieces("she") + pieces("left"),
    ]
    inputs = prepared([linked, link(WORDS[:2], [], pieces)], [CHAINS, []], [[7, 8], [9]])
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (2, 2 + len(linked.ids) + 3)
    assert inputs["source_lengths"].tolist() == [len(linked.ids) + 2, 2 + 2 + 2]
    assert inputs["input_ids"][1, :9].tolist() == [101, *pieces("ann"), *pieces("sang"), 102, 9, 102, 0]
    assert inputs["chains"].shape[1] == 2 and not inputs["chains"][1].any()
    assert inputs["chains"][0, 0].nonzero()[:, 0].tolist() == [1 + place for place in members[0]]
    cut = prepared([linked], [CHAINS], longest=8)
    assert cut["input_ids"][0, -1] == 102 and cut["input_ids"].shape == (1, 8) and not cut["chains"][0, :, 7].any()


def test_who_sees_whom() -> None:
    seen = visible(torch.tensor([2, 1]), torch.tensor([[True] * 4, [True] * 3 + [False]])).int().tolist()
    assert seen[0] == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert seen[1] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]


def test_the_shared_head_is_the_mean_of_the_chains_values() -> None:
    inputs, model = batch(), built()
    attention = model.bert.blocks[1].attention
    assert isinstance(attention, SharedAttention)
    seen = visible(inputs["source_lengths"], inputs["attention_mask"])
    weights = shared_weights(inputs["chains"], seen)
    x = torch.randn(2, 12, 8)
    attention.out_proj = torch.nn.Identity()
    out, values = attention(x, mask=seen[:, None], weights=weights)[..., 4:], attention.v_proj(x)[..., 4:]
    torch.testing.assert_close(out[0, 1], values[0, [1, 4]].mean(0))
    torch.testing.assert_close(out[0, 4], values[0, [1, 4, 5]].mean(0))  # of two chains their union
    assert torch.equal(out[1, 2], out[1, 3])
    torch.testing.assert_close(out[0, 2], values[0, :7].mean(0))  # in none: all that is visible
    torch.testing.assert_close(out[0, 9], values[0, :10].mean(0))
    assert not out[1, 10:].any()
    plain = attention(x, mask=seen[:, None])
    torch.testing.assert_close(attention(x, mask=seen[:, None], weights=weights)[..., :4], plain[..., :4])
    none = shared_weights(torch.zeros(2, 1, 12, dtype=torch.bool), seen)
    torch.testing.assert_close(none, seen / seen.sum(-1, keepdim=True).clamp(min=1))


def test_queries_and_keys_of_the_shared_head_have_no_gradient() -> None:
    model = built()
    model(**batch()).logits.square().sum().backward()
    attention = model.bert.blocks[1].attention
    for proj in (attention.q_proj, attention.k_proj):
        assert not proj.weight.grad[4:].any() and not proj.bias.grad[4:].any() and proj.weight.grad[:4].any()
    assert attention.v_proj.weight.grad[4:].any()


def test_the_source_does_not_see_the_summary_nor_a_word_what_is_behind_it() -> None:
    inputs, model = batch(), built()
    expected = model(**inputs).logits
    for place in (7, 9, 11):
        other = inputs["input_ids"].clone()
        other[0, place:] = (other[0, place:] - 5) % 20
        said = model(**{**inputs, "input_ids": other}).logits
        torch.testing.assert_close(said[0, :place], expected[0, :place])
        assert not torch.allclose(said[0, place], expected[0, place])
    other = inputs["input_ids"].masked_fill(~inputs["attention_mask"], 3)
    torch.testing.assert_close(model(**{**inputs, "input_ids": other}).logits[1, :10], expected[1, :10])
    at = torch.tensor([[3, 8], [0, 9]])
    torch.testing.assert_close(
        model(**inputs, positions=at).logits, expected.gather(1, at[..., None].expand(-1, -1, 20))
    )


def test_layers_before_the_shared_one_are_as_without() -> None:
    inputs, shared = batch(), built()
    plain = built(share_layer=None)
    plain.load_state_dict(shared.state_dict())
    one = [m.bert.blocks[0](m.bert.embeddings(inputs["input_ids"])) for m in (plain, shared)]
    assert torch.equal(*one)
    assert not torch.allclose(plain(**inputs).logits, shared(**inputs).logits)


def test_what_is_asked_for_in_training() -> None:
    inputs, generator = batch(), torch.Generator().manual_seed(0)
    ids, labels = masked(
        **{k: inputs[k] for k in ("input_ids", "source_lengths", "attention_mask")}, generator=generator
    )
    asked = labels != IGNORE
    assert not asked[0, :7].any() and not asked[1, :6].any() and not asked[1, 10:].any()
    assert asked[0, 11] and asked[1, 9] and (ids[asked] == 103).all()
    assert torch.equal(torch.where(asked, labels, ids), inputs["input_ids"])
    many = inputs["input_ids"].repeat(200, 1)
    ids, _ = masked(many, inputs["source_lengths"].repeat(200), inputs["attention_mask"].repeat(200, 1), generator)
    assert float((ids[::2, 7:11] == 103).float().mean()) == pytest.approx(0.7, abs=0.05)
    logits = torch.randn(2, 3, 5)
    labels = torch.tensor([[1, IGNORE, 2], [IGNORE, IGNORE, IGNORE]])
    expected = -(logits[0, 0].log_softmax(0)[1] + logits[0, 2].log_softmax(0)[2]) / 2
    torch.testing.assert_close(fusion_loss(logits, labels), expected, rtol=1e-4, atol=1e-4)
    assert fusion_loss(logits, torch.full((2, 3), IGNORE)) == 0


def test_greedy_writing_is_asking_for_one_word_after_the_other() -> None:
    model, inputs = built(), batch()
    options = {"beams": 1, "least": 2, "most": 6, "mask": 5, "sep": 6}
    sources = {name: inputs[name] for name in ("input_ids", "source_lengths", "chains")}
    said = model.generate(**sources, **options)
    for b in range(2):
        n, words = int(inputs["source_lengths"][b]), []
        for step in range(6):
            row = torch.cat([inputs["input_ids"][b, :n], torch.tensor([*words, 5])])[None]
            chains = torch.zeros(1, 2, row.shape[1], dtype=torch.bool)
            chains[..., :n] = inputs["chains"][b, :, :n]
            logits = model(row, torch.tensor([n]), None, chains).logits[0, -1].clone()
            logits[5] = -torch.inf
            if step < 2:
                logits[6] = -torch.inf
            three = list(zip(words, words[1:], words[2:]))
            logits[[z for x, y, z in three if [x, y] == words[-2:]]] = -torch.inf
            words.append(int(logits.argmax()))
            if words[-1] == 6:
                break
        assert said.words[b, : len(words)].tolist() == words
    wide = model.generate(**sources, **{**options, "beams": 5})
    assert wide.words.shape[0] == 2 and wide.scores.isfinite().all() and (wide.lengths >= 2).all()


def test_three_words_do_not_come_twice() -> None:
    ids = torch.tensor([[9, 1, 2, 3, 1, 2, 0], [9, 9, 9, 1, 2, 1, 2]])
    blocked = _repeating(ids, torch.tensor([1, 3]), torch.tensor([5, 6]), 10)
    assert blocked.nonzero().tolist() == [[0, 3], [1, 1]]
    early = _repeating(ids, torch.tensor([4, 3]), torch.tensor([5, 6]), 10)
    assert early.nonzero().tolist() == [[1, 1]]  # what stands in the source does not count
    said = built(share_layer=None).generate(torch.tensor([[4, 8, 6]]), torch.tensor([3]), beams=2, least=20, most=25,
                                            mask=5, sep=6)  # fmt: skip
    words = said.words[0, : int(said.lengths[0])].tolist()
    three = list(zip(words, words[1:], words[2:]))
    assert len(words) >= 20 and len(three) == len(set(three))


def berts() -> tuple[torch.nn.Module, SentenceFuser]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=48,
    )  # fmt: skip
    theirs = transformers.BertForMaskedLM(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return theirs, SentenceFuser.from_bert(theirs, share_layer=1, share_head=1).eval()


def test_a_bert_of_transformers_shares_a_head_and_is_as_before_afterwards() -> None:
    theirs, ours = berts()
    inputs = batch()
    seen = visible(inputs["source_lengths"], inputs["attention_mask"])
    place = torch.arange(12)
    call = {
        "input_ids": inputs["input_ids"],
        "attention_mask": torch.where(seen, 0.0, -1e4)[:, None],
        "token_type_ids": (place >= inputs["source_lengths"][:, None]).long(),
    }
    real = inputs["attention_mask"]
    with torch.no_grad():
        before, plain = footprint(theirs), theirs(**call).logits
        with sharing(theirs, inputs["chains"], seen, layer=1, head=1) as report:
            said = theirs(**call).logits
        expected = ours(**inputs).logits
        torch.testing.assert_close(said[real], expected[real], rtol=1e-4, atol=1e-5)
        assert footprint(theirs) == before and not torch.allclose(plain[real], said[real])
        assert (report.calls, report.words) == (1, 5)
        assert report.places == ["after bert.encoder.layer.1.attention.self"]
        other = {name: x[:1] for name, x in call.items()}
        with (
            pytest.raises(ValueError, match=r"must be that of the chains, \(2, 12\), got \(1, 12\)"),
            sharing(theirs, inputs["chains"], seen, layer=1, head=1),
        ):
            theirs(**other)
    assert footprint(theirs) == before
    for bad, message in (
        (lambda: sharing(theirs, inputs["chains"], seen, layer=3), "layer must be from 0 to 2, got 3"),
        (lambda: sharing(theirs, inputs["chains"], seen, layer=0, head=2), "head must be from 0 to 1"),
        (lambda: sharing(theirs, inputs["chains"].float(), seen, layer=0, head=0), "chains must be bool"),
        (lambda: sharing(torch.nn.Linear(1, 1), inputs["chains"], seen), "must be a BERT of transformers"),
    ):
        with pytest.raises(ValueError, match=message), bad():
            pass


def test_bad_arguments() -> None:
    inputs, model = batch(), built()
    linked = link(WORDS, [], pieces)
    for bad, message in (
        (lambda: link(WORDS, [[(2, 2)]], pieces), r"0 <= start < end <= 6, got \(2, 2\)"),
        (lambda: link(WORDS, [[(5, 7)]], pieces), r"got \(5, 7\)"),
        (lambda: link(WORDS, CHAINS, pieces, markers=(1, 2)), "two for each of 2 chains, got 2"),
        (lambda: prepared([linked], []), "one for each source"),
        (lambda: built(share_layer=3), "share_layer must be from 0 to 2"),
        (lambda: built(share_head=2), "share_head must be from 0 to 1"),
        (lambda: model(inputs["input_ids"][0], inputs["source_lengths"]), r"input_ids must be \(batch, words\)"),
        (lambda: model(inputs["input_ids"], inputs["source_lengths"][:1]), r"source_lengths \(batch,\)"),
        (lambda: model(inputs["input_ids"], inputs["source_lengths"], inputs["attention_mask"][:1]), "attention_mask"),
        (lambda: model(**{**inputs, "chains": inputs["chains"][:, :, 1:]}), r"chains must be bool \(2, chains, 12\)"),
        (lambda: model.generate(inputs["input_ids"], inputs["source_lengths"], most=60), "48 words at most"),
        (lambda: masked(inputs["input_ids"], inputs["source_lengths"], inputs["attention_mask"],
                        torch.Generator(), share=1.5), "share must be in"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            bad()
