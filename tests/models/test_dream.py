"""DREAM: the draft, its tree, what it is taught, and decoding that changes nothing of what a model says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.layers.packed import packed
from saccade.layers.proposals import Proposal
from saccade.layers.speculation import Speculative, compact, tree_masks
from saccade.layers.wrapping import footprint
from saccade.models.dream import (
    DreamDraft,
    FeatureBlock,
    Sample,
    dream,
    feature_noise,
    fit_draft,
    grow,
    kept_tokens,
    own_features,
    record,
    select_features,
)
from saccade.ops.trees import ancestors, choose_child, depths

VOCABULARY = 24


def draft(gate: float = 0.8, **options: Any) -> DreamDraft:
    torch.manual_seed(1)
    network = DreamDraft(16, 24, 4, 2, **options)
    for name in ("cross_attn_attn_gate", "cross_attn_mlp_gate"):
        torch.nn.init.constant_(getattr(network.features, name), gate)
    return network.eval()


def target(**settings: Any) -> Any:
    """A small model of transformers that says different things, not one over and over."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5, "eos_token_id": None,
            "bos_token_id": None, "pad_token_id": 0, **settings,
        }
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


class Oracle:
    """Proposes what a text is known to go on with, beside something else."""

    wants_attention = False

    def __init__(self, text: list[int], ahead: int) -> None:
        self.text, self.ahead, self.known = text, ahead, 0

    def begin(self, model: Any, prompt: Tensor, attention: Tensor | None) -> None:
        self.known = 0

    def propose(self, tokens: Any, embeds: Tensor, features: Tensor) -> Any:
        assert embeds.shape[1] == len(tokens) and features.shape[1] == len(tokens) - (self.known == 0)
        self.known += len(tokens)
        coming = self.text[self.known : self.known + self.ahead]
        wrong = [(token + 1) % VOCABULARY for token in coming[:1]]
        return Proposal([tokens[-1], *wrong, *coming], [-1, *[0] * len(wrong + coming[:1]), *range(2, len(coming) + 1)])


@torch.no_grad()
def test_gates_at_zero_leave_features_unread() -> None:
    x, f = torch.randn(2, 7, 16), torch.randn(2, 2, 6, 16)
    closed, open_ = draft(0.0), draft()
    assert torch.equal(closed(x, f[0]).hidden, closed(x, f[1]).hidden)
    assert not torch.allclose(open_(x, f[0]).hidden, open_(x, f[1]).hidden)
    block = FeatureBlock(16, 24, 4)
    assert torch.equal(block(x, f[0]), x)


@torch.no_grad()
def test_strict_drafts_are_causal_and_the_same_in_pieces() -> None:
    network, x, f = draft(strict=True), torch.randn(1, 9, 16), torch.randn(1, 8, 16)
    whole, cache = network(x, f).hidden, network.new_cache()
    pieces = [network(x[:, a:b], f[:, max(0, a - 1) : b - 1], cache=cache).hidden for a, b in ((0, 5), (5, 6), (6, 9))]
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-6)
    other_x, other_f = x.clone(), f.clone()
    other_x[:, 5:], other_f[:, 4:] = 0, 0
    assert torch.allclose(network(other_x, other_f).hidden[:, :5], whole[:, :5], atol=1e-6)
    # row 4 reads f_3 and row 5 f_4
    assert not torch.allclose(network(x, other_f).hidden[:, 5], whole[:, 5])
    assert cache.length == 9 and cache.features.length == 8 and cache.nbytes == 4 * (9 * 2 + 8) * 2 * 2 * 4
    released = draft()
    assert not torch.allclose(released(x, f).hidden[:, 1], released(x[:, :5], f[:, :4]).hidden[:, 1], atol=1e-6)


