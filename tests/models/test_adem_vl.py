"""ADEM-VL: the fusion and its dropping, scales, texts without images, decoding, frozen and wrapped models."""

from __future__ import annotations

import json
from math import floor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from saccade import catalogue, load_authors
from saccade.layers.wrapping import footprint
from saccade.models.adem_vl import ADEMVL, VisualFusion, VisualMemory, fused, multiscale, silu_fusion

GOLDEN = Path(__file__).parent.parent / "golden" / "adem-vl"


def network(**changes: object) -> ADEMVL:
    torch.manual_seed(0)
    model = catalogue.create(
        "adem-vl", **{**catalogue.part("adem-vl").example, "layers": 2, "clip_layers": 3, **changes}
    ).eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def parts(texts: int = 5, tokens: int = 20, dim: int = 8) -> tuple[Tensor, VisualMemory]:
    torch.manual_seed(1)
    return torch.randn(2, texts, dim), VisualMemory(F.silu(torch.randn(2, tokens, dim)), torch.randn(2, tokens, dim))


@pytest.mark.parametrize("texts", [3, 60])  # either order of the products
def test_without_dropping_it_is_bilinear(texts: int) -> None:
    u, memory = parts(texts)
    expected = F.silu(u) @ memory.key_BSD.mT @ memory.value_BSD
    torch.testing.assert_close(silu_fusion(u, memory, drop_ratio=0.0), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.3, 0.99])
def test_the_lowest_scores_of_each_token_are_dropped(ratio: float) -> None:
    u, memory = parts()
    seen = VisualMemory(memory.key_BSD, torch.eye(20).expand(2, -1, -1))  # the scores themselves come out
    score = F.silu(u) @ memory.key_BSD.mT
    kept = silu_fusion(u, seen, drop_ratio=ratio)
    dropped = floor(ratio * 20)
    assert ((kept == 0).sum(-1) == dropped).all()
    order = score.argsort(-1)
    torch.testing.assert_close(kept.gather(-1, order)[..., dropped:], score.gather(-1, order)[..., dropped:])


def test_tokens_that_move_with_their_embeddings_change_nothing() -> None:
    torch.manual_seed(0)
    fusion, order = VisualFusion(8, 6, hidden=4, scales=(16,)), torch.randperm(16)
    nn.init.normal_(fusion.embeddings.value)
    u, embeds = torch.randn(2, 3, 8), torch.randn(2, 16, 8)
    first = fusion(u, fusion.embeddings(embeds))
    for embedding in (fusion.embeddings.key, fusion.embeddings.value):
        embedding.data = embedding.data[:, order]
    torch.testing.assert_close(fusion(u, fusion.embeddings(embeds[:, order])), first)


def test_scales_are_means_of_blocks() -> None:
    patches = torch.randn(2, 16, 3)
    found = multiscale(patches, (16, 4, 1))
    torch.testing.assert_close(found[:, :16], patches)
    torch.testing.assert_close(found[:, 16], patches[:, [0, 1, 4, 5]].mean(1))
    torch.testing.assert_close(found[:, 20], patches.mean(1))


def test_nothing_is_fused_without_alpha_and_without_image_and_value_embedding() -> None:
    model = network()
    embeds = torch.randn(2, 5, 16)
    plain = model.language(embeds_BNC=embeds)
    model.fusion.embeddings.value.data.zero_()
    assert torch.equal(model.say(embeds, model.fusion.without_image(2)), plain)
    model.fusion.alpha = 0.0
    assert torch.equal(model.say(embeds, model.seen(torch.randn(2, 3, 16, 16), 2)[0]), plain)


def test_texts_without_an_image_stand_beside_others() -> None:
    model, ids = network(), torch.randint(3, 15, (2, 9))
    words = {"image_words": torch.tensor([4, 5]), "no_image_words": torch.tensor([4, 5, 6])}
    images, labels = torch.randn(2, 3, 16, 16), ids.clone()
    labels[:, :3] = 0
    both, loss = model.read(ids, images, present=torch.tensor([1, 0]), labels=labels, **words)
    alone, _ = model.read(ids[1:], **words)
    torch.testing.assert_close(both[1:], alone[:, : both.shape[1]])
    other, _ = model.read(ids, images + 1, present=torch.tensor([1, 0]), labels=labels, **words)
    assert torch.equal(other[1], both[1]) and not torch.equal(other[0], both[0])
    assert loss is not None and loss.isfinite()
    assert model.read(ids, images)[0].shape == (2, 9, 15)
    with pytest.raises(ValueError, match="words that count within 9 tokens"):
        model.read(ids, images, labels=torch.zeros_like(ids))


@pytest.mark.parametrize("class_prompt", [True, False])
def test_word_after_word_equals_the_whole_pass(class_prompt: bool) -> None:
    model, captions = network(class_prompt=class_prompt), torch.randint(3, 15, (2, 5))
    images = torch.randn(2, 3, 16, 16)
    whole = model(images, captions).logits
    step = model.told(model.begun(captions), model.start(images)).logits
    torch.testing.assert_close(step, whole, atol=1e-5, rtol=1e-5)
    features = model.vision.tokens(images)
    torch.testing.assert_close(model(features, captions).logits, whole)


