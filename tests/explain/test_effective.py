"""Records of parts in a network: their weights, the gradients of these, the maps; the model is as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import saccade
from saccade.explain.effective import MixRecord, effective, part_maps
from saccade.explain.maps import _maximum_flow, flow, rollout
from saccade.layers.pre_norm import PreNormBlock
from saccade.layers.qkv_attention import QKVAttention
from saccade.ops.pattern import Pattern

N, DIM = 7, 12


class Plain(QKVAttention):
    """Softmax attention that keeps its weights, and so their gradient."""

    kept: Tensor

    def attend(self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern, *more: object) -> Tensor:  # type: ignore[override]
        weights = (q_BHND @ k_BKMD.mT).softmax(-1)
        if weights.requires_grad:
            weights.retain_grad()
            self.kept = weights
        return weights @ v_BKME


def network(*mixers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*(PreNormBlock(mixer, DIM) for mixer in mixers)).eval()


def parts(model: nn.Sequential) -> dict[str, nn.Module]:
    return {f"layer {i}": block.attention for i, block in enumerate(model)}


def looked_at(model: nn.Sequential, x: Tensor) -> list[MixRecord]:
    with effective(model, parts(model)) as records:
        model(x)[:, -1, 0].sum().backward()
    return records


def test_weights_and_their_gradients_are_those_of_the_chain_rule() -> None:
    torch.manual_seed(0)
    model, x = network(Plain(DIM, 3), Plain(DIM, 3)), torch.randn(2, N, DIM, requires_grad=True)
    records = looked_at(model, x)
    assert [record.name for record in records] == ["layer 0", "layer 1"] and records[0].shape == (2, 3, N, N)
    for record, block in zip(records, model, strict=True):
        torch.testing.assert_close(record.weights(), block.attention.kept)
        torch.testing.assert_close(record.gradients(), block.attention.kept.grad)


def test_the_model_is_as_it_was() -> None:
    torch.manual_seed(0)
    model, x = network(Plain(DIM, 3)), torch.randn(1, N, DIM, requires_grad=True)
    before = model(x)
    with pytest.raises(KeyError), effective(model, parts(model)):
        raise KeyError
    assert not model[0].attention._forward_pre_hooks and "project" not in vars(model[0].attention)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("slug", ["softmax", "moba", "lightning", "mega", "neighborhood"])
def test_parts_of_the_catalogue_have_maps(slug: str) -> None:
    torch.manual_seed(0)
    causal = "bidirectional" not in saccade.catalogue.part(slug).supports
    built = [saccade.create(slug, dim=DIM, num_heads=2, causal=causal) for _ in range(2)]
    model, x = network(*built), torch.randn(2, N, DIM, requires_grad=True)
    found, missing = part_maps(looked_at(model, x))
    assert {"raw", "rollout", "flow"} <= set(found)
    assert ("gradient x attention" in found) == isinstance(built[0], QKVAttention) == (not missing)
    for name, map_BM in found.items():
        assert map_BM.shape == (2, N) and map_BM.isfinite().all() and (map_BM >= 0).all(), name
    torch.testing.assert_close(found["rollout"].sum(-1), torch.ones(2))


def test_what_gives_no_weights_or_values_says_so() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, N, DIM, requires_grad=True)
    found, missing = part_maps(looked_at(network(nn.Linear(DIM, DIM)), x))
    assert not found and "has neither mix" in missing["raw"]
    model = network(Plain(DIM, 3))
    with effective(model, parts(model)) as records:
        model(x)
    with pytest.raises(RuntimeError, match="call backward"):
        records[0].gradients()

    class Louder(Plain):
        def out(self, out_BHNE: Tensor) -> Tensor:
            return super().out(out_BHNE)

        def attend(self, *args: Tensor) -> Tensor:  # type: ignore[override]
            return super().attend(*args) * (2.0 if torch.is_grad_enabled() else 1.0)  # type: ignore[arg-type]

    records = looked_at(network(Louder(DIM, 3)), x)
    with pytest.raises(ValueError, match="sums more than its values"):
        records[0].gradients()


def test_flow_of_few_layers_is_the_maximum_flow() -> None:
    pytest.importorskip("scipy")
    torch.manual_seed(0)
    model, x = network(*(Plain(DIM, 3) for _ in range(3))), torch.randn(2, N, DIM, requires_grad=True)
    records = looked_at(model, x)
    for count in (1, 2):
        layers = [(record.weights().mean(1) + torch.eye(N)) / 2 for record in records[:count]]
        torch.testing.assert_close(flow(records[:count], 3), _maximum_flow(layers, torch.eye(N)[3]), atol=1e-4, rtol=0)
    assert "flow" not in part_maps(records)[0] and flow(records, 3).shape == (2, N)
    assert rollout(records).shape == (2, N, N)
