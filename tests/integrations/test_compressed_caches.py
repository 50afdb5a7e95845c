"""Caches under a policy inside transformers models: against full caches and masks, in batches, beams, hybrids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import saccade
from saccade.layers.ragged_tokens import PAGE

transformers = pytest.importorskip("transformers")

from saccade.attention.nats import NAtS, lifetimes  # noqa: E402
from saccade.compress.policies import HeavyHitters, KeyNorm, Policy, Random, Window  # noqa: E402
from saccade.integrations.compression import as_press, cache_for, running  # noqa: E402

SMALL: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0}
SMALL |= {"initializer_range": 0.1}  # attention that is not even
#: name, options
POLICIES: list[tuple[str, dict[str, Any]]] = [
    ("window", {"sinks": 2}),
    ("heavy-hitters", {}),
    ("heavy-hitters", {"observe": 3, "sinks": 1}),
    ("key-norm", {}),
    ("random", {"seed": 2}),
]


def built(name: str) -> Any:
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"] * 2
    config: Any = {
        "llama": lambda: transformers.LlamaConfig(**SMALL, num_hidden_layers=3),
        "mistral": lambda: transformers.MistralConfig(**SMALL, num_hidden_layers=2, sliding_window=7),
        "gemma2": lambda: transformers.Gemma2Config(
            **SMALL, num_hidden_layers=4, sliding_window=7, layer_types=kinds, attn_logit_softcapping=2.0
        ),
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **SMALL, num_hidden_layers=4, sliding_window=7, layer_types=kinds
        ),
    }[name]()
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def tokens(B: int, N: int, seed: int = 1) -> Tensor:
    """No token twice among 49: of one token the keys have one norm, and rounding would choose among them."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.cat([torch.randperm(49, generator=generator) + 1 for _ in range(3)])[:N] for _ in range(B)]
    return torch.stack(rows)


def logits_of(model: Any, ids: Tensor, sizes: list[int], cache: Any, mask: Tensor | None = None) -> Tensor:
    """In pieces; positions are those of the real tokens."""
    found, done = [], 0
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    for piece in ids.split(sizes, 1):
        end = done + piece.shape[1]
        given = {} if mask is None else {"attention_mask": mask[:, :end], "position_ids": positions[:, done:end]}
        found.append(model(piece, past_key_values=cache, use_cache=True, **given).logits)
        done = end
    return torch.cat(found, 1)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3"])
@pytest.mark.parametrize("sizes", [[30], [20, 1, 1, 1, 7], [9, 13, 8]])
@torch.no_grad()
def test_with_room_for_all_it_is_the_full_cache(name: str, sizes: list[int]) -> None:
    model, ids = built(name), tokens(2, 30)
    plain = model(ids).logits
    for policy, options in [("full", {}), *POLICIES]:
        budget = None if policy == "full" else 30
        layers = [0, 1] if name == "mistral" else None
        with saccade.compressed(model, policy, budget, layers=layers, **options) as cache:
            close(logits_of(model, ids, sizes, cache), plain)
    close(model(ids).logits, plain)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@torch.no_grad()
def test_window_and_sinks_step_by_step_is_that_mask(name: str) -> None:
    model, ids = built(name), tokens(2, 40)
    options: dict[str, Any] = {"layers": "all"} if name == "mistral" else {}
    layers = [0, 1] if options else None
    row = torch.arange(40)[:, None]
    sinks, budget = (2, 10) if name == "llama" else (0, 5)
    seen = (row >= row.T) & ((row - row.T <= budget - sinks) | (sinks > row.T))
    eager = built(name)
    eager.set_attn_implementation("eager")
    bias = torch.zeros(40, 40).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None].expand(2, 1, -1, -1)
    masked = eager(ids, attention_mask=bias, use_cache=False).logits
    with saccade.compressed(model, "window", budget, sinks=sinks, layers=layers) as cache:
        close(logits_of(model, ids, [1] * 40, cache), masked)
        assert all((lengths == budget).all() for lengths in cache.lengths)


