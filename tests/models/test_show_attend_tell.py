"""Show, Attend and Tell: attention of regions, drawn and blended; masks; generation; losses; the released archive."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from saccade import catalogue
from saccade.models.show_attend_tell import (
    Baseline,
    HalvingDropout,
    RegionAttention,
    ShowAttendTell,
    doubly_stochastic,
    draw_region,
    reinforced,
    word_costs,
)
from saccade.models.show_attend_tell.authors import PORTS

SMALL = {"dim": 8, "word_dim": 6, "hidden": 10, "vocab_size": 12}
GOLDEN = Path(__file__).parents[1] / "golden" / "show-attend-tell" / "soft_attention.a.safetensors"


def small(**changes: object) -> ShowAttendTell:
    torch.manual_seed(0)
    model = ShowAttendTell(**{**SMALL, **changes}).eval()  # type: ignore[arg-type]
    for parameter in model.parameters():  # larger than it starts with, so that something can be seen
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def given(batch: int = 2, regions: int = 9, words: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, regions, 8), torch.randint(1, 12, (batch, words))


def test_no_score_is_the_mean_and_permuted_regions_permute_the_attention() -> None:
    model, (regions, captions) = small(), given()
    said = model(regions, captions)
    torch.testing.assert_close(said.attention.sum(2), torch.ones(2, 5))
    order = torch.randperm(9)
    turned = model(regions[:, order], captions)
    torch.testing.assert_close(turned.attention, said.attention[:, :, order])
    torch.testing.assert_close(turned.logits, said.logits)
    torch.nn.init.zeros_(model.attention.score.weight)
    plain = model(regions, captions)
    torch.testing.assert_close(plain.attention, torch.full((2, 5, 9), 1 / 9))
    mean = model(regions.mean(1, keepdim=True), captions)  # one region that is the mean of them
    torch.testing.assert_close(plain.logits, mean.logits)


def test_attention_comes_before_the_word_and_of_what_is_there() -> None:
    model, (regions, captions) = small(), given()
    said, other = model(regions, captions), captions.clone()
    other[:, 2:] = (other[:, 2:] % 11) + 1
    changed = model(regions, other)
    torch.testing.assert_close(changed.logits[:, :3], said.logits[:, :3])
    assert (changed.logits[:, 3:] - said.logits[:, 3:]).abs().max() > 1e-3
    present = torch.tensor([[True] * 6 + [False] * 3, [True] * 9])
    some = model(regions, captions, present=present)
    assert not some.attention[0, :, 6:].any()
    torch.testing.assert_close(some.logits[:1], model(regions[:1, :6], captions[:1]).logits)
    torch.testing.assert_close(some.logits[1], said.logits[1])


def test_a_drawn_region_is_a_blend_of_one() -> None:
    hard, soft, (regions, captions) = small(attention="hard"), small(), given()
    torch.testing.assert_close(hard(regions, captions).logits, soft(regions, captions).logits)  # in evaluation
    samples = torch.nn.functional.one_hot(torch.randint(9, (2, 5)), 9).float()
    said = hard(regions, captions, samples=samples)
    assert torch.equal(said.chosen, samples)
    first = soft.advance(torch.full((2,), -1), soft.start(regions), samples[:, 0])[0]
    torch.testing.assert_close(said.logits[:, 0], first.logits)
    alpha = torch.tensor([[0.7, 0.2, 0.1]]).expand(20000, -1)
    share = draw_region(alpha, torch.Generator().manual_seed(0))
    assert torch.equal(share.sum(1), torch.ones(20000))
    vectors = torch.randn(3, 8)  # the mean of drawn contexts tends to the blend
    torch.testing.assert_close((share @ vectors).mean(0), alpha[0] @ vectors, atol=0.02, rtol=0)
    sharp = RegionAttention(8, 10, temperature=1e6)
    weights = sharp(sharp.prepare(regions), torch.randn(2, 10))
    assert torch.equal(weights, draw_region(weights))


def test_a_batch_in_training_draws_or_does_not() -> None:
    regions, captions = given(4)
    for share, drawn in ((1.0, True), (0.0, False)):
        model = small(attention="hard", semi_sampling=share).train()
        said = model(regions, captions)
        assert (torch.equal(said.chosen, said.attention)) != drawn and not said.chosen.requires_grad
        assert not drawn or torch.equal(said.chosen.max(2).values, torch.ones(4, 5))
        said.logits.sum().backward()
        assert model.attention.score.weight.grad is None or not model.attention.score.weight.grad.any()
    with pytest.raises(ValueError, match='samples are for attention="hard"'):
        small()(regions, captions, samples=torch.rand(4, 5, 9))


def test_a_selector_of_nothing_leaves_the_first_state_alone() -> None:
    model, (regions, captions) = small(), given()
    torch.nn.init.zeros_(model.selector.weight)
    torch.nn.init.constant_(model.selector.bias, -100.0)
    mean = regions.mean(1, keepdim=True)
    other = mean + (regions - mean) * 3  # another image of the same mean
    torch.testing.assert_close(model(other, captions).logits, model(regions, captions).logits)
    assert model(regions, captions).looks.max() < 1e-6
    assert small(selector=False)(regions, captions).looks is None


def test_masked_words_change_nothing() -> None:
    model, (regions, captions) = small(), given()
    mask = torch.tensor([[True, True, False, True, True], [True] * 5])
    said, state = model(regions, captions, mask=mask), model.start(regions)
    for step, word in enumerate(model.begun(captions).unbind(1)):
        one, after = model.advance(word, state)
        torch.testing.assert_close(one.logits[0], said.logits[0, step])
        if step != 2:
            state = after
    costs = word_costs(said.logits, captions, mask)
    assert costs[0, 2] == 0 and (costs[mask] > 0).all()
    torch.testing.assert_close(
        costs[1], torch.nn.functional.cross_entropy(said.logits[1], captions[1], reduction="none"), atol=1e-4, rtol=1e-4
    )


def test_generation_equals_the_parallel_form() -> None:
    model, (regions, _) = small(vocab_size=12), given()
    torch.nn.init.constant_(model.logits.bias[:1], -3.0)
    gone = model.generate(regions, most=6)
    told = model(regions, gone.words)
    for row, length in enumerate(gone.lengths.tolist()):
        torch.testing.assert_close(gone.attention[row, :length], told.attention[row, :length])
        torch.testing.assert_close(gone.looks[row, :length], told.looks[row, :length])
        until = min(length + 1, gone.words.shape[1])
        score = -torch.nn.functional.cross_entropy(told.logits[row, :until], gone.words[row, :until], reduction="sum")
        torch.testing.assert_close(gone.scores[row], score)
        assert gone.words[row, 0] == told.logits[row, 0].argmax()
    beams = model.generate(regions, most=6, beams=5)
    assert (beams.scores >= gone.scores - 1e-5).all() or beams.lengths.tolist() != gone.lengths.tolist()


def test_losses_by_hand() -> None:
    once = torch.eye(4)[None]
    assert doubly_stochastic(once) == 0
    assert doubly_stochastic(torch.full((2, 4, 4), 0.25)) == 0
    assert doubly_stochastic(once, torch.tensor([[True, True, True, False]])) == 1
    alpha = torch.tensor([[[0.2, 0.8], [0.5, 0.5]]], requires_grad=True)
    chosen, costs = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), torch.tensor([[3.0, 1.0]])
    (slope,) = torch.autograd.grad(reinforced(alpha, chosen, costs, baseline=0.5, entropy=0.01), alpha)
    entropy = 0.01 * (alpha.detach().log() + 1)
    torch.testing.assert_close(slope, (0.5 - 2.0) / 10 * (-chosen / alpha.detach()) + entropy)
    (slope,) = torch.autograd.grad(reinforced(alpha, chosen, costs, entropy=0.0), alpha)
    torch.testing.assert_close(slope, costs[..., None] / 10 * chosen / alpha.detach())
    baseline = Baseline()
    assert baseline.update(costs) == 0 and baseline.update(costs) == pytest.approx(0.2)
    assert float(baseline.value) == pytest.approx(0.38) and "value" in baseline.state_dict()
    for attention in ("soft", "hard"):
        model, (regions, captions) = small(attention=attention).train(), given()
        captions[0, 3] = 0
        model.penalty(model(regions, captions), captions).backward()
        assert model.attention.score.weight.grad.abs().max() > 0


def test_half_is_kept_and_half_is_taken_of_all() -> None:
    drop, x = HalvingDropout(), torch.ones(1000)
    assert set(drop(x).tolist()) == {0.0, 1.0} and 400 < drop(x).sum() < 600
    assert torch.equal(drop.eval()(x), x / 2)
    with torch.device("meta"):
        assert ShowAttendTell().of_word.weight.shape == (7200, 512)
    assert len(small(initial=2, deep=2, final=2).final) == 2
    start = ShowAttendTell(**SMALL)  # type: ignore[arg-type]
    torch.testing.assert_close(start.of_hidden.weight[:10] @ start.of_hidden.weight[:10].T, torch.eye(10))
    assert start.of_word.weight.std() < 0.02


def test_the_released_archive_is_read(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN)
    state = {name[6:]: tensor.numpy() for name, tensor in tensors.items() if name.startswith("param.")}
    np.savez(tmp_path / "model.npz", history_errs=np.zeros((2, 3)), **state)
    with safe_open(GOLDEN, "pt") as file:
        arguments = json.loads(file.metadata()["args"])
    model = catalogue.load_authors("show-attend-tell", tmp_path / "model.npz", "soft_attention", **arguments).eval()
    said = PORTS[0].run(model, {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("input.")}, {})
    torch.testing.assert_close(said["cost"], tensors["output.cost"])
    loaded = ShowAttendTell.from_authors(tmp_path / "model.npz", **SMALL)
    torch.testing.assert_close(loaded.words.weight, model.words.weight)
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        catalogue.load_authors("show-attend-tell", tmp_path / "objects.npz", "soft_attention")
    bare = PORTS[0].build({"n_words": 5})
    assert bare.selector is None and bare.seen_out is None and not bare.prev2out and bare.words.weight.shape == (5, 100)
    for name in ("n_layers_lstm", "use_dropout_lstm"):
        with pytest.raises(ValueError, match=name):
            PORTS[0].build({name: 2})


def test_images_are_seen_by_a_stem() -> None:
    model = small(stem=(4, 8))
    said = model(torch.rand(2, 3, 16, 12), given()[1])
    assert said.attention.shape == (2, 5, 12)
    assert model.generate(torch.rand(2, 3, 16, 16)).attention.shape[2] == 16


def test_refusals() -> None:
    for arguments, message in (
        ({"hidden": 0}, "must be positive"),
        ({"deep": -1}, "not negative"),
        ({"attention": "x"}, "soft or hard"),
        ({"semi_sampling": 1.5}, "semi_sampling"),
        ({"temperature": 0.0}, "temperature"),
        ({"stem": (4, 9)}, r"stem must end in dim \(8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**arguments)
    model, (regions, captions) = small(), given()
    for call, message in (
        (lambda: model(regions[..., 1:], captions), "regions, 8"),
        (lambda: model(regions, captions[:1]), "captions must be"),
        (lambda: model(regions, captions, mask=torch.ones(2, 4)), "mask must be"),
        (lambda: model(regions, captions, present=torch.ones(2, 9)), "present must be"),
        (lambda: model.start(None), "got none"),
        (lambda: model(torch.rand(2, 3, 32, 32), captions), "stem="),
    ):
        with pytest.raises(ValueError, match=message):
            call()
