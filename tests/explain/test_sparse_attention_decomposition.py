"""Sparse attention decomposition: sums, planted directions, models read as sums, circuits and what cuts do."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.explain.sparse_attention_decomposition import (
    CausalCheck,
    Edge,
    Firing,
    SparseAttentionDecomposition,
    Stream,
    Writer,
    causal_check,
    circuit,
    cut,
    deltas,
    largest,
    over_prompts,
    projected,
    read,
    signals,
    singular,
    terms,
    used,
)
from saccade.layers.wrapping import footprint

SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 20, "intermediate_size": 24,
    "max_position_embeddings": 16, "num_key_value_heads": 2,
}  # fmt: skip
IDS = torch.tensor([[3, 7, 1, 4, 9, 7, 1, 11, 2]])


def drawn(E: int = 11, R: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, x_i, x_j = (torch.randn(*shape, dtype=torch.double) for shape in ((E, R), (E, R), (E,), (E,)))
    return q, k, x_i, x_j


def llama(**more: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return rough(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **more)))


def gpt2() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=3, n_head=4)
    return rough(transformers.GPT2LMHeadModel(config))


def rough(model: Any) -> Any:
    """Weights so large that heads choose, and gains and biases that are not 1 and 0."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.4)
    return model.eval()


def neox() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
    return rough(transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes, rotary_pct=0.5)))


MODELS = {"llama": llama, "gpt2": gpt2, "neox": neox, "biased": lambda: llama(attention_bias=True)}


def test_triples_are_those_of_the_whole_form() -> None:
    q, k, x_i, x_j = drawn()
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.double))[0]
    omega = q @ turn @ k.mT
    u, sigma, v = triples = singular(q, k, turn)
    torch.testing.assert_close((u * sigma) @ v.mT, omega)
    torch.testing.assert_close(sigma, torch.linalg.svdvals(omega)[:4])
    torch.testing.assert_close(u.mT @ u, torch.eye(4, dtype=torch.double))
    term = terms(triples, x_i, x_j)
    torch.testing.assert_close(term.sum(), x_i @ omega @ x_j)
    flip = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.double)
    other = u * flip, sigma, v * flip
    torch.testing.assert_close(terms(other, x_i, x_j), term)
    for ours, theirs in zip(signals(other, x_i, used(term)), signals(triples, x_i, used(term)), strict=True):
        torch.testing.assert_close(ours, theirs)
    batched = singular(q, k, turn.expand(3, 4, 4))
    torch.testing.assert_close(terms(batched, x_i.expand(3, -1), x_j.expand(3, -1)), term.expand(3, -1))


def test_the_used_directions_are_the_fewest_largest() -> None:
    term = torch.tensor([[3.0, 1.0, 2.0, -1.0], [-3.0, -1.0, -2.0, 1.0], [1.0, 1.0, 1.0, 1.0], [9.0, 0.0, 0.5, -4.0]])
    assert used(term).tolist() == [
        [True, True, True, False], [True, True, True, False], [True] * 4, [True, False, False, False]
    ]  # fmt: skip
    assert used(term, 0.5).sum(-1).tolist() == [1, 1, 3, 1]  # beyond a share, not at it
    assert not used(-term[0]).equal(used(term[2]))
    assert largest(torch.tensor([[5.0, 1.0, 3.0, 1.0], [1.0, -4.0, 0.5, -1.0]]), 0.7).tolist() == [
        [True, False, True, False], [True, False, False, False]
    ]  # fmt: skip
    assert not largest(-torch.ones(3)).any()


def test_what_is_projected_away_is_away() -> None:
    q, k, x_i, x_j = drawn()
    u, _, _ = triples = singular(q, k)
    chosen = used(terms(triples, x_i, x_j))
    projector = (u * chosen) @ u.mT
    torch.testing.assert_close(projector @ projector, projector)
    assert int(torch.linalg.matrix_rank(projector)) == int(chosen.sum())
    left = terms(triples, x_i - projector @ x_i, x_j)
    assert left[chosen].abs().max() < 1e-12
    torch.testing.assert_close(left[~chosen], terms(triples, x_i, x_j)[~chosen])
    torch.testing.assert_close(
        projected(u, chosen, x_i[:-1], one=2.0), (projector @ F.pad(x_i[:-1], (0, 1), value=2.0))[:-1]
    )