def test_bad_inputs_of_the_draft() -> None:
    network, x = draft(), torch.randn(1, 5, 16)
    for features, words in (
        (torch.randn(1, 5, 16), "5 tokens go with 4 target_features, got 5"),
        (torch.randn(1, 4, 8), r"target_features must be \(batch, tokens, 16\), got \(1, 4, 8\)"),
    ):
        with pytest.raises(ValueError, match=words):
            network(x, features)
    cache = network.new_cache()
    network(x, x[:, 1:], cache=cache)
    with pytest.raises(ValueError, match="1 tokens after others go with 1 target_features, got 0"):
        network(x[:, :1], x[:, :0], cache=cache)
    with pytest.raises(ValueError, match="num_heads must divide dim"):
        FeatureBlock(16, 24, 3)
    with pytest.raises(ValueError, match="length must be from 0 to 5, got 6"):
        cache.first.crop(6)


@torch.no_grad()
@pytest.mark.parametrize("top_k", [1, 3])
def test_the_tree_holds_the_best_and_leaves_the_cache(top_k: int) -> None:
    network, table = draft(), torch.randn(VOCABULARY, 16)
    ids, cache = torch.randint(VOCABULARY, (1, 6)), network.new_cache()
    hidden = network(F.embedding(ids, table), torch.randn(1, 5, 16), cache=cache).hidden[0, -1]
    arguments = (network, cache, hidden, 7, lambda i: F.embedding(i, table), lambda x: F.linear(x, table))
    tree = grow(*arguments, total_tokens=9, depth=3, top_k=top_k)
    assert cache.length == 6 and cache.features.length == 5
    assert tree.tokens[0] == 7 and len(tree.tokens) == (9 if top_k > 1 else 5) and tree.is_chain == (top_k == 1)
    assert ancestors(torch.tensor(tree.parents))[:, 0].all() and max(depths(torch.tensor(tree.parents))) <= 4
    for node in range(len(tree.tokens)):  # children of one node differ
        children = [t for t, p in zip(tree.tokens, tree.parents) if p == node]
        assert len(set(children)) == len(children)
    again = grow(*arguments, total_tokens=9, depth=3, top_k=top_k)
    assert again == tree
    assert len(grow(*arguments, least=1.0, top_k=top_k).tokens) == 1
    with pytest.raises(ValueError, match="depth not negative, got 9, 3 and -1"):
        grow(*arguments, total_tokens=9, depth=-1, top_k=3)


