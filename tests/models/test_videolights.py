"""VideoLights: refinement, fusion, decoder, feedback, padding, losses, files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from saccade.models.moments import to_ends
from saccade.models.videolights import (
    BiCMF,
    Criterion,
    FeatureRefinement,
    Projection,
    SpanDecoder,
    SpanMatcher,
    Targets,
    VideoLights,
)
from saccade.models.videolights.losses import rank_loss, scaled
from saccade.train.entries import Entry
from saccade.train.tasks.localise import Localise

GOLDEN = Path(__file__).parent.parent / "golden" / "videolights"
SMALL = {
    "video_dim": 14, "text_dim": 10, "dim": 16, "num_heads": 4, "feedforward": 24, "encoder_layers": 1,
    "decoder_layers": 2, "num_queries": 3, "contrastive_dim": 6,
}  # fmt: skip


def network(**changes: object) -> VideoLights:
    torch.manual_seed(0)
    return VideoLights(**{**SMALL, **changes}).eval()


def features(clips: int = 7, words: int = 5, batch: int = 2) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, clips, 14), torch.randn(batch, words, 10)


def test_the_correlation_of_the_code_is_a_constant() -> None:
    torch.manual_seed(0)
    clips, words = torch.randn(3, 7, 16), torch.randn(3, 5, 16)
    plain, own = FeatureRefinement(16), FeatureRefinement(16, constant_correlation=False)
    shares = (clips @ words.mT).softmax(-1)  # as the code has it: every word weighs the same vector
    values = (plain.word_factor * plain.clip_factor).expand(3, 5, 16)
    torch.testing.assert_close(plain.correlation(clips, words), shares @ values)
    torch.testing.assert_close(own.correlation(clips, words), shares @ words)
    mask = torch.arange(5) < torch.tensor([[5], [4], [2]])
    torch.testing.assert_close(own.correlation(clips, words, mask)[2:], own.correlation(clips[2:], words[2:, :2]))


def test_fusion_knows_no_order_of_words_and_no_padding() -> None:
    torch.manual_seed(0)
    layer = BiCMF(16, 4, 24).eval()
    clips, words, places, spots = (
        torch.randn(2, 7, 16),
        torch.randn(2, 5, 16),
        torch.randn(2, 7, 16),
        torch.randn(5, 16),
    )
    expected, order = layer(clips, words, places, spots), torch.randperm(5)
    torch.testing.assert_close(layer(clips, words[:, order], places, spots[order]), expected)
    clips_BL = torch.arange(7) < torch.tensor([[7], [4]])
    words_BW = torch.arange(5) < torch.tensor([[5], [3]])
    changed = torch.where(words_BW[..., None], words, 50.0), torch.where(clips_BL[..., None], clips, -50.0)
    found = layer(changed[1], changed[0], places, spots, clips_BL, words_BW)
    alone = layer(clips[1:, :4], words[1:, :3], places[1:, :4], spots[:3])
    torch.testing.assert_close(found[1:, :4], alone)
    other = BiCMF(16, 4, 24, single_residual=True).eval()
    other.load_state_dict(layer.state_dict())
    assert not torch.allclose(other(clips, words, places, spots), expected)


def test_a_decoder_whose_heads_are_zero_leaves_its_anchors() -> None:
    torch.manual_seed(0)
    decoder = SpanDecoder(16, 4, 24, layers=3, num_queries=4).eval()
    _, anchors = decoder(torch.randn(2, 7, 16), torch.randn(2, 7, 16))
    for each in anchors:
        torch.testing.assert_close(each, decoder.anchors.sigmoid().expand(2, -1, -1), atol=2e-3, rtol=0)
    said = network()(*features())
    assert said.pred_spans.min() >= 0 and said.pred_spans.max() <= 1


def test_feedback() -> None:
    model, (video, text) = network(), features()
    clips, memory, span = torch.randn(2, 7, 16), torch.randn(2, 7, 16), torch.tensor([[0.5, 0.3], [0.9, 0.6]])
    feedback = model.feedback
    gru = nn.GRU(16, 16, batch_first=True)
    gru.load_state_dict({f"{name}_l0": tensor for name, tensor in feedback.gru.state_dict().items()})
    for item, (first, last) in enumerate(((2, 4), (4, 6))):  # 0.35 to 0.65 and 0.6 to 1.2 of 7 clips
        moment = F.pad(clips[item, first : last + 1], (0, 0, 0, 7 - (last + 1 - first)))
        state = gru(moment[None])[1][0, 0]
        expected = memory[item] * (clips[item] @ state)[:, None] + memory[item]
        torch.testing.assert_close(feedback.weighed(clips, memory, span)[item], expected)
    for parameter in feedback.gru.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(feedback.weighed(clips, memory, span), memory)
    nn.init.zeros_(feedback.map.weight)
    said = model(video, text).saliency_feedback
    assert torch.equal(said, said[:1, :1].expand_as(said))


def test_a_batch_of_one_text_has_the_same_saliency_with_its_neighbours() -> None:
    model, (video, text) = network(), features()
    said = model(video, text[:1].expand_as(text))
    torch.testing.assert_close(said.saliency, said.saliency_neighbour)
    said = model(video, text)
    assert not torch.allclose(said.saliency, said.saliency_neighbour, atol=1e-3)


def test_padding_changes_no_clip() -> None:
    model, (video, text) = network(), features(9, 6)
    clips_BL, words_BW = torch.arange(9) < torch.tensor([[9], [6]]), torch.arange(6) < torch.tensor([[6], [4]])
    video[1, 6:], text[1, 4:] = 30, -30
    said, alone = model(video, text, clips_BL, words_BW), model(video[1:, :6], text[1:, :4])
    torch.testing.assert_close(said.saliency[1:, :6], alone.saliency)
    torch.testing.assert_close(said.pred_spans[1:], alone.pred_spans)
    torch.testing.assert_close(said.logits[1:], alone.logits)
    targets = Targets.of([torch.tensor([[0.1, 0.5]])] * 2, torch.rand(2, 9) * clips_BL, clips_BL)
    assert (targets.pairs[1] < 6).all() and Criterion()(said, targets).loss.isfinite()


def test_pairs_are_of_a_clip_that_answers_and_one_that_does_not() -> None:
    labels = torch.tensor([[0.0, 3, 0, 5], [0, 0, 0, 0], [1, 2, 3, 4]])
    targets = Targets.of([torch.tensor([[0.2, 0.4]])] * 3, labels, pairs=20)
    good, bad = (labels.gather(1, targets.pairs[..., side]) for side in (0, 1))
    assert (good[0] > 0).all() and (bad[0] == 0).all() and torch.equal(good[1:], bad[1:])
    torch.testing.assert_close(to_ends(targets.spans[0]), torch.tensor([[0.2, 0.4]]))


def test_matches_cost_the_least() -> None:
    spans = torch.tensor([[[0.2, 0.2], [0.7, 0.4], [0.25, 0.2]]])
    (match,) = SpanMatcher()(torch.zeros(1, 3, 2), spans, [torch.tensor([[0.25, 0.2], [0.7, 0.3]])])
    assert match[0].tolist() == [1, 2] and match[1].tolist() == [1, 0]


def test_the_loss_by_hand() -> None:
    scores, labels = torch.tensor([[2.0, 1.0, -1.0]]), torch.tensor([[4.0, 1.0, 0.0]])
    torch.testing.assert_close(scaled(scores, labels), torch.tensor([[0.75, 0.5, 0.0]]))
    log_share = (scores / 0.5).log_softmax(1)[0]
    expected = (-(log_share[0] + log_share[1]) / 2 - 3 * log_share[0]) / 12  # r = 1, then r = 2, 3 and 4
    torch.testing.assert_close(rank_loss(scores, labels, torch.ones(1, 3)), expected)
    model, (video, text) = network(), features(7)
    said = model(video, text)
    targets = Targets.of([torch.tensor([[0.1, 0.5], [0.7, 0.9]]), torch.tensor([[0.3, 0.6]])], 12 * torch.rand(2, 7))
    plain, later = Criterion()(said, targets), Criterion()(said, targets, epoch=3)
    names = {"span", "giou", "label", "align", "saliency", "span_0", "giou_0", "label_0", "align_0"}
    assert plain.terms.keys() == names and later.terms["saliency"] > plain.terms["saliency"]
    one = Criterion({"span": 0, "giou": 0, "label": 0, "align": 0})(said, targets)
    torch.testing.assert_close(one.loss, one.terms["saliency"])
    better = replace(said, saliency=targets.labels, saliency_feedback=targets.labels)
    assert Criterion()(better, targets).terms["saliency"] < plain.terms["saliency"]


def test_it_learns_the_task() -> None:
    task = Localise(Localise.budgets["quick"].changed({"batch": 4, "evaluation_size": 4}), torch.device("cpu"))
    model = task.model(Entry("videolights", "videolights", {"dim": 16, "feedforward": 16}), 0).train()
    loss = task.loss(model, task.batch(0, 0))
    loss.backward()
    assert loss > 0 and {"map", "r1_50", "hit1"} <= task.figures(model).keys()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert unused == {"clip_space.weight", "clip_space.bias"}  # its outputs no loss reads, as in the code


def test_files_of_features(tmp_path: Path) -> None:
    model, (video, text) = network(), features(10, 4, 1)
    for name, x in (("video", video), ("text", text)):
        np.save(tmp_path / f"{name}.npy", x[0].numpy())
    said = model.predict([tmp_path / "video.npy", tmp_path / "text.npy"])
    assert said.seconds == 20.0 and model.answer(said) and model.picture(said).height == 40
    spans, scores = said.found()[0]
    assert spans.min() >= 0 and spans.max() <= 1 and (scores.diff() <= 0).all()


def test_a_released_file_loads(tmp_path: Path) -> None:
    recording = load_file(GOLDEN / "video_light.a.safetensors")
    state = {name[6:]: tensor for name, tensor in recording.items() if name.startswith("param.")}
    torch.save({"model": state}, tmp_path / "model_best.ckpt")
    model = VideoLights.from_authors(tmp_path / "model_best.ckpt", ends=False, **SMALL)
    assert torch.equal(model.decoder.anchors, state["query_embed.weight"])
    shallow = {name: tensor for name, tensor in state.items() if ".decoder.layers.1." not in name}
    torch.save({"model": shallow}, tmp_path / "shallow.ckpt")
    VideoLights.from_authors(tmp_path / "shallow.ckpt", ends=False, **{**SMALL, "decoder_layers": 1})


def test_a_clips_ends_are_features() -> None:
    model, mask = network(), torch.arange(4) < torch.tensor([[4], [2]])
    found = model._with_ends(torch.zeros(2, 4, 14), mask)[..., 14:]
    assert found[0].tolist() == [[0, 0.25], [0.25, 0.5], [0.5, 0.75], [0.75, 1]] and found[1, 1].tolist() == [0.5, 1]


def test_bad_arguments() -> None:
    model, (video, text) = network(), features()
    said = model(video, text)
    mask = torch.ones(2, 7, dtype=torch.bool)
    for bad, message in (
        (lambda: model(video[..., 1:], text), r"video must be \(batch, steps, 14\)"),
        (lambda: model(video, text[:1]), "text must be of 2 items like the others, got 1"),
        (lambda: model(video, text, mask[:, 1:]), r"video_mask must be bool \(2, 7\)"),
        (lambda: model(video, text, mask, mask), r"text_mask must be bool \(2, 5\)"),
        (lambda: network(num_heads=3), "num_heads"),
        (lambda: network(video_dim=0), "must be positive"),
        (lambda: network(num_queries=0), "layers and num_queries must be positive"),
        (lambda: network(projection_layers=0), "layers must be positive, got 0"),
        (lambda: Projection(4, 4, 0), "layers must be positive"),
        (lambda: Criterion()(said, Targets.of([torch.zeros(0, 2)] * 2, torch.zeros(2, 7))), "a moment at least"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
