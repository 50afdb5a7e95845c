"""What the paper implies, and bad arguments. The rest is tested by being registered: tests/test_parts.py."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.models.medusa import (
    LOSSES,
    Medusa,
    MultiScaleAttention,
    SharedFeatureAttention,
    balanced_entropy,
    medusa_loss,
    multitask_gain,
)
from saccade.models.medusa.losses import IGNORED, class_entropy, distance, normal_distance
from saccade.models.multitask import Multitask

CHANNELS = (4, 6, 8)


def tiny(**changes: object) -> Medusa:
    torch.manual_seed(0)
    return Medusa(("segmentation", "depth"), (3, 1), depth=18, width=4, blocks=1, **changes)


def maps() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, c, 16 >> i, 12 >> i) for i, c in enumerate(CHANNELS)]


def test_tasks_come_and_go_and_the_others_stay_as_they_are() -> None:
    model, x = tiny().eval(), torch.randn(2, 3, 40, 37)
    segmentation, depth = model(x).logits
    model.add_task("edges", 1)
    assert model.tasks == ("segmentation", "depth", "edges")
    for now, before in zip(model(x).logits, (segmentation, depth)):
        assert torch.equal(now, before)
    model.remove_task("segmentation")
    assert model.tasks == ("depth", "edges") and torch.equal(model(x).logits[0], depth)


def test_a_tasks_loss_does_not_reach_another_tasks_head() -> None:
    model = tiny().train()
    out = model(torch.randn(2, 3, 64, 64))
    truths = {"depth": torch.rand(2, 1, 64, 64)}
    medusa_loss(out, model.tasks, truths).loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.heads["segmentation"].parameters())
    assert any(p.grad.any() for p in model.heads["depth"].parameters())
    assert any(p.grad.any() for p in model.backbone.parameters())


def test_universal_features_are_learned_on_by_the_new_head_alone() -> None:
    model = tiny()
    model.freeze_backbone()
    head = model.add_task("edges", 1)
    model.train()
    assert head.training and not model.backbone.training
    before = copy.deepcopy(model.backbone.state_dict())
    out = model(torch.randn(2, 3, 64, 64))
    medusa_loss(out, model.tasks, {"edges": torch.ones(2, 1, 64, 64)}).loss.backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.backbone.state_dict().items())
    assert head.fuse.head[1].weight.grad.any()


def identity(conv: nn.Conv2d) -> None:
    nn.init.dirac_(conv.weight)


def test_open_gates_leave_the_plain_head() -> None:
    torch.manual_seed(0)
    gated = MultiScaleAttention(CHANNELS, 3, gate_bias=40.0).eval()
    plain = MultiScaleAttention(CHANNELS, 3, msa="concat").eval()
    plain.head.load_state_dict(gated.head.state_dict())
    assert gated.gates is not None
    for gate in gated.gates:
        identity(gate.conv)
        nn.init.zeros_(gate.gate.weight)
    torch.testing.assert_close(gated(maps()), plain(maps()))
    for gate in gated.gates:  # closed
        nn.init.constant_(gate.gate.bias, -200.0)
    closed = gated(maps())
    assert torch.equal(closed, gated([torch.randn_like(x) for x in maps()]))


def test_weights_of_scales() -> None:
    torch.manual_seed(0)
    module = MultiScaleAttention(CHANNELS, 3, msa="softmax_sum", width=5).eval()
    projected = [torch.randn(2, 5, 6, 7) for _ in CHANNELS]
    torch.testing.assert_close(module.weights(projected).sum(1), torch.ones(2, 6, 7))
    for score in module.scores:
        nn.init.zeros_(score.weight)
        nn.init.zeros_(score.bias)
    torch.testing.assert_close(module.weights(projected), torch.full((2, 3, 6, 7), 1 / 3))
    fine = [
        F.interpolate(conv(x), (16, 12), mode="bilinear") for conv, x in zip(module.projections, maps())
    ]  # fmt: skip
    torch.testing.assert_close(module(maps()), module.head(torch.stack(fine).mean(0)))
    alone = MultiScaleAttention((4,), 3, msa="softmax_sum").eval()
    x = maps()[:1]
    torch.testing.assert_close(alone(x), alone.head(alone.projections[0](x[0])))
    several = MultiScaleAttention(CHANNELS, 3, msa="sigmoid_sum", width=5)
    weights = several.weights(projected)
    assert weights.min() > 0 and weights.max() < 1 and not torch.allclose(weights.sum(1), torch.ones(()))


def test_masks() -> None:
    x = torch.randn(2, 4, 5, 6)
    spatial = SharedFeatureAttention(4, gate="spatial", transform="none", gate_bias=2.0)
    assert spatial.mask(x).shape == (2, 1, 5, 6)
    torch.testing.assert_close(spatial(x), x * spatial.mask(x))
    nn.init.zeros_(spatial.gate.weight)
    torch.testing.assert_close(spatial.mask(x), torch.full((2, 1, 5, 6), 2.0).sigmoid())
    assert SharedFeatureAttention(4, 6)(x).shape == (2, 6, 5, 6) and SharedFeatureAttention(4).gate.bias is None


@pytest.mark.parametrize("options", [{"msa": "softmax_sum", "gate": "spatial", "transform": "none"}, {"blocks": 0}])
def test_options(options: dict[str, object]) -> None:
    model = Medusa(("depth",), (1,), depth=18, width=4, **{"blocks": 1, **options})
    assert model(torch.randn(2, 3, 33, 40)).logits[0].shape == (2, 1, 33, 40)


def test_maps_of_each_scale_are_for_training() -> None:
    model, x = tiny(), torch.randn(2, 3, 64, 48)
    side = model.train()(x).side
    assert [tuple(map_.shape[1:]) for map_ in side] == [
        (outputs, 16 >> i, 12 >> i) if i < 3 else (outputs, 2, 2) for outputs in (3, 1) for i in range(4)
    ]
    assert model.eval()(x).side is None and tiny(supervised=False).train()(x).side is None


def test_losses() -> None:
    torch.manual_seed(0)
    logits, truth = torch.randn(2, 1, 4, 5), (torch.rand(2, 1, 4, 5) < 0.3).float()
    weight = (1 - truth).mean()
    expected = F.binary_cross_entropy_with_logits(
        logits, truth, weight=torch.where(truth == 1, weight, 1 - weight)
    )  # fmt: skip
    torch.testing.assert_close(balanced_entropy(logits, truth), expected)
    hidden = truth.clone()
    hidden[:, :, :2] = IGNORED
    torch.testing.assert_close(
        balanced_entropy(logits, hidden, 0.95), balanced_entropy(logits[:, :, 2:], truth[:, :, 2:], 0.95)
    )
    labels = torch.full((1, 2, 2), IGNORED)
    labels[0, 0, 0] = 1
    classes = torch.randn(1, 3, 2, 2)
    torch.testing.assert_close(class_entropy(classes, labels), -classes[0, :, 0, 0].log_softmax(0)[1])
    assert distance(torch.ones(1, 1, 1, 2), torch.tensor([[[[3.0, IGNORED]]]])).item() == 2
    normals = F.normalize(torch.randn(1, 3, 2, 2), dim=1)
    assert normal_distance(5 * normals, normals).item() == pytest.approx(0, abs=1e-6)
    out = Multitask([classes, logits[:1]], side=[classes[..., :1, :1], logits[:1, :, :2, :2]])
    truths = {"segmentation": torch.zeros(1, 4, 4).long(), "depth": torch.ones(1, 1, 4, 5)}
    found = medusa_loss(out, ("segmentation", "depth"), truths)
    assert found.loss.item() == pytest.approx(sum(LOSSES[name][1] * float(term) for name, term in found.terms.items()))
    alone = medusa_loss(Multitask(out.logits), ("segmentation", "depth"), truths)
    assert all(alone.terms[name] < found.terms[name] for name in truths)


def test_refusals() -> None:
    model = tiny()
    for name in ("depth", "a.b", ""):
        with pytest.raises(ValueError, match="new and without dots"):
            model.add_task(name, 1)
    with pytest.raises(ValueError, match="may be removed"):
        model.remove_task("edges")
    with pytest.raises(ValueError, match="one for each task"):
        Medusa(("a", "b"), (1,))
    with pytest.raises(ValueError, match="channels must be given"):
        Medusa(backbone=nn.Identity())
    with pytest.raises(ValueError, match="must give 1 maps"):
        Medusa(("a",), (1,), backbone=model.backbone, channels=(4,)).eval()(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="maps must have"):
        MultiScaleAttention(CHANNELS, 1)(maps()[::-1])
    with pytest.raises(ValueError, match="images"):
        model(torch.randn(1, 1, 32, 32))
    with pytest.raises(ValueError, match="gate must be"):
        SharedFeatureAttention(4, gate="channel")
    with pytest.raises(ValueError, match="without transform"):
        SharedFeatureAttention(4, 6, transform="none")
    with pytest.raises(ValueError, match="msa must be"):
        tiny(msa="mean")
    with pytest.raises(ValueError, match="a channel at least"):
        Medusa(("a",), (0,), depth=18, width=4)
    with pytest.raises(ValueError, match="in the sums alone"):
        MultiScaleAttention(CHANNELS, 1).weights(maps())
    output = Multitask([torch.zeros(1, 1, 2, 2)])
    with pytest.raises(ValueError, match="the output's 1"):
        medusa_loss(output, ("a", "b"), {})
    with pytest.raises(ValueError, match="have a loss"):
        medusa_loss(output, ("a",), {"a": torch.zeros(1, 1, 2, 2)})
    with pytest.raises(ValueError, match="tasks must be the same"):
        multitask_gain({"a": 1.0}, {"b": 1.0})
