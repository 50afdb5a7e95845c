"""The front-end of click models: the invariants of gates, tables, generated pairs and numbers, and the searches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from saccade.models.click import FieldTable, click_loss, pairs_of
from saccade.models.ctr_representation_survey import (
    AutoDimTable,
    AutoDis,
    BlockGatedTable,
    Buckets,
    ClickModel,
    CodebookTable,
    HashTable,
    Kept,
    MixedTable,
    OptEmbedTable,
    OptFeature,
    OptFSTable,
    OptInter,
    PEPTable,
    QuotientRemainderTable,
    Rewind,
    RoundedTable,
    Table,
    autofield_gates,
    cross_rows,
    cross_sizes,
    evolve,
    frequent,
    lpfs_gates,
    lpfs_plus_gates,
    mutual_information,
    optfs_temperature,
    permutation_importance,
    prune,
    saliency,
    shrunk,
    three_steps,
)
from saccade.models.ctr_representation_survey.generation import straight_step
from saccade.models.ctr_representation_survey.network import NUMBERS, TABLES
from saccade.models.ctr_representation_survey.selection import SELECTIONS

FIELDS = (5, 3, 40)
SIZES = {"dim": 8, "hidden": (6, 5)}


def rows(count: int = 9, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randint(size, (count,), generator=generator) for size in FIELDS], 1)
    return ids, torch.randn(count, 2, generator=generator)


def built(**options: object) -> ClickModel:
    torch.manual_seed(0)
    return ClickModel(FIELDS, 2, **{**SIZES, **options}).eval()


def same_weights(**options: object) -> ClickModel:
    model, plain = built(**options), built()
    model.load_state_dict(plain.state_dict(), strict=False)
    return model


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("selection", [None, "autofield"])
def test_every_table_gives_vectors_and_trains(table: str, selection: str | None) -> None:
    model = built(table=table, selection=selection or "none").train()
    ids, numbers = rows()
    ids[0, 1] = -1
    said = model(ids, numbers)
    assert said.logits.shape == (9,) and said.embeddings.shape == (9, 5, 8) and not said.embeddings[0, 3].any()
    click_loss(said, torch.arange(9) % 2).backward()
    assert all(p.grad is not None for p in model.parameters()) and model.eval().stored() > 0
    several = torch.stack([ids, torch.full_like(ids, -1)], 2)
    torch.testing.assert_close(model(several, numbers).logits, model(ids, numbers).logits)


@pytest.mark.parametrize("numbers", ["scaled", *NUMBERS])
@pytest.mark.parametrize("generation", ["none", "optinter", "optfeature", "autofis"])
def test_every_form_of_numbers_and_pairs(numbers: str, generation: str) -> None:
    model = built(numbers=numbers, generation=generation, interaction="fnn").train()
    click_loss(model(*rows()), torch.arange(9) % 2).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_gates_of_one_full_widths_and_no_hash_are_the_baseline() -> None:
    ids, numbers = rows()
    expected = built()(ids, numbers).logits
    for options in (
        {"selection": "kept"},
        {"table": "optembed", "table_options": {"candidate": (7,) * 5}},
        {"table": "dnis"},
    ):
        torch.testing.assert_close(same_weights(**options)(ids, numbers).logits, expected, rtol=0, atol=0)
    torch.testing.assert_close(same_weights(table="optfs")(ids, numbers).logits, expected)
    hashed = built(table="hash", table_options={"compression": 1})
    state = built().state_dict()
    state["table.table.weight"] = state.pop("table.weight")
    hashed.load_state_dict(state)
    assert torch.equal(hashed(ids, numbers).logits, expected)


def test_a_gate_of_zero_removes_the_vector_and_with_the_first_order_term_the_field() -> None:
    ids, numbers = rows()
    other = ids.clone()
    other[:, 2] = (other[:, 2] + 7) % 40
    for gated, alike in ((True, True), (False, False)):
        model = same_weights(selection="kept", selection_options={"keep": (0, 1, 2, 3)}, gate_first_order=gated)
        torch.nn.init.normal_(model.first.table.weight)
        assert not model(ids, numbers).embeddings[:, 4].any()
        assert torch.equal(model(ids, numbers).logits, model(other, numbers).logits) == alike
    assert model.stored() == 2 * 8 + 8 * 8  # two numbers, and fields of 5 and 3 values


def test_gates_of_fields() -> None:
    a = torch.tensor([-2.0, -0.1, 0.0, 0.1, 3.0, 1e4])
    assert autofield_gates(torch.zeros(4)).tolist() == [0.25] * 4
    sharp = autofield_gates(torch.tensor([0.1, 0.2, 0.0]), 1e-3)
    torch.testing.assert_close(sharp, torch.tensor([0.0, 1.0, 0.0]))
    assert lpfs_gates(a)[2] == 0 and lpfs_gates(a)[5] == pytest.approx(1)
    torch.testing.assert_close(lpfs_plus_gates(-a), -lpfs_plus_gates(a))
    assert shrunk(a, 0.1).tolist() == pytest.approx([-1.9, 0, 0, 0, 2.9, 9999.9]) and (shrunk(a, 0.1)[1:4] == 0).all()
    model = built(selection="lpfs")
    with torch.no_grad():
        model.selection.a[:] = torch.tensor([1.0, 0.004, 0.5, -0.3, 1e-3])
    model.selection.shrink(0.05)
    assert model.selection.kept().tolist() == [True, False, True, False, False]
    assert SELECTIONS["lpfs++"](3, 8).plus
    with pytest.raises(ValueError, match="chooses fields anew"):
        built(selection="adafs").selection.kept()


def test_optfs_starts_as_the_baseline_and_ends_as_its_ticket() -> None:
    table = OptFSTable(FIELDS, 4)
    torch.testing.assert_close(table.gates(), torch.ones(48, 1))
    torch.nn.init.normal_(table.mask_logits)
    table.temperature = 1e6
    soft = table.gates()
    table.ticket = True
    torch.testing.assert_close(soft, table.gates())
    assert table.penalty() is None and 0 < table.stored() < 48 * 4
    assert [optfs_temperature(e, 3, 400) for e in range(3)] == [1.0, 20.0, 400.0] and optfs_temperature(0, 1, 9) == 1


def test_optembed() -> None:
    table = OptEmbedTable(FIELDS, 4).eval()
    with torch.no_grad():
        table.weight[1] = 0
    assert table.row_mask().sum() == 47  # thresholds of 0 keep what is not 0
    ids = rows()[0]
    table.choose((0, 2, 3))
    assert [int((e != 0).any(0).sum()) for e in table(ids).unbind(1)] == [1, 3, 4]
    table.choose(None)
    with torch.no_grad():
        table.threshold[2] = 1e3
    assert not table(ids)[:, 2].any()
    vector = OptEmbedTable(FIELDS, 4, oov="vector")
    with torch.no_grad():
        vector.threshold[2] = 1e3
        vector.oov[2] = 7.0
    assert (vector.eval()(ids)[:, 2] == 7).all()
    torch.manual_seed(0)
    drawn = OptEmbedTable((40,), 4).train()(torch.zeros(400, 1, dtype=torch.long))
    assert (drawn != 0).sum(-1).unique().tolist() == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="candidate must be 3 numbers from 0 to 3"):
        table.choose((4, 0, 0))


def test_pep_shrinks_and_keeps_signs() -> None:
    for grain, shape in (("global", (1, 1)), ("field", (3, 1)), ("value", (48, 1)), ("number", (48, 4))):
        table = PEPTable(FIELDS, 4, grain=grain, initial=-3.0)
        kept = table.kept()
        assert table.s.shape == shape and (kept.abs() <= table.weight.abs()).all()
        assert ((kept == 0) | (kept.sign() == table.weight.sign())).all() and 0 < table.stored() < 48 * 4


def test_widths_of_fields() -> None:
    assert MixedTable(FIELDS, 8, alpha=0.0).dims == (8, 8, 8)
    mixed = MixedTable(FIELDS, 8, alpha=0.5)
    assert mixed.dims == (6, 8, 2) and mixed(rows()[0]).shape == (9, 3, 8)
    table = AutoDimTable(FIELDS, 8)
    with torch.no_grad():
        table.logits.copy_(torch.tensor([[3.0, 0, 0], [0, 3, 0], [0, 0, 3]]))
    assert table.chosen() == (2, 4, 8)
    blocks = BlockGatedTable(FIELDS, 8, blocks=4).eval()
    with torch.no_grad():
        blocks.gate[2, 1] = -0.5
    assert (blocks(rows()[0])[:, 2] != 0).all(0).tolist() == [True] * 2 + [False] * 2 + [True] * 4
    rounded = RoundedTable(FIELDS, 8)
    assert (rounded.kept() - rounded.weight).abs().max() <= rounded.weight.abs().max() / 253
    assert rounded.stored() == 48 * 8 // 4 + 48


def test_values_are_told_apart_by_quotient_and_remainder_and_not_by_a_hash() -> None:
    ids = torch.arange(40)[:, None]
    for operation in ("add", "multiply", "concat"):
        table = QuotientRemainderTable((40,), 6, operation=operation, divisor=7)
        torch.nn.init.normal_(table.quotient.weight)
        assert len(table(ids)[:, 0].unique(dim=0)) == 40 and table.stored() < 40 * 6
    hashed = HashTable((40,), 6, compression=4)(ids)[:, 0]
    assert len(hashed.unique(dim=0)) == 10 and torch.equal(hashed[3], hashed[13])


def test_a_table_in_codes_is_near_the_table() -> None:
    torch.manual_seed(0)
    table = FieldTable(FIELDS, 8)
    near = [float((CodebookTable.of(table, codes=c)(rows()[0]) - table(rows()[0])).norm()) for c in (2, 8, 48)]
    assert near[0] > near[1] > near[2] and near[2] < 1e-5
    assert CodebookTable(FIELDS, 8, groups=4, codes=16).stored() == 16 * 8 + 48 * 4 * 4 // 32


def test_numbers() -> None:
    numbers = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    buckets = Buckets(2, 3, buckets=5)
    assert len(buckets(numbers)[:, 0].unique(dim=0)) == 5
    buckets.fit(numbers * 3 + 1)
    _, sizes = buckets(numbers * 3 + 1)[:, 1].unique(dim=0, return_counts=True)
    assert sizes.tolist() == [100] * 5
    soft = AutoDis(2, 3, buckets=6)
    torch.testing.assert_close(soft.weights(numbers).sum(-1), torch.ones(500, 2))
    assert (soft(numbers) - soft(numbers + 1e-5)).abs().max() < 1e-2
    soft.temperature = 1e-6
    assert (soft.weights(numbers).amax(-1) > 0.999).float().mean() > 0.99


def test_optinter_memorises_factorises_or_leaves_out() -> None:
    torch.manual_seed(0)
    part, ids = OptInter(FIELDS, 8, width=4), rows()[0]
    part.decide((0, 1, 2))
    out = part(torch.zeros(9, 3, 8), ids).unflatten(1, (3, 4))
    row = ids[:, 0] * 3 + ids[:, 1]
    assert torch.equal(out[:, 0], part.cross.weight[row]) and not out[:, 2].any()
    u = part.factors(ids)
    assert torch.equal(out[:, 1], u[:, 0] * u[:, 2])
    part.chosen = None
    torch.testing.assert_close(part.shares().sum(1), torch.ones(3))
    with torch.no_grad():
        part.logits[1, 1] = 2.0
    assert part.decide() == (0, 1, 0)


def test_rare_combinations_share_a_row() -> None:
    ids, pairs = torch.tensor([[1, 2, 0], [1, 2, 3], [0, 1, -1]]), pairs_of(3)
    row = cross_rows(ids, FIELDS, pairs)
    assert (row[2] == -1).tolist() == [False, True, True] and row[0, 0] == row[1, 0] == 5
    numbers, total = frequent(row, sum(cross_sizes(FIELDS, pairs)), least=2)
    assert total == 2 and numbers[5] == 1 and numbers[row[0, 1]] == 0
    part = OptInter(FIELDS, 8, width=2, crosses=total)
    given = torch.where(row < 0, -1, numbers[row.clamp(min=0)])
    assert part(torch.zeros(3, 3, 8), ids, given).shape == (3, 6)
    with pytest.raises(ValueError, match="crosses must be given exactly"):
        part(torch.zeros(3, 3, 8), ids)


def test_optfeature_gates_pairs_of_a_row() -> None:
    s = torch.tensor([-1.0, 0.5], requires_grad=True)
    straight_step(s).mul(torch.tensor([2.0, 3.0])).sum().backward()
    assert straight_step(s).tolist() == [0, 1] and s.grad.tolist() == [2, 3]
    torch.manual_seed(0)
    part, (ids, _) = OptFeature(FIELDS, 8), rows()
    e = torch.ones(9, 3, 8)
    torch.nn.init.normal_(part.values.weight)
    out = part(e, ids)
    assert torch.equal(out, 8.0 * (part.scores(ids) > 0)) and len(out.unique(dim=0)) > 1
    part.hard = True
    with torch.no_grad():
        part.alpha.fill_(-1.0)
    assert len(part.scores(ids).unique(dim=0)) == 1  # by fields alone


def test_three_steps_update_the_weights_by_their_gradient_and_gates_through_the_proxy() -> None:
    def prepared() -> ClickModel:
        return built(selection="autofield").double().train()

    ids, numbers = rows()
    batch = (ids, numbers.double(), (torch.arange(9) % 2).double())
    model, lr, step = prepared(), 0.3, 0.01
    own = [p for name, p in model.named_parameters() if "selection" not in name]
    weights, gates = torch.optim.SGD(own, step), torch.optim.SGD(model.selection.parameters(), step)
    three_steps(model, model.selection, batch, weights, gates, lr=lr)

    def after(logits: torch.Tensor) -> torch.Tensor:
        other = prepared()
        with torch.no_grad():
            other.selection.logits.copy_(logits)
        mine = [p for name, p in other.named_parameters() if "selection" not in name]
        slopes = torch.autograd.grad(click_loss(other(*batch[:-1]), batch[-1]), mine)
        with torch.no_grad():
            for p, g in zip(mine, slopes):
                p -= lr * g
            return click_loss(other(*batch[:-1]), batch[-1])

    slope = torch.tensor([(after(d) - after(-d)) / 2e-4 for d in 1e-4 * torch.eye(5).double()]).double()
    torch.testing.assert_close(model.selection.logits.detach(), -step * slope, rtol=1e-2, atol=1e-7)
    plain = prepared()
    click_loss(plain(*batch[:-1]), batch[-1]).backward()
    torch.testing.assert_close(model.table.weight, plain.table.weight - step * plain.table.weight.grad)


def test_evolution_finds_the_best_and_asks_once() -> None:
    asked = []

    def score(candidate: tuple[int, ...]) -> float:
        asked.append(candidate)
        return -sum(abs(c - wanted) for c, wanted in zip(candidate, (3, 0, 5, 1)))

    best, found = evolve(score, 4, 8, torch.Generator().manual_seed(0), rounds=25)
    assert best == (3, 0, 5, 1) and found == 0 and len(asked) == len(set(asked)) and asked[0] == (7,) * 4


def test_importance() -> None:
    pytest.importorskip("sklearn")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, (600, 3), generator=generator)
    labels = (ids[:, 1] == 2).float()
    assert mutual_information(ids, labels).argmax() == 1
    model = ClickModel((3, 3, 3), dim=4, hidden=(4,))
    optimiser = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(60):
        optimiser.zero_grad()
        click_loss(model(ids), labels).backward()
        optimiser.step()

    def score(logits: torch.Tensor, label: torch.Tensor) -> float:
        return -float(F.binary_cross_entropy_with_logits(logits, label))

    fallen = permutation_importance(model, (ids, labels), score, generator)
    assert fallen.argmax() == 1 and fallen[1] > 10 * fallen[[0, 2]].abs().max()
    kept = saliency(model, model.table.weight, [(ids, labels)], 0.25)
    assert kept.sum() == 9 and kept[3:6].sum() > 3
    assert prune(model.table.weight, 0.5).sum() == 18 and model.stored() == 18


def test_weights_go_back_and_gates_stay() -> None:
    model = built(table="optfs")
    rewind, before = Rewind(model, "mask_logits"), model.table.weight.detach().clone()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    rewind(model)
    assert torch.equal(model.table.weight, before) and (model.table.mask_logits == 1.5).all()
    chosen = built(selection="autofield")
    assert not [name for name in Rewind(chosen, chosen.selection).kept if "selection" in name]


def test_what_is_stored() -> None:
    assert built().stored() == 50 * 8 and isinstance(built().table, Table)
    assert built(numbers="buckets", number_options={"buckets": 4}).stored() == 48 * 8 + 2 * 4 * 8
    assert Kept(4, 8, keep=(1,)).kept().tolist() == [False, True, False, False]


def test_bad_arguments() -> None:
    ids, numbers = rows()
    for bad, message in (
        (lambda: built(table="tree"), "table must be one of full"),
        (lambda: built(selection="best"), "selection must be one of autofield"),
        (lambda: built(generation="x"), "generation must be one of optinter"),
        (lambda: built(numbers="log"), "numbers must be one of buckets"),
        (lambda: built(table="pep", table_options={"size": 3}), "table 'pep': .*size"),
        (lambda: built(generation="autofis", interaction="fm"), "embeddings of one width only"),
        (lambda: ClickModel(FIELDS, numbers="autodis"), "positive for numbers 'autodis'"),
        (lambda: built()(ids), r"numbers must be \(9, 2\), got none"),
        (lambda: ClickModel(FIELDS)(ids, numbers), r"takes no numbers, got \(9, 2\)"),
        (lambda: built()(ids[:, :2], numbers), r"ids must be int64 \(batch, 3\)"),
        (lambda: built(generation="optinter")(ids[..., None], numbers), "one value a field"),
        (lambda: built(table="hash", table_options={"compression": 0.5}), "compression must be at least 1"),
        (lambda: QuotientRemainderTable(FIELDS, 7, operation="concat"), "dim must be even"),
        (lambda: QuotientRemainderTable(FIELDS, 8, operation="minus"), "operation must be one of"),
        (lambda: OptInter(FIELDS, 8, pairs=[(1, 1)]), "i < j of 3 categories"),
        (lambda: OptInter(FIELDS, 8).decide((0, 3, 0)), "0, 1 or 2 for each of 3 pairs"),
        (lambda: Kept(3, 8, keep=(3,)), "keep must be numbers of 3 fields"),
        (lambda: OptEmbedTable(FIELDS, 8, threshold="row"), "threshold must be field or value"),
        (lambda: PEPTable(FIELDS, 8, grain="row"), "grain must be one of"),
        (lambda: BlockGatedTable(FIELDS, 8, blocks=3), "blocks must divide dim"),
        (lambda: AutoDimTable(FIELDS, 8, widths=()), "widths must be positive"),
        (lambda: Buckets(1, 2, buckets=1), "buckets must be at least 2"),
        (lambda: evolve(lambda c: 0.0, 2, 3, torch.Generator(), rounds=0), "rounds must be at least 1"),
        (lambda: prune(torch.ones(2, 2), 0.0), "keep must be a share"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
