"""Bottleneck fusion: the card's invariants, missing and padded modalities, the paper's model, bad arguments."""

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

import saccade
from saccade.fusion.bottleneck_fusion import MBT, BottleneckFusion, through_bottleneck
from saccade.fusion.bottleneck_fusion.claim import xor_clips


def _fusion(**arguments):
    torch.manual_seed(0)
    fusion = BottleneckFusion(**{"dim": 8, "num_heads": 2, "num_bottlenecks": 2, "depth": 3, **arguments})
    for parameter in fusion.parameters():
        nn.init.normal_(parameter, std=0.4)
    return fusion.eval()


def _streams(*lengths, batch=2, dim=8):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(batch, n, dim, generator=generator) for n in lengths)


def _crossing(fusion):
    """The gradient of the second stream's result with respect to the first stream."""
    a, b = _streams(5, 4)
    return torch.autograd.grad(fusion(a.requires_grad_(), b)[1].sum(), a, allow_unused=True)[0]


def _forward_crossing(fusion):
    a, b = _streams(5, 4)
    return (fusion(a, b)[1] - fusion(a.flip(1, 2), b)[1]).abs().max()


def test_late_fusion_is_independent_encoders():
    fusion = _fusion(fusion_layer=3)
    crossing = _crossing(fusion)
    assert crossing is None or not crossing.any()
    a, b = _streams(5, 4)
    x = a
    for blocks in fusion.layers:
        x = blocks["a"](x)
    torch.testing.assert_close(fusion(a, b)[0], x)


def test_news_needs_two_fused_layers():
    assert _forward_crossing(_fusion(fusion_layer=2)) == 0
    crossing = _crossing(_fusion(fusion_layer=2))
    assert crossing is None or not crossing.any()
    assert _forward_crossing(_fusion(fusion_layer=1)) > 1e-4


@pytest.mark.parametrize("bottlenecks", [1, 2])
def test_what_crosses_is_as_narrow_as_the_bottleneck(bottlenecks):
    fusion = _fusion(dim=4, depth=2, num_bottlenecks=bottlenecks).double()
    a, b = (stream.double() for stream in _streams(6, 5, batch=1, dim=4))
    jacobian = torch.autograd.functional.jacobian(lambda a: fusion(a, b)[1], a).reshape(20, 24)
    assert 1 <= torch.linalg.matrix_rank(jacobian, rtol=1e-10) <= bottlenecks * 4
    joint = _fusion(dim=4, depth=2, bottleneck=False).double()
    free = torch.autograd.functional.jacobian(lambda a: joint(a, b)[1], a).reshape(20, 24)
    assert torch.linalg.matrix_rank(free, rtol=1e-10) > bottlenecks * 4


def test_one_modality_is_a_transformer_with_extra_tokens():
    fusion = _fusion(weights=("a",))
    (a,) = _streams(5)
    x = torch.cat([a, fusion.bottleneck.expand(2, -1, -1)], 1)
    for blocks in fusion.layers:
        x = blocks["a"](x)
    torch.testing.assert_close(fusion(a)[0], x[:, :5])