def test_a_planted_direction_and_its_writer_are_found() -> None:
    torch.manual_seed(0)
    D, R, N = 24, 8, 5
    module = SparseAttentionDecomposition(3, 4, D, R)
    a, b = F.normalize(torch.randn(2, D), dim=-1)
    with torch.no_grad():
        for weight, direction in ((module.query, a), (module.key, b)):
            weight[2, 1] = 0.02 * torch.randn(D, R)
            weight[2, 1, :, 0] = 5**0.5 * direction
        module.out.mul_(0.1)
        module.out[0, 2, 0], module.out[1, 3, 0] = a, b  # the first of what they carry
    z = torch.zeros(2, N, 4, R)
    z[:, :, :, 0] = 1.0
    x = 0.05 * torch.randn(N, D)
    x[4] += a
    x[1] += b
    found = module(x, z, torch.full((N,), 2.0), 2, 1, 4, 1)
    assert found.used.sum() == 1 and found.used[0] and found.terms[0] / found.score > 0.9
    assert divmod(int(found.destination.argmax()), 4) == (0, 2) and divmod(int(found.source.argmax()), 4) == (1, 3)
    torch.testing.assert_close(
        found.destination[0, 2], found.u[:-1, 0] @ a * found.sigma[0].sqrt() / 2, atol=1e-4, rtol=0
    )
    each = SparseAttentionDecomposition(3, 4, D, R, bias_each=True)
    each.load_state_dict(module.state_dict())
    offset = each(x, z, torch.full((N,), 2.0), 2, 1, 4, 1).destination - found.destination
    assert offset.std() < 1e-6
    assert "1 of 8 directions" in found.table() and "0.2" in found.table()
    pytest.importorskip("matplotlib")
    assert len(found.plot().axes) == 3


