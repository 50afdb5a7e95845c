"""LLaMA's blocks against transformers, with caches, at given positions, and from interleaved weights."""

import pytest
import torch

from saccade import masks
from saccade.layers.llama import Llama, LlamaAttention, LlamaBlock, LlamaLM, from_transformers, split_halves


@pytest.fixture
def small() -> LlamaLM:
    torch.manual_seed(0)
    return LlamaLM(Llama(40, 32, 48, layers=2, num_heads=4, num_kv_heads=2)).eval()


def test_equals_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    ours = LlamaLM(Llama(40, 32, 48, layers=2, num_heads=4, num_kv_heads=2), tied=True).eval()
    ours.load_state_dict(from_transformers(theirs.state_dict()))
    ids = torch.randint(40, (2, 9))
    with torch.no_grad():
        assert torch.allclose(ours(ids), theirs(ids).logits, atol=1e-5)


@torch.no_grad()
def test_decodes_as_it_runs(small: LlamaLM) -> None:
    ids, cache = torch.randint(40, (2, 9)), small.model.new_cache(2)
    whole = small(ids)
    parts = [small(ids[:, a:b], cache=cache) for a, b in ((0, 5), (5, 6), (6, 9))]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)
    assert cache.length == 9 and cache.nbytes == 2 * 2 * 2 * 2 * 9 * 8 * 4
    assert torch.allclose(small(embeds_BNC=small.model.embed_tokens(ids)), whole)


@torch.no_grad()
def test_positions_and_masks_that_are_given(small: LlamaLM) -> None:
    """Two branches behind one beginning, side by side, are what each is alone."""
    ids = torch.tensor([[3, 5, 7, 9, 11]])
    positions, sees = torch.tensor([0, 1, 2, 3, 2]), torch.ones(5, 5, dtype=torch.bool).tril()
    sees[4, 2:4] = False
    tree = small(ids, positions=positions, mask=masks.dense(sees[None, None]))
    assert torch.allclose(tree[:, :4], small(ids[:, :4]), atol=1e-5)
    assert torch.allclose(tree[:, 4], small(ids[:, [0, 1, 4]])[:, 2], atol=1e-5)
    assert torch.allclose(tree, small(ids, positions=positions[None], mask=sees[None, None]), atol=1e-6)


@torch.no_grad()
def test_interleaved_weights() -> None:
    """Queries and keys of LLaMA's own layout, turned in neighbouring pairs, have the same products."""
    layer = LlamaAttention(16, 2)
    x, weights = torch.randn(1, 6, 16), torch.randn(2, 16, 16)
    angles = torch.arange(6)[:, None] * 10000.0 ** (-torch.arange(4) / 4)
    turn = torch.polar(torch.ones_like(angles), angles)
    q, k = (
        torch.view_as_real(torch.view_as_complex((x @ w.T).view(1, 6, 2, 4, 2).contiguous()) * turn[:, None])
        .flatten(3).transpose(1, 2)
        for w in weights
    )  # fmt: skip
    layer.q_proj.weight.data, layer.k_proj.weight.data = (split_halves(w, 2) for w in weights)
    ours = layer.project(x, None, torch.arange(6))
    assert torch.allclose(ours[0] @ ours[1].mT, q @ k.mT, atol=1e-4)


def test_a_block_may_lack_its_first_norm_and_a_model_its_input(small: LlamaLM) -> None:
    block = LlamaBlock(LlamaAttention(16, 2), 16, input_norm=False)
    assert not [name for name, _ in block.named_parameters() if "input_layernorm" in name]
    with pytest.raises(ValueError, match="either ids or embeds"):
        small.model()
