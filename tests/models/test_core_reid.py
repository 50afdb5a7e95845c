"""CORE-ReID: its attention, three views, fusion, losses, teacher, pseudo labels and checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from saccade.layers.resnet import ResNetTrunk
from saccade.models.core_reid import (
    ECAB,
    CoReID,
    Fuse,
    PartHead,
    Parts,
    adapt,
    adaptation_loss,
    bmfn,
    class_loss,
    embedding_of,
    ensemble,
    follow,
    fused_views,
    identity_batch,
    pseudo_labels,
    soft_triplet_loss,
    source_loss,
    triplet_loss,
)
from saccade.models.images import to_picture

GOLDEN = Path(__file__).parent.parent / "golden" / "core-reid"
SMALL = {"num_classes": 5, "depth": 18, "width": 1, "reduction": 2, "image_size": (32, 16)}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def maps(height: int = 6) -> Tensor:
    torch.manual_seed(1)
    return torch.rand(3, 8, height, 5)


def head() -> PartHead:
    torch.manual_seed(0)
    return PartHead(8, 5, reduction=2).eval()


def test_ecab_sees_mean_and_maximum_of_channels() -> None:
    torch.manual_seed(0)
    ecab, x = ECAB(8, 2), 3 * maps()
    weight = ecab(x)
    assert weight.shape == (3, 8, 1, 1) and weight.min() > 0 and weight.max() < 1
    assert [tuple(layer.weight.shape) for layer in ecab.layers] == [(4, 8), (2, 4), (1, 2), (2, 1), (4, 2), (8, 4)]
    order = torch.randperm(30)
    torch.testing.assert_close(ecab(x.flatten(2)[..., order].view_as(x)), weight)
    flat = x[..., :1, :1].expand_as(x)
    torch.testing.assert_close(ecab(flat)[..., 0, 0], (2 * ecab.shared(flat[..., 0, 0])).sigmoid())


def test_three_views_of_a_person() -> None:
    module, x = head(), maps()
    said = module(x)
    pooled = x.mean((2, 3)) + x.amax((2, 3))
    torch.testing.assert_close(said.whole, pooled / (1 + 1e-5) ** 0.5)
    upper = x[:, :, :3]
    expected = (upper.mean((2, 3)) + upper.amax((2, 3)))[..., None, None] * module.upper.ecab(upper)
    torch.testing.assert_close(said.upper_attention, expected)
    changed = x.clone()
    changed[:, :, 3:] += 1
    assert torch.equal(module(changed).upper, said.upper) and not torch.equal(module(changed).lower, said.lower)
    embedding = embedding_of(said)
    assert embedding.shape == (3, 24)
    torch.testing.assert_close(torch.linalg.vector_norm(embedding, dim=1), torch.ones(3))
    one = module(maps(1))
    assert torch.equal(one.upper_attention, module.upper(maps(1))[1])  # of one row both halves are the whole


def test_fusion_with_no_attention_is_one_view_thrice() -> None:
    fuse, x = Fuse(8).eval(), maps()
    ones = torch.ones(3, 8, 1, 1)
    whole, upper, lower = fuse(x, ones, ones)
    assert torch.equal(whole, upper) and torch.equal(whole, lower)
    assert not torch.equal(fuse(x, 0.5 * ones, ones)[1], upper)


def test_bmfn() -> None:
    first, second = torch.randn(2, 3, 5, generator=generator())
    torch.testing.assert_close(bmfn(first, first), F.normalize(first, dim=1))
    torch.testing.assert_close(bmfn(first, second), bmfn(second, first))
    torch.testing.assert_close(torch.linalg.vector_norm(bmfn(first, second), dim=1), torch.ones(3))


def test_losses_against_loops() -> None:
    torch.manual_seed(0)
    features, label = torch.randn(9, 4), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3])
    distance = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    furthest = torch.stack([max(distance[i, j] for j in range(9) if label[j] == label[i]) for i in range(9)])
    nearest = torch.stack([min(distance[i, j] for j in range(9) if label[j] != label[i]) for i in range(9)])
    soft = F.softplus(furthest - nearest).mean()
    torch.testing.assert_close(soft_triplet_loss(features, label), soft, rtol=1e-4, atol=1e-5)
    hinge = (furthest - nearest + 0.3).relu().mean()
    torch.testing.assert_close(triplet_loss(features, label), hinge, rtol=1e-4, atol=1e-5)
    half = soft_triplet_loss(features, label, margin=0.25)
    expected = 0.25 * F.softplus(nearest - furthest).mean() + 0.75 * soft
    torch.testing.assert_close(half, expected, rtol=1e-4, atol=1e-5)
    sure = soft_triplet_loss(features, label, margin=None, teacher=1e4 * torch.eye(4)[label])
    torch.testing.assert_close(sure, soft, rtol=1e-4, atol=1e-5)  # a teacher that tells all apart
    logits = torch.randn(9, 4)
    torch.testing.assert_close(class_loss(logits, label, smoothing=0), F.cross_entropy(logits, label))
    features.requires_grad_()
    soft_triplet_loss(features * 0 + 1, label).backward()
    assert features.grad.isfinite().all()


def test_the_loss_of_three_batches() -> None:
    torch.manual_seed(0)
    label = torch.tensor([0, 0, 1, 1])
    seen = [(Parts(*torch.randn(3, 4, 8), torch.randn(4, 5), *torch.randn(3, 4, 8, 1, 1)), label) for _ in range(3)]
    expected = source_loss(*seen[0]) + 0.5 * (
        soft_triplet_loss(seen[1][0].upper, label) + soft_triplet_loss(seen[2][0].lower, label)
    )
    torch.testing.assert_close(adaptation_loss(*seen), expected)


def test_the_teacher_copies_then_follows() -> None:
    torch.manual_seed(0)
    student = torch.nn.Linear(2, 2)
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        student.weight.add_(1)
    follow(teacher, student, 0)
    assert torch.equal(teacher.weight, student.weight)
    before = teacher.weight.clone()
    with torch.no_grad():
        student.weight.add_(1)
    follow(teacher, student, 1)
    torch.testing.assert_close(teacher.weight, before + 0.5)
    follow(teacher, student, 10**6, alpha=0.75)
    torch.testing.assert_close(teacher.weight, before + 0.625)


def test_batches_hold_identities_of_several_cameras() -> None:
    label, camera = torch.arange(6).repeat_interleave(5), torch.arange(30) % 5 % 2
    numbers = identity_batch(label, 12, generator(), camera=camera)
    assert numbers.shape == (12,) and len(label[numbers].unique()) == 3
    for identity in numbers.split(4):
        assert len(label[identity].unique()) == 1 and len(identity.unique()) == 4
        assert camera[identity[0]] != camera[identity[1]]
    few = identity_batch(torch.tensor([0, 1, 1, 1]), 8, generator())
    assert sorted(torch.tensor([0, 1, 1, 1])[few].tolist()) == [0] * 4 + [1] * 4


def test_pseudo_labels_find_clusters() -> None:
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    middles = 5 * torch.eye(3)
    features = (middles[:, None] + 0.1 * torch.randn(3, 20, 3)).flatten(0, 1)
    labels, found = pseudo_labels(features, 3)
    assert all(len(part.unique()) == 1 for part in labels.split(20)) and len(labels.unique()) == 3
    torch.testing.assert_close(found[labels[::20]], middles, atol=0.2, rtol=0)
    with pytest.raises(ValueError, match=r"clusters must be from 1 to the number of images \(60\), got 61"):
        pseudo_labels(features, 61)


def test_adaptation_moves_student_teacher_and_fusion() -> None:
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    student, images = CoReID(**SMALL), torch.rand(12, 3, 32, 16)
    before = copy.deepcopy(student.state_dict())
    both = adapt(student, images, clusters=3, epochs=1, steps=2, batch=8, generator=generator())
    assert both.teacher.head.classifier.weight.shape == (3, 8) and not both.training
    weights = {name: t for name, t in both.teacher.state_dict().items() if name.endswith("weight")}
    del weights["head.classifier.weight"]
    still = {name for name, tensor in weights.items() if torch.equal(tensor, before[name])}
    assert still == {name for name in weights if "ecab" in name}  # which no loss reaches
    assert both.fuse.norms[1].running_mean.any()
    views = fused_views(both, images, batch=5)
    assert [tuple(view.shape) for view in views] == [(12, 8)] * 3
    torch.testing.assert_close(views[2], fused_views(both, images.flip(3))[2])
    assert not any(p.requires_grad for p in ensemble(student).teacher.parameters())


def test_images_are_seen_with_their_mirrors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, image = CoReID(**SMALL), torch.rand(3, 32, 16)
    for name, each in (("one", image), ("mirror", image.flip(2))):
        to_picture(each).save(tmp_path / f"{name}.png")
    output = model.predict([tmp_path / "one.png", tmp_path / "mirror.png"])
    assert output.embedding.shape == (2, 24)
    torch.testing.assert_close(output.embedding[0], output.embedding[1])
    said = model.eval()(torch.rand(2, 3, 40, 20))
    assert [part.shape for part in said.parts] == [(2, 8)] * 5 and said.logits.shape == (2, 5)


def test_the_trunk_keeps_its_resolution() -> None:
    trunk = ResNetTrunk(18, width=2, last_stride=1)
    shapes = [x.shape[2:] for x in trunk(torch.rand(1, 3, 64, 32))]
    assert shapes[-1] == shapes[-2] == (4, 2) and trunk.strides == (4, 8, 16, 16)
    with pytest.raises(ValueError, match="last_stride must be 1 or 2, got 3"):
        ResNetTrunk(18, last_stride=3)


def test_a_checkpoint_of_one_network_loads(tmp_path: Path) -> None:
    """Its names, under DataParallel: those of the recording without `model.`, and those of a sequential ResNet."""
    torch.manual_seed(0)
    model = CoReID(6, depth=50, width=2, reduction=4)
    recorded = load_file(GOLDEN / "ensemble_fusion.a.safetensors")
    state = {n[12:]: t for n, t in recorded.items() if n.startswith("param.model.")}
    ours = {"conv": "conv", "bn": "norm"}
    for name, tensor in model.trunk.state_dict().items():
        part, rest = name.split(".", 1)
        if part == "stem":
            state[f"base.{rest}"] = torch.rand_like(tensor.float()).to(tensor.dtype)
            continue
        stage, block, layer, leaf = rest.split(".", 3)
        for theirs, mine in ours.items():
            layer = layer.replace(mine, theirs)
        if layer == "shortcut":
            layer = "downsample"
        state[f"base.{int(stage) + 4}.{block}.{layer}.{leaf}"] = torch.rand_like(tensor.float()).to(tensor.dtype)
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "best.pth.tar")
    loaded = CoReID.from_authors(tmp_path / "best.pth.tar", num_classes=6, depth=50, width=2, reduction=4)
    assert loaded.channels == 64
    assert torch.equal(loaded.trunk.stages[2][0].shortcut[0].weight, state["base.6.0.downsample.0.weight"])
    assert torch.equal(loaded.head.lower.fc.weight, state["adativeFC_low.weight"])
    module_map = recorded["input.x"]
    torch.testing.assert_close(loaded.head(module_map).whole, recorded["output.student_global"], rtol=1e-4, atol=1e-4)
    state["base.9.0.conv1.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "strange.pth.tar")
    with pytest.raises(ValueError, match=r"no place for base\.9\.0"):
        CoReID.from_authors(tmp_path / "strange.pth.tar", num_classes=6, depth=50, width=2)


def test_bad_arguments() -> None:
    features = torch.rand(4, 3)
    same = torch.zeros(4, dtype=torch.long)
    for bad, message in (
        (lambda: ECAB(12, 2), r"channels must be a multiple of reduction\^3, got 12 and 2"),
        (lambda: PartHead(8, 0, reduction=2), "num_classes must be positive, got 0"),
        (lambda: head()(torch.rand(2, 9, 4, 4)), "8"),
        (lambda: CoReID(**SMALL)(torch.rand(2, 4, 32, 16)), r"images \(batch, 3, height, width\)"),
        (lambda: CoReID(**{**SMALL, "depth": 20}), "depth must be one of 18, 34, 50, 101, 152, got 20"),
        (lambda: CoReID(**{**SMALL, "image_size": (0, 16)}), "image_size must be"),
        (lambda: CoReID(5, trunk=torch.nn.Identity()), "trunk must have channels"),
        (lambda: soft_triplet_loss(features, same), "two labels at least"),
        (lambda: soft_triplet_loss(features, torch.arange(4), margin=None), "teacher must be given"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
