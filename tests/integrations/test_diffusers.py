from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")

from diffusers.models.attention_dispatch import AttentionBackendName  # noqa: E402

from saccade.attention.rectified_spaattn import rectified_spaattn_attend  # noqa: E402
from saccade.integrations.diffusers import switch  # noqa: E402
from saccade.ops.hilbert import gilbert_order, neighbor_blocks  # noqa: E402

BLOCKS = {"block_q": 8, "block_k": 8}
SPARSE = {"top_k": 2, "cdf_threshold": 0.0, **BLOCKS}

#: settings under which nothing is left out, and under which something is
KEEP: dict[str, dict[str, Any]] = {
    "softmax": {},
    "window": {"left": 99},
    "spargeattn": {"similarity_threshold": 1.0, **BLOCKS},
    "block-sparse-vggt": {"top_k": 99, **BLOCKS},
    "rectified-spaattn": {"top_k": 99, **BLOCKS},
}
DROP: dict[str, dict[str, Any]] = {
    "window": {"left": 4},
    "spargeattn": {"top_k": 0.3, **BLOCKS},
    "block-sparse-vggt": {"top_k": 2, **BLOCKS},
    "rectified-spaattn": SPARSE,
}


def wan() -> tuple[nn.Module, dict[str, Tensor]]:
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=8,
        ffn_dim=16, num_layers=2,
    )  # fmt: skip
    call = {"hidden_states": torch.randn(2, 4, 3, 8, 12), "encoder_hidden_states": torch.randn(2, 3, 8)}
    return model, call


def hunyuan() -> tuple[nn.Module, dict[str, Tensor]]:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1,
        num_single_layers=2, num_refiner_layers=1, text_embed_dim=8, pooled_projection_dim=8, rope_axes_dim=(4, 4, 4),
    )  # fmt: skip
    call = {
        "hidden_states": torch.randn(2, 4, 3, 8, 12),
        "encoder_hidden_states": torch.randn(2, 7, 8),
        "encoder_attention_mask": (torch.arange(7) < torch.tensor([[5], [3]])).long(),
        "pooled_projections": torch.randn(2, 8),
        "guidance": torch.tensor([5.0, 5.0]),
    }
    return model, call


def flux() -> tuple[nn.Module, dict[str, Tensor]]:
    model = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=12, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 4),
    )  # fmt: skip
    call = {
        "hidden_states": torch.randn(2, 60, 4),
        "encoder_hidden_states": torch.randn(2, 7, 8),
        "pooled_projections": torch.randn(2, 8),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(6.0), torch.arange(10.0)),
        "txt_ids": torch.zeros(7, 3),
    }
    return model, call


def cogvideox() -> tuple[nn.Module, dict[str, Tensor]]:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=8, num_layers=2, sample_width=12, sample_height=8, sample_frames=9, max_text_seq_length=7,
    )  # fmt: skip
    return model, {"hidden_states": torch.randn(2, 3, 4, 8, 12), "encoder_hidden_states": torch.randn(2, 7, 8)}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "wan": wan,
    "hunyuan": hunyuan,
    "flux": flux,
    "cogvideox": cogvideox,
}
#: attention modules of the blocks where visual tokens meet
LAYERS = {
    "wan": ["blocks.0.attn1", "blocks.1.attn1"],
    "hunyuan": ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn"],
    "flux": ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn"],
    "cogvideox": ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"],
}


