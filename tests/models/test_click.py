"""Tables of fields and interaction networks, against their equations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from saccade.models.click import (
    INTERACTIONS,
    ClickOutput,
    CrossNetwork,
    FieldTable,
    FirstOrder,
    Interaction,
    click_loss,
    deep,
    fm,
    inner_products,
    pairs_of,
)

FIELDS = (5, 1, 7)


def embeddings() -> torch.Tensor:
    return torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0))


def test_fm_is_the_sum_of_all_inner_products() -> None:
    e = embeddings()
    every = torch.stack([(e[:, i] * e[:, j]).sum(1) for i, j in pairs_of(3)], 1)
    torch.testing.assert_close(inner_products(e), every)
    torch.testing.assert_close(fm(e), every.sum(1))


def test_a_table_has_a_field_behind_the_other_and_nothing_where_there_is_no_value() -> None:
    table = FieldTable(FIELDS, 6)
    assert table.weight.shape == (13, 6)
    ids = torch.tensor([[4, 0, -1], [0, -1, 6]])
    out = table(ids)
    assert torch.equal(out[0, 0], table.weight[4]) and torch.equal(out[0, 1], table.weight[5])
    assert torch.equal(out[1, 2], table.weight[12]) and not out[0, 2].any() and not out[1, 1].any()
    out[:, 1:].sum().backward()
    assert not table.weight.grad[:5].any()  # what is missing trains nothing


def test_several_values_of_a_field_are_their_mean() -> None:
    table = FieldTable(FIELDS, 6)
    several = torch.tensor([[[1, 3, -1], [0, -1, -1], [-1, -1, -1]]])
    out = table(several)
    torch.testing.assert_close(out[0, 0], (table.weight[1] + table.weight[3]) / 2)
    assert torch.equal(out[0, 1], table.weight[5]) and not out[0, 2].any()


def test_the_first_order_term() -> None:
    first = FirstOrder(FIELDS)
    ids, scale = torch.tensor([[2, 0, 3]]), torch.tensor([[1.0, 0.0, 2.0]])
    weight = first.table.weight[:, 0]
    torch.testing.assert_close(first(ids)[0], weight[2] + weight[5] + weight[9] + first.bias[0])
    torch.testing.assert_close(first(ids, scale)[0], weight[2] + 2 * weight[9] + first.bias[0])


def test_a_cross_network_by_hand() -> None:
    net, x = CrossNetwork(3, 2), torch.randn(2, 3)
    torch.nn.init.normal_(net.bias)
    expected = x
    for weight, bias in zip(net.weight, net.bias):
        expected = torch.stack([x[b] * (weight @ expected[b]) + bias + expected[b] for b in range(2)])
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("form", INTERACTIONS)
def test_every_interaction_gives_a_logit_and_trains(form: str) -> None:
    extra = 0 if form == "fm" else 2
    net = Interaction(3, 6, form, hidden=(5, 4), extra=extra, norm="batch")
    e = embeddings().requires_grad_()
    out = net(e, torch.randn(4, extra) if extra else None)
    assert out.shape == (4,)
    out.sum().backward()
    assert e.grad is not None and all(p.grad is not None for p in net.parameters())


def test_deepfm_is_fm_and_fnn() -> None:
    both, e = Interaction(3, 6, "deepfm", hidden=(5,)), embeddings()
    alone = Interaction(3, 6, "fnn", hidden=(5,))
    alone.load_state_dict(both.state_dict())
    torch.testing.assert_close(both(e), fm(e) + alone(e))


def test_the_loss() -> None:
    logits, labels = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0])
    plain = F.binary_cross_entropy(logits.sigmoid(), labels)
    torch.testing.assert_close(click_loss(ClickOutput(logits), labels), plain)
    torch.testing.assert_close(click_loss(ClickOutput(logits, penalty=torch.tensor(0.5)), labels), plain + 0.5)
    assert ClickOutput(logits.bfloat16()).probability.dtype == torch.float32


def test_bad_arguments() -> None:
    table = FieldTable(FIELDS, 2)
    for bad, message in (
        (lambda: FieldTable((), 2), "at least one field"),
        (lambda: FieldTable((3, 0), 2), "at least one field, got"),
        (lambda: FieldTable((3,), 0), "dim must be positive"),
        (lambda: table(torch.zeros(2, 2, dtype=torch.long)), r"ids must be int64 \(batch, 3\)"),
        (lambda: table(torch.zeros(2, 3)), "ids must be int64"),
        (lambda: Interaction(3, 2, "gbdt"), "interaction must be one of fm"),
        (lambda: Interaction(3, 2, "fm", extra=2), "embeddings of one width only"),
        (lambda: deep(3, (4, 0)), "widths must be positive"),
        (lambda: click_loss(ClickOutput(torch.zeros(2)), torch.zeros(3)), r"labels must be \(2,\), got \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
