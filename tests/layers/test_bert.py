"""BERT's blocks, held to transformers' and, for the cross attention, to the equation."""

from __future__ import annotations

import pytest
import torch

from saccade.layers.bert import BERT, Bert, BertBlock

SIZES = {"dim": 12, "depth": 2, "num_heads": 3, "hidden": 20, "positions": 9}


def _ids(*shape):
    return torch.randint(17, shape)


def test_computes_what_transformers_computes():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=17, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20,
        max_position_embeddings=9, is_decoder=True, add_cross_attention=True,
    )  # fmt: skip
    theirs = transformers.BertModel(config, add_pooling_layer=False).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = Bert(17, context_dim=12, **SIZES).eval()
    ours.load_state_dict(BERT(theirs.state_dict()))
    ids, types, context = _ids(2, 7), torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2), torch.randn(2, 5, 12)
    mask, context_mask = torch.ones(2, 7, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    mask[1, 4:], context_mask[0, 3:] = False, False
    pairs = mask[:, None, None] & torch.ones(7, 7, dtype=torch.bool).tril()  # theirs is causal: it is a decoder
    with torch.no_grad():
        wanted = theirs(
            ids, attention_mask=mask.long(), token_type_ids=types, encoder_hidden_states=context,
            encoder_attention_mask=context_mask.long(),
        ).last_hidden_state  # fmt: skip
        found = ours(ids, context, mask=pairs, types=types, context_mask=context_mask)
    torch.testing.assert_close(found[mask], wanted[mask], rtol=1e-5, atol=1e-5)


def test_a_block_is_its_equation():
    block = BertBlock(4, 1, 6, context_dim=3).eval().double()
    x, context = torch.randn(1, 5, 4).double(), torch.randn(1, 2, 3).double()

    def softmax(layer, query, source):
        weights = (layer.q_proj(query) @ layer.k_proj(source).mT / 2).softmax(-1)
        return layer.out_proj(weights @ layer.v_proj(source))

    y = block.attention_norm(x + softmax(block.attention, x, x))
    y = block.cross_norm(y + softmax(block.cross, y, context))
    y = block.mlp_norm(y + block.mlp.fc2(torch.nn.functional.gelu(block.mlp.fc1(y))))
    torch.testing.assert_close(block(x, context), y)


def test_padding_changes_nothing_and_the_context_is_only_looked_at_where_given():
    model = Bert(17, context_dim=5, types=0, **SIZES).eval()
    ids, context = _ids(2, 4), torch.randn(2, 3, 5)
    padded = torch.cat([ids, _ids(2, 3)], 1)
    mask = torch.arange(7).expand(2, 7) < 4
    torch.testing.assert_close(model(padded, context, mask=mask)[:, :4], model(ids, context))
    assert not torch.allclose(model(ids), model(ids, context))
    plain = Bert(17, types=0, **SIZES).eval()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if ".cross" not in name})
    torch.testing.assert_close(plain(ids), model(ids))


def test_refuses_what_does_not_fit():
    model, crossing = Bert(17, types=0, **SIZES), Bert(17, context_dim=5, **SIZES)
    with pytest.raises(ValueError, match=r"word ids must be \(batch, at most 9 words\), got \(1, 10\)"):
        model(_ids(1, 10))
    with pytest.raises(ValueError, match="has none: build it with types=2"):
        model(_ids(1, 3), types=torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="no cross attention: give context_dim"):
        model(_ids(1, 3), torch.randn(1, 2, 5))
    with pytest.raises(ValueError, match=r"context must be \(1, tokens, 5\), got \(1, 2, 6\)"):
        crossing(_ids(1, 3), torch.randn(1, 2, 6))
    with pytest.raises(ValueError, match="vocabulary, dim and positions must be positive"):
        Bert(0)