def build(name: str) -> tuple[nn.Module, Callable[..., Tensor]]:
    torch.manual_seed(0)
    model, call = MODELS[name]()

    @torch.no_grad()
    def sample(timestep: float = 9.0, model: nn.Module = model) -> Tensor:
        return model(timestep=torch.tensor([timestep] * 2), **call).sample

    return model.eval(), sample


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("slug", KEEP)
@pytest.mark.parametrize("curve", [False, True])
def test_what_keeps_everything_is_the_model(name: str, slug: str, curve: bool) -> None:
    model, sample = build(name)
    expected = sample()
    with switch(model, slug, curve=curve, report=True, **KEEP[slug]) as report:
        out = sample()
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert [layer.name for layer in report.layers] == LAYERS[name]
    assert [layer.layer for layer in report.layers] == list(range(len(LAYERS[name])))
    for layer in report.layers:
        assert (layer.calls, layer.dense_calls, layer.density) == (1, 0, 1.0) and layer.relative_error < 1e-5


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("slug", DROP)
def test_what_drops_something_says_so(name: str, slug: str) -> None:
    model, sample = build(name)
    expected = sample()
    with switch(model, slug, report=True, **DROP[slug]) as report:
        out = sample()
    assert out.isfinite().all() and (out - expected).abs().max() > 1e-3
    for layer in report.layers:
        assert 0 < layer.density < 0.6 and layer.relative_error > 1e-3 and layer.calls == 1
    rows = [line.split()[0] for line in str(report).splitlines()[-len(LAYERS[name]) :]]
    assert rows == LAYERS[name]
    with switch(model, slug, **DROP[slug]) as silent:
        assert torch.equal(sample(), out) and not silent.layers


@pytest.mark.parametrize("name", MODELS)
def test_on_leaving_the_model_is_as_it_was(name: str) -> None:
    model, sample = build(name)
    expected, before = sample(), {n: dict(m.__dict__) for n, m in model.named_modules()}
    processors = {n: dict(vars(p)) for n, p in model.attn_processors.items()}
    with pytest.raises(RuntimeError, match="in between"), switch(model, "rectified-spaattn", curve=True, **SPARSE):
        sample()
        raise RuntimeError("in between")
    assert {n: dict(vars(p)) for n, p in model.attn_processors.items()} == processors
    for n, module in model.named_modules():
        assert module.__dict__.keys() == before[n].keys() and "forward" not in module.__dict__
        assert not module._forward_pre_hooks
    assert torch.equal(sample(), expected)
    copy.deepcopy(model)


def record(model: nn.Module, sample: Callable[..., Tensor], path: str) -> list[list[Tensor]]:
    """The queries, keys and values of a layer's attention in the dense model."""
    seen: list[list[Tensor]] = []
    original = F.scaled_dot_product_attention

    def recording(*args: Any, **kwargs: Any) -> Tensor:
        seen.append([kwargs[x] if x in kwargs else args[i] for i, x in enumerate(("query", "key", "value"))])
        return original(*args, **kwargs)

    module = model.get_submodule(path)
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", recording)
            return inner(*args, **kwargs)

    module.__dict__["forward"] = forward
    sample()
    del module.__dict__["forward"]
    return seen


@pytest.mark.parametrize("curve", [False, True])
@pytest.mark.parametrize("name", ["wan", "flux", "cogvideox", "hunyuan"])
def test_a_layer_computes_the_function(name: str, curve: bool) -> None:
    """The first layer's output is the room's function of that layer's heads, text last and tokens along the curve."""
    model, sample = build(name)
    ((q, k, v),) = record(model, sample, LAYERS[name][0])
    grid = (1, 6, 10) if name == "flux" else (3, 4, 6)
    visual = grid[0] * grid[1] * grid[2]
    text = q.shape[2] - visual
    begin = text if name in ("flux", "cogvideox") else 0
    words = torch.cat([torch.arange(begin), torch.arange(begin + visual, visual + text)])
    pixels = gilbert_order(grid) if curve else torch.arange(visual)
    order = torch.cat([pixels + begin, words])
    options = {**SPARSE, "neighbors": neighbor_blocks(grid, gilbert_order(grid), 8) if curve else None}

    outs: list[Tensor] = []
    project = model.get_submodule(LAYERS[name][0]).to_out[0]
    hook = project.register_forward_pre_hook(lambda module, args: outs.append(args[0]))
    with switch(model, "rectified-spaattn", curve=curve, **SPARSE):
        sample()
    hook.remove()
    before = outs[0].shape[1] - visual  # CogVideoX projects text along with the rest
    for row in range(2):
        real = (5, 3)[row] if name == "hunyuan" else text
        chosen = order[: visual + real]
        one = (x[row : row + 1, :, chosen] for x in (q, k, v))
        out = rectified_spaattn_attend(*one, text_tokens=real, **options)[:, :, :visual]
        expected = out[:, :, pixels.argsort()].transpose(1, 2).flatten(2)
        torch.testing.assert_close(outs[0][row : row + 1, before:], expected, atol=1e-5, rtol=1e-5)


