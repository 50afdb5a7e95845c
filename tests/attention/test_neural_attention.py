"""Neural Attention: the invariants of its card, tiles against the definition, decoding, conversion, memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from saccade import catalogue, masks
from saccade.attention.neural_attention import NeuralAttention, PairNetwork, neural_attend
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.ops import measure

GOLDEN = Path(__file__).parents[1] / "golden" / "neural-attention"


def network(head_dim: int = 6, projection_dim: int = 4) -> PairNetwork:
    torch.manual_seed(0)
    return PairNetwork(head_dim, projection_dim).double()


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def by_definition(q: Tensor, k: Tensor, v: Tensor, net: PairNetwork, allowed: Tensor | None = None) -> Tensor:
    """The network on each concatenated pair, as the paper writes it."""
    G = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)
    N, M = q.shape[2], k.shape[2]
    down_q, down_k = net.query_down(q), net.key_down(k)
    z = torch.cat([down_q[:, :, :, None].expand(-1, -1, -1, M, -1), down_k[:, :, None].expand(-1, -1, N, -1, -1)], -1)
    scores = net.third(net.second(net.first(z).relu()).relu())[..., 0]
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("projection_dim", [2, 3, 7])
def test_additive_form_equals_the_concatenation(projection_dim: int) -> None:
    net = network(6, projection_dim)
    q, k, v = tensors((2, 4, 5, 6), (2, 2, 11, 6), (2, 2, 11, 3))
    torch.testing.assert_close(neural_attend(q, k, v, net), by_definition(q, k, v, net), rtol=1e-12, atol=1e-12)


def test_tiles_equal_the_definition_forward_and_backward() -> None:
    net = network()
    q, k, v = tensors((1, 4, 70, 6), (1, 2, 70, 6), (1, 2, 70, 5))
    inputs = (q, k, v, *net.parameters())
    seed = torch.randn(1, 4, 70, 5, dtype=torch.float64)
    expected = by_definition(q, k, v, net, torch.ones(70, 70).tril().bool())
    wanted = torch.autograd.grad(expected, inputs, seed)
    ours = neural_attend(q, k, v, net, causal=True, backend="stream")
    got = torch.autograd.grad(ours, inputs, seed)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gradcheck() -> None:
    net = network(4, 2)
    q, k, v = tensors((1, 2, 3, 4), (1, 1, 4, 4), (1, 1, 4, 2))
    assert torch.autograd.gradcheck(lambda *x: neural_attend(*x, net), (q, k, v))


def test_a_network_blind_to_keys_attends_uniformly() -> None:
    q, k, v = tensors((1, 2, 9, 6), (1, 2, 9, 6), (1, 2, 9, 3))
    running = v.cumsum(2) / torch.arange(1, 10)[:, None]
    for blind in ("w_3", "B"):
        net = network()
        with torch.no_grad():
            (net.third.weight if blind == "w_3" else net.first.weight[:, 4:]).zero_()
        torch.testing.assert_close(neural_attend(q, k, v, net), v.mean(2, keepdim=True).expand_as(v))
        torch.testing.assert_close(neural_attend(q, k, v, net, causal=True), running)


def test_a_network_blind_to_queries_attends_alike() -> None:
    net = network()
    with torch.no_grad():
        net.first.weight[:, :4].zero_()
    q, k, v = tensors((1, 2, 9, 6), (1, 2, 7, 6), (1, 2, 7, 3))
    out = neural_attend(q, k, v, net)
    torch.testing.assert_close(out, out[:, :, :1].expand_as(out))
    assert not torch.allclose(out[:, :, 0], v.mean(2))


def test_permutations_are_followed() -> None:
    torch.manual_seed(0)
    layer, x, order = NeuralAttention(12, 2, rope=False), torch.randn(2, 9, 12), torch.randperm(9)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


def test_masks_and_causality_hold_together() -> None:
    net = network()
    q, k, v = tensors((2, 2, 8, 6), (2, 2, 8, 6), (2, 2, 8, 3))
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[0, 5:], valid[1, :2] = False, False
    allowed = torch.ones(8, 8).tril().bool() & valid[:, None, None]
    out = neural_attend(q, k, v, net, mask=valid, causal=True)
    expected = by_definition(q, k, v, net, allowed)
    assert not out[1, :, :2].any()  # nothing to attend to
    torch.testing.assert_close(out[0], expected[0])
    torch.testing.assert_close(out[1, :, 2:], expected[1, :, 2:])
    window = neural_attend(q, k, v, net, mask=masks.window(2))
    torch.testing.assert_close(window, by_definition(q, k, v, net, masks.window(2).dense(8, 8)))


def test_the_cache_is_as_narrow_as_the_network() -> None:
    torch.manual_seed(0)
    layer, x = NeuralAttention(64, 2, True, num_kv_heads=1, projection_dim=2).eval(), torch.randn(3, 10, 64)
    cache = layer.new_cache(3)
    with torch.no_grad():
        pieces = [layer(x[:, :4], cache=cache), *(layer(x[:, i : i + 1], cache=cache) for i in range(4, 10))]
        torch.testing.assert_close(torch.cat(pieces, 1), layer(x))
    assert cache.nbytes == 3 * 10 * (2 + 32) * 4


def test_extra_memory_does_not_grow_with_pairs() -> None:
    net = PairNetwork(8, 4)

    def extra(length: int) -> int:
        q, k, v = (torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(3))
        return measure.peak_bytes(lambda: neural_attend(q, k, v, net).sum().backward())

    # all activations of 4096 x 4096 pairs would take 16.8 M x 28 B x 2 = 900 MB
    assert extra(4096) < 48 * 2**20


def test_takes_over_the_projections_of_a_softmax_layer() -> None:
    dense = SoftmaxAttention(16, 4, causal=True, num_kv_heads=2, qkv_bias=True)
    ours = NeuralAttention.from_softmax(dense)
    assert ours.causal and ours.num_kv_heads == 2
    for name, parameter in dense.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name))


def test_a_last_bias_has_no_effect_and_the_causal_module_ignores_masks() -> None:
    """As the authors' modules: b_3 cancels in the softmax; causal=True overwrites the caller's mask."""
    recording = GOLDEN / "neural_attention_full.a.safetensors"
    with safe_open(recording, "pt") as file:
        arguments = json.loads(file.metadata()["args"])
    loaded = load_file(recording)
    state = {name[6:]: tensor for name, tensor in loaded.items() if name.startswith("param.")}
    port = catalogue.port("neural-attention", "neural_attention_full")
    inputs = {"x": loaded["input.x"], "mask": loaded["input.mask"]}
    outputs = []
    for bias in (0.0, 5.0):
        module = port.build({**arguments, "causal": True})
        module.load_state_dict(port.convert({**state, "linear3.bias": torch.tensor([bias])}))
        outputs.append(port.run(module.eval(), inputs, arguments))
    assert torch.equal(outputs[0]["y"], outputs[1]["y"])
    assert torch.equal(outputs[0]["y"], outputs[0]["y_masked"])


def test_authors_defaults() -> None:
    module = catalogue.port("neural-attention", "neural_attention_causal").build({"dim": 512})
    assert module.causal and module.num_heads == 8 and module.network.projection_dim == 2
    wide = catalogue.port("neural-attention", "neural_attention_full").build({"dim": 64, "heads": 2, "dim_head": 96})
    assert not wide.causal and wide.out_proj.in_features == 192 and wide.network.projection_dim == 3


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="projection_dim must be at least 2, got 1"):
        NeuralAttention(16, 4, projection_dim=1)
    q, k, v = (torch.randn(1, 2, 4, 6) for _ in range(3))
    with pytest.raises(ValueError, match="cannot do this"):
        neural_attend(q, k, v, PairNetwork(6, 2), backend="sdpa")