@torch.no_grad()
def test_a_level_reads_what_its_path_alone_would(tree_width: int = 3) -> None:
    """The scores of a tree are those of each of its paths, drafted by itself."""
    network, table = draft(strict=True), torch.randn(VOCABULARY, 16)
    ids, features = torch.randint(VOCABULARY, (1, 6)), torch.randn(1, 5, 16)
    cache = network.new_cache()
    hidden = network(F.embedding(ids, table), features, cache=cache).hidden[0, -1]
    said: list[tuple[Tensor, Tensor]] = []

    def head(x: Tensor) -> Tensor:
        said.append((x, F.linear(x, table)))
        return said[-1][1]

    grow(network, cache, hidden, int(ids[0, -1]), lambda i: F.embedding(i, table), head, depth=1, top_k=tree_width)
    for row, token in enumerate(said[0][1][0].topk(tree_width).indices):
        path = torch.cat([ids, token[None, None]], 1)
        # positions of nodes count from behind the root, as the released code has it
        alone = network(F.embedding(path, table), torch.cat([features, hidden[None, None]], 1)).hidden[0, -1]
        assert torch.allclose(said[1][0][row], alone, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_greedy_tokens_are_the_models_own(implementation: str) -> None:
    model = target(attn_implementation=implementation)
    ids = torch.randint(1, VOCABULARY, (1, 5))
    before = footprint(model)
    plain = model.generate(ids, max_new_tokens=24, do_sample=False)
    assert len(plain[0].unique()) > 6
    speculative = dream(model, draft(), total_tokens=7, depth=2, top_k=3)
    assert torch.equal(speculative.generate(ids, max_new_tokens=24, do_sample=False), plain)
    with Speculative(model, Oracle(plain[0].tolist(), 3)) as report:
        assert torch.equal(model.generate(ids, max_new_tokens=24, do_sample=False), plain)
        assert torch.equal(model.generate(ids, max_new_tokens=7, do_sample=False), plain[:, :12])
    # a draft that copies the target has all of its tokens accepted, and one more behind them
    assert report.tokens == 23 + 6 and report.rounds == 6 + 2 and report.accepted_length > 3.5
    assert "tokens per pass" in str(report)
    with pytest.raises(RuntimeError, match="inside"), speculative:
        raise RuntimeError("inside")
    assert footprint(model) == before and "generate" not in vars(model)


def test_a_draft_of_another_type_changes_no_token() -> None:
    model, ids = target(), torch.randint(1, VOCABULARY, (1, 6))
    alone = model.generate(ids, max_new_tokens=12, do_sample=False)
    wrapper = dream(model, draft().bfloat16(), total_tokens=8, depth=2, top_k=3, vocabulary=torch.arange(5, 20))
    assert torch.equal(wrapper.generate(ids, max_new_tokens=12, do_sample=False), alone)
    with packed(model), packed(wrapper.drafter.draft):  # type: ignore[attr-defined]
        assert torch.equal(wrapper.generate(ids, max_new_tokens=12, do_sample=False), alone)


def test_processors_stops_and_short_vocabularies() -> None:
    model, ids = target(), torch.randint(1, VOCABULARY, (1, 5))
    for options in (
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"eos_token_id": int(model.generate(ids, max_new_tokens=9)[0, -1])},
        {"max_length": 17},
        {"max_new_tokens": 1},
    ):
        options = {"do_sample": False, "max_new_tokens": 20, **options} if "max_length" not in options else options
        plain = model.generate(ids, **options)
        wrapper = dream(model, draft(), total_tokens=6, top_k=2, depth=2, vocabulary=torch.arange(3, 20))
        assert torch.equal(wrapper.generate(ids, **options), plain)


def test_rows_and_padding() -> None:
    model = target()
    ids = torch.randint(1, VOCABULARY, (2, 6))
    mask = torch.ones_like(ids)
    ids[0, :2], mask[0, :2] = 0, 0
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    wrapper = dream(model, draft(), total_tokens=6, top_k=2, depth=2)
    assert torch.equal(wrapper.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False), plain)
    one = wrapper.generate(ids[:1], attention_mask=mask[:1], max_new_tokens=12, do_sample=False)
    assert torch.equal(one, plain[:1])


def test_sampling_is_the_models_own() -> None:
    """Chi-square of 20,000 draws of the two tokens behind a text, proposed as a tree, against the model's own."""
    model, draws = target(vocab_size=6), 20_000
    ids = torch.tensor([[1, 2, 3, 4]])
    parents, tokens = torch.tensor([-1, 0, 0, 1, 1, 2]), torch.tensor([[4, 0, 2, 1, 3, 5]])
    with torch.no_grad():
        first = model(ids).logits[0, -1].softmax(-1)
        second = [model(torch.tensor([[1, 2, 3, 4, t]])).logits[0, -1].softmax(-1) for t in (0, 2)]
        cache = model(ids[:, :3], use_cache=True).past_key_values
        tree = model(
            input_ids=tokens, attention_mask=tree_masks(model, parents, 3), position_ids=3 + depths(parents)[None],
            past_key_values=cache,
        ).logits[0].softmax(-1)  # fmt: skip
    assert torch.allclose(tree[0], first, atol=1e-5) and torch.allclose(tree[1:3], torch.stack(second), atol=1e-5)
    generator = torch.Generator().manual_seed(0)
    token, child = choose_child(tree[0].expand(draws, -1), torch.tensor([[0, 2]]).expand(draws, -1), generator)
    counts, expected = token.bincount(minlength=6), draws * first
    assert ((counts - expected) ** 2 / expected).sum() < 20.5  # 5 degrees of freedom, once in a thousand
    for number, later in ((0, [1, 3]), (1, [5])):
        rows = int((child == number).sum())
        assert rows > 200
        said, _ = choose_child(tree[number + 1].expand(rows, -1), torch.tensor([later]).expand(rows, -1), generator)
        expected = rows * second[number]
        assert ((said.bincount(minlength=6) - expected) ** 2 / expected).sum() < 20.5


