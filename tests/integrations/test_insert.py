"""Gates put into ResNet, ConvNeXt and plain CNNs: places, behaviour at the start, state, undoing, errors, command."""

import copy
import dataclasses
import json
import logging
import pickle
from collections import namedtuple

import pytest
import torch
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
)

import saccade
from saccade import catalogue
from saccade.cli import main
from saccade.integrations import insert as inserting
from saccade.integrations.insert import Gentle


@pytest.fixture
def resnet():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="basic", num_labels=3)
    return ResNetForImageClassification(config).eval()


@pytest.fixture
def convnext():
    torch.manual_seed(0)
    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, image_size=32, num_labels=3)
    return ConvNextForImageClassification(config).eval()


@pytest.fixture
def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Conv2d(8, 12, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 3),
    ).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def logits(model, x):
    with torch.no_grad():
        out = model(x)
    return getattr(out, "logits", out)


LAYERS = ["resnet.encoder.stages.0.layers.0", "resnet.encoder.stages.0.layers.1", "resnet.encoder.stages.1.layers.0"]


@pytest.mark.parametrize(
    ("after", "paths"),
    [
        ("resnet.encoder.stages.1", ["resnet.encoder.stages.1"]),
        ("resnet.encoder.stages.*", ["resnet.encoder.stages.0", "resnet.encoder.stages.1"]),
        ("resnet.encoder.stages.*.layers.?", LAYERS),
        ("ResNetBasicLayer", LAYERS),
        ("ResNetBasic*", LAYERS),
        ("**.layer", [f"{layer}.layer" for layer in LAYERS]),
        ("*.layer", [f"{layer}.layer" for layer in LAYERS]),
        (["resnet.embedder", "*.stages.1"], ["resnet.embedder", "resnet.encoder.stages.1"]),
        (nn.MaxPool2d, ["resnet.embedder.pooler"]),
    ],
)
def test_finds_places(resnet, after, paths):
    report = saccade.insert(resnet, "triplet", after=after, kernel_size=3, example=torch.randn(1, 3, 32, 32))
    assert [place.path for place in report.places] == paths
    state = resnet.state_dict()
    assert all(f"{place.gate}.cw.conv.weight" in state for place in report.places)


def test_report_counts(resnet, images):
    before = sum(p.numel() for p in resnet.parameters())
    report = saccade.insert(resnet, "cbam", after="ResNetBasicLayer", reduction=4, example=images)
    assert [place.channels for place in report.places] == [8, 8, 16]
    assert [place.size for place in report.places] == [(8, 8), (8, 8), (4, 4)]
    after = sum(p.numel() for p in resnet.parameters())
    assert report.parameters == before and report.added_parameters == after - before > 0
    assert report.input == [(2, 3, 32, 32)]
    # the spatial gate's convolution, 2 k^2 a position; the MLP, 2 C^2 / r a pooling
    first = report.places[0]
    assert first.flops == 2 * (98 * 64 + 2 * 2 * 8 * 2)
    assert report.added_flops == sum(place.flops for place in report.places) and report.flops > report.added_flops
    assert 0.5 < first.change < 1
    text = str(report)
    assert LAYERS[0] in text and "gentle=True" in text and f"{report.added_parameters:,}" in text
    json.dumps(report.as_dict())


def test_gates_the_output(resnet, images):
    plain = copy.deepcopy(resnet)
    report = saccade.insert(resnet, "cbam", after="resnet.encoder.stages.1", reduction=4)
    assert report.input == [(1, 3, 224, 224)]
    gate = resnet.get_submodule(report.places[0].gate)
    expected = plain.resnet.encoder(plain.resnet.embedder(images)).last_hidden_state
    ours = resnet.resnet.encoder(resnet.resnet.embedder(images)).last_hidden_state
    assert torch.equal(ours, gate(expected)) and not torch.equal(ours, expected)


def test_a_sequence_is_gated_through_its_last_member(resnet, images):
    plain = copy.deepcopy(resnet)
    report = saccade.insert(resnet, "cbam", after=f"{LAYERS[1]}.layer", reduction=4, example=images)
    assert report.places[0].gate == f"{LAYERS[1]}.layer.1.saccade_gate"
    x = torch.randn(2, 8, 8, 8)
    block, old = resnet.get_submodule(LAYERS[1]), plain.get_submodule(LAYERS[1])
    gate = block.layer[1].saccade_gate
    torch.testing.assert_close(block(x), torch.relu(gate(old.layer(x)) + x))


