"""CoVR: queries beside BLIP's, shifts, padding, videos, the loss at its limits, BLIP taken over, bad arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from saccade import catalogue
from saccade.catalogue import load_authors
from saccade.models.covr import ComposedQuery, CoVR, hard_negative_nce, video_scores

GOLDEN = Path(__file__).parents[1] / "golden" / "covr" / "composed_query.a.safetensors"
EXAMPLE = dict(catalogue.part("covr").example)


def model(**changes: object) -> CoVR:
    torch.manual_seed(0)
    return CoVR(**{**EXAMPLE, **changes}).eval()


def given() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids, description = (torch.randint(11, (2, n), generator=generator) for n in (6, 5))
    return torch.rand(2, 3, 16, 16, generator=generator), ids, description


def test_without_its_map_a_description_changes_nothing_and_with_it_all_tokens_alike() -> None:
    covr, (image, ids, description) = model(), given()
    plain, shifted = covr(image, ids).embedding, covr(image, ids, None, description).embedding
    assert not torch.allclose(plain, shifted)
    seen: list[Tensor] = []
    hook = covr.query.text.blocks[0].cross.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    covr(image, ids, None, description)
    hook.remove()
    difference = seen[0] - covr.tokens(image)
    torch.testing.assert_close(difference, covr.query.describe(description)[:, None].expand_as(difference))
    nn.init.zeros_(covr.query.prompt_proj.weight)
    nn.init.zeros_(covr.query.prompt_proj.bias)
    torch.testing.assert_close(covr(image, ids, None, description).embedding, plain)


def test_padding_changes_nothing() -> None:
    covr, (image, ids, description) = model(), given()
    expected = covr(image, ids[:, :4], None, description[:, :3]).embedding
    mask, there = (torch.arange(n).expand(2, n) < real for n, real in ((6, 4), (5, 3)))
    torch.testing.assert_close(covr(image, ids, mask, description, there).embedding, expected)
    torch.testing.assert_close(covr(image, ids, mask.long(), description, there.long()).embedding, expected)


def test_all_vectors_have_unit_length_whatever_there_is() -> None:
    covr, (image, ids, description) = model(), given()
    video = torch.rand(2, 3, 3, 16, 16)
    for said in (
        covr(image), covr(video), covr(None, ids), covr(image, ids), covr(image, ids, None, description),
    ):  # fmt: skip
        torch.testing.assert_close(said.embedding.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(covr(video, ids).embedding, covr(video[:, 1], ids).embedding)
    frames = covr(video.flatten(0, 1)).embedding.unflatten(0, (2, 3))
    torch.testing.assert_close(covr(video).embedding, F.normalize(frames.mean(1), dim=-1))


def test_the_encoder_is_told_by_its_first_word_that_it_looks() -> None:
    covr, (image, ids, description) = model(), given()
    other = torch.cat([(ids[:, :1] + 1) % 11, ids[:, 1:]], 1)
    torch.testing.assert_close(covr(image, other).embedding, covr(image, ids).embedding)
    assert not torch.allclose(covr(None, other).embedding, covr(None, ids).embedding)
    changed = torch.cat([(description[:, :1] + 1) % 11, description[:, 1:]], 1)
    for encodes in (True, False):
        covr.query.encode_description = encodes
        same = torch.allclose(covr.query.describe(changed), covr.query.describe(description))
        assert same == encodes


def test_what_embeds_targets_is_not_trained() -> None:
    covr, (image, ids, description) = model().train(), given()
    covr(image, ids, None, description).embedding.sum().backward()
    assert not covr.vision.training and not any(p.requires_grad for p in covr.vision.parameters())
    assert all(p.grad is not None for p in covr.query.parameters())


def test_the_loss_at_its_limits() -> None:
    generator = torch.Generator().manual_seed(0)
    query, target = (F.normalize(torch.randn(5, 8, generator=generator), dim=1) for _ in range(2))
    score = query @ target.T / 0.07
    labels = torch.arange(5)
    plain = F.cross_entropy(score, labels) + F.cross_entropy(score.T, labels)
    for columns in (True, False):
        found = hard_negative_nce(query, target, beta=0.0, column_denominator=columns)
        torch.testing.assert_close(found, plain)
    assert hard_negative_nce(query[:1], target[:1]).item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(hard_negative_nce(query, target, alpha=0.5, beta=0.7), _slow(score, 0.5, 0.7, True))
    rows = hard_negative_nce(query, target, alpha=0.5, beta=0.7, column_denominator=False)
    torch.testing.assert_close(rows, _slow(score, 0.5, 0.7, False))
    order = torch.randperm(5, generator=generator)
    torch.testing.assert_close(hard_negative_nce(query[order], target[order]), hard_negative_nce(query, target))


def _slow(score: Tensor, alpha: float, beta: float, columns: bool) -> Tensor:
    count, total = len(score), torch.zeros(())
    hard = (beta * score).exp()
    for i in range(count):
        rows = cols = torch.zeros(())
        for j in range(count):
            of_row = j if columns else i
            by_row = (count - 1) * hard[i, j] / (hard[of_row].sum() - hard[of_row, of_row])
            by_column = (count - 1) * hard[j, i] / (hard[:, i].sum() - hard[i, i])
            rows = rows + (alpha if i == j else by_row) * score[i, j].exp()
            cols = cols + (alpha if i == j else by_column) * score[j, i].exp()
        total = total + rows.log() + cols.log() - 2 * score[i, i]
    return total / count


def test_frames_of_a_target_weigh_by_the_query() -> None:
    frames, query = F.normalize(torch.randn(3, 4, 6), dim=-1), F.normalize(torch.randn(2, 6), dim=-1)
    nearest = torch.einsum("qe,bfe->qbf", query, frames).amax(-1)
    torch.testing.assert_close(video_scores(query, frames, 1e-4), nearest, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(video_scores(query, frames, 1e6), video_scores(query, frames, None))
    torch.testing.assert_close(video_scores(query, frames[:, :1]), query @ frames[:, 0].T)


def test_a_released_file_gives_the_side_of_the_query(tmp_path: Path) -> None:
    state = {name[6:]: tensor for name, tensor in load_file(GOLDEN).items() if name.startswith("param.")}
    more = {"visual_encoder.cls_token": torch.zeros(1, 1, 4), "vision_proj.weight": torch.zeros(2, 2)}
    torch.save({"model": {**state, **more, "temp": torch.zeros(())}}, tmp_path / "covr.ckpt")
    arguments = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "encoder_width": 20}
    sizes = {"intermediate_size": 32, "vocab_size": 30, "embed_dim": 10}
    ours = load_authors("covr", tmp_path / "covr.ckpt", **arguments, **sizes)
    assert isinstance(ours, ComposedQuery) and torch.equal(ours.prompt_proj.weight, state["prompt_proj.weight"])
    shape = {"vocabulary": 30, "dim": 24, "hidden": 32, "positions": 16, "embed_dim": 10, "encode_token": 29}
    whole = CoVR.from_authors(tmp_path / "covr.ckpt", **{**EXAMPLE, **shape, "vision_dim": 20})
    assert torch.equal(whole.query.text_proj.weight, state["text_proj.weight"])
    with pytest.raises(ValueError, match="does not fit the query of CoVR"):
        CoVR.from_authors(tmp_path / "covr.ckpt", **EXAMPLE)


def test_blip_is_taken_over() -> None:
    transformers = pytest.importorskip("transformers")
    text = {
        "vocab_size": 20, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 16,
        "max_position_embeddings": 8, "encoder_hidden_size": 8, "projection_dim": 6,
        "bos_token_id": 1, "pad_token_id": 0, "eos_token_id": 2, "sep_token_id": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 8,
    }  # fmt: skip
    config = transformers.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=6)
    blip = transformers.BlipForImageTextRetrieval(config).eval()
    for parameter in blip.parameters():
        nn.init.normal_(parameter, std=0.2)
    covr, (image, ids, _) = CoVR.from_blip(blip).eval(), given()
    told = covr.query.grounded(ids)
    assert told[0, 0] == 19
    with torch.no_grad():
        tokens = blip.vision_model(image).last_hidden_state
        expected = blip.text_encoder(told, encoder_hidden_states=tokens, is_decoder=False).last_hidden_state
        target = F.normalize(blip.vision_proj(tokens[:, 0]), dim=-1)
        torch.testing.assert_close(covr(image, ids).features, blip.text_proj(expected[:, 0]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(covr(image).embedding, target)
    with pytest.raises(ValueError, match="must be a BlipForImageTextRetrieval, this Linear has no vision_model"):
        CoVR.from_blip(nn.Linear(1, 1))


def test_bad_arguments() -> None:
    covr, (image, ids, description) = model(), given()
    for bad, message in (
        (lambda: covr(), "must have an image or a text: give pixel_values, input_ids or both"),
        (lambda: covr(image, None, None, description), "needs the reference and the text"),
        (lambda: covr(None, ids, None, description), "needs the reference and the text"),
        (lambda: covr(image, ids[:1]), "an image for each text, got 2 and 1"),
        (lambda: covr(image, ids, torch.ones(2, 5)), r"attention_mask must be \(2, 6\) as input_ids, got \(2, 5\)"),
        (lambda: covr(image, None, torch.ones(2, 5)), "attention_mask is given without input_ids"),
        (lambda: covr(image[:, :2], ids), r"images \(batch, 3, height, width\)"),
        (lambda: covr(image[:, None][:, :0], ids), "a frame at least"),
        (lambda: covr(image, torch.zeros(2, 9, dtype=torch.long)), "at most 8 words"),
        (lambda: model(encode_token=12), "encode_token must be one of 12 words, got 12"),
        (lambda: model(encode_token=None, encode_description=True), "needs an encode_token"),
        (lambda: hard_negative_nce(torch.rand(2, 3), torch.rand(3, 3)), "one shape"),
        (lambda: hard_negative_nce(torch.rand(2, 3), torch.rand(2, 3), temperature=0.0), "must be positive"),
        (lambda: video_scores(torch.rand(2, 3), torch.rand(2, 3)), r"frames \(videos, frames, width\)"),
        (lambda: video_scores(torch.rand(2, 3), torch.rand(2, 2, 3), -1.0), "temperature must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