def test_cross_attention_and_text_layers_are_left_alone() -> None:
    for name in ("wan", "hunyuan"):
        model, _ = build(name)
        for path in [n for n, m in model.named_modules() if hasattr(m, "get_processor") and n not in LAYERS[name]]:
            with switch(model, "window", left=1):
                assert "forward" not in model.get_submodule(path).__dict__
        with pytest.raises(ValueError, match="no layer is"):
            switch(model, "window", layers=["*attn2"] if name == "wan" else ["context_embedder*"])


def test_layers_by_number_and_by_pattern() -> None:
    model, sample = build("flux")
    for chosen, expected in (
        ({"layers": [0]}, LAYERS["flux"][:1]),
        ({"layers": ["single*"]}, LAYERS["flux"][1:]),
        ({"dense_layers": [0, -1]}, LAYERS["flux"][1:2]),
    ):
        with switch(model, "rectified-spaattn", report=True, **chosen, **SPARSE) as report:
            sample()
        assert [layer.name for layer in report.layers] == expected
    with pytest.raises(ValueError, match="no layer is 3; there are layers 0 to 2"):
        switch(model, "window", layers=[3])


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_the_first_steps_are_dense(name: str) -> None:
    model, sample = build(name)
    dense = {t: sample(t) for t in (9.0, 7.0, 5.0)}
    with switch(model, "rectified-spaattn", dense_steps=2, report=True, **SPARSE) as report:
        # two calls a step, as with guidance; then a second run
        outs = [(t, sample(t)) for t in (9.0, 9.0, 7.0, 7.0, 5.0, 5.0, 9.0, 7.0, 5.0)]
    same = [torch.equal(out, dense[t]) for t, out in outs]
    assert same == [True] * 4 + [False] * 2 + [True] * 2 + [False]
    assert all((layer.calls, layer.dense_calls) == (3, 6) for layer in report.layers)


def test_a_switch_inside_a_switch() -> None:
    model, sample = build("hunyuan")
    expected = sample()
    with switch(model, "rectified-spaattn", layers=[0], **SPARSE):
        first = sample()
    with switch(model, "rectified-spaattn", report=True, **SPARSE) as outer:
        all_three = sample()
        with switch(model, "softmax", layers=[1, 2], report=True) as inner:
            torch.testing.assert_close(sample(), first, atol=1e-6, rtol=1e-5)
        assert torch.equal(sample(), all_three)
    assert [layer.calls for layer in outer.layers] == [3, 2, 2] and [layer.calls for layer in inner.layers] == [1, 1]
    assert torch.equal(sample(), expected) and (first - expected).abs().max() > 1e-4


def test_a_pipeline() -> None:
    (one, first), (two, second) = build("wan"), build("wan")
    pipeline = SimpleNamespace(components={"transformer": one, "transformer_2": two, "vae": nn.Linear(1, 1)})
    expected = first(9.0)
    with switch(pipeline, "rectified-spaattn", dense_steps=1, layers=[0], report=True, **SPARSE) as report:
        assert torch.equal(first(9.0), expected)
        # the second model comes in at the second step: its first call is no warm-up
        assert (second(5.0) - build("wan")[1](5.0)).abs().max() > 1e-4
    names = [layer.name for layer in report.layers]
    assert names == ["transformer.blocks.0.attn1", "transformer_2.blocks.0.attn1"]
    assert [(layer.calls, layer.dense_calls) for layer in report.layers] == [(0, 1), (1, 0)]