@pytest.mark.parametrize("slug", [part.slug for part in catalogue.select(kind="gate")])
def test_gentle_keeps_the_networks_outputs(slug, convnext, images):
    part = catalogue.part(slug)
    before = logits(convnext, images)
    example = {name: value for name, value in part.example.items() if name != "channels"}
    report = saccade.insert(convnext, slug, after="ConvNextStage", gentle=True, **example)
    assert [place.channels for place in report.places] == [8, 16]
    torch.testing.assert_close(logits(convnext, images), before, rtol=1e-4, atol=1e-5)
    assert all(place.change < 1e-5 for place in report.places)
    convnext.train()(images).logits.sum().backward()
    # one amount, or a zero of the gate's own, is on the way; never two, which would stop all gradients
    for place in report.places:
        gate = convnext.get_submodule(place.gate)
        assert any(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in gate.parameters())


@pytest.mark.parametrize("slug", [part.slug for part in catalogue.select(kind="gate")])
def test_identity_init_keeps_the_networks_outputs(slug, convnext, images):
    import inspect

    part = catalogue.part(slug)
    if "identity_init" not in inspect.signature(part.build).parameters:
        pytest.skip("has no identity_init")
    before = logits(convnext, images)
    example = {name: value for name, value in part.example.items() if name != "channels"}
    report = saccade.insert(convnext, slug, after="ConvNextLayer", **example)
    assert report.arguments["identity_init"] is True
    torch.testing.assert_close(logits(convnext, images), before, rtol=1e-4, atol=1e-5)
    report.remove()
    report = saccade.insert(convnext, slug, after="ConvNextLayer", identity_init=False, **example)
    assert all(place.change > 1e-3 for place in report.places)


def test_gentle_is_the_papers_gate_at_one(images):
    gate = saccade.create("cbam", channels=3, reduction=1).eval()
    gentle = Gentle(gate)
    assert torch.equal(gentle(images), images)
    nn.init.ones_(gentle.amount)
    torch.testing.assert_close(gentle(images), gate(images))
    assert gentle.bfloat16()(images.bfloat16()).dtype == torch.bfloat16


def test_state_saves_and_loads(resnet, images):
    old = {name: t.clone() for name, t in resnet.state_dict().items()}
    other = copy.deepcopy(resnet)
    saccade.insert(resnet, "cbam", after="ResNetBasicLayer", reduction=4)
    assert old.keys() <= resnet.state_dict().keys()
    result = resnet.load_state_dict(old, strict=False)
    assert not result.unexpected_keys and all("saccade_gate" in name for name in result.missing_keys)
    torch.manual_seed(5)
    saccade.insert(other, "cbam", after="ResNetBasicLayer", reduction=4)
    assert not torch.equal(logits(other, images), logits(resnet, images))
    other.load_state_dict(resnet.state_dict())
    assert torch.equal(logits(other, images), logits(resnet, images))


def test_remove(resnet, images):
    before, names = logits(resnet, images), list(resnet.state_dict())
    first = saccade.insert(resnet, "cbam", after="resnet.encoder.stages.*", reduction=4)
    once = logits(resnet, images)
    second = saccade.insert(resnet, "triplet", after="resnet.encoder.stages.*")
    assert second.places[0].gate.endswith("saccade_gate_2")
    assert not torch.equal(logits(resnet, images), once)
    first.remove()
    second.remove()
    second.remove()
    assert torch.equal(logits(resnet, images), before) and list(resnet.state_dict()) == names


def test_types_do_not_match_inside_gates(cnn):
    first = saccade.insert(cnn, "triplet", after=nn.Conv2d, kernel_size=3)
    assert [place.path for place in first.places] == ["0.0", "1"]
    second = saccade.insert(cnn, "triplet", after=nn.Conv2d, kernel_size=3)
    assert [place.path for place in second.places] == ["0.0", "1"]