def test_sampled_text_by_the_whole_loop() -> None:
    """The second and third token of many texts, drafted, against the model's own distribution."""
    model = target(vocab_size=4, initializer_range=0.3)
    ids, wrapper = torch.tensor([[1, 2, 3]]), dream(model, draft(), total_tokens=4, top_k=2, depth=1)
    with torch.no_grad():
        exact = torch.zeros(4)
        for a, p in enumerate(model(ids).logits[0, -1].softmax(-1)):
            exact += p * model(torch.tensor([[1, 2, 3, a]])).logits[0, -1].softmax(-1)
    torch.manual_seed(0)
    with wrapper:
        drawn = model.generate(ids.repeat(200, 1), max_new_tokens=3, do_sample=True, top_k=0)
    counts = drawn[:, 4].bincount(minlength=4)
    assert ((counts - 200 * exact) ** 2 / (200 * exact)).sum() < 16.3  # 3 degrees of freedom, once in a thousand


def test_compaction_keeps_the_accepted_path() -> None:
    transformers = pytest.importorskip("transformers")
    cache, k, v = transformers.DynamicCache(), torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4)
    cache.update(k.clone(), v.clone(), 0)
    compact(cache, 4, [0, 2, 3])
    kept = [0, 1, 2, 3, 4, 6, 7]
    assert torch.equal(cache.layers[0].keys, k[:, :, kept]) and torch.equal(cache.layers[0].values, v[:, :, kept])
    with pytest.raises(ValueError, match="accepted must hold"):
        compact(cache, 4, [])


def test_what_cannot_be_speculated_is_said() -> None:
    model, ids = target(), torch.randint(1, VOCABULARY, (1, 5))
    wrapper = dream(model, draft())
    with pytest.raises(ValueError, match="no beam search: num_beams must be 1, got 2"):
        wrapper.generate(ids, num_beams=2, max_new_tokens=4)
    with pytest.raises(ValueError, match="return_dict_in_generate must be False"):
        wrapper.generate(ids, return_dict_in_generate=True, max_new_tokens=4)
    with pytest.raises(ValueError, match="the draft is for models of width 8, got one of 16"):
        dream(model, DreamDraft(8, 8, 2)).generate(ids, max_new_tokens=4)
    with pytest.raises(ValueError, match="load it with attn_implementation='eager'"):
        dream(model, draft(), keep_ratio=0.5).generate(ids, max_new_tokens=4)
    with pytest.raises(ValueError, match="load it with attn_implementation='eager'"):
        record(model, input_ids=ids)
    with pytest.raises(ValueError, match="must be a causal language model of transformers, got Linear"):
        dream(torch.nn.Linear(2, 2), draft())
    with pytest.raises(ValueError, match="names no image token"):
        dream(target(attn_implementation="eager"), draft(), keep_ratio=0.5).generate(ids, max_new_tokens=4)
    assert "generate" not in vars(model)


def test_the_surest_layer_is_chosen() -> None:
    attentions = [torch.full((1, 2, 5, 5), 0.2) for _ in range(16)]
    attentions[3] = torch.eye(5).expand(1, 2, 5, 5)
    hidden = [torch.full((1, 5, 4), float(l)) for l in range(17)]
    feature, layer = select_features(hidden, attentions, "entropy")
    assert (layer == 3).all() and (feature == 3).all()
    for criterion in ("sum", "mutual"):
        random = [torch.randn(2, 2, 5, 5).softmax(-1) for _ in range(16)]
        layers = select_features([torch.zeros(2, 5, 4)] * 17, random, criterion)[1]
        assert layers.min() >= 1 and layers.max() <= 4
    with pytest.raises(ValueError, match="criterion must be one of"):
        select_features(hidden, attentions, "least")
    with pytest.raises(ValueError, match="must be at least 3, got 5 layers"):
        select_features(hidden[:6], attentions[:5])