def test_a_backend_of_the_users_is_kept() -> None:
    model, sample = build("wan")
    expected = sample()
    for module in model.modules():
        if hasattr(module, "set_attention_backend") and hasattr(module, "processor"):
            module.set_attention_backend("_native_math")
    with switch(model, "rectified-spaattn", **{**SPARSE, "top_k": 99}):
        torch.testing.assert_close(sample(), expected, atol=1e-5, rtol=1e-5)
    with switch(model, "rectified-spaattn", report=True, **SPARSE) as report:
        sample()
    assert all(layer.calls == 1 for layer in report.layers)
    processors = model.attn_processors.values()
    assert {p._attention_backend for p in processors} == {AttentionBackendName._NATIVE_MATH}


def test_gradients_reach_the_model() -> None:
    model, call = MODELS["wan"]()
    with switch(model, "rectified-spaattn", curve=True, **SPARSE):
        out = model(timestep=torch.tensor([9, 9]), **call).sample
    out.square().sum().backward()
    assert model.blocks[0].attn1.to_q.weight.grad.abs().sum() > 0


def test_a_compiled_model() -> None:
    model, sample = build("wan")
    expected = sample()
    with switch(model, "rectified-spaattn", **SPARSE):
        sparse = sample()
    torch._dynamo.reset()
    model.compile(backend="eager")
    torch.testing.assert_close(sample(), expected)
    with switch(model, "rectified-spaattn", **SPARSE):
        torch.testing.assert_close(sample(), sparse)
    torch.testing.assert_close(sample(), expected)


def test_a_model_of_another_class() -> None:
    class Other(diffusers.FluxTransformer2DModel):
        pass

    torch.manual_seed(0)
    model, call = flux()
    other = Other(**dict(model.config))
    other.load_state_dict(model.state_dict())
    call["timestep"] = torch.tensor([0.9, 0.9])
    with torch.no_grad():
        with (
            pytest.raises(ValueError, match="Other attends over 67 tokens, 60 of them visual"),
            switch(other, "rectified-spaattn", **SPARSE),
        ):
            other(**call)
        with pytest.raises(ValueError, match="the grid of Other"), switch(other, "window", left=1, curve=True):
            other(**call)
        with switch(model, "rectified-spaattn", curve=True, **SPARSE):
            expected = model(**call).sample
        with switch(other, "rectified-spaattn", text="first", curve=(1, 6, 10), **SPARSE):
            assert torch.equal(other(**call).sample, expected)
        with (
            pytest.raises(ValueError, match="grid of 1 x 2 x 3 is not the layer's 60 visual"),
            switch(model, "rectified-spaattn", curve=(1, 2, 3), **SPARSE),
        ):
            model(**call)


def test_bad_arguments() -> None:
    model, _ = build("wan")
    for arguments, message in (
        (("rectified",), "did you mean 'rectified-spaattn'"),
        (("moba",), "not defined for bidirectional attention"),
    ):
        with pytest.raises(ValueError, match=message):
            switch(model, *arguments)
    for options, message in (
        ({"drop": 0.5}, "did you mean 'drop_rate'"),
        ({"dense_steps": -1}, "dense_steps must not be negative, got -1"),
        ({"text": "left"}, "text must be 'first' or 'last', got 'left'"),
        ({"curve": (3, 0, 1)}, "curve must be"),
    ):
        with pytest.raises(ValueError, match=message):
            switch(model, "rectified-spaattn", **options)
    with pytest.raises(ValueError, match="no blocks with attention processors"):
        switch(nn.Linear(2, 2), "window")
    with pytest.raises(ValueError, match="neither a diffusers model nor a pipeline"):
        switch("wan", "window")
    with pytest.raises(ValueError, match="no transformer among unet"):
        switch(SimpleNamespace(components={"unet": model}), "window")
    processor = model.blocks[0].attn1.processor
    processor._parallel_config = object()
    with pytest.raises(ValueError, match="context-parallel"), switch(model, "window", left=1):
        build("wan")[1](model=model)
