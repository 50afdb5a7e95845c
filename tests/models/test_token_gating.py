"""Token-wise gating: the gate's ends, text alone, causality, variants, generation, objectives, schedules."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from saccade.models.token_gating import (
    ChannelAttention,
    DualStream,
    DyIntra,
    DynamicGate,
    FiLM,
    ImageTextContrast,
    LexiconContrast,
    contrast,
    gate_temperature,
    learning_rate,
    lexicon_shares,
    set_temperature,
)

SMALL = {"vocab_size": 11, "dim": 16, "num_heads": 4, "hidden": 24, "image_depth": 1, "depth": 2, "image_dim": 10}


def small(**changes: object) -> DualStream:
    torch.manual_seed(0)
    return DualStream(**{**SMALL, **changes}).eval()  # type: ignore[arg-type]


def given(batch: int = 2, words: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 10), torch.randint(3, 11, (batch, words))


def test_a_gate_at_its_ends_takes_text_or_image() -> None:
    y, c = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    for per in ("feature", "token"):
        gate = DynamicGate(16, per=per).eval()
        torch.nn.init.zeros_(gate.weigh.weight)
        for bias, taken in ((100.0, y), (-100.0, c), (0.0, (y + c) / 2)):
            torch.nn.init.constant_(gate.weigh.bias, bias)
            mixed, z = gate(y, c)
            torch.testing.assert_close(mixed, gate.norm(taken))
            assert z.shape == (2, 5, 16 if per == "feature" else 1)
    assert sum(p.numel() for p in DynamicGate(16).parameters()) == 2 * 16**2 + 3 * 16
    with pytest.raises(ValueError, match="per must be"):
        DynamicGate(16, per="x")


def test_hard_gates_choose_when_evaluated_and_blend_when_trained() -> None:
    torch.manual_seed(0)
    y, c = torch.randn(2, 50, 16), torch.randn(2, 50, 16)
    for per, width in (("feature", 32), ("token", 2)):
        gate = DynamicGate(16, per=per, hard=True).eval()
        assert gate.weigh.out_features == width
        z = gate(y, c)[1]
        assert set(z.unique().tolist()) == {0.0, 1.0} and torch.equal(z, gate(y, c)[1])
        pairs = gate.weigh(torch.cat([y, c], 2)).unflatten(-1, (-1, 2))
        assert torch.equal(z > 0, pairs[..., 0] >= pairs[..., 1])
        soft = gate.train()(y, c)[1]
        assert ((soft > 0) & (soft < 1)).all()
        gate.temperature = 0.05
        assert ((gate(y, c)[1] - 0.5).abs() > 0.49).float().mean() > 0.8
        noisy = DynamicGate(16, per=per, hard=True, noisy=True).eval()
        assert set(noisy(y, c)[1].unique().tolist()) == {0.0, 1.0}
        assert not torch.equal(noisy(y, c)[1], noisy(y, c)[1])
    model = small(gate="hard").train()
    set_temperature(model, 0.3)
    assert [layer.gate.temperature for layer in model.layers] == [0.3, 0.3]
    vector, words = given()
    model(vector, words).logits.square().sum().backward()
    assert model.layers[0].gate.weigh.weight.grad.abs().max() > 0


def test_text_alone_is_a_model_without_cross_attention() -> None:
    model, (vector, words) = small(), given()
    alone = model(None, words)
    assert alone.looks is None
    torch.testing.assert_close(model(torch.zeros_like(vector), words).logits, alone.logits)
    for parameter in model.layers[0].cross.parameters():
        torch.nn.init.normal_(parameter, std=3.0)
    torch.testing.assert_close(model(None, words).logits, alone.logits)
    mixed = vector.clone()
    mixed[1] = 0
    said = model(mixed, words)
    torch.testing.assert_close(said.logits[1], alone.logits[1])
    assert (said.logits[0] - alone.logits[0]).abs().max() > 1e-3 and not said.looks[1].any()
    whole = small(per_sample=False)  # as the authors' code
    assert (whole(mixed, words).logits[1] - whole(None, words).logits[1]).abs().max() > 1e-3
    torch.testing.assert_close(whole(torch.zeros_like(vector), words).logits, whole(None, words).logits)


def test_one_image_token_has_no_queries_and_keys() -> None:
    model, (vector, words) = small(), given()
    said = model(vector, words)
    for layer in model.layers:
        for projection in (layer.cross.q_proj, layer.cross.k_proj):
            torch.nn.init.normal_(projection.weight, std=5.0)
    torch.testing.assert_close(model(vector, words).logits, said.logits)
    layer, image = model.layers[0], model.image(vector)
    attended = layer.cross(torch.randn(2, 4, 16), image.tokens)
    torch.testing.assert_close(attended, attended[:, :1].expand(-1, 4, -1))
    torch.testing.assert_close(attended[:, 0], layer.cross.out_proj(layer.cross.v_proj(image.tokens[:, 0])))


def test_later_words_and_padding_change_nothing() -> None:
    model, (vector, words) = small(), given()
    said, other = model(vector, words), words.clone()
    other[:, 3] = (other[:, 3] - 2) % 8 + 3
    changed = model(vector, other)
    torch.testing.assert_close(changed.logits[:, :4], said.logits[:, :4])
    assert (changed.logits[:, 4:] - said.logits[:, 4:]).abs().max() > 1e-3
    mask = torch.tensor([[True, True, False, True, True, True]] * 2)
    first, second = (model(vector, each, mask=mask).logits for each in (words, _put(words, 1)))
    torch.testing.assert_close(first[:, 3:], second[:, 3:])


def _put(words: torch.Tensor, at: int) -> torch.Tensor:
    """Another word there, which stands before the next."""
    other = words.clone()
    other[:, at] = (other[:, at] - 2) % 8 + 3
    return other


def test_modulations_by_hand() -> None:
    x, condition = torch.randn(2, 5, 16), torch.randn(2, 1, 16)
    film, intra, channels = FiLM(16), DyIntra(16), ChannelAttention(16)
    for layer in (film.gamma, film.beta, intra.weigh):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    torch.nn.init.ones_(film.gamma.bias)
    torch.testing.assert_close(film(x, condition), x)
    torch.testing.assert_close(intra(x, condition), 1.5 * x)
    expected = (channels.up(channels.down(x.mean(1)).relu())).sigmoid()[:, None] * x
    torch.testing.assert_close(channels(x), expected)
    assert channels.down.out_features == 1 and ChannelAttention(64).down.out_features == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"gate": "none"},
        {"per": "token"},
        {"gate": "hard", "per": "token"},
        {"enhance": "film"},
        {"enhance": "film", "place": "text"},
        {"enhance": "film", "place": "image"},
        {"enhance": "dyintra"},
        {"enhance": "dyintra", "place": "text"},
        {"enhance": "dyintra", "place": "image"},
        {"enhance": "channel"},
        {"image_encoder": "mlp"},
        {"image_encoder": "none"},
        {"tied": True},
    ],
    ids=str,
)
def test_variants_learn_all_their_parameters(changes: dict[str, object]) -> None:
    model, (vector, words) = small(**changes).train(), given()
    said = model(vector, words)
    assert said.logits.shape == (2, 6, 11) and (said.looks is None) == (changes.get("gate") == "none")
    said.logits.square().sum().backward()
    lacking = [name for name, p in model.named_parameters() if p.grad is None]
    assert not lacking, lacking


def test_generation_equals_the_parallel_form() -> None:
    for changes in ({}, {"enhance": "film", "place": "text"}, {"gate": "none"}):
        model, (vector, _) = small(**changes), given()
        for beams in (1, 3):
            gone = model.generate(vector, most=6, beams=beams)
            told = model(vector, gone.words)
            for row, length in enumerate(gone.lengths.tolist()):
                until = min(length + 1, gone.words.shape[1])
                loss = F.cross_entropy(told.logits[row, :until], gone.words[row, :until], reduction="sum")
                torch.testing.assert_close(gone.scores[row], -loss, atol=1e-4, rtol=1e-4)
                if told.looks is not None:
                    torch.testing.assert_close(gone.looks[row, :until], told.looks[row, :until])
    text = small().generate(prompt=torch.tensor([[4, 5]]), most=4)
    longer = small()(None, torch.cat([torch.tensor([[4, 5]]), text.words], 1))
    assert text.words[0, 0] == longer.logits[0, 2, 2:].argmax() + 2  # neither what fills up nor what begins
    with pytest.raises(ValueError, match="cannot generate"):
        small(enhance="film", place="image").generate(vector)
    endless = small(max_len=4)
    torch.nn.init.constant_(endless.logits.bias[2:3], -100.0)
    with pytest.raises(ValueError, match="4 words at most"):
        endless.generate(vector, most=9)


def test_the_image_is_a_vector_of_whatever_is_given() -> None:
    model, (vector, words) = small(), given()
    torch.testing.assert_close(model.vector(vector[:, None].expand(-1, 3, -1)), vector)
    pixels = torch.rand(2, 3, 28, 28)
    tokens = torch.randn(2, 5, 10)
    for output, expected in (
        (SimpleNamespace(last_hidden_state=tokens, pooler_output=vector), vector),
        (SimpleNamespace(last_hidden_state=tokens), tokens[:, 0]),
        (tokens, tokens[:, 0]),
        (tokens.mT.unflatten(2, (1, 5)), tokens.mean(1)),
    ):
        torch.testing.assert_close(model.on(lambda x, output=output: output).vector(pixels), expected)
    stem = small(stem=(4, 8))
    assert stem.project.in_features == 8 and stem(torch.rand(2, 3, 16, 12), words).logits.shape == (2, 6, 11)
    for bad, message in ((vector[:, :9], "which makes"), (torch.rand(2, 4, 9), "vectors")):
        with pytest.raises(ValueError, match=message):
            model(bad, words)
    with pytest.raises(ValueError, match="needs features, or an encoder"):
        small()(pixels, words)


def test_pairs_and_words_are_held_against_others() -> None:
    text, image = torch.randn(3, 16), torch.randn(3, 16)
    unit = [F.normalize(x, dim=1) for x in (text, image)]
    score = unit[0] @ unit[1].T / 0.07
    expected = -(score.log_softmax(1).diagonal().mean() + score.log_softmax(0).diagonal().mean()) / 2
    torch.testing.assert_close(contrast(text, image, 0.07), expected)
    words, there = (
        torch.randn(3, 4, 16),
        torch.tensor([[True] * 4, [True, True, False, False], [True, True, True, False]]),
    )
    first, second = (share.exp() for share in lexicon_shares(words, image, there, 0.8))
    s = torch.einsum("bld,kd->blk", words, image).div(0.8).exp()
    for i in range(3):
        for j in range(4):
            if not there[i, j]:
                continue
            among = sum(s[i, j, k] for k in range(3) if there[k, j])
            others = sum(s[k, o, i] for k in range(3) for o in range(4) if k != i and there[k, o])
            torch.testing.assert_close(first[i, j], s[i, j, i] / among)
            torch.testing.assert_close(second[i, j], s[i, j, i] / (s[i, j, i] + others))
    assert (first[there] > 0).all() and (first[there] <= 1).all() and (second[there] <= 1).all()
    alone = lexicon_shares(words[:1], image[:1], there[:1], 0.8)
    torch.testing.assert_close(torch.stack(alone).exp(), torch.ones(2, 1, 4))
    everywhere = lexicon_shares(words, image, there, 0.8)
    assert all(share.isfinite()[there].all() for share in everywhere)


def test_objectives_learn_from_a_pass() -> None:
    model, (vector, words) = small(), given(3)
    streams, there = model.streams(words, vector), torch.ones(3, 6, dtype=torch.bool)
    there[0, 4:] = False
    for objective, name in ((ImageTextContrast(16), "contrast"), (LexiconContrast(16), "lexicon")):
        said = objective(streams, there)
        torch.testing.assert_close(said.loss, objective.weight * said.terms[name])
        said.loss.backward(retain_graph=True)
        assert all(p.grad is not None for p in objective.parameters())
        assert objective(streams).loss.isfinite()
        with pytest.raises(ValueError, match="a pass with images"):
            objective(model.streams(words))
    fraction, log = LexiconContrast(16, form="fraction"), LexiconContrast(16)
    log.load_state_dict(fraction.state_dict())
    shares = lexicon_shares(
        log.of_words(streams.first), log.of_image(streams.image.tokens[:, 0]), there, log.temperature
    )
    torch.testing.assert_close(log(streams, there).terms["lexicon"], -(shares[0] + shares[1])[there].mean() / 2)
    torch.testing.assert_close(
        fraction(streams, there).terms["lexicon"], (shares[0].exp() + shares[1].exp())[there].mean() / 2
    )
    with pytest.raises(ValueError, match="log or fraction"):
        LexiconContrast(16, form="x")


def test_released_files_load_and_compute_as_released(tmp_path: Path) -> None:
    tensors = load_file(Path(__file__).parents[1] / "golden" / "token-gating" / "dual_stream_film.a.safetensors")
    path = tmp_path / "film.safetensors"
    save_file({name[6:]: tensor for name, tensor in tensors.items() if name.startswith("param.")}, path)
    sizes = {**SMALL, "vocab_size": 30, "max_len": 8, "enhance": "film"}
    model = DualStream.from_authors(path, **sizes)
    assert not model.per_sample and model.layers[0].gate.noisy
    there = tensors["input.padding_mask"] == 0
    streams = model.streams(tensors["input.input_ids"], tensors["input.dino_embedding"], there)
    torch.testing.assert_close(streams.logits, tensors["output.logits"], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="does not fit DualStream"):
        DualStream.from_authors(path, **{**sizes, "enhance": None})


def test_schedules() -> None:
    assert learning_rate(0) == 0 and learning_rate(12_000) == 5e-5 and learning_rate(2_000_000) < 1e-12
    assert learning_rate((12_000 + 1_107_020) // 2) == pytest.approx(2.5e-5)
    assert gate_temperature(153_704) == pytest.approx(0.55) and gate_temperature(10**6) == pytest.approx(0.1)


def test_refusals() -> None:
    for arguments, message in (
        ({"num_heads": 3}, "heads"),
        ({"hidden": 0}, "must be positive"),
        ({"dropout": 1.0}, "dropout"),
        ({"gate": "x"}, "gate must be one of soft, hard, none"),
        ({"enhance": "x"}, "enhance must be"),
        ({"place": "x"}, "place must be"),
        ({"image_encoder": "x"}, "image_encoder must be"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**arguments)
    model, (vector, words) = small(max_len=6), given()
    for call, message in (
        (lambda: model(vector, words[:1]), "captions must be"),
        (lambda: model(vector, torch.cat([words, words], 1)), "6 words at most"),
        (lambda: model(vector, words.float()), "torch.long"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
