"""LSceneLLM: what is selected, what selected tokens change, causality, scenes of points, and models of transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.fusion.lscenellm import (
    MagnifiedDecoder,
    MagnifierAttention,
    PromptTokens,
    Scene,
    SceneMagnifier,
    SceneProjector,
    farthest_points,
    magnify,
    neighbours,
    scene_tokens,
    select_fine,
)
from saccade.layers.llama import Llama
from saccade.layers.wrapping import footprint
from saccade.ops.attend import attend

SCENE = Scene(2, 5, 3, 8)


def decoder(**changes: float) -> MagnifiedDecoder:
    torch.manual_seed(0)
    return MagnifiedDecoder(16, 2, 3, **{"start": 0, **changes}).eval()


def scene(text: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 5, 16), torch.randn(2, 5, 3, 16), torch.randn(2, text, 16)


def plain(model: MagnifiedDecoder, coarse: Tensor, text: Tensor, prefix: Tensor | None = None) -> Tensor:
    x = torch.cat([coarse, text] if prefix is None else [prefix, coarse, text], 1)
    for block in model.layers:
        x = block(x)
    return model.norm(x)[:, -text.shape[1] :]


def test_selection() -> None:
    torch.manual_seed(0)
    share = torch.rand(2, 7, 5)
    selected = select_fine(share, 96, 3).unflatten(-1, (5, 3))
    assert (selected.all(-1) == selected.any(-1)).all()  # all fine tokens of a coarse one, or none
    assert selected[..., 0].gather(-1, share.argmax(-1, keepdim=True)).all()
    assert not selected[..., 0].gather(-1, share.argmin(-1, keepdim=True)).any()
    assert torch.equal(select_fine(4 * share, 96, 3), selected.flatten(-2))
    assert not select_fine(share, 255, 3).any() and select_fine(share, -1, 3).all()
    assert not select_fine(torch.full((1, 2, 5), 0.3), 96, 3).any()  # all alike: nothing


def test_merging_equals_one_softmax() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    fine_k, fine_v = torch.randn(2, 2, 2, 9, 8)  # of two heads, for four
    selected = torch.rand(2, 6, 9) < 0.3
    selected[:, 2] = False
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    ordinary, lse = attend(q, k, v, mask=causal, return_lse=True)
    got = magnify(q, ordinary, lse, fine_k, fine_v, selected)
    keys, values = (torch.cat([a, b.repeat_interleave(2, 1)], 2) for a, b in ((k, fine_k), (v, fine_v)))
    mask = torch.cat([causal.expand(2, -1, -1), selected], -1)[:, None]
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, keys, values, mask))
    assert torch.equal(got[:, :, 2], ordinary[:, :, 2])
    half = magnify(q, ordinary, lse, fine_k, fine_v, selected, share=0.5)
    torch.testing.assert_close(half, (got + ordinary) / 2)


def test_nothing_selected_is_the_plain_decoder() -> None:
    model, (coarse, fine, text) = decoder(threshold=255.0), scene()
    assert torch.equal(model(coarse, fine, text), plain(model, coarse, text))
    prefix = torch.randn(2, 3, 16)
    assert torch.equal(model(coarse, fine, text, prefix_BPC=prefix), plain(model, coarse, text, prefix))
    other = decoder(threshold=-1.0)
    assert not torch.allclose(other(coarse, fine, text), plain(other, coarse, text))
    assert torch.equal(decoder(threshold=-1.0, share=0.0)(coarse, fine, text), plain(other, coarse, text))


def test_rows_before_the_text_never_change_and_later_ones_change_no_earlier() -> None:
    torch.manual_seed(0)
    layer, x, fine = MagnifierAttention(16, 2), torch.randn(2, 12, 16), torch.randn(2, 15, 16)
    everything = torch.ones(2, 4, 15, dtype=torch.bool)
    seen, selected = layer.look(x, SCENE, fine, everything)
    assert torch.equal(seen[:, :8], layer(x)[:, :8]) and not torch.allclose(seen[:, 8:], layer(x)[:, 8:])
    assert selected.shape == (2, 4, 15)
    model, (coarse, fine, text) = decoder(), scene()
    later = torch.cat([text[:, :4], torch.randn(2, 2, 16)], 1)
    torch.testing.assert_close(model(coarse, fine, later)[:, :4], model(coarse, fine, text)[:, :4])
    padded = model(coarse, fine, text, last_text=8)  # rows 5 .. 8 are text, the others padding
    torch.testing.assert_close(padded[:, :4], model(coarse, fine, text)[:, :4])


def test_fine_values_of_zero_shrink_by_the_mass_that_goes_there() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 3, 8)
    fine_k = torch.randn(1, 1, 4, 8)
    ordinary, lse = attend(q, k, v, return_lse=True)
    got = magnify(q, ordinary, lse, fine_k, torch.zeros(1, 1, 4, 8), torch.ones(1, 3, 4, dtype=torch.bool))
    mass = (q @ torch.cat([k, fine_k], 2).mT * 8**-0.5).softmax(-1)[..., 3:].sum(-1)
    torch.testing.assert_close(got, ordinary * (1 - mass)[..., None])


def test_scenes_of_points() -> None:
    torch.manual_seed(0)
    corners = torch.tensor([[x, y, z] for x in (0.0, 9.0) for y in (0.0, 9.0) for z in (0.0, 9.0)])
    points = (corners[:, None] + 0.1 * torch.rand(8, 20, 3)).flatten(0, 1)[torch.randperm(160)][None]
    which = torch.cdist(points[0], corners).argmin(1)
    assert which[farthest_points(points, 8)[0]].unique().numel() == 8  # one in each corner
    assert neighbours(points, points[:, :4], 1)[0, :, 0].tolist() == [0, 1, 2, 3]
    coarse, fine, centres = scene_tokens(
        points, F.one_hot(which, 8).float()[None], tokens=8, group=20, per_token=4, fine_group=20
    )
    assert coarse.shape == (1, 8, 8) and fine.shape == (1, 8, 4, 8) and centres.shape == (1, 8, 3)
    torch.testing.assert_close(coarse[0].argmax(-1).sort().values, torch.arange(8))
    torch.testing.assert_close(fine, coarse[:, :, None].expand(-1, -1, 4, -1))  # a corner is all alike
    assert SceneProjector(8, 6)(fine).shape == (1, 8, 4, 6) and PromptTokens(8, 6)(coarse[:, 0]).shape == (1, 8, 6)


def tiny(**changes: object) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "pad_token_id": 0,
             "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **changes)).eval()


def test_a_model_of_transformers_looks_closer_and_is_as_before() -> None:
    model, ids, fine = tiny(), torch.randint(3, 30, (2, 11)), torch.randn(2, 15, 16)
    magnifier, before = SceneMagnifier.of(model), footprint(model)
    assert magnifier.start == 0 and torch.equal(magnifier.key[0].weight, model.model.layers[1].self_attn.k_proj.weight)
    with torch.no_grad():
        ordinary = model(ids).logits
        with magnifier(model, fine, SCENE) as report:
            seen = model(ids).logits
        assert torch.equal(seen[:, :8], ordinary[:, :8]) and not torch.allclose(seen[:, 8:], ordinary[:, 8:])
        assert report.rows == 3 * 2 * 3 and 0 < report.selected < report.rows * 15 and report.calls == 2
        assert "fine tokens a row" in str(report)
        magnifier.threshold = 255.0
        with magnifier(model, fine, SCENE):
            assert torch.equal(model(ids).logits, ordinary)
        magnifier.threshold = 96.0
        with magnifier(model, fine, SCENE):  # with the cache, as without it; as beams, as eager attention
            said = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
            assert torch.equal(
                model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=False), said
            )
            beams = model.generate(ids, max_new_tokens=3, num_beams=3, do_sample=False, pad_token_id=0)
            assert beams.shape[0] == 2
            model.set_attn_implementation("eager")
            torch.testing.assert_close(model(ids).logits, seen)
            model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="stop"), magnifier(model, fine, SCENE):
        raise RuntimeError("stop")
    assert footprint(model) == before


def test_the_wrapper_equals_the_decoder() -> None:
    model, ours = tiny(rms_norm_eps=1e-6), MagnifiedDecoder(16, 4, 3, start=0, hidden=24, num_kv_heads=2).eval()
    magnifier = SceneMagnifier.of(model)
    for projection in (*magnifier.key, *magnifier.value):
        nn.init.normal_(projection.weight)
    names = {name.replace("o_proj", "out_proj"): tensor for name, tensor in model.model.state_dict().items()}
    fine = {
        f"layers.{i + 1}.self_attn.fine_{letter}_proj.weight": part[i].weight
        for i in range(2)
        for letter, part in (("k", magnifier.key), ("v", magnifier.value))
    }
    missing = ours.load_state_dict({n: t for n, t in (names | fine).items() if n in ours.state_dict()}, strict=False)
    assert not missing.missing_keys
    (coarse, dense, text), prefix = scene(), torch.randn(2, 3, 16)
    with torch.no_grad(), magnifier(model, dense.flatten(1, 2), Scene(3, 5, 3, 8)):
        theirs = model.model(inputs_embeds=torch.cat([prefix, coarse, text], 1)).last_hidden_state[:, 8:]
    torch.testing.assert_close(ours(coarse, dense, text, prefix_BPC=prefix), theirs, atol=1e-5, rtol=1e-5)


def test_its_projections_learn() -> None:
    model = tiny().requires_grad_(False)
    magnifier = SceneMagnifier.of(model)
    with magnifier(model, torch.randn(2, 15, 16), SCENE):
        model(torch.randint(3, 30, (2, 11))).logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in magnifier.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Scene(2, 0, 3, 8), "tokens and per_token positive"),
        (lambda: Scene(2, 5, 3, 6), r"behind the scene, 2 \.\. 6, got 6"),
        (lambda: Scene(2, 5, 3, 8, 7), r"last_text must not stand before first_text \(8\), got 7"),
        (lambda: MagnifiedDecoder(16, 2, 3, start=2), r"start must be between 0 and layers - 2 \(1\), got 2"),
        (lambda: SceneMagnifier(16, 16, 1), r"layers - 2 \(-1\)"),
        (lambda: decoder()(*scene()[:1], torch.randn(2, 4, 3, 16), scene()[2]), r"\(batch, 5, fine tokens of each"),
        (lambda: MagnifierAttention(16, 2, magnifies=False).fine(torch.randn(2, 15, 16), SCENE), "only selects"),
        (lambda: MagnifierAttention(16, 2).fine(torch.randn(2, 14, 16), SCENE), r"\(batch, 5 x 3, 16\)"),
        (lambda: SceneMagnifier.of(nn.Linear(2, 2)), "Linear has no decoder"),
        (lambda: SceneMagnifier.of(Llama(9, 16, num_heads=2)), "LlamaAttention lacks o_proj"),
        (lambda: farthest_points(torch.randn(1, 3, 3), 4), r"number of points \(3\), got 4"),
        (lambda: neighbours(torch.randn(1, 3, 3), torch.randn(1, 1, 3), 4), "between 1 and 3 points, got 4"),
        (lambda: scene_tokens(torch.randn(1, 3, 3), torch.randn(1, 4, 3)), "must be as many"),
    ],
)
def test_refuses(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_call_behind_the_scene_is_refused() -> None:
    model, ids = tiny(), torch.randint(3, 30, (1, 11))
    cache = model(ids).past_key_values
    magnifier, message = (
        SceneMagnifier.of(model),
        "the first call must hold the scene, rows 2 and on, got a cache of 11",
    )
    with magnifier(model, torch.randn(1, 15, 16), SCENE), pytest.raises(ValueError, match=message):
        model(ids[:, :1], past_key_values=cache)
