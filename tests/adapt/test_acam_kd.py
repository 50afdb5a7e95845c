"""ACAM-KD: its masks, its terms and its diversity at their limits, padding, other models, bad arguments."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saccade.adapt.acam_kd import ACAMKD, LevelDistillation, masked_error, overlap
from saccade.layers.watching import watched


def _level(channels: int = 6, **changes: object) -> LevelDistillation:
    torch.manual_seed(0)
    level = LevelDistillation(channels, **changes)
    for units in (level.channel_units, level.spatial_units):
        nn.init.normal_(units)
    return level


def _maps(channels: int = 6, size: tuple[int, int] = (5, 4)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    teacher, student = (torch.randn(2, channels, *size, generator=generator) for _ in range(2))
    return teacher, student


def test_terms_are_the_definition() -> None:
    level, (teacher, student) = _level(units=3), _maps()
    aligned = level.align(student)
    q, k, v = (f.flatten(2) for f in (level.q_proj(teacher), level.k_proj(aligned), level.v_proj(aligned)))
    attention = (q.mT @ k / 3**0.5).softmax(-1)  # rows: the teacher's positions
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 20))
    fused = v @ attention.mT
    channel = (level.channel_units[None] * fused.mean(2)[:, None]).sigmoid()
    spatial = torch.einsum("uk,bkp->bup", level.spatial_units, fused).sigmoid()
    difference = (teacher - aligned).flatten(2)
    expected = {"channel": 0.0, "spatial": 0.0}
    for b in range(2):
        for u in range(3):
            expected["channel"] += (channel[b, u, :, None] * difference[b]).square().sum() / (20 * channel[b, u].sum())
            expected["spatial"] += (spatial[b, u] * difference[b]).square().sum() / (6 * spatial[b, u].sum())
    terms = level(teacher, student)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value / 6)
    torch.testing.assert_close(terms["diversity"], overlap(channel) + overlap(spatial))
    loss, summed = ACAMKD([6], units=3, alpha=2.0, weight=0.5)([teacher], [student])
    torch.testing.assert_close(loss, 2 * (summed["channel"] + summed["spatial"]) + 0.5 * summed["diversity"])


def test_equal_features_cost_nothing() -> None:
    level, (teacher, _) = _level(align=False), _maps()
    student = teacher.clone().requires_grad_()
    terms = level(teacher, student)
    assert terms["channel"] == 0 and terms["spatial"] == 0
    (terms["channel"] + terms["spatial"]).backward()
    assert not student.grad.any()


def test_zero_units_give_half_the_mean_square() -> None:
    level, (teacher, student) = _level(align=False), _maps()
    for units in (level.channel_units, level.spatial_units):
        nn.init.zeros_(units)
    terms, error = level(teacher, student), (teacher - student).square().mean()
    torch.testing.assert_close(terms["channel"], error / 2)
    torch.testing.assert_close(terms["spatial"], error / 2)
    level.normalise = False
    torch.testing.assert_close(level(teacher, student)["spatial"], error / 4)


def test_diversity() -> None:
    same = torch.tensor([1.0, 0, 1, 1, 0]).expand(2, 4, 5)
    assert overlap(same) == 3 and overlap(same, "pairwise").item() == pytest.approx(1)
    apart = torch.eye(5)[None, :4]
    assert overlap(apart) == 0 and overlap(apart, "pairwise") == 0
    assert overlap(same[:, :1]) == 0 and overlap(same[:, :1], "pairwise") == 0
    masks = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0))
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    ratio, pairwise = torch.zeros(2), torch.zeros(2)
    for b in range(2):
        m = masks[b]
        ratio[b] = 2 * sum(m[i] @ m[j] for i, j in pairs) / (2 * m.square().sum())
        pairwise[b] = sum(2 * m[i] @ m[j] / (m[i] @ m[i] + m[j] @ m[j]) for i, j in pairs) / 6
    torch.testing.assert_close(overlap(masks), ratio.mean())
    torch.testing.assert_close(overlap(masks, "pairwise"), pairwise.mean())


@pytest.mark.parametrize("query", ["teacher", "student"])
def test_masks_follow_the_student(query: str) -> None:
    level, (teacher, student) = _level(query=query), _maps()
    before = level.masks(level.fuse(teacher, level.align(student)))
    after = level.masks(level.fuse(teacher, level.align(student + 1.0 * torch.randn(student.shape))))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(before, after))


@pytest.mark.parametrize("changes", [{}, {"query": "student"}, {"channel_units": "vector", "diversity": "pairwise"}])
def test_positions_that_move_together_change_nothing(changes: dict[str, str]) -> None:
    level, maps = _level(**changes), _maps()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    moved = [x.flatten(2)[:, :, order].view_as(x) for x in maps]
    for got, expected in zip(level(*moved).values(), level(*maps).values()):
        torch.testing.assert_close(got, expected)
    fused, spatial = level.fuse(maps[0], level.align(maps[1])), level.fuse(moved[0], level.align(moved[1]))
    torch.testing.assert_close(level.masks(spatial)[1], level.masks(fused)[1][:, :, order])


def test_padding_counts_nowhere() -> None:
    level, (teacher, student) = _level(), _maps()
    mask = torch.zeros(2, 7, 6, dtype=torch.bool)
    mask[:, :5, :4] = True
    wide = [9 * torch.randn(2, 6, 7, 6) for _ in range(2)]
    for x, real in zip(wide, (teacher, student)):
        x[:, :, :5, :4] = real
    for got, expected in zip(level(*wide, mask).values(), level(teacher, student).values()):
        torch.testing.assert_close(got, expected)
    assert all(term.isfinite() for term in level(*wide, torch.zeros_like(mask)).values())


def test_pooled_keys() -> None:
    level, pooled = _level(), _level(keys=2)
    pooled.load_state_dict(level.state_dict())
    teacher, student = _maps()
    assert not torch.allclose(pooled.fuse(teacher, student), level.fuse(teacher, student))
    # a map that is constant over the cells that are pooled reads the same
    teacher, coarse = torch.randn(2, 6, 4, 4), torch.randn(2, 6, 2, 2)
    student = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    for got, expected in zip(pooled(teacher, student).values(), level(teacher, student).values()):
        torch.testing.assert_close(got, expected)


def test_gradients_reach_the_student_and_the_units_and_not_the_teacher() -> None:
    objective, maps = ACAMKD([6, 6]), [[x.requires_grad_() for x in _maps()] for _ in range(2)]
    teacher, student = zip(*maps)
    for name in ("channel", "spatial", "diversity"):
        objective.zero_grad()
        objective(teacher, student).terms[name].backward()
        units = "channel_units" if name == "channel" else "spatial_units"
        assert all(getattr(level, units).grad.any() for level in objective.levels)
    assert all(x.grad is None for x in teacher) and all(x.grad.any() for x in student)


def test_levels_are_summed() -> None:
    objective, maps = ACAMKD([6, 6]), _maps()
    objective.levels[1].load_state_dict(objective.levels[0].state_dict())
    one = objective.levels[0](*maps)
    for name, term in objective(*([x, x] for x in maps)).terms.items():
        torch.testing.assert_close(term, 2 * one[name])


def test_large_maps_need_no_matrix_of_all_positions() -> None:
    level = _level(4, align=False)
    teacher, student = torch.randn(1, 4, 96, 96), torch.randn(1, 4, 96, 96)
    assert all(term.isfinite() for term in level(teacher, student).values())
    largest = max(t.numel() for t in _saved(level, teacher, student))
    assert largest <= 96 * 96 * 8  # all pairs were 85 million


def _saved(level, teacher, student):
    seen: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        level(teacher, student.requires_grad_())
    return seen


def test_transformers_models_are_watched_and_left_as_they_were() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    teacher = transformers.SwinModel(
        transformers.SwinConfig(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)
    ).eval()
    student = transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic")
    )
    image, inside = torch.randn(2, 3, 32, 32), ("encoder.layers.0.blocks.0", "encoder.stages.0")
    hooks = [sum(len(m._forward_hooks) for m in model.modules()) for model in (teacher, student)]
    with torch.no_grad(), watched(teacher, inside[0]) as shown:
        teacher(image)
    with watched(student, inside[1]) as said:
        student(image)
    (theirs,), (ours,) = shown.values(), said.values()
    assert theirs.shape == (2, 8, 8, 8) and ours.shape == (2, 4, 8, 8)
    ACAMKD([8], [4])([theirs], [ours]).loss.backward()
    assert student.embedder.embedder.convolution.weight.grad.any()
    assert hooks == [sum(len(m._forward_hooks) for m in model.modules()) for model in (teacher, student)]
    with pytest.raises(ValueError, match="no module 'layer'"), watched(teacher, "layer"):
        pass
    with pytest.raises(ValueError, match="encoder must give a map"), watched(teacher, "encoder"):
        teacher(image)


def test_masked_error_counts_channels_or_positions() -> None:
    masks = torch.tensor([[[1.0, 0.0, 1.0]]])
    assert masked_error(torch.tensor([[3.0, 5.0, 9.0]]), masks, 2) == 12 / (2 * 2)
    assert masked_error(torch.tensor([[3.0, 5.0, 9.0]]), masks, 2, normalise=False) == 12 / (3 * 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": ()}, "one for each level"),
        ({"channels": (4, 4), "student_channels": (4,)}, "one for each level"),
        ({"channels": (1,)}, "channels must be at least 2"),
        ({"channels": (4,), "units": 0}, "units and keys positive"),
        ({"channels": (4,), "keys": 0}, "units and keys positive"),
        ({"channels": (4,), "student_channels": (3,), "align": False}, "without align both must have as many channels"),
        ({"channels": (4,), "query": "both"}, "query must be one of teacher, student, got 'both'"),
        ({"channels": (4,), "diversity": "dice"}, "diversity must be one of ratio, pairwise"),
        ({"channels": (4,), "channel_units": "matrix"}, "channel_units must be one of scalar, vector"),
    ],
)
def test_refusals(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        ACAMKD(**arguments)


def test_bad_calls() -> None:
    objective, x = ACAMKD([4]), torch.zeros(1, 4, 3, 3)
    for call, message in (
        (([x, x], [x]), "one for each of 1 levels, got 2, 1 and 1 masks"),
        (([x], [x[:, :3]]), r"x must be \(batch, 4, height, width\)"),
        (([x], [x[:, :, :2]]), "both maps must have one batch, height and width"),
        (([x], [x], [torch.ones(1, 3, 3)]), r"a mask must be bool \(1, 3, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            objective(*call)