@pytest.mark.parametrize(("policy", "options"), POLICIES)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_left_padding_gives_the_rows_alone(name: str, policy: str, options: dict[str, Any]) -> None:
    model, ids = built(name), tokens(2, 34)
    mask = torch.ones(2, 34, dtype=torch.long)
    mask[1, :11] = 0
    sizes = [30, 1, 1, 2]
    for budget in (8, 0.4):
        with running(model):
            cache = cache_for(model, policy, budget, **options)
            both = logits_of(model, ids, sizes, cache, mask)
            for row, first in ((0, 0), (1, 11)):
                alone = cache_for(model, policy, budget, **options)
                close(both[row, first:], logits_of(model, ids[row : row + 1, first:], [30 - first, 1, 1, 2], alone)[0])
                for mine, ours in zip(cache.lengths, alone.lengths):
                    assert (mine is None) == (ours is None) and (mine is None or mine[row].equal(ours[0]))
            # a mask of ones is no mask
            full = cache_for(model, "full")
            close(
                logits_of(model, ids, sizes, full, torch.ones_like(mask)),
                model(ids, past_key_values=cache_for(model, "full")).logits,
            )


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_generates_with_and_without_beams(name: str) -> None:
    model, ids = built(name), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :4], ids[0, :4] = 0, 0
    for beams in (1, 3):
        how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1, "num_beams": beams, "attention_mask": mask}
        plain = model.generate(ids, **how)
        for policy, options in POLICIES:
            with saccade.compressed(model, policy, 64, **options) as cache:
                assert torch.equal(model.generate(ids, **how, past_key_values=cache), plain)
                cache.reset()
                assert torch.equal(model.generate(ids, **how, past_key_values=cache), plain)
            with saccade.compressed(model, policy, 6, least=0.5, **options) as cache:
                out = model.generate(ids, **how, past_key_values=cache)
                assert out.shape == plain.shape and cache.seen == 23
                assert all(x is None or x.sum(1).eq(12).all() for x in cache.lengths)