def test_scores_of_random_heads_need_less_than_half_of_the_directions() -> None:
    torch.manual_seed(0)
    module = SparseAttentionDecomposition(1, 1, 64, 16)
    x = torch.randn(40, 64)
    triples = singular(*(F.pad(weight[0, 0], (0, 0, 0, 1)) for weight in (module.query, module.key)))
    x_E = F.pad(x, (0, 1), value=1.0)
    term = terms(tuple(each.detach() for each in triples), x_E[:, None].expand(-1, 40, -1), x_E.expand(40, -1, -1))  # type: ignore[arg-type]
    high = term.sum(-1) > term.sum(-1).flatten().quantile(0.9)
    assert float(used(term)[high].sum(-1).float().mean()) < 8


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_read_as_a_sum(name: str) -> None:
    model = MODELS[name]()
    before = footprint(model)
    stream = read(model, {"input_ids": IDS})
    assert footprint(model) == before and all(parameter.grad is None for parameter in model.parameters())
    assert (stream.positions_ND is not None) == (name == "gpt2")
    logits = model(input_ids=IDS).logits[0]
    assert stream.target == (8, *logits[-1].topk(2).indices.tolist())
    i, j = torch.tensor([7, 8, 5]), torch.tensor([2, 3, 5])
    for number, layer in enumerate(stream.layers):
        writers = stream.writers(number)
        # all that was written is what the layer was given
        for place in (0, 8):
            total = torch.stack([stream.written(writer, place) for writer in writers]).sum(0)
            torch.testing.assert_close(total, layer.given_ND[place], atol=1e-4, rtol=1e-4)
        for head in range(4):
            u, sigma, v = layer.form(head, i, j)
            term = terms((u, sigma, v), layer.x_NE[i], layer.x_NE[j])
            scores = layer.record.scores(heads=[head])[0, 0, i, j]
            torch.testing.assert_close(term.sum(-1) * layer.record.scale, scores, atol=1e-4, rtol=1e-3)
            chosen = used(term)
            for signal, places in zip(signals((u, sigma, v), layer.x_NE[i], chosen), (i, j), strict=True):
                found = stream.contributions(number, signal, places)
                assert found.shape == (3, len(writers))
                whole = (signal * layer.x_NE[places]).sum(-1)
                torch.testing.assert_close(found.sum(-1) + signal[:, -1], whole, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_are_those_of_what_heads_give(name: str) -> None:
    """A head's output scaled by 1 + h changes the lead by h times its number."""
    model = MODELS[name]()
    stream = read(model, {"input_ids": IDS}, (7, 4, 5))
    layer, step = stream.layers[1], 1e-2
    number = stream.gradients[1, 7, 2]

    def lead(factor: float) -> float:
        off = layer.z_NHV[7, 2] @ layer.out_HVD[2] * factor
        module = dict(model.named_modules())[layer.name]

        def hook(module: Any, args: Any, output: Any) -> Any:
            out = output[0].clone()
            out[0, 7] += off
            return (out, *output[1:])

        handle = module.register_forward_hook(hook)
        with torch.no_grad():
            logits = model(input_ids=IDS).logits[0, 7].double()
        handle.remove()
        return float(logits[4] - logits[5])

    assert (lead(step) - lead(-step)) / (2 * step) == pytest.approx(float(number), rel=0.05, abs=2e-3)


def every_edge(stream: Stream, firing: Firing, side: str) -> list[Edge]:
    return [Edge(writer, firing, side, 0.0) for writer in stream.writers(firing.layer)]


@pytest.mark.parametrize("name", MODELS)
def test_a_head_without_all_that_it_reads_scores_as_its_bias_does(name: str) -> None:
    """All directions of all writers at the destination off: what is left of the query is the bias alone."""
    from saccade.explain.recording import recorded

    model = MODELS[name]()
    stream = read(model, {"input_ids": IDS})
    firing = Firing(2, 3, 8, 5)
    layer = stream.layers[2]
    edges = every_edge(stream, firing, "destination")
    with cut(model, stream, edges, choice=torch.ones_like), torch.no_grad():
        module = dict(model.named_modules())[layer.name]
        kept: list[Tensor] = []
        handle = module.register_forward_hook(lambda m, a, output: kept.append(output[0]))
        model(input_ids=IDS)
        handle.remove()
    moved = (kept[0][0] - layer.written_ND).norm(dim=-1)
    assert moved[:8].max() < 1e-4 < moved[8]
    # by hand: that head's query, key and value of its own token, less what they read
    x_NE = layer.x_NE.clone()
    off = sum(deltas(stream, edges, choice=torch.ones_like)) / layer.scale_N[8]
    x_NE[8, :-1] -= off
    k = layer.key_head(3)
    q, key, value = x_NE @ layer.query_HER[3], x_NE @ layer.key_KER[k], x_NE @ layer.value_KEV[k]
    if layer.turn_NRR is not None:
        q, key = ((layer.turn_NRR @ each[..., None])[..., 0] for each in (q, key))
    weights = (q[8] @ key.mT * layer.record.scale).softmax(-1)
    out = layer.z_NHV[8].clone()
    out[3] = weights @ value
    expected = torch.einsum("hv,hvd->d", out, layer.out_HVD) + layer.bias_D
    torch.testing.assert_close(kept[0][0, 8], expected, atol=2e-3, rtol=1e-3)
    with recorded(model) as recording, torch.no_grad():
        model(input_ids=IDS)
    torch.testing.assert_close(recording.layers[2].q_BHND, layer.record.q_BHND)  # the model is as it was


@torch.no_grad()
def heard(model: Any, norm: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """What a norm is given, and the logits."""
    given: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    logits = model(input_ids=IDS).logits[0]
    handle.remove()
    return given[0][0], logits


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_globally_cut_is_off_the_stream(name: str) -> None:
    model = MODELS[name]()
    stream = read(model, {"input_ids": IDS})
    firing = Firing(2, 1, 7, 4)
    blocks, before, behind = {
        "llama": ("model.layers", "input_layernorm", "post_attention_layernorm"),
        "gpt2": ("transformer.h", "ln_1", "ln_2"),
    }[name]
    for writer, first in (
        (Writer("tokens"), f"0.{before}"),
        (Writer("head", 1, 2), f"1.{behind}"),
        (Writer("bias", 1), f"1.{behind}"),
        (Writer("mlp", 1), f"2.{before}"),
    ):
        edges = [Edge(writer, firing, side, 0.0) for side in ("destination", "source")]
        norm = model.get_submodule(f"{blocks}.{first}")
        given, logits = heard(model, norm)
        with cut(model, stream, edges, where="global"):
            other, less = heard(model, norm)
        change = given - other
        for edge, delta in zip(edges, deltas(stream, edges), strict=True):
            torch.testing.assert_close(change[edge.token], delta, atol=1e-4, rtol=1e-3)
            change[edge.token] = 0
        assert change.abs().max() < 1e-4
        with cut(model, stream, edges, where="global", factor=-1.0):
            _, more = heard(model, norm)
        constant = writer.kind == "bias" and name == "llama"  # it has none
        assert constant or not (torch.allclose(less, logits) or torch.allclose(more, less))


def test_a_circuit_is_traced_to_what_was_read() -> None:
    model = llama()
    found = circuit(model, {"input_ids": IDS}, threshold=0.2, seeds=4, sinks=0)
    assert found.seeds and {firing.destination for firing in found.seeds} == {8}
    firings = {firing for layer in found.decomposed.values() for firing in layer.firings}
    weights = {number: found.stream.layers[number].record.weights()[0] for number in found.decomposed}
    scores = {number: found.stream.layers[number].record.scores()[0] for number in found.decomposed}
    for number, head, i, j in itertools.product(weights, range(4), range(9), range(9)):
        fires = bool(weights[number][head, i, j] >= 0.2 and scores[number][head, i, j] >= 0)
        assert ((number, head, i, j) in firings) == fires
    inside = set(found.firings)
    for edge in found.edges:
        assert edge.weight > 0 and edge.writer.layer < edge.firing.layer and edge.firing in inside
        if edge.writer.kind == "head" and edge.writer.layer > 0:
            below = {f for f in firings if f[:3] == (edge.writer.layer, edge.writer.head, edge.token)}
            assert below <= inside
    by_hand = found.stream.contributions
    for firing in found.firings[:3]:
        layer = found.stream.layers[firing.layer]
        i, j = torch.tensor([firing.destination]), torch.tensor([firing.source])
        triples = layer.form(firing.head, i, j)
        term = terms(triples, layer.x_NE[i], layer.x_NE[j])
        assert found.count(firing) == int(used(term).sum())
        signal, _ = signals(triples, layer.x_NE[i], used(term))
        C = by_hand(firing.layer, signal, i)[0]
        writers = found.stream.writers(firing.layer)
        chosen = [k for k, writer in enumerate(writers) if writer.kind in found.kinds]
        expected = {writers[k] for k, keep in zip(chosen, largest(C[chosen]).tolist(), strict=True) if keep}
        got = {edge.writer for edge in found.edges if edge.firing == firing and edge.side == "destination"}
        assert got == expected
    heads = circuit(model, {"input_ids": IDS}, threshold=0.2, sinks=0, seeds=found.seeds, kinds=("head",))
    assert {edge.writer.kind for edge in heads.edges} == {"head"} and heads.seeds == found.seeds
    assert "attends from" in found.table() and "writer" in str(found)
    places = found.places()
    assert all(places[e.writer, e.token][1] - e.writer.layer == 0.5 * (e.writer.kind == "mlp") for e in found.edges)
    assert len(set(places.values())) == len(places)  # none stands on another
    columns = found.columns(places)
    assert list(columns) == sorted(columns) and list(columns.values()) == sorted(columns.values())
    weights_of_edges = [edge.weight for edge in found.edges]
    assert [edge.weight for edge in found.strongest(3)] == sorted(weights_of_edges, reverse=True)[:3]
    pytest.importorskip("matplotlib")
    assert len(found.plot().axes) == 1
    nothing = circuit(model, {"input_ids": IDS}, threshold=1.0)
    assert not nothing.edges and "no head" in nothing.table()
    assert len(nothing.plot().axes) == 1


def test_cutting_a_circuit_is_compared_with_cutting_others() -> None:
    model = llama()
    inputs = {"input_ids": IDS}
    before = footprint(model)
    found = circuit(model, inputs, threshold=0.2, sinks=0)
    check = causal_check(model, inputs, found, draws=2)
    assert footprint(model) == before
    logits = model(**inputs).logits[0, 8]
    assert check.before == pytest.approx(float(logits[found.target[1]] - logits[found.target[2]]), abs=1e-5)
    with cut(model, found.stream, found.edges), torch.no_grad():
        logits = model(**inputs).logits[0, 8]
    assert check.cut == pytest.approx(float(logits[found.target[1]] - logits[found.target[2]]), abs=1e-5)
    assert check.edges == len(found.edges) and set(check.others) >= {"other writers", "other directions"}
    assert all(len(each) == 2 for each in check.others.values())
    again = causal_check(model, inputs, found, draws=2)
    assert again == check and causal_check(model, inputs, found, draws=2, seed=1) != check
    assert "the circuit" in str(check) and check.fall == check.before - check.cut
    pytest.importorskip("matplotlib")
    assert len(check.plot().axes) == 1
    plain = CausalCheck(1, 2.0, 1.0, {"elsewhere": [2.0, 1.5]})
    assert plain.fall == 1.0 and plain.falls() == {"elsewhere": 0.25}


def test_prompts_are_summed_up_by_roles() -> None:
    model = llama()
    circuits = [circuit(model, {"input_ids": ids}, threshold=0.2, sinks=0) for ids in (IDS, IDS.flip(1))]
    roles = [{8: "end", 4: "middle"}, {8: "end"}]
    found = over_prompts(circuits, roles)
    edge = next(edge for edge in circuits[0].edges if edge.token == 8)
    key = edge.writer, Writer("head", edge.firing.layer, edge.firing.head), "end"
    alike = [
        [e.weight for e in each.edges if (e.writer, e.firing[:2], e.token) == (edge.writer, edge.firing[:2], 8)]
        for each in circuits
    ]
    means = [sum(each) / len(each) for each in alike if each]
    assert found.weights[key] == pytest.approx(sum(means) / len(means)) and found.prompts[key] == len(means)
    assert sum(found.firings.values()) == sum(len(each.firings) for each in circuits)
    assert {role for *_, role in found.weights} <= {"end", "middle"} and "prompts" in found.table()
    with pytest.raises(ValueError, match="roles for each circuit"):
        over_prompts(circuits, roles[:1])


def test_refusals() -> None:
    transformers = pytest.importorskip("transformers")
    module = SparseAttentionDecomposition(2, 2, 6, 3)
    x, z, scale = torch.randn(4, 6), torch.randn(2, 4, 2, 3), torch.ones(4)
    for arguments, message in (
        ((x, z, scale, 2, 0, 1, 0), "2 layers of 2 heads"),
        ((x[:, 1:], z, scale, 1, 0, 1, 0), r"x must be \(tokens, 6\)"),
        ((x, z[:, 1:], scale, 1, 0, 1, 0), "z must be"),
        ((x, z, scale, 1, 0, 4, 0), "4 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            module(*arguments)
    with pytest.raises(ValueError, match="positive"):
        SparseAttentionDecomposition(0, 1, 2, 3)
    model = llama()
    for inputs, options, message in (
        ({"input_ids": IDS.expand(2, -1)}, {}, "one text"),
        ({"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}, {}, "without padding"),
        ({"input_ids": IDS}, {"target": (0, 1, 99)}, "target must be"),
        ({"input_ids": IDS}, {"target": (0,)}, "target must be"),
        ({"input_ids": IDS}, {"kinds": ("magic",)}, "kinds must be of"),
        ({"input_ids": IDS}, {"threshold": 2.0}, "threshold"),
        ({"input_ids": IDS}, {"seeds": [Firing(1, 0, 0, 5)]}, "does not fire"),
    ):
        with pytest.raises(ValueError, match=message):
            circuit(model, inputs, **options)
    stream = read(model, {"input_ids": IDS})
    with pytest.raises(ValueError, match="'local' or 'global'"), cut(model, stream, [], where="far"):
        pass
    with pytest.raises(ValueError, match="no edges"):
        causal_check(model, {"input_ids": IDS}, circuit(model, {"input_ids": IDS}, threshold=1.0))
    torch.manual_seed(0)
    small = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
    for kind, more, message in (
        ("BertLMHeadModel", {"is_decoder": True}, "no norm before"),
        ("Qwen3ForCausalLM", {"head_dim": 4, "num_key_value_heads": 2}, "not linear"),
        ("Gemma2ForCausalLM", {"head_dim": 4, "num_key_value_heads": 2}, "norm behind"),
        ("GraniteForCausalLM", {"residual_multiplier": 0.5, "num_key_value_heads": 2}, "scales what is written"),
    ):
        config = getattr(transformers, kind.replace("LMHeadModel", "Config").replace("ForCausalLM", "Config"))
        with pytest.raises(ValueError, match=message):
            read(rough(getattr(transformers, kind)(config(**small, **more))), {"input_ids": IDS})