def test_plain_cnn_copies_and_pickles(cnn):
    x = torch.randn(2, 1, 9, 7)
    report = saccade.insert(cnn, "cbam", after=["0", "1"], reduction=4)
    assert [place.gate for place in report.places] == ["0.2.saccade_gate", "1.saccade_gate"]
    twin = copy.deepcopy(cnn)
    assert torch.equal(twin(x), cnn(x))
    nn.init.zeros_(twin.get_submodule("1.saccade_gate").expand.weight)
    assert not torch.equal(twin(x), cnn(x))  # its own gate, not the first network's
    assert torch.equal(pickle.loads(pickle.dumps(cnn))(x), cnn(x))
    report.remove()
    assert not any("saccade" in name for name in cnn.state_dict())


def test_compiles(cnn):
    x = torch.randn(2, 1, 9, 7)
    saccade.insert(cnn, "cbam", after="1", reduction=4, gentle=True)
    nn.init.constant_(cnn[1].saccade_gate.amount, 0.5)
    torch._dynamo.reset()
    compiled = torch.compile(cnn, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), cnn(x))


def test_modes_types_and_statistics_stay(resnet):
    resnet.train().bfloat16()
    resnet.resnet.embedder.eval()
    state = copy.deepcopy(resnet.state_dict())
    report = saccade.insert(resnet, "cbam", after="resnet.encoder.stages.*", reduction=4, example=None)
    assert resnet.training and not resnet.resnet.embedder.training and not resnet.resnet.embedder.embedder.training
    gate = resnet.get_submodule(report.places[0].gate)
    assert gate.training and gate.conv.weight.dtype == torch.bfloat16
    assert all(torch.equal(value, resnet.state_dict()[name]) for name, value in state.items())


def test_given_channels_need_no_dry_run(cnn):
    report = saccade.insert(cnn, "cbam", after="1", channels=12, reduction=4)
    assert report.flops is None and report.added_flops is None and "?" in str(report)
    report.remove()
    report = saccade.insert(cnn, "cbam", after=["0", "1"], channels={"0": 8, "1": 12}, reduction=4)
    assert cnn(torch.randn(2, 1, 9, 7)).shape == (2, 3)
    with pytest.raises(ValueError, match="channels must be a positive number for '1'"):
        saccade.insert(cnn, "cbam", after="1", channels={"0": 8})


def test_networks_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU())
    report = saccade.insert(model, "cbam", after="0")
    assert report.places[0].change is None and report.flops == 222 * 222 * 64 * 27
    assert model[0].saccade_gate.conv.weight.is_meta


Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass(frozen=True)
class Maps:
    name: str
    last: torch.Tensor


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.stage = nn.Conv2d(1, 4, 3)
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(self.stage(x))


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda x: (x, 1), lambda out: out[0]),
        (lambda x: ["name", x], lambda out: out[1]),
        (lambda x: Pair(None, x), lambda out: out.second),
        (lambda x: {"a": None, "b": x}, lambda out: out["b"]),
        (lambda x: Maps("map", x), lambda out: out.last),
    ],
)
def test_first_tensor_of_an_output(wrap, unwrap):
    x = torch.randn(1, 1, 8, 8)
    model = nn.Sequential()
    model.add_module("block", Wrapped(wrap))
    model.eval()
    before = model(x)
    report = saccade.insert(model, "cbam", after="Wrapped", reduction=2)
    out = model(x)
    assert type(out) is type(before)
    torch.testing.assert_close(unwrap(out), model.get_submodule(report.places[0].gate)(unwrap(before)))


def test_outputs_of_transformers_are_gated(images):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = ResNetModel(config).eval()
    before = model(images)
    report = saccade.insert(model, "cbam", after="encoder", reduction=4)
    out = model(images)
    assert torch.equal(out.last_hidden_state, model.encoder.saccade_gate(before.last_hidden_state))
    assert out["last_hidden_state"] is out.last_hidden_state and report.places[0].channels == 16
    assert model(images, return_dict=False)[0].equal(out.last_hidden_state)


