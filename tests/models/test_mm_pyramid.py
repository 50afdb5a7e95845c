"""MM-Pyramid: how far it sees, its windows, gates and streams, its heads, padding, losses and files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from saccade.models.mm_pyramid import (
    IntegrateBlock,
    LocalisationHead,
    MMPyramid,
    ParsingHead,
    Pyramid,
    TemporalBlock,
    localisation_loss,
    parsing_loss,
)
from saccade.models.moments import EventOutput
from saccade.train.entries import Entry
from saccade.train.tasks.localise import Localise

GOLDEN = Path(__file__).parent.parent / "golden" / "mm-pyramid"
SMALL = {"hidden": 8, "audio_dim": 6, "video_dim": 9, "motion_dim": 7, "frames": 2, "num_heads": 2, "feedforward": 12}


def pyramid(levels: int = 2, **changes: object) -> Pyramid:
    torch.manual_seed(0)
    return Pyramid(8, 12, 2, levels=levels, **changes).eval()


def network(**changes: object) -> MMPyramid:
    torch.manual_seed(0)
    return MMPyramid(5, **{**SMALL, "levels": 2, **changes}).eval()


def features(steps: int = 7, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, steps, 6), torch.randn(batch, 2 * steps, 9), torch.randn(batch, steps, 7)


@pytest.mark.parametrize("levels", [1, 3])
def test_a_step_sees_so_far_and_no_further(levels: int) -> None:
    model, reach, middle = pyramid(levels), 2 * (2**levels - 1), 32
    streams = torch.randn(2, 1, 65, 8)
    expected = model(*streams)
    for away in (-reach - 1, -reach, reach, reach + 1):
        changed = streams.clone()
        changed[:, :, middle + away] += 5
        off = max((a - b)[:, middle].abs().max().item() for a, b in zip(model(*changed), expected))
        assert (off > 1e-6) == (abs(away) <= reach), (away, off)


def test_a_window_as_long_as_the_stream_is_none() -> None:
    torch.manual_seed(0)
    windowed, whole = IntegrateBlock(8, 12, 2, reach=6).eval(), IntegrateBlock(8, 12, 2).eval()
    whole.load_state_dict(windowed.state_dict())
    video, audio = torch.randn(2, 3, 7, 8)
    for ours, expected in zip(windowed(video, audio), whole(video, audio)):
        torch.testing.assert_close(ours, expected)
    assert not torch.allclose(IntegrateBlock(8, 12, 2, reach=2).eval()(video, audio)[0], whole(video, audio)[0])


def test_gates_choose_between_the_own_stream_and_the_other() -> None:
    torch.manual_seed(0)
    block = IntegrateBlock(8, 12, 2, reach=2).eval()
    video, audio = torch.randn(2, 3, 7, 8)
    for own, other, expected in (
        (1e4, -1e4, block.video(video, video, 2)),
        (-1e4, 1e4, block.cross(video, audio, 2)),
    ):
        with torch.no_grad():
            block.video_sum.own_gate.bias.fill_(own)
            block.video_sum.other_gate.bias.fill_(other)
        torch.testing.assert_close(block(video, audio)[0], expected)


def test_exchanged_streams_with_exchanged_parameters_give_exchanged_outputs() -> None:
    model, twin = pyramid(), pyramid()
    words = {"video": "audio", "audio": "video"}
    exchanged = {
        ".".join(
            words[part.split("_")[0]] + part[5:] if part.split("_")[0] in words else part for part in name.split(".")
        ): tensor
        for name, tensor in model.state_dict().items()
    }
    twin.load_state_dict(exchanged)
    video, audio = torch.randn(2, 3, 9, 8)
    for ours, expected in zip(twin(audio, video), reversed(model(video, audio))):
        torch.testing.assert_close(ours, expected)


def test_probabilities() -> None:
    torch.manual_seed(0)
    head, x = ParsingHead(8, 5), 3 * torch.randn(4, 7, 2, 8)
    said = head(x)
    assert said.probabilities.min() >= 0 and said.probabilities.max() <= 1
    assert (said.streams <= said.probabilities.amax(1) + 1e-6).all()
    nn.init.zeros_(head.probability.weight)  # of one probability everywhere, weights that sum to 1 leave it
    nn.init.constant_(head.probability.bias, 0.3)
    p = torch.tensor(0.3).sigmoid()
    torch.testing.assert_close(head(x).streams, p.expand(4, 2, 5))
    nn.init.zeros_(head.over_streams.weight)  # where they do not depend on time, those at all sum to 1 too
    torch.testing.assert_close(head(x).whole, p.expand(4, 5))


def test_padding_changes_nothing() -> None:
    for head in ("parse", "localise"):
        model, (audio, video, motion) = network(head=head), features(9)
        mask = torch.arange(9) < torch.tensor([[9], [6]])
        audio[1, 6:], video[1, 12:], motion[1, 6:] = 30, -30, 30
        said = model(audio, video, motion, mask)
        alone = model(audio[1:, :6], video[1:, :12], motion[1:, :6])
        torch.testing.assert_close(said.probabilities[1:, :6], alone.probabilities)
        torch.testing.assert_close(said.streams[1:], alone.streams)
        torch.testing.assert_close(said.whole[1:], alone.whole)
        truth = torch.rand(2, 9, 2, 5) < 0.3
        assert model.loss(said, truth).isfinite()


def test_one_class_or_none_for_each_step() -> None:
    model = network(head="localise", motion_dim=0, frames=1)
    audio, video, _ = features()
    said = model(audio, video[:, :7])
    assert said.probabilities.shape == (2, 7, 1, 5) and said.logits.shape == (2, 7, 6)
    torch.testing.assert_close(said.probabilities.sum((2, 3)) + said.logits.softmax(-1)[..., 0], torch.ones(2, 7))
    torch.testing.assert_close(said.whole, said.probabilities.amax((1, 2)))
    truth = torch.zeros(2, 7, 2, 5, dtype=torch.bool)
    truth[0, 2:4, 1, 3] = True
    logits = torch.full((2, 7, 6), -20.0)
    logits[..., 0] = 20
    logits[0, 2:4, 0], logits[0, 2:4, 4] = -20, 20
    right = EventOutput(said.probabilities, said.streams, said.whole, logits=logits)
    assert localisation_loss(right, truth) < 1e-6 < localisation_loss(said, truth) and model.loss(right, truth) < 1e-6
    assert isinstance(model.head, LocalisationHead) and model.streams == ("audio and video",)


def test_labels_of_whole_videos_are_smoothed() -> None:
    label = torch.tensor([[1.0, 0.0]])
    said = EventOutput(torch.zeros(1, 3, 2, 2), torch.tensor([[[1.0, 0.0], [0.95, 0.05]]]), label)
    least = -(0.95 * np.log(0.95) + 0.05 * np.log(0.05))
    assert float(parsing_loss(said, label)) == pytest.approx(least, abs=1e-5)
    other = parsing_loss(said, label, label, 1 - label, smooth_video=1.0)
    assert float(other) == pytest.approx(-np.log(0.05), abs=1e-5)
    with pytest.raises(ValueError, match="two streams, audio and video, got 1"):
        parsing_loss(EventOutput(said.probabilities, said.streams[:, :1], label), label)


def test_files_of_features(tmp_path: Path) -> None:
    model = network().train()
    with torch.no_grad():
        for layer in (model.head.probability, model.head.over_time, model.head.over_streams):
            layer.weight.mul_(40)
    files = []
    for name, x in zip(model.views, features(10, 1)):
        files.append(tmp_path / f"{name}.npy")
        np.save(files[-1], x[0].numpy())
    said = model.predict(files)
    assert said.seconds == 10.0 and model.training and said.probabilities.shape == (1, 10, 2, 5)
    assert not said.probabilities[0][:, :, said.whole[0] < 0.5].any() and said.probabilities.max() > 0.5
    assert model.answer(said) and len(set(model.picture(said).getdata())) > 5
    raw = model.eval()(*features(10, 1)).probabilities
    torch.testing.assert_close(said.probabilities[..., said.whole[0] >= 0.5], raw[..., said.whole[0] >= 0.5])


def test_a_released_file_loads(tmp_path: Path) -> None:
    recording = load_file(GOLDEN / "avvp_net.a.safetensors")
    state = {name[6:]: tensor for name, tensor in recording.items() if name.startswith("param.")}
    torch.save(state, tmp_path / "MM_Pyramid.pt")
    model = MMPyramid.from_authors(tmp_path / "MM_Pyramid.pt", num_classes=5, levels=2, **{**SMALL, "frames": 8})
    names = ("input.audio", "input.visual", "input.visual_st")
    said = model(*(recording[name] for name in names))
    torch.testing.assert_close(said.probabilities[:, :, 1], recording["output.frame_prob"][:, :, 0])


def test_it_learns_the_task_in_either_form() -> None:
    task = Localise(Localise.budgets["quick"].changed({"batch": 4, "evaluation_size": 4}), torch.device("cpu"))
    for options in ({}, {"head": "localise"}):
        entry = Entry("mm-pyramid", "mm-pyramid", {"hidden": 8, "feedforward": 8, "levels": 1, **options})
        model = task.model(entry, 0)
        task.loss(model, task.batch(0, 0)).backward()
        figures = task.figures(model)
        assert {"map", "r1_50", "hit1"} <= figures.keys() and ("segment_type_f1" in figures) == (not options)


def test_bad_arguments() -> None:
    model, (audio, video, motion) = network(), features()
    mask = torch.ones(2, 7, dtype=torch.bool)
    for bad, message in (
        (lambda: model(audio[..., 1:], video, motion), r"audio must be \(batch, steps, 6\)"),
        (lambda: model(audio, video), "motion must be given: this network takes 7 channels"),
        (lambda: network(motion_dim=0)(audio, video, motion), "motion must be None"),
        (lambda: model(audio, video[:, 1:], motion), "2 frames and motion one step for each of 7 steps"),
        (lambda: model(audio, video, motion[:1]), "motion must be of 2 items like the others, got 1"),
        (lambda: model(audio, video, motion, mask[:, 1:]), r"mask must be bool \(2, 7\)"),
        (lambda: network(head="count"), "head must be 'parse' or 'localise', got 'count'"),
        (lambda: network(levels=0), "levels must be positive"),
        (lambda: network(frames=0), "must be positive and motion_dim 0 or more"),
        (lambda: network(num_heads=3), "num_heads"),
        (lambda: TemporalBlock(8, 4), "kernel_size must be odd"),
        (lambda: pyramid()(torch.randn(2, 5, 8), torch.randn(2, 6, 8)), "video and audio must both be"),
        (lambda: localisation_loss(model(audio, video, motion), torch.zeros(2, 7, 2, 5)), "must have logits"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