@torch.no_grad()
def test_bytes_fall_as_predicted_and_heads_are_ragged() -> None:
    model, ids = built("llama"), tokens(2, 128)
    one, held = 2 * 8 * 4, {}
    with running(model):
        for budget in (128, 64, 16):
            cache = cache_for(model, "window", budget)
            model(ids, past_key_values=cache)
            held[budget] = cache.bytes
            assert cache.bytes == 3 * (4 * budget * (one + 4 + 1) + 4 * 3 * 8)
        full = transformers.DynamicCache(config=model.config)
        with pytest.raises(ValueError, match="past_key_values=cache"):
            model(ids, past_key_values=full)
        cache = cache_for(model, "heavy-hitters", 24, least=0.1, recent=0.2)
        model(ids, past_key_values=cache)
        lengths = torch.stack([x for x in cache.lengths if x is not None])
        assert (lengths.sum(-1) == 48).all() and len(lengths.unique()) > 4
        places = (PAGE * (-(-lengths // PAGE))).sum()
        # keys, values, position, weight and a mark of each place; tables of the heads, and an owner a page
        assert 0 <= cache.bytes - int(places) * (one + 4 + 4 + 1) <= 3 * 8 * (3 * 4 + 20)
        budget = cache_for(model, "key-norm", "16 KiB")
        model(ids, past_key_values=budget)
        assert 0.7 * 2**14 < budget.bytes <= 2**14
    model(ids, past_key_values=full)
    dense = sum(x.numel() * 4 for layer in full.layers for x in (layer.keys, layer.values))
    assert dense == 3 * 4 * 128 * one and held[16] < 0.15 * dense


@torch.no_grad()
def test_hybrids_keep_what_they_have() -> None:
    model, ids = built("gemma3"), tokens(1, 50)
    with saccade.compressed(model, "window", 16) as cache:
        model(ids, past_key_values=cache)
        assert [None if x is None else x.tolist() for x in cache.lengths] == [None, [[16, 16]]] * 2
        sliding = 2 * 2 * 6 * 8 * 4
        # transformers' sliding layers hold a view of the whole prompt until the next step; then what the window holds
        model(ids[:, :1], past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer", "PolicyLayer"] * 2
        assert cache.layers[0].keys.shape[2] == 6 and cache.bytes >= 2 * sliding
    with saccade.compressed(model, "window", 4, sinks=0, layers=[0, 1, 2, 3]) as cache:
        model(ids, past_key_values=cache)
        assert all((x == 4).all() for x in cache.lengths)


@torch.no_grad()
def test_a_budget_shared_by_beams_selected_and_repeated() -> None:
    model, ids = built("llama"), tokens(2, 20)
    with saccade.compressed(model, "key-norm", 7) as cache:
        model(ids, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        out = model(ids[[0, 0, 1, 1], :1], past_key_values=cache).logits
        assert out[0].equal(out[1]) and out[2].equal(out[3])
        cache.batch_select_indices(torch.tensor([3, 0]))
        assert cache.lengths[0].shape == (2, 2)
        assert cache.crop(0) is None
        with pytest.raises(ValueError, match="cropped"):
            cache.crop(-1)


def test_refusals() -> None:
    model = built("llama")
    for arguments, words in (
        (("windows", 3), "full, window"),
        (("window", 3, {"sink": 1}), "options sinks"),
        (("window", 3, {"layers": [7]}), "no layer is 7"),
        (("window",), "needs a budget"),
        ((), "needs a policy"),
        (("window", 3, {"image": tokens(1, 4)}), "A-VL"),
    ):
        *given, options = arguments if arguments and isinstance(arguments[-1], dict) else (*arguments, {})
        with pytest.raises(ValueError, match=words), saccade.compressed(model, *given, **options):
            pass
    with pytest.raises(ValueError, match="no layer of full attention"):
        cache_for(built("mistral"), "window", 4)
    with saccade.compressed(model, "window", 4) as cache, torch.no_grad():
        with pytest.raises(ValueError, match="past_key_values=cache"):
            model(tokens(1, 5), use_cache=False)
        with pytest.raises(ValueError, match="no packed sequences or pairs"):
            pairs = torch.rand(1, 1, 5, 5) < 0.5
            model(tokens(1, 5), attention_mask=pairs, past_key_values=cache)
    assert model.config._attn_implementation == "sdpa"


class ShortKeys:
    """A stand-in with kvpress' interface: its scorers keep the best `int(N (1 - ratio))` tokens of each head."""

    def __init__(self, compression_ratio: float) -> None:
        self.compression_ratio, self.calls = compression_ratio, 0

    def compress(
        self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        assert hidden_states.shape[1] == keys.shape[2] and attentions is None
        assert module.q_proj is not None and kwargs["position_embeddings"][0].shape[1] == keys.shape[2]
        self.calls += 1
        kept = int(keys.shape[2] * (1 - self.compression_ratio))
        index = (-keys.norm(dim=-1)).topk(kept, dim=-1).indices[..., None].expand(-1, -1, -1, keys.shape[3])
        return keys.gather(2, index), values.gather(2, index)


@torch.no_grad()
def test_a_press_is_taken_as_a_policy() -> None:
    model, ids = built("llama"), tokens(2, 25)
    press, policy = ShortKeys(0.6), KeyNorm(sinks=0, recent=0.0)
    with running(model):
        ours, theirs = cache_for(model, policy, 10), cache_for(model, press)
        first = [model(ids[:, :24], past_key_values=cache).logits for cache in (ours, theirs)]
        close(first[0], first[1])
        assert press.calls == 3 and all((x == 9).all() for x in theirs.lengths)
        ours = cache_for(model, policy, 9)
        model(ids[:, :24], past_key_values=ours)
        close(*(model(ids[:, 24:], past_key_values=cache).logits for cache in (ours, theirs)))
        assert press.calls == 3 and all((x == 10).all() for x in theirs.lengths)
        padded = torch.ones_like(ids)
        padded[0, 0] = 0
        with pytest.raises(ValueError, match="ShortKeys takes no padding"):
            model(ids, attention_mask=padded, past_key_values=cache_for(model, press))
    with pytest.raises(ValueError, match="takes no budget"):
        cache_for(model, press, 5)


@pytest.mark.parametrize(
    "policy", [Window(sinks=2), HeavyHitters(), HeavyHitters(observe=5), KeyNorm(), Random()], ids=str
)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@torch.no_grad()
def test_a_policy_as_a_press_keeps_the_same(name: str, policy: Policy) -> None:
    model, ids = built(name), tokens(2, 25)
    with running(model):
        ours, theirs = cache_for(model, policy, 12), cache_for(model, as_press(policy, 0.5))
        for cache in (ours, theirs):
            model(ids[:, :24], past_key_values=cache)
        close(*(model(ids[:, 24:], past_key_values=cache).logits for cache in (ours, theirs)))


@torch.no_grad()
def test_a_press_from_weights_that_are_given() -> None:
    eager, ids = built("llama"), tokens(1, 20)
    eager.set_attn_implementation("eager")
    seen: dict[str, Any] = {}
    module = eager.model.layers[1].self_attn

    def look(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen.update(kwargs, weights=output[1])

    module.register_forward_hook(look, with_kwargs=True)
    cache = transformers.DynamicCache(config=eager.config)
    eager(ids, past_key_values=cache)
    keys, values = cache.layers[1].keys, cache.layers[1].values
    for policy in (HeavyHitters(), HeavyHitters(observe=3)):
        press = as_press(policy, 0.5)
        given, computed = (
            press.compress(module, seen["hidden_states"], keys, values, weights, seen)
            for weights in (seen["weights"], None)
        )
        assert given[0].equal(computed[0]) and given[1].equal(computed[1]) and given[0].shape[2] == 10
    for bad, words in ((1.0, "compression_ratio"), (-0.1, "compression_ratio")):
        with pytest.raises(ValueError, match=words):
            as_press(KeyNorm(), bad)


@torch.no_grad()
def test_trained_roles_in_a_model() -> None:
    """A Llama whose layers have roles, against NAtS' layer with the same weights."""
    model, ids = built("llama"), tokens(2, 40)
    layer = NAtS(32, 4, num_kv_heads=2, head_dim=8, window=3, chunk_size=1, rope=True).eval()
    theirs = model.model.layers[0].self_attn
    for mine, name in (
        (layer.q_proj, "q_proj"),
        (layer.k_proj, "k_proj"),
        (layer.v_proj, "v_proj"),
        (layer.out_proj, "o_proj"),
    ):
        mine.weight.copy_(getattr(theirs, name).weight)
    seen: dict[str, Tensor] = {}
    hook = theirs.register_forward_hook(
        lambda module, args, kwargs, output: seen.update(x=kwargs["hidden_states"], y=output[0]), with_kwargs=True
    )
    with saccade.compressed(model, "nats", router=[layer.role_proj] * 3, window=3) as cache:
        model(ids, past_key_values=cache)
        close(seen["y"], layer(seen["x"]))
        alive = (lifetimes(layer.roles(seen["x"]).argmax(-1), 40, window=3) >= 40).sum(-1)
        assert cache.lengths[0].equal(alive) and (alive < 40).all()
    hook.remove()
    with pytest.raises(ValueError, match="learns its roles"), saccade.compressed(model, "nats"):
        pass


@torch.no_grad()
def test_fewer_visual_tokens() -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=20, patch_size=4),
        text_config=transformers.LlamaConfig(**SMALL, num_hidden_layers=2),
        image_token_id=49,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.cat([torch.arange(1, 4), torch.full((25,), 49), torch.arange(4, 12)])[None]
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 20, 20), "attention_mask": torch.ones_like(ids)}
    how = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    plain = model.generate(**inputs, **how)
    for budget, kept in ((25, 25), (5, 5), (0.2, 5)):
        with saccade.compressed(model, "token-compression", budget, start="strided") as cache:
            out = model.generate(**inputs, **how, past_key_values=cache)
        assert [x.tolist() for x in cache.lengths] == [[[11 + kept + 4] * 2]] * 2
        assert kept < 25 or out.equal(plain)
    with pytest.raises(ValueError, match="tokens of an image"), saccade.compressed(model, "token-compression", "1MB"):
        pass


@torch.no_grad()
def test_a_vl_on_text_alone_takes_a_budget() -> None:
    model, ids = built("llama"), tokens(2, 30)
    for budget, kept in ((8, 8), (0.5, 15)):
        with saccade.compressed(model, "a-vl", budget) as cache:
            model(ids, past_key_values=cache)
            assert [x.tolist() for x in cache.lengths] == [[[kept] * 2] * 2] * 3 and cache.bytes >= cache.nbytes
            model(ids[:, :1], past_key_values=cache)
    with saccade.compressed(model, "a-vl", 8) as cache:
        model(ids[:1], past_key_values=cache)
        cache.batch_repeat_interleave(3)
        said = model(torch.tensor([[1], [2], [3]]), past_key_values=cache).logits
        cache.batch_select_indices(torch.tensor([2, 0]))
        assert model(torch.tensor([[4], [4]]), past_key_values=cache).logits.shape == (2, 1, 50)
        with pytest.raises(ValueError, match="cannot be cropped"):
            cache.crop(-1)
        for row, token in enumerate((1, 2, 3)):
            cache.reset()
            model(ids[:1], past_key_values=cache)
            close(model(torch.tensor([[token]]), past_key_values=cache).logits[0], said[row])
    for arguments, words in (
        ((8, {"text_rate": 0.5}), "not both"),
        (("1MB", {}), "budget is a share"),
        ((8, {"layers": [0]}), "all layers"),
        ((8, {"least": 0.1}), "no least"),
    ):
        with pytest.raises(ValueError, match=words), saccade.compressed(model, "a-vl", arguments[0], **arguments[1]):
            pass
    with pytest.raises(ValueError, match="full attention, got"), saccade.compressed(built("gemma3"), "a-vl"):
        pass


@torch.no_grad()
def test_a_cache_that_would_store_nothing_is_refused() -> None:
    model, ids = built("llama"), tokens(1, 12)
    for policy, budget in (("window", 64), ("a-vl", None)):
        with saccade.compressed(model, policy, budget) as cache:
            model(ids, past_key_values=cache)
            with saccade.switch(model, "window", left=64), pytest.raises(ValueError, match="no switch"):
                model(ids, past_key_values=cache)
            with pytest.raises(ValueError, match="runs inside"):
                built("llama")(ids, past_key_values=cache)
            cache.reset()
        with pytest.raises(ValueError, match="runs inside"):
            model(ids, past_key_values=cache)
        refused = pytest.raises(ValueError, match="undo the switch")
        with refused, saccade.switch(model, "window", left=64), saccade.compressed(model, policy, budget):
            pass
        model.set_attn_implementation("saccade_moba")
        refused = pytest.raises(ValueError, match="undo attn_implementation='saccade_moba'")
        with refused, saccade.compressed(model, policy, budget):
            pass
        model.set_attn_implementation("saccade_softmax")
        with saccade.compressed(model, policy, budget) as cache:
            model(ids, past_key_values=cache)
        model.set_attn_implementation("sdpa")
    assert model(ids).logits.shape == (1, 12, 50)
    with saccade.compressed(model, "window", 64) as cache:
        for _ in range(2):
            model.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False, eos_token_id=-1)
            with pytest.raises(ValueError, match="ready for another prompt"):
                model.generate(ids[:, :7], past_key_values=cache, max_new_tokens=3)
            cache.reset()


def test_gradients_are_of_no_matter_to_what_is_kept() -> None:
    model, ids = built("llama"), tokens(1, 12)
    with saccade.compressed(model, "heavy-hitters", 9) as cache:
        found = [model(ids[:, i : i + 3], past_key_values=cache).logits for i in range(0, 12, 3)]
    with torch.no_grad(), saccade.compressed(model, "heavy-hitters", 9) as cache:
        close(torch.cat(found, 1), logits_of(model, ids, [3, 3, 3, 3], cache))