@pytest.mark.parametrize(
    ("slug", "after", "options", "message"),
    [
        ("cbam", "resnet.encoder.stage.0", {}, "no module has the path.*'resnet.encoder.stages.0'"),
        ("cbam", "ResnetBasicLayer", {}, "nearest names are 'ResNetBasicLayer'"),
        ("cbam", nn.LSTM, {}, "no module is a LSTM; there are AdaptiveAvgPool2d, BatchNorm2d"),
        ("cbam", [], {}, "at least one module"),
        ("cbam", "resnet.encoder.stages", {}, "no module has the path"),
        ("cbam", "classifier", {}, r"after 'classifier' come \(1, 3\)"),
        ("cbam", "resnet.encoder.stages.0", {}, "after 'resnet.encoder.stages.0': reduction must be"),
        ("cbam", "resnet.encoder.stages.0", {"nonsense": 1}, "nonsense"),
        ("cbam", "resnet.encoder.stages.0", {"example": torch.zeros(1, 4, 8, 8)}, "dry run on inputs .* failed"),
        ("moba", "resnet.encoder.stages.0", {}, "needs a gate .*cbam.* 'moba' is a sequence mechanism"),
        ("cbm", "resnet.encoder.stages.0", {}, "did you mean 'cbam'"),
    ],
)
def test_errors_leave_the_network_alone(resnet, slug, after, options, message):
    names = list(resnet.state_dict())
    with pytest.raises(ValueError, match=message):
        saccade.insert(resnet, slug, after=after, **options)
    assert list(resnet.state_dict()) == names
    assert not any(module._forward_hooks for module in resnet.modules())


def test_places_that_cannot_be_gated():
    model = nn.Sequential(nn.Conv2d(1, 4, 3))
    model.spare = nn.Conv2d(4, 4, 1)
    model.forward = lambda x: model[0](x)
    with pytest.raises(ValueError, match="'spare' is not called"):
        saccade.insert(model, "cbam", after="spare", reduction=2)
    shared = nn.ReLU()
    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 4, 3), shared), nn.Sequential(nn.Conv2d(4, 4, 3), shared))
    with pytest.raises(ValueError, match="used elsewhere too"):
        saccade.insert(model, "cbam", after="0", reduction=2)
    with pytest.raises(ValueError, match="give example="):
        saccade.insert(nn.Sequential(nn.ReLU()), "cbam", after="0")


def test_command_prints_saves_and_what_it_saved_loads(tmp_path, capsys, resnet, images):
    resnet.save_pretrained(tmp_path / "model")
    given = ["insert", str(tmp_path / "model"), "--gate", "cbam:reduction=4", "--after", "ResNetStage", "--gentle"]
    with pytest.raises(SystemExit) as exit_:
        main([*given, "--out", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert not exit_.value.code and "resnet.encoder.stages.1" in out and "cbam x 2" in out
    loaded = inserting.load(tmp_path / "out")
    torch.testing.assert_close(logits(loaded, images), logits(resnet, images))
    gate = loaded.get_submodule("resnet.encoder.stages.1.saccade_gate")
    assert isinstance(gate, Gentle)
    # other weights, saved again from Python
    nn.init.ones_(gate.amount)
    report = saccade.insert(loaded, "triplet", after="resnet.embedder")
    state = loaded.state_dict()
    assert any(name.startswith("resnet.embedder.saccade_gate") for name in state)
    report.remove()
    with pytest.raises(SystemExit) as exit_:
        main([*given, "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert rows["added_parameters"] == sum(place["parameters"] for place in rows["places"])


def test_several_inserts_are_saved_and_loaded(tmp_path, caplog, monkeypatch, resnet, images):
    reports = [
        saccade.insert(resnet, "cbam", after="ResNetStage", reduction=4),
        saccade.insert(resnet, "triplet", after=["resnet.encoder.stages.0", "resnet.embedder"], kernel_size=3),
    ]
    inserting.save(resnet, tmp_path, reports)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert torch.equal(logits(inserting.load(tmp_path), images), logits(resnet, images))
    assert not caplog.text, "transformers reports the gates' weights"


@pytest.mark.parametrize("arguments", [("no/folder", "--gate", "cbam", "--after", "0"), ("{model}", "--gate", "cbam")])
def test_command_errors(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        main(["insert", *(text.format(model=tmp_path) for text in arguments)])
    assert exit_.value.code and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("after", [2, None, [2], ["0", None]])
def test_what_is_no_place_is_said_in_words(after: object) -> None:
    with pytest.raises(ValueError, match="after must be a module path"):
        saccade.insert(nn.Sequential(nn.Conv2d(3, 8, 3)), "cbam", after=after)  # type: ignore[arg-type]