def test_image_tokens_that_are_kept() -> None:
    weights, is_image = torch.rand(3, 8, 8), torch.tensor([0, 1, 1, 0, 1, 1, 1, 0]).bool()
    assert kept_tokens(weights, is_image, 1.0).tolist() == list(range(8))
    kept = kept_tokens(weights, is_image, 0.5)
    best = weights.mean((0, 1))[is_image].topk(2).indices.sort().values
    assert kept.tolist() == sorted([0, 3, 7, *is_image.nonzero()[best, 0].tolist()])
    assert len(kept_tokens(weights, is_image, 0.01)) == 4
    with pytest.raises(ValueError, match="keep_ratio must be above 0"):
        kept_tokens(weights, is_image, 0.0)


def test_training_makes_longer_guesses() -> None:
    """A draft of a small target's own texts; what it learned is accepted more often than before."""
    model = target(num_hidden_layers=8, attn_implementation="eager")
    torch.manual_seed(0)
    prompts = torch.randint(1, VOCABULARY, (32, 2))
    texts = model.generate(prompts, max_new_tokens=22, do_sample=False)
    samples = [record(model, input_ids=texts)] * 40
    assert samples[0].features.shape == (32, 24, 16) and samples[0].learned.all()
    network = draft(0.5)

    def accepted() -> float:
        with dream(model, network, total_tokens=6, top_k=2, depth=2) as report:
            model.generate(prompts[:4], max_new_tokens=16, do_sample=False)
        return report.accepted_length

    before = accepted()
    losses = fit_draft(network, model, samples, lr=1e-2, warmup=5, steps=40, over="sum", noise=0.0)
    assert losses[-1] < 0.7 * losses[0] and accepted() > before + 0.3


def test_the_second_step_reads_what_the_draft_said() -> None:
    sample = Sample(*(torch.randn(1, 5, 16) for _ in range(3)), torch.tensor([[0, 1, 1, 0, 1]]).bool())
    out = draft()(sample.embeds, sample.features[:, :-1])
    mixed = own_features(out, sample)
    assert torch.equal(mixed[0, [0, 3]], sample.features[0, [0, 3]])
    assert torch.equal(mixed[0, [1, 2, 4]], out.hidden[0, [1, 2, 4]]) and not mixed.requires_grad
    noise = feature_noise(torch.zeros(1, 64, 16), 0.2)
    assert noise.abs().max() <= 0.8 and noise.std() > 0.4


def test_a_vision_language_model_and_its_pruned_draft() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=2
    )
    text = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.5, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=VOCABULARY - 1, vision_feature_layer=-1
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, *[VOCABULARY - 1] * 16, 4, 5]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8)}
    plain = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    model.set_attn_implementation("eager")
    for ratio in (1.0, 0.5):
        wrapper = dream(model, draft(), total_tokens=6, top_k=2, depth=2, keep_ratio=ratio)
        assert torch.equal(wrapper.generate(**inputs, max_new_tokens=12, do_sample=False), plain)
    assert record(model, **inputs).embeds.shape == (1, 19, 16)
    pruned = record(model, keep_ratio=0.5, **inputs)
    assert pruned.embeds.shape == pruned.mid.shape == (1, 11, 16)
    with pytest.raises(ValueError, match="takes several texts alone, and one with"):
        wrapper.generate(input_ids=ids.repeat(2, 1), pixel_values=torch.randn(2, 3, 8, 8), max_new_tokens=4)
