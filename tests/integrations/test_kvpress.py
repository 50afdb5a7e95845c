"""kvpress itself: its presses in our caches, and our policies in its context manager and wrappers.

kvpress 0.5.5 hooks into transformers before 5.3, and our caches are made for later ones: each test runs where it can.
"""

from __future__ import annotations

import inspect
from importlib.metadata import requires
from typing import Any

import pytest
import torch
from torch import Tensor

import saccade

transformers = pytest.importorskip("transformers")
kvpress = pytest.importorskip("kvpress", reason="kvpress is not installed", exc_type=ImportError)

from saccade.compress.policies import HeavyHitters, KeyNorm, Policy, Random, Window  # noqa: E402
from saccade.integrations.compression import PolicyPress, as_press, cache_for, running  # noqa: E402

N = 24


def fits() -> bool:
    """Whether this transformers is one that kvpress asks for: its hooks read what others do not give."""
    requirements = pytest.importorskip("packaging.requirements")
    asked = map(requirements.Requirement, requires("kvpress") or [])
    return all(one.specifier.contains(transformers.__version__) for one in asked if one.name == "transformers")


beside_theirs = pytest.mark.skipif(not fits(), reason=f"kvpress does not take transformers {transformers.__version__}")
PRESSES = [
    kvpress.KnormPress(0.6),
    kvpress.SnapKVPress(0.5, window_size=4),
    kvpress.StreamingLLMPress(0.5, n_sink=2),
    kvpress.ExpectedAttentionPress(0.5, n_future_positions=8, n_sink=2),
    kvpress.TOVAPress(0.5),
    kvpress.KeyRerotationPress(kvpress.KnormPress(0.5)),
    kvpress.ChunkPress(kvpress.KnormPress(0.5), chunk_length=8),
]


def built() -> tuple[Any, Tensor]:
    """A small Llama, and tokens for it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=3, initializer_range=0.1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    return model, torch.stack([torch.randperm(49)[: N + 1] + 1 for _ in range(2)])


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def by_kvpress(press: Any, model: Any, ids: Tensor) -> tuple[Tensor, Any]:
    """Logits of the last token after a prompt that kvpress shortened, and the cache."""
    cache = transformers.DynamicCache(config=model.config)
    with press(model):
        model(ids[:, :N], past_key_values=cache)
    kept = cache.get_seq_length()
    position = torch.full((len(ids), 1), N)
    return model(ids[:, N:], past_key_values=cache, position_ids=position).logits, kept


def by_us(press: Any, model: Any, ids: Tensor) -> tuple[Tensor, Any]:
    with saccade.compressed(model, press) as cache:
        model(ids[:, :N], past_key_values=cache)
        kept = int(cache.lengths[0].max())
        return model(ids[:, N:], past_key_values=cache).logits, kept


def test_the_interface_is_what_ours_takes_and_is() -> None:
    names = [*inspect.signature(kvpress.BasePress.compress).parameters]
    assert names == [*inspect.signature(PolicyPress.compress).parameters]
    assert [*inspect.signature(kvpress.ScorerPress.score).parameters] == names
    assert names == [*inspect.signature(PolicyPress.score).parameters]
    assert [*inspect.signature(kvpress.BasePress.post_init_from_model).parameters] == ["self", "model"]
    press = as_press(KeyNorm(), 0.25)
    assert isinstance(press, kvpress.ScorerPress) and press.compression_ratio == 0.25


@pytest.mark.parametrize("press", PRESSES, ids=lambda press: type(press).__name__)
@torch.no_grad()
def test_theirs_in_our_caches(press: Any) -> None:
    model, ids = built()
    logits, held = by_us(press, model, ids)
    assert abs(held - N * (1 - press.compression_ratio)) <= 1 and logits.isfinite().all()
    if type(press) is kvpress.KnormPress:
        with saccade.compressed(model, KeyNorm(sinks=0, recent=0.0), held) as cache:
            model(ids[:, :N], past_key_values=cache)
            close(logits[:, 0], model(ids[:, N:], past_key_values=cache).logits[:, 0])


@beside_theirs
@pytest.mark.parametrize("policy", [Window(sinks=2), HeavyHitters(), KeyNorm(), Random()], ids=str)
@torch.no_grad()
def test_ours_in_their_context_manager(policy: Policy) -> None:
    model, ids = built()
    logits, kept = by_kvpress(as_press(policy, 0.5), model, ids)
    dense = model(ids).logits[:, N:]
    assert kept == N // 2 and logits.isfinite().all() and not torch.allclose(logits, dense, atol=1e-4)
    close(by_kvpress(as_press(policy, 0.0), model, ids)[0], dense)


@beside_theirs
@torch.no_grad()
def test_ours_in_their_wrappers() -> None:
    model, ids = built()
    ours, theirs = as_press(KeyNorm(sinks=0, recent=0.0), 0.5), kvpress.KnormPress(0.5)
    for wrap in (kvpress.AdaKVPress, kvpress.KeyRerotationPress, lambda press: kvpress.ComposedPress([press])):
        close(by_kvpress(wrap(ours), model, ids)[0], by_kvpress(wrap(theirs), model, ids)[0])


@torch.no_grad()
def test_what_drops_nothing_is_refused() -> None:
    model, ids = built()
    for press in (kvpress.ComposedPress([kvpress.KnormPress(0.5)]), kvpress.KVzipPress(0.5)):
        with pytest.raises(ValueError, match="of its own, not by compress"):
            cache_for(model, press)
    with running(model), pytest.raises(ValueError, match="AdaKVPress drops no keys"):
        model(ids, past_key_values=cache_for(model, kvpress.AdaKVPress(kvpress.KnormPress(0.5))))
    assert all(getattr(layer.self_attn, "masked_key_indices", None) is None for layer in model.model.layers)