def test_beams_find_a_caption_at_least_as_likely() -> None:
    model, images = network(), torch.randn(2, 3, 16, 16)
    greedy, beams = (model.generate(images, most=4, beams=beams) for beams in (1, 4))
    assert (beams.scores >= greedy.scores - 1e-5).all()
    for row in range(2):  # its score is what the whole pass says of it
        words = beams.words[row : row + 1]
        logs = model(images[row : row + 1], words).logits.log_softmax(-1)
        logs[..., [0, 1]] = 0
        length = min(int(beams.lengths[row]) + 1, words.shape[1])
        told = logs.gather(-1, words[..., None])[0, :length].sum()
        assert (told - beams.scores[row]).abs() < 1e-4


def test_only_adapters_projectors_and_embeddings_are_learned() -> None:
    model = network().freeze()
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert wanted == {name for name, _ in model.learned()}
    assert {name.split(".")[0] for name in wanted} == {"fusion", "vision"} and "fusion.embeddings.key" in wanted
    assert not any("fc1" in name for name in wanted if name.startswith("vision"))
    model(torch.randn(1, 3, 16, 16), torch.randint(3, 15, (1, 4))).logits.sum().backward()
    assert all((parameter.grad is not None) == (name in wanted) for name, parameter in model.named_parameters())


def test_an_adapter_starts_as_the_plain_encoder() -> None:
    model = catalogue.create("adem-vl", **catalogue.part("adem-vl").example).eval()
    x, block = torch.randn(2, 5, 12), model.vision.blocks[0]
    torch.testing.assert_close(block.mlp(x), block.mlp.mlp(x))


def test_a_whole_checkpoint_loads(tmp_path: Path) -> None:
    with safe_open(GOLDEN / "network.a.safetensors", "pt") as file:
        arguments = json.loads(file.metadata()["args"])
    tensors = load_file(GOLDEN / "network.a.safetensors")
    state = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("param.")}
    assert "backbone.visual.transformer.resblocks.2.ln_1.weight" in state  # the last block, of which nothing comes
    save_file(state, tmp_path / "whole.safetensors")
    model = load_authors("adem-vl", tmp_path / "whole.safetensors", **arguments)
    assert isinstance(model, ADEMVL) and len(model.vision.blocks) == 2
    del state["adapter_emb1"]
    save_file(state, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match=r"missing fusion\.embeddings\.key"):
        load_authors("adem-vl", tmp_path / "half.safetensors", **arguments)


def tiny_llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_a_model_of_transformers_sees_and_is_as_before() -> None:
    model, ids = tiny_llama(), torch.randint(3, 30, (2, 5))
    fusion = VisualFusion(16, 6, hidden=4, scales=(16, 4), alpha=1.0, beta=1.0)
    patches, before = torch.randn(2, 16, 6), footprint(model)
    with torch.no_grad():
        plain = model(ids).logits
        memory = fusion.remember(patches)
        with fused(model, fusion, memory) as report:
            seen = model(ids).logits
            said = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
            beams = model.generate(ids, max_new_tokens=3, num_beams=3, do_sample=False, pad_token_id=0)
            swapped = model(ids[[1, 0]]).logits
        assert len(report.places) == 2 and report.calls >= 2
        assert not torch.allclose(seen, plain) and not torch.allclose(swapped[[1, 0]], seen)
        assert said.shape[1] > 5 and beams.shape[0] == 2
        with fused(model, fusion, memory):  # with the cache, as without it
            again = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
        assert torch.equal(again, said)
        assert torch.equal(model(ids).logits, plain)
    with pytest.raises(RuntimeError, match="stop"), fused(model, fusion, memory):
        raise RuntimeError("stop")
    assert footprint(model) == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: network(rope="thirds"), "rope must be neighbours or halves"),
        (lambda m: network(drop_ratio=1.0), "drop_ratio must be at least 0 and below 1, got 1.0"),
        (lambda m: network(scales=(16, 5)), r"scales must be square numbers of tokens, got \(16, 5\)"),
        (lambda m: network(clip_layers=0), "layers and clip_layers must be positive"),
        (lambda m: multiscale(torch.randn(1, 15, 4)), "square map, got 15"),
        (
            lambda m: m(torch.randn(2, 17, 11), torch.ones(2, 3, dtype=torch.long)),
            r"tokens \(batch, 1 \+ patches, 12\)",
        ),
        (lambda m: m.read(torch.ones(2, 3, dtype=torch.long), present=torch.tensor([1, 0])), "got no pixel_values"),
        (lambda m: m.start(None), "pixel_values must be images or their tokens"),
        (lambda m: silu_fusion(torch.randn(3, 2, 8), parts()[1]), "an image for each of 3 texts, got 2"),
        (lambda m: silu_fusion(torch.randn(2, 2, 7), parts()[1]), r"\(batch, tokens, 8\)"),
        (lambda m: fused(nn.Linear(2, 2), m.fusion, parts()[1]).__enter__(), "Linear has no decoder"),
        (lambda m: fused(tiny_llama(), m.fusion, parts()[1]).__enter__(), "width 16, got 8"),
    ],
)
def test_refuses(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(network())
