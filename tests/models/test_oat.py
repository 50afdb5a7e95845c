"""OAT: objects in any order and number, places by distance, causality, generation, behaviour, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from saccade.models.images import to_picture
from saccade.models.oat import (
    OAT,
    Appearance,
    ObjectAttention,
    Places,
    behaviour,
    behaviour_difference,
    distance_table,
    learnt_table,
    next_object_loss,
    sinusoid_table,
)
from saccade.models.oat.authors import PORTS

SMALL = {"grid": (2, 3), "dim": 24, "num_heads": 4, "hidden": 32, "depth": 1, "key_dim": 24, "levels": 2}


def small(**changes: object) -> OAT:
    torch.manual_seed(0)
    return OAT(**{**SMALL, **changes}).eval()  # type: ignore[arg-type]


def scene(number: int = 6, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.rand(batch, number, 3, 20, 24), torch.arange(batch) + 1, torch.randint(number, (batch, 4))


def test_permuted_objects_permute_the_logits() -> None:
    model, (objects, targets, fixations) = small(), scene()
    said = model(objects, targets, fixations).logits
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    place = order.argsort()
    turned = model(objects[:, order], place[targets], place[fixations], cells=order).logits
    torch.testing.assert_close(turned[..., :6], said[..., order], atol=1e-5, rtol=0)
    torch.testing.assert_close(turned[..., 6:], said[..., 6:], atol=1e-5, rtol=0)


def test_the_logit_of_nothing_is_the_readouts_bias() -> None:
    model, given = small(), scene()
    torch.nn.init.constant_(model.point.readout.bias, 0.7)
    said = model(*given).logits
    assert said.shape == (2, 5, 8)
    torch.testing.assert_close(said[..., -1], torch.full((2, 5), 0.7))
    single = small(pointers=1)
    assert single.point.readout is None and not single(*given).logits[..., -1].any()
    point, steps, memory = ObjectAttention(8, 2, 16), torch.randn(1, 2, 8), torch.randn(1, 3, 8)
    maps = [point.of_step[h](steps)[0, 1] @ point.of_object[h](memory)[0, 2] / 4 for h in range(2)]
    torch.testing.assert_close(point(steps, memory)[0, 1, 2], point.readout(torch.stack(maps))[0])


def test_later_fixations_change_nothing_before() -> None:
    model, (objects, targets, fixations) = small(), scene()
    other = fixations.clone()
    other[:, 2:] = (other[:, 2:] + 1) % 6
    said, changed = (model(objects, targets, each).logits for each in (fixations, other))
    torch.testing.assert_close(changed[:, :3], said[:, :3], atol=1e-6, rtol=0)
    assert (changed[:, 3:] - said[:, 3:]).abs().max() > 1e-4
    nothing = torch.cat([fixations, torch.full((2, 2), 7)], 1)  # fills up
    torch.testing.assert_close(model(objects, targets, nothing).logits[:, :5], said, atol=1e-6, rtol=0)


def test_any_number_of_objects() -> None:
    model = small(grid=(3, 4))
    for number in (2, 7, 12):
        objects, targets, fixations = scene(number, batch=1)
        assert model(objects, targets % number, fixations).logits.shape == (1, 5, number + 2)


def test_likeness_of_places_falls_with_their_distance_alone() -> None:
    for rows, width in ((11, 86), (14, 86), (4, 4)):
        table = distance_table(rows, width)
        place = torch.arange(rows).float()
        expected = (-(place[:, None] - place).square() / 8).exp()
        unit = F.normalize(table, dim=1)
        torch.testing.assert_close(unit @ unit.T, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(table.norm(dim=1), torch.full((rows,), width**0.5))
    few = F.normalize(distance_table(12, 6), dim=1)  # of less rank than there are places
    place = torch.arange(12).float()
    assert (few @ few.T - (-(place[:, None] - place).square() / 8).exp()).abs().max() < 0.15
    learnt = learnt_table(6, 12, steps=600, generator=torch.Generator().manual_seed(0))
    unit = F.normalize(learnt, dim=1)
    place = torch.arange(6).float()
    assert (unit @ unit.T - (-(place[:, None] - place).square() / 8).exp()).abs().max() < 0.02
    waves = F.normalize(sinusoid_table(14, 86), dim=1)
    assert (waves @ waves.T)[0].diff().max() > 0  # these do not fall


def test_a_token_is_what_an_object_looks_like_and_where_it_is() -> None:
    places = Places(10, 5)
    coordinates = torch.tensor([[[1, 4, 0], [8, 0, 1]]])
    found, table = places(coordinates), places.table
    assert found.shape == (1, 2, 10) and table.shape == (5, 4)
    torch.testing.assert_close(found[0, 0], torch.cat([table[1], table[4], table[0]])[:10])
    assert not found[0, 1, :4].any()  # beyond the table
    places.take(torch.eye(5))
    assert torch.equal(places.double().float()(coordinates)[0, 0, :5], torch.eye(5)[1])
    with pytest.raises(ValueError, match="table must be"):
        places.take(torch.rand(5, 2))
    pictures = torch.rand(1, 2, 3, 50, 70)
    assert Appearance(6, 3)(pictures).shape == (1, 2, 6) and Appearance(6, 3).fc.in_features == 672
    assert Appearance(6, 4).fc.in_features == 2720
    with pytest.raises(ValueError, match=r"leave 192 numbers.*flat=192"):
        Appearance(6)(pictures)
    assert Appearance(6, flat=192)(pictures).shape == (1, 2, 6)
    assert Appearance(6)(torch.rand(1, 1, 3, 91, 151)).shape == (1, 1, 6)  # 5 x 9 x 32 = 1440
    assert Appearance(6, 2)(torch.rand(1, 1, 3, 5, 9)).isfinite().all()


def test_generation_equals_the_parallel_form() -> None:
    model, (objects, targets, _) = small(), scene()
    gone = model.generate(objects, targets, most=5)
    steps = gone.places.shape[1]
    again = model(objects, targets, gone.places[:, :-1]).logits
    for row, length in enumerate(gone.lengths.tolist()):
        until = min(length + 1, steps)
        torch.testing.assert_close(gone.logits[row, :until], again[row, :until], atol=1e-5, rtol=1e-5)
    first = gone.logits[:, 0, :6].argmax(1)
    assert torch.equal(gone.places[:, 0], first)
    assert gone.points[0, 0].tolist() == pytest.approx([(int(first[0]) % 3 + 0.5) / 3, (int(first[0]) // 3 + 0.5) / 2])
    drawn = [model.generate(objects, targets, sample=True, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    assert drawn[0].places.shape != drawn[1].places.shape or not torch.equal(drawn[0].places, drawn[1].places)
    torch.nn.init.constant_(model.point.readout.bias, 0.0)
    model.point.readout.weight.data.zero_()  # all alike: the first object, then it again, never the stop
    assert model.generate(objects, targets).places.tolist() == [[0] * 12] * 2


def test_who_stops_has_stopped() -> None:
    model, (objects, targets, _) = small(), scene()
    original = model.decode

    def stopping(*args: object, **named: object) -> torch.Tensor:
        logits = original(*args, **named)  # type: ignore[arg-type]
        logits[..., 6] = 100.0
        return logits

    model.decode = stopping  # type: ignore[method-assign]
    gone = model.generate(objects, targets)
    assert gone.lengths.tolist() == [1, 1] and (gone.places[:, 1] == 6).all() and gone.places.shape == (2, 2)


def test_released_names_that_do_nothing_are_dropped() -> None:
    tensors = load_file(Path(__file__).parents[1] / "golden" / "oat" / "oat.a.safetensors")
    state = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("param.")}
    state["positional_encoding.pos_embedding"] = torch.zeros(3)
    state["position.pos_table"] = torch.zeros(3)
    small().load_state_dict(PORTS[0].convert(state))
    with pytest.raises(ValueError, match="CAVersion"):
        PORTS[0].build({"rows": 2, "cols": 3, "CAVersion": 0})


def test_behaviour_and_loss() -> None:
    assert behaviour([0, 1, 1, 0, 2], target=5) == {
        "success": 0.0, "length": 5.0, "search": 0.6, "refixation": 0.2, "revisit": 0.2
    }  # fmt: skip
    same = [([0, 1, 1, 0, 2], 2), ([3, 3], 3)]
    assert behaviour_difference(same, same) == 0
    # success 1/2 and not 1, length 2 and not 1, search (1 + 2/3) / 2 and not 1; people never looked again
    people, model = [([1], 1), ([2], 2)], [([1], 1), ([3, 3, 0], 1)]
    assert behaviour_difference(model, people) == pytest.approx((0.5 + 1.0 + (1 - (1 + 2 / 3) / 2)) / 3)
    network, (objects, targets, _) = small(), scene()
    path = torch.tensor([[2, 1, 6], [2, 6, 7]])
    said = network(objects, targets, path[:, :-1])
    logs = said.logits.log_softmax(2)
    expected = -(logs[0, 0, 2] + logs[0, 1, 1] + logs[0, 2, 6] + logs[1, 0, 2] + logs[1, 1, 6]) / 5
    torch.testing.assert_close(next_object_loss(said, path), expected)
    for call in (
        lambda: behaviour([], 1),
        lambda: behaviour_difference([], people),
        lambda: next_object_loss(said, path[:, 1:]),
    ):
        with pytest.raises(ValueError, match=r"must (be|have)"):
            call()


def test_a_picture_of_a_shelf_in_its_search_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    to_picture(torch.rand(3, 45, 64)).save(tmp_path / "shelf.png")
    model = small().train()
    output = model.predict(tmp_path / "shelf.png", targets=[4])
    assert model.training and output.images[0].shape == (3, 45, 64)
    (said,) = model.answer(output)
    assert int(said["fixations"]) == int(output.lengths[0]) >= 1
    assert model.picture(output).size == (64, 45)
    for targets in (None, [1, 2]):
        with pytest.raises(ValueError, match="targets must say"):
            model.predict(tmp_path / "shelf.png", targets=targets)
    with pytest.raises(ValueError, match="from 0 to 5"):
        model.predict(tmp_path / "shelf.png", targets=[6])


def test_refusals() -> None:
    for arguments, message in (
        ({"grid": (0, 3)}, "grid"),
        ({"dim": 21, "num_heads": 3}, "dim even"),
        ({"num_heads": 5}, "heads"),
        ({"positions": "x"}, "positions"),
        ({"sigma": 0.0}, "sigma"),
        ({"levels": -1}, "levels"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**arguments)
    model, (objects, targets, fixations) = small(), scene()
    for given, message in (
        ((objects[0], targets, fixations), "objects must be"),
        ((objects, targets[:1], fixations), "targets must be"),
        ((objects, targets + 5, fixations), "targets must be from 0 to 5"),
        ((objects, targets, fixations[:1]), "fixations must be"),
        ((objects, targets, fixations + 7), "fixations must be from 0 to 7"),
        ((torch.rand(2, 7, 3, 20, 24), targets, fixations), "6 at most"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*given)
    with pytest.raises(ValueError, match="cells must be"):
        model(objects, targets, fixations, cells=torch.arange(5))