def test_order_of_bottlenecks_does_not_matter():
    fusion, streams = _fusion(num_bottlenecks=5), _streams(5, 4)
    want = fusion(*streams)
    with torch.no_grad():
        fusion.bottleneck.copy_(fusion.bottleneck[:, torch.tensor([3, 0, 4, 1, 2])])
    for got, expected in zip(fusion(*streams), want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("bottleneck", [True, False])
def test_swapping_modalities_with_their_weights_swaps_the_results(bottleneck):
    fusion, twin = _fusion(bottleneck=bottleneck), _fusion(bottleneck=bottleneck, weights=("b", "a"))
    twin.load_state_dict(fusion.state_dict())
    a, b = _streams(5, 4)
    for got, expected in zip(twin(b, a), reversed(fusion(a, b)), strict=True):
        torch.testing.assert_close(got, expected)


def test_shared_weights_with_equal_inputs_keep_the_streams_equal():
    fusion = _fusion(weights=("a", "a"))
    (a,) = _streams(5)
    left, right = fusion(a, a)
    assert torch.equal(left, right)
    bottleneck = fusion.bottleneck.expand(2, -1, -1)
    block = fusion.layers[0]["a"]
    _, mean = through_bottleneck([block, block], [a, a], bottleneck, [None, None])
    torch.testing.assert_close(mean, through_bottleneck([block], [a], bottleneck, [None])[1])
    assert sum(p.numel() for p in fusion.parameters()) < sum(p.numel() for p in _fusion().parameters())


def test_all_modalities_read_the_bottleneck_of_the_layer_before():
    fusion, (a, b) = _fusion(depth=2, fusion_layer=0), _streams(5, 4)
    z, bottleneck = [a, b], fusion.bottleneck.expand(2, -1, -1)
    for blocks in fusion.layers:
        both = [blocks[name](torch.cat([x, bottleneck], 1)) for name, x in zip("ab", z, strict=True)]
        z, bottleneck = [y[:, :-2] for y in both], (both[0][:, -2:] + both[1][:, -2:]) / 2
    for got, expected in zip(fusion(a, b), z, strict=True):
        torch.testing.assert_close(got, expected)


def test_block_is_the_papers():
    (x,) = _streams(5)
    block = _fusion().layers[0]["a"]
    q, k, v = (
        proj(block.norm1(x)).unflatten(-1, (2, 4)).transpose(1, 2)
        for proj in (block.attention.q_proj, block.attention.k_proj, block.attention.v_proj)
    )
    attended = torch.softmax(q @ k.mT / 2, -1) @ v
    x1 = x + block.attention.out_proj(attended.transpose(1, 2).flatten(2))
    hidden = block.mlp.fc1(block.norm2(x1))
    hidden = 0.5 * hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
    torch.testing.assert_close(block(x), x1 + block.mlp.fc2(hidden), rtol=1e-4, atol=1e-5)
    assert block.norm1.eps == block.norm2.eps == 1e-6


@pytest.mark.parametrize("weights", [("a", "b", "c"), ("a", "a", "a")])
def test_without_bottleneck(weights):
    fusion, z = _fusion(bottleneck=False, depth=1, weights=weights), _streams(5, 4, 3)
    assert fusion.bottleneck is None
    got = fusion(*z)
    blocks = [fusion.layers[0][name] for name in weights]
    for i in range(3):
        others = [z[j] for j in range(3) if j != i]
        want = blocks[i](torch.cat([*others, z[i]], 1))[:, -z[i].shape[1] :]
        torch.testing.assert_close(got[i], want)


def test_three_modalities_and_any_of_them_missing():
    fusion, (a, b, c) = _fusion(weights=("a", "b", "c")), _streams(5, 4, 3)
    assert [x.shape for x in fusion(a, b, c)] == [a.shape, b.shape, c.shape]
    left, middle, right = fusion(a, None, c)
    two = _fusion(weights=("a", "c"))
    two.load_state_dict({name: p for name, p in fusion.state_dict().items() if ".b." not in name})
    assert middle is None
    for got, expected in zip((left, right), two(a, c), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("arguments", [{}, {"bottleneck": False}, {"bottleneck": False, "weights": ("a", "a")}])
def test_padding_changes_nothing(arguments):
    fusion, (a, b) = _fusion(**arguments), _streams(5, 4)
    pads = 9 * torch.randn(2, 3, 8)
    mask = torch.arange(8).expand(2, -1) < 5
    got = fusion(torch.cat([a, pads], 1), b, masks=(mask, None))
    want = fusion(a, b)
    torch.testing.assert_close(got[0][:, :5], want[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bottleneck", [True, False])
def test_a_row_without_real_tokens_is_a_missing_modality(bottleneck):
    fusion, (a, b) = _fusion(bottleneck=bottleneck), _streams(5, 4)
    masks = (torch.tensor([[True] * 5, [False] * 5]), torch.ones(2, 4, dtype=torch.bool))
    got = fusion(a, b, masks=masks)
    torch.testing.assert_close(got[1][0], fusion(a, b)[1][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1][1], fusion(None, b)[1][1], rtol=1e-4, atol=1e-5)
    nothing = tuple(torch.zeros_like(mask) for mask in masks)
    assert all(x.isfinite().all() for x in fusion(a, b, masks=nothing))


def test_test_without_bottlenecks():
    fusion, (a, b) = _fusion(test_with_bottlenecks=False), _streams(5, 4)
    assert _forward_crossing(fusion) == 0
    apart = _fusion(fusion_layer=3)
    apart.load_state_dict(fusion.state_dict())
    torch.testing.assert_close(fusion(a, b), apart(a, b))
    fusion.train()
    assert _forward_crossing(fusion) > 0


def test_drop_path():
    torch.manual_seed(0)
    rates = [blocks["a"].drop_path.rate for blocks in _fusion(depth=4, drop_path=0.3).layers]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    fusion = _fusion(drop_path=0.5, dropout=0.1, attn_drop=0.1).train()
    fusion(*_streams(5, 4))[1].sum().backward()
    assert fusion.layers[0]["b"].mlp.fc1.weight.grad.isfinite().all()


def test_half_precision():
    fusion, streams = _fusion(), _streams(5, 4)
    want = fusion(*streams)
    mask = torch.ones(2, 5, dtype=torch.bool)
    for masks in (None, (mask, None)):
        got = fusion.bfloat16()(*(x.bfloat16() for x in streams), masks=masks)
        for x, expected in zip(got, want, strict=True):
            assert x.dtype == torch.bfloat16
            assert (x.float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("lengths", [(1, 1), (1, 13), (7, 2)])
def test_odd_lengths_and_a_batch_of_none(lengths):
    fusion = _fusion()
    for batch in (1, 0):
        streams = _streams(*lengths, batch=batch)
        assert [x.shape for x in fusion(*streams)] == [x.shape for x in streams]


# The paper's model.


def _model(**arguments):
    torch.manual_seed(0)
    sizes = {"rgb_size": (4, 8, 8), "spectrogram_size": (12, 8), "patch": (2, 4, 4), "in_channels": 1}
    small = {"dim": 8, "num_heads": 2, "depth": 3, "fusion_layer": 1, "num_bottlenecks": 2, "drop_path": 0.0}
    model = MBT(5, **{**sizes, **small, **arguments})
    nn.init.normal_(model.head.weight)
    return model.eval()


def _clip():
    generator = torch.Generator().manual_seed(2)
    return {
        "spectrogram_BCHW": torch.randn(2, 1, 12, 8, generator=generator),
        "rgb_BCFHW": torch.randn(2, 1, 4, 8, 8, generator=generator),
    }


def test_model_with_class_tokens():
    model, clip = _model(), _clip()
    out = model(**clip)
    assert out.logits.shape == (2, 5) and out.tokens.shape == (2, 7 + 9, 8) and out.modality_logits.shape == (2, 2, 5)
    torch.testing.assert_close(out.logits, out.modality_logits.mean(0))
    torch.testing.assert_close(out.modality_logits, model.head(out.tokens[:, [0, 7]]).transpose(0, 1))
    assert model.encoder.bottleneck.shape == (1, 3, 8)
    assert not _untouched().logits.any()


def _untouched():
    return MBT(
        5, rgb_size=(4, 8, 8), spectrogram_size=(12, 8), patch=(2, 4, 4), dim=8, num_heads=2, depth=2, fusion_layer=1
    )(spectrogram_BCHW=torch.randn(1, 3, 12, 8), rgb_BCFHW=torch.randn(1, 3, 4, 8, 8))


@pytest.mark.parametrize(
    ("classifier", "pool"), [("gap", lambda x: x.mean(1)), ("gmp", lambda x: x.max(1)[0]), ("gsp", lambda x: x.sum(1))]
)
def test_model_with_pooling(classifier, pool):
    model = _model(classifier=classifier)
    out = model(**_clip())
    assert out.tokens.shape == (2, 6 + 8, 8) and out.modality_logits is None and model.encoder.bottleneck.shape[1] == 2
    torch.testing.assert_close(out.logits, model.head(pool(out.tokens)))


def test_model_with_one_modality_missing():
    model, clip = _model(), _clip()
    out = model(rgb_BCFHW=clip["rgb_BCFHW"])
    assert out.tokens.shape == (2, 9, 8) and out.modality_logits.shape == (1, 2, 5)
    alone = _model(modalities=("rgb",))
    alone.load_state_dict({k: v for k, v in model.state_dict().items() if "spectrogram" not in k})
    torch.testing.assert_close(alone(rgb_BCFHW=clip["rgb_BCFHW"]).logits, out.logits)


def test_default_sizes_are_mbt_b():
    with torch.device("meta"):
        model = MBT(527)
    assert model.positions["rgb"].table.shape == (1, 16 * 14 * 14 + 1, 768)
    assert model.positions["spectrogram"].table.shape == (1, 50 * 8 + 1, 768)
    assert len(model.encoder.layers) == 12 and model.encoder.fusion_layer == 8
    assert model.encoder.layers[-1]["rgb"].mlp.fc1.out_features == 3072
    assert model.encoder.layers[-1]["rgb"].drop_path.rate == pytest.approx(0.3)


def _recording(name):
    with safe_open(f"tests/golden/bottleneck-fusion/{name}.a.safetensors", "pt") as file:
        args = json.loads(file.metadata()["args"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    groups = {
        kind: {key[len(kind) + 1 :]: t for key, t in tensors.items() if key.startswith(kind + ".")}
        for kind in ("param", "input", "output")
    }
    return args, groups


@pytest.mark.parametrize("name", ["mbt", "mbt_shared"])
def test_equals_the_authors_code(name):
    args, groups = _recording(name)
    port = saccade.catalogue.port("bottleneck-fusion", name)
    model = port.build(args).eval()
    model.load_state_dict(port.convert(groups["param"]))
    got = port.run(model, groups["input"], args)
    for key, want in groups["output"].items():
        assert (got[key] - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize(
    "changes",
    [
        {"use_bottleneck": False},
        {"modality_fusion": ["rgb", "spectrogram"]},
        {"test_with_bottlenecks": False},
        {"use_bottleneck": False, "classifier": "gap"},
    ],
)
@pytest.mark.parametrize("name", ["mbt", "mbt_shared"])
def test_port_takes_the_authors_other_arguments(name, changes):
    args, groups = _recording(name)
    args |= changes
    port = saccade.catalogue.port("bottleneck-fusion", name)
    state = dict(groups["param"])
    if not args["use_bottleneck"]:
        del state["bottleneck"]
    if args["classifier"] == "gap":
        del state["cls"], state["clsspectrogram"]
        for key in [key for key in state if "posembed" in key]:
            state[key] = state[key][:, 1:]
    model = port.build(args).eval()
    model.load_state_dict(port.convert(state))
    got = port.run(model, groups["input"], args)
    assert got["logits"].shape == (2, 5)
    first = model.modalities[0]
    size = {"rgb": 8, "spectrogram": 6}[first] + (args["classifier"] == "token")
    # the order of modalities moves the tokens and changes nothing else
    if "modality_fusion" in changes:
        want = groups["output"]["tokens"]
        moved = torch.cat([got["tokens"][:, size:], got["tokens"][:, :size]], 1)
        torch.testing.assert_close(moved, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got["logits"], groups["output"]["logits"], rtol=1e-4, atol=1e-5)
    else:
        assert not torch.allclose(got["tokens"][:, :3], groups["output"]["tokens"][:, :3], atol=1e-3)


def test_port_with_one_modality_and_flat_patches():
    args, groups = _recording("mbt")
    port = saccade.catalogue.port("bottleneck-fusion", "mbt")
    state = {k: v for k, v in groups["param"].items() if "spectrogram" not in k}
    state["embedding.kernel"] = state["embedding.kernel"].sum(0)
    state["Transformer.posembed_input.pos_embedding"] = torch.randn(1, 17, 16)
    model = port.build({**args, "modality_fusion": ["rgb"], "patches": [4, 4]}).eval()
    model.load_state_dict(port.convert(state))
    assert port.run(model, {"rgb": groups["input"]["rgb"]}, args)["tokens"].shape == (2, 17, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fusion_layer": 4}, "depth must be positive and fusion_layer from 0 to depth, got 3 and 4"),
        ({"depth": 0}, "depth must be positive"),
        ({"num_bottlenecks": 0}, "num_bottlenecks must be positive, got 0"),
        ({"weights": ()}, "weights must be a name for each modality"),
        ({"weights": "ab"}, "weights must be a name for each modality"),
        ({"weights": ("a", "b", "a")}, "weights must be a name for each modality, all different or all equal"),
        ({"drop_path": 1.0}, "drop_path must be at least 0 and below 1, got 1.0"),
        ({"num_heads": 3}, r"num_heads must divide dim \(8\)"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        _fusion(**arguments)


def test_bad_calls():
    fusion, (a, b) = _fusion(), _streams(5, 4)
    cases = [
        ((a, b, a), {}, "expected 2 modalities, got 3"),
        ((None, None), {}, "at least one modality must be given"),
        ((a, b[:1]), {}, r"all modalities must have one batch size, got \[1, 2\]"),
        ((a, b[..., :4]), {}, r"a modality must be \(batch, tokens, 8\), got \(2, 4, 4\)"),
        ((a, b), {"masks": (None,)}, "masks must be one for each of 2 modalities, got 1"),
        ((a, b), {"masks": (torch.ones(2, 4, dtype=torch.bool), None)}, r"a mask must be bool \(batch, tokens\)"),
    ]
    for streams, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            fusion(*streams, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modalities": ("rgb", "smell")}, "modalities must be some of spectrogram, rgb"),
        ({"modalities": ("rgb", "rgb")}, "modalities must be different"),
        ({"classifier": "cls"}, "classifier must be one of token, gap, gmp, gsp, got 'cls'"),
        ({"patch": (4, 4)}, "patch must be three positive sizes"),
        ({"rgb_size": (1, 8, 8)}, "rgb_size must be 3 sizes of at least a patch"),
    ],
)
def test_bad_model_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        _model(**arguments)


def test_bad_model_calls():
    clip = _clip()
    with pytest.raises(ValueError, match="at least one modality"):
        _model()()
    with pytest.raises(ValueError, match=r"the position table is for 9 tokens \(class token included\), got 5"):
        _model()(rgb_BCFHW=clip["rgb_BCFHW"][:, :, :2])
    with pytest.raises(ValueError, match="this model has the modalities rgb, got spectrogram"):
        _model(modalities=("rgb",))(**clip)
    with pytest.raises(ValueError, match="rgb must have 5 axes"):
        _model()(rgb_BCFHW=clip["rgb_BCFHW"][0])


def test_xor_needs_both():
    spectrogram, clip, label = xor_clips(400, torch.Generator().manual_seed(0))
    high = spectrogram[:, 0].mean(1)[:, 6] > spectrogram[:, 0].mean(1)[:, 2]
    right = clip[:, 0].mean((1, 2))[:, 5:7].sum(-1) > clip[:, 0].mean((1, 2))[:, 1:3].sum(-1)
    assert torch.equal((high ^ right).long(), label)
    assert abs((high.long() == label).float().mean() - 0.5) < 0.1
