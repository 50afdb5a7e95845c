"""Reviews read in the light of a table: what the weights depend on, and the reference models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from saccade.fusion.consumer_cross_attention import (
    ConsumerFusion,
    ConsumerModel,
    Preference,
    Reference,
    TableTokens,
    cleaned,
    leave_one_out,
    parameter_groups,
    preference_loss,
)
from saccade.fusion.consumer_cross_attention.fusion import masked_mean

SIZES = {"dim": 8, "variables": 5, "num_heads": 2, "hidden": 12, "drop": 0.0}


def given() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    return torch.randn(2, 7, 8, generator=generator), torch.randn(2, 5, generator=generator), mask


def built(**options: object) -> ConsumerFusion:
    torch.manual_seed(0)
    return ConsumerFusion(**{**SIZES, **options}).eval()


def test_weights_sum_to_one_over_words_and_padding_has_no_say() -> None:
    text, table, mask = given()
    for options in ({}, {"tokens": "per_variable", "query": "both"}, {"tokens": "chunks", "early_concat": True}):
        model = built(**options)
        weights = model.weights(text, table, mask=mask)
        assert weights.shape == (2, 2, model.table.count, 7)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert not weights[1, ..., 4:].any()
        other = text.masked_fill(~mask[..., None], 50.0)
        torch.testing.assert_close(model(other, table, mask=mask).prediction, model(text, table, mask=mask).prediction)
        short = model(text[1:, :4], table[1:]).prediction
        torch.testing.assert_close(model(text, table, mask=mask).prediction[1:], short)


def test_another_table_weighs_the_same_words_otherwise() -> None:
    text, table, _ = given()
    same = text[:1].expand(2, -1, -1)
    model = built()
    weights = model.weights(same, table)
    assert (weights[0] - weights[1]).abs().max() > 1e-3
    attention = model.by_table[0].attention
    nn.init.zeros_(attention.q_proj.weight)
    weights = model.weights(same, table)
    torch.testing.assert_close(weights[0], weights[1])


def test_without_keys_the_values_are_averaged() -> None:
    text, table, mask = given()
    model = built()
    attention = model.by_table[0].attention
    nn.init.zeros_(attention.k_proj.weight)
    x = model.table(table)
    expected = attention.out_proj(masked_mean(attention.v_proj(text), mask))
    torch.testing.assert_close(attention(x, text, mask=mask)[:, 0], expected)


def test_words_that_ask_a_single_token_all_read_the_same_and_are_refused() -> None:
    text, table, _ = given()
    with pytest.raises(ValueError, match="at least two tokens of the table: with one, every weight is 1"):
        built(query="text")
    model = built(query="text", force=True)
    attention = model.by_text[0].attention
    z = attention(text, model.table(table))
    torch.testing.assert_close(z, z[:, :1].expand_as(z))
    with pytest.raises(ValueError, match="where the table asks"):
        model.weights(text, table)
    assert built(query="both", tokens="chunks")(text, table).features.shape == (2, 16)


def test_a_text_without_a_word_leaves_the_background() -> None:
    text, table, mask = given()
    mask[1] = False
    model = built()
    assert not model.weights(text, table, mask=mask)[1].any()
    first, other = (model(x, table, mask=mask).prediction for x in (text, text + 3))
    torch.testing.assert_close(first[1], other[1])
    assert first.isfinite().all()
    block, x = model.by_table[0], model.table(table)
    alone = block.norm(x)
    torch.testing.assert_close(block(x, text, mask)[1], block.mlp_norm(alone + block.mlp(alone))[1])


def test_missing_variables_count_as_the_mean_and_are_told() -> None:
    _, table, _ = given()
    gone = table.clone()
    gone[0, 2] = torch.nan
    tokens = TableTokens(5, 8, "per_variable")
    with torch.no_grad():
        tokens.bias[3], tokens.weight[3], tokens.missing[2] = 0.0, 0.0, 7.0
    out = tokens(gone)
    assert out.shape == (2, 5, 8) and not out[:, 3].any() and (out[0, 2] == 7).all()
    for form in ("single", "chunks"):
        mlp = TableTokens(5, 8, form, drop=0.0)
        zero = torch.where(gone.isnan(), 0.0, gone)
        assert mlp(gone).isfinite().all() and not torch.equal(mlp(gone)[0], mlp(zero)[0])
        assert torch.equal(mlp(gone)[1], mlp(table)[1])


@pytest.mark.parametrize(
    ("text", "table"),
    [("pooled", None), ("mean", None), (None, "linear"), (None, "mlp"), ("pooled", "mlp"), ("mean", "mlp")],
)
def test_the_six_references(text: str | None, table: str | None) -> None:
    words, variables, mask = given()
    model = Reference(8, 5, text=text, table=table, hidden=6)
    said = model(words if text else None, variables if table else None, mask=mask if text else None)
    assert said.prediction.shape == (2, 1)
    said.prediction.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    if text == "mean":
        torch.testing.assert_close(said.features[1, :8], words[1, :4].mean(0))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.drop = nn.Embedding(9, 8), nn.Dropout(0.5)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.drop(self.words(input_ids)))


def test_around_an_encoder() -> None:
    _, table, mask = given()
    ids = torch.arange(14).view(2, 7) % 9
    tuned, frozen = (ConsumerModel(Encoder(), built(), freeze=freeze).train() for freeze in (False, True))
    assert tuned.encoder.training and not frozen.encoder.training and frozen.fusion.training
    for model in (tuned, frozen):
        preference_loss(model(ids, table, mask.long()), torch.tensor([1.0, 4.0])).backward()
    assert tuned.encoder.words.weight.grad is not None and frozen.encoder.words.weight.grad is None
    assert [group["lr"] for group in parameter_groups(tuned)] == [2e-5, 1e-4]
    assert [group["lr"] for group in parameter_groups(frozen)] == [1e-4]
    with pytest.raises(ValueError, match="encoder must give last_hidden_state"):
        ConsumerModel(_Silent(), built())(ids, table)


class _Silent(nn.Module):
    def forward(self, **inputs: object) -> object:
        return object()


def test_an_encoder_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = ConsumerModel(transformers.BertModel(config, add_pooling_layer=False), built()).eval()
    ids, (_, table, mask) = torch.arange(14).view(2, 7), given()
    other = ids.masked_fill(~mask, 3)
    torch.testing.assert_close(
        model(ids, table, mask.long()).prediction, model(other, table, mask.long()).prediction, rtol=1e-4, atol=1e-5
    )


def test_losses_and_data() -> None:
    said = Preference(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))
    assert preference_loss(said, torch.tensor([2.0, 3.0])).item() == pytest.approx(0.5)
    stars = Preference(torch.zeros(2, 5), torch.zeros(2, 1))
    assert preference_loss(stars, torch.tensor([0, 4])).item() == pytest.approx(1.6094, abs=1e-4)
    assert leave_one_out(torch.tensor([2.0, 4.0, 1.0]), torch.tensor([1, 1, 0]))[:2].tolist() == [4.0, 2.0]
    assert cleaned("So\ngood \U0001f600 :) ... “yes” — no!!") == 'So good . "yes" - no!'


def test_bad_arguments() -> None:
    text, table, mask = given()
    model = built()
    for bad, message in (
        (lambda: model(text[..., :7], table), r"text must be \(batch, at least one word, 8\)"),
        (lambda: model(text[:, :0], table), "at least one word"),
        (lambda: model(text, table[:, :4]), r"table must be \(batch, 5\), got \(2, 4\)"),
        (lambda: model(text, table[:1]), "as many rows, got 2 and 1"),
        (lambda: model(text, table, mask=mask.float()), r"mask must be bool \(2, 7\)"),
        (lambda: built(query="table"), "query must be one of tabular"),
        (lambda: built(tokens="many"), "tokens must be one of single"),
        (lambda: built(num_heads=3), "num_heads must divide dim"),
        (lambda: built(depth=0), "depth, outputs and head_hidden must be positive"),
        (lambda: TableTokens(0, 8), "must be positive"),
        (lambda: Reference(8, 5, text=None, table=None), "not both None"),
        (lambda: Reference(8, 5, text="max"), "text must be pooled"),
        (lambda: Reference(8, 5)(None, table), "reads the text, got None"),
        (lambda: Reference(8, 5)(text, None), "reads the table, got None"),
        (lambda: preference_loss(model(text, table), torch.zeros(3)), r"ratings must be \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
