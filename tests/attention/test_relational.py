from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import saccade
from saccade import attention_map, catalogue, masks
from saccade.attention.relational import (
    RETRIEVERS,
    DualAttention,
    DualAttentionLM,
    PositionalSymbols,
    PositionRelativeSymbols,
    RelationalAttention,
    RelationalSymbolicAttention,
    SymbolicAttention,
    relational_attend,
    relational_attend_reference,
)

SYMBOLS = {
    "symbolic": {"num_heads": 2, "num_symbols": 5},
    "positional": {"max_length": 40},
    "relative": {"max_distance": 3},
    "relational": {"relation_heads": 2, "num_heads": 2, "num_symbols": 5, "distance": 3, "include_self": True},
}


def tokens(N: int, B: int = 2, C: int = 24) -> Tensor:
    return torch.randn(B, N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(N))


def operands(N: int, M: int, *, kind: str, H: int = 4, K: int = 2, R: int = 3, B: int = 2) -> list[Tensor]:
    torch.manual_seed(N + M)
    shape = {"tokens": (B, K, M, 5), "table": (K, 7, 5), "pairs": (1, N, M, K, 5)}[kind]
    shapes = (B, H, N, 6), (B, K, M, 6), (B, R, N, 4), (B, R, M, 4), shape, (H, 5, R)
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("kind", ["tokens", "table", "pairs"])
@pytest.mark.parametrize(
    ("N", "M", "options"),
    [
        (13, 13, {}),
        (13, 13, {"causal": True, "activation": "relu"}),
        (5, 13, {"causal": True, "offset": 8, "activation": "tanh"}),
        (7, 2, {"scale": 0.3, "activation": "gelu"}),
        (9, 9, {"mask": masks.window(2), "activation": "sigmoid"}),
        (9, 9, {"mask": masks.padding(torch.tensor([[True] * 9, [False] * 9])), "causal": True, "activation": "silu"}),
    ],
)
def test_streamed_equals_the_definition_forward_and_backward(kind: str, N: int, M: int, options: dict) -> None:
    tensors = operands(N, M, kind=kind)
    expected, _, _ = relational_attend_reference(*tensors, **options)
    # pieces of few queries, made again in the backward pass; and all queries in one
    for memory_mb in (0.002, 32.0):
        out = relational_attend(*tensors, **options, memory_mb=memory_mb)
        torch.testing.assert_close(out, expected, atol=1e-11, rtol=0)
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), tensors, retain_graph=True) for y in (out, expected))):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_half_precision_stays_near_single() -> None:
    tensors = [t.detach().float() for t in operands(33, 33, kind="tokens")]
    single = relational_attend(*tensors, causal=True)
    half = relational_attend(*(t.bfloat16() for t in tensors), causal=True)
    assert half.dtype == torch.bfloat16 and (half - single).abs().max() < 0.05 * single.abs().max()


def test_compiles_in_pieces_with_a_backward_pass() -> None:
    tensors = operands(9, 9, kind="table")
    torch._dynamo.reset()

    def run(*tensors: Tensor) -> Tensor:
        return relational_attend(*tensors, causal=True, memory_mb=0.01)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for a, b in zip(*(torch.autograd.grad(f(*tensors).square().sum(), tensors) for f in (run, compiled))):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_without_relational_heads_it_is_multi_head_attention(causal: bool) -> None:
    torch.manual_seed(0)
    module, x = DualAttention(24, 4, causal, relational_heads=0, rope=False).double(), tokens(9)
    s = module.sensory
    q, k, v = (p(x).unflatten(-1, (4, 6)).transpose(1, 2) for p in (s.q_proj, s.k_proj, s.v_proj))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(module(x), s.out_proj(expected.transpose(1, 2).flatten(2)), atol=1e-13, rtol=0)
    assert module.relational is None and module.retriever is None


def test_without_relations_the_message_is_the_symbol() -> None:
    torch.manual_seed(0)
    module, x = RelationalAttention(24, 3, True).double(), tokens(9)
    torch.nn.init.zeros_(module.relation_weights)
    symbols = PositionalSymbols(24, 9).double()(x)
    values = module.v_proj(symbols).unflatten(-1, (3, 8)).transpose(1, 2)
    expected = attention_map(module, x) @ values
    torch.testing.assert_close(
        module(x, symbols), module.out_proj(expected.transpose(1, 2).flatten(2)), atol=1e-13, rtol=0
    )


def test_without_symbols_only_inner_products_count() -> None:
    torch.manual_seed(0)
    module, x = RelationalAttention(24, 3, num_relations=2, relation_activation="tanh").double(), tokens(9)
    torch.nn.init.zeros_(module.v_proj.weight)
    symbols = tokens(9, C=24)
    expected = module(x, symbols)
    rotation = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64)).Q
    with torch.no_grad():
        for projection in (module.q_proj, module.k_proj, module.q_rel_proj, module.k_rel_proj):
            projection.weight.copy_(projection.weight @ rotation)
    torch.testing.assert_close(module(x @ rotation, symbols), expected, atol=1e-12, rtol=0)
    assert not torch.allclose(module(x, symbols), expected)


def test_relations_are_symmetric_where_asked_for() -> None:
    for symmetric in (True, False):
        r = RelationalAttention(24, 2, symmetric=symmetric).double().relations(tokens(7))
        assert r.shape == (2, 7, 7, 2) and torch.allclose(r, r.transpose(1, 2)) == symmetric


def test_relative_symbols_as_a_table_and_as_pairs_and_under_a_shift() -> None:
    torch.manual_seed(0)
    symbols = PositionRelativeSymbols(24, 3).double()
    for causal in (True, False):
        module = RelationalAttention(24, 3, causal, num_kv_heads=1).double()
        x = tokens(11)
        torch.testing.assert_close(module(x, symbols(x)), module(x, symbols.pairs(11)[None]), atol=1e-13, rtol=0)
    # the same tokens further on, after what may not be attended to; rotary angles are single precision
    module, x = RelationalAttention(24, 3).double(), tokens(8)
    shifted = torch.cat([tokens(4), x], 1)
    visible = torch.arange(12).expand(2, -1) >= 4
    torch.testing.assert_close(
        module(shifted, symbols(x), mask=visible)[:, 4:], module(x, symbols(x)), atol=1e-7, rtol=0
    )


def test_grouped_heads_equal_repeated_ones() -> None:
    torch.manual_seed(0)
    grouped = DualAttention(24, 6, True, relational_heads=2, num_kv_heads=3, symbols="relative").double()
    full = DualAttention(24, 6, True, relational_heads=2, symbols="relative").double()
    assert grouped.sensory.num_kv_heads == 2 and grouped.relational.num_kv_heads == 1
    state = grouped.state_dict()
    for key in state:
        if key.endswith(("k_proj.weight", "v_proj.weight")):
            heads = grouped.get_submodule(key.split(".")[0]).num_kv_heads
            state[key] = state[key].unflatten(0, (heads, 4)).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    torch.testing.assert_close(grouped(tokens(9)), full(tokens(9)), atol=1e-13, rtol=0)


@pytest.mark.parametrize("kind", SYMBOLS)
def test_decoding_and_the_past(kind: str) -> None:
    torch.manual_seed(0)
    module = DualAttention(
        24, 4, True, symbols=kind, symbol_options=SYMBOLS[kind], num_kv_heads=2, relation_activation="silu"
    ).double()
    x = tokens(17)
    with torch.no_grad():
        expected, cache = module(x), module.new_cache(2)
        pieces = [module(x[:, :2], cache=cache), module(x[:, 2:9], cache=cache)]
        pieces += [module(x[:, i : i + 1], cache=cache) for i in range(9, 17)]
        torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-12, rtol=0)
        changed = x.clone()
        changed[:, 10:] += 1
        torch.testing.assert_close(module(changed)[:, :10], expected[:, :10], atol=1e-13, rtol=0)
    # a sensory head keeps k and v, a relational one its key, relation keys and, where it is the token's, a symbol
    kept = 2 * 12 // 2 + 12 // 2 + 12 + (0 if kind == "relative" else 12 // 2)
    tail = 2 * 3 * 24 * 8 if kind == "relational" else 0
    assert cache.length == 17 and cache.nbytes == 2 * 17 * kept * 8 + tail


def test_symbolic_attention_is_attention_over_templates() -> None:
    torch.manual_seed(0)
    symbols, x = SymbolicAttention(24, 3, 7).double(), tokens(5)
    expected = []
    for head in range(3):
        part = slice(8 * head, 8 * head + 8)
        query = symbols.q_proj(x)[..., part]
        weights = (query @ symbols.template_features[:, part].T / 8**0.5).softmax(-1)
        expected.append(weights @ symbols.symbol_library[:, part])
    torch.testing.assert_close(symbols(x), torch.cat(expected, -1), atol=1e-13, rtol=0)


def test_relational_symbols_know_tokens_by_comparison_only() -> None:
    torch.manual_seed(0)
    symbols = RelationalSymbolicAttention(24, 3, 2, 5, distance=2, causal=False).double()
    x = tokens(9)
    before = symbols(x)
    changed = x.clone()
    changed[:, 6:] += 1
    assert torch.equal(symbols(changed)[:, :4], before[:, :4])
    assert not torch.allclose(symbols(changed)[:, 4], before[:, 4])
    # equal tokens: equal comparisons, at the clamped ends as well
    same = symbols(x[:, :1].expand(-1, 6, -1))
    torch.testing.assert_close(same, same[:, :1].expand_as(same), atol=1e-13, rtol=0)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"causal": True}, [-1, -2]),
        ({"causal": True, "include_self": True}, [0, -1, -2]),
        ({"causal": False}, [-2, -1, 1, 2]),
        ({"causal": False, "include_self": True, "normalize": False}, [-2, -1, 0, 1, 2]),
    ],
)
def test_neighbours_stand_in_the_authors_order(options: dict, steps: list[int]) -> None:
    torch.manual_seed(0)
    symbols, x = RelationalSymbolicAttention(24, 2, 3, 5, distance=2, **options).double(), tokens(6)
    query, key = symbols.q_proj(x).unflatten(-1, (2, 12)), symbols.k_proj(x).unflatten(-1, (2, 12))
    compared = []
    for i in range(6):
        near = [key[:, min(max(i + step, 0), 5)] for step in steps]
        scores = torch.stack([(query[:, i] * k).sum(-1) for k in near], 1)  # B W H
        compared.append(scores if options.get("normalize") is False else (scores / 12**0.5).softmax(1))
    expected = symbols.symbolic_attention(symbols.in_proj(torch.stack(compared, 1).flatten(2)))
    torch.testing.assert_close(symbols(x), expected, atol=1e-12, rtol=0)


def test_shared_attention_gives_both_branches_one_map() -> None:
    module = DualAttention(24, 4, share_attention=True, key_dim=4).double()
    maps = attention_map(module, tokens(7))
    assert torch.equal(maps[:, :2], maps[:, 2:])
    assert not torch.equal(*attention_map(DualAttention(24, 4).double(), tokens(7)).chunk(2, 1))


@pytest.mark.parametrize("options", [{}, {"rope": False, "norm_first": False, "activation": "relu"}])
def test_language_model_decodes_learns_and_shares_its_symbols(options: dict) -> None:
    torch.manual_seed(0)
    model = DualAttentionLM(11, 24, 2, 4, 2, symbol_options=SYMBOLS["symbolic"], max_length=16, **options)
    assert model.retrievers[0] is model.retrievers[1]
    apart = DualAttentionLM(11, 24, 2, 4, 2, symbol_options=SYMBOLS["symbolic"], shared_symbols=False)
    assert apart.retrievers[0] is not apart.retrievers[1]
    ids = torch.randint(11, (2, 12))
    with torch.no_grad():
        caches = model.new_caches()
        pieces = [model(ids[:, :5], caches)] + [model(ids[:, i : i + 1], caches) for i in range(5, 12)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(ids), atol=1e-5, rtol=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        losses.append(F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert DualAttentionLM(11, 24, 1, 4, 0)(ids).shape == (2, 12, 11)


def test_port_takes_other_arguments_of_the_authors() -> None:
    port = catalogue.port("relational", "dat_lm")
    retrievers = (
        ({"symbol_dim": 24, "max_rel_pos": 4}, PositionRelativeSymbols),
        ({"symbol_dim": 24, "max_length": 16}, PositionalSymbols),
        ({"d_model": 24, "rel_n_heads": 2, "symbolic_attn_n_heads": 2, "n_symbols": 5, "nbhd_delta": 2}, None),
    )
    for kwargs, kind in retrievers:
        arguments = {
            **{"vocab_size": 7, "d_model": 24, "n_layers": 1, "n_heads_sa": 1, "n_heads_ra": 3, "dff": None},
            **{"activation": "gelu", "norm_first": False, "max_block_size": 16, "pos_enc_type": "pos_emb"},
            **{"symbol_retrieval_kwargs": kwargs, "ra_kwargs": {"n_relations": 2, "n_kv_heads": 1}},
        }
        model = port.build(arguments)
        assert isinstance(model.retrievers[0], kind or RelationalSymbolicAttention)
        assert model.blocks[0].attention.relational.num_kv_heads == 1
        assert model(torch.randint(7, (1, 9))).isfinite().all()
    with pytest.raises(ValueError, match=r"the authors' arguments must be among .*, got 'strange'"):
        port.build({**arguments, "strange": 1})


def authors_state(retriever: dict[str, tuple[int, ...]], rope: bool, norm: str) -> dict[str, Tensor]:
    """Their names and shapes (V 7, D 24, 2 layers, 1 sensory and 3 relational heads, F 20), as the card lists them."""
    shapes = {"token_embedder.weight": (7, 24), "final_out.weight": (7, 24), "norm.weight": (24,), "norm.bias": (24,)}
    if not rope:
        shapes["positional_embedder.weight"] = (16, 24)
    for i in range(2):
        shapes |= {f"symbol_retrievers.{i}.{name}": shape for name, shape in retriever.items()}
        leaves = {"layernorm": ("weight", "bias"), "rmsnorm": ("weight",), "none": ()}[norm]
        shapes |= {f"blocks.{i}.norm{n}.{leaf}": (24,) for n in (1, 2) for leaf in leaves}
        shapes |= {f"blocks.{i}.dual_attn.self_attention.{w}.weight": (6, 24) for w in ("wq", "wk", "wv")}
        shapes |= {
            f"blocks.{i}.dual_attn.self_attention.wo.{k}": (6, 6)[: 2 - (k == "bias")] for k in ("weight", "bias")
        }
        relational = f"blocks.{i}.dual_attn.relational_attention."
        shapes |= {f"{relational}wq_attn.weight": (18, 24), f"{relational}wr": (3, 6, 2)}
        shapes |= {f"{relational}{w}.weight": (6, 24) for w in ("wk_attn", "wv")}
        shapes |= {f"{relational}{w}.bias": (6,) for w in ("wk_attn", "wv")}
        shapes |= {f"{relational}{w}.weight": (18, 24) for w in ("wq_rel", "wk_rel")} | {
            f"{relational}wo.weight": (18, 18)
        }
        shapes |= {f"blocks.{i}.ff_block.linear1.weight": (20, 24), f"blocks.{i}.ff_block.linear1.bias": (20,)}
        shapes |= {f"blocks.{i}.ff_block.linear2.weight": (24, 20), f"blocks.{i}.ff_block.linear2.bias": (24,)}
    state = {f"layers.{name}": torch.randn(shape) for name, shape in shapes.items()}
    state["layers.final_out.weight"] = state["layers.token_embedder.weight"].clone()
    return state | {k.replace("rs.0", "rs.1"): t.clone() for k, t in state.items() if "symbol_retrievers.0" in k}


@pytest.mark.parametrize(
    ("retrieval", "kwargs", "retriever", "rope", "norm"),
    [
        ("symbolic_attention", {"d_model": 24, "n_heads": 2, "n_symbols": 5},
         {"q_proj.weight": (24, 24), "q_proj.bias": (24,), "template_features": (5, 24), "symbol_library": (5, 24)},
         False, "layernorm"),
        ("positional_symbols", {"symbol_dim": 24, "max_length": 16}, {"symbol_library.weight": (16, 24)},
         True, "rmsnorm"),
        ("position_relative", {"symbol_dim": 24, "max_rel_pos": 4}, {"rel_pos_enc.rel_pos_embeddings": (9, 24)},
         False, "none"),
    ],
)  # fmt: skip
def test_language_models_of_the_authors_load(
    retrieval: str, kwargs: dict, retriever: dict, rope: bool, norm: str, tmp_path: Path
) -> None:
    arguments = {
        **{"vocab_size": 7, "d_model": 24, "n_layers": 2, "n_heads_sa": 1, "n_heads_ra": 3, "dff": 20},
        **{"activation": "gelu", "norm_first": norm != "layernorm", "norm_type": norm, "max_block_size": 16},
        **{"symbol_retrieval": retrieval, "symbol_retrieval_kwargs": kwargs, "bias": False},
        **{"pos_enc_type": "RoPE" if rope else "pos_emb", "sa_kwargs": {"add_bias_out": True}},
        **{"ra_kwargs": {"n_relations": 2, "n_kv_heads": 1, "add_bias_kv": True}},
    }
    state = authors_state(retriever, rope, norm)
    save_file(state, tmp_path / "lm.safetensors")
    model = saccade.load_authors("relational", tmp_path / "lm.safetensors", module="dat_lm", **arguments)
    assert model(torch.randint(7, (2, 9))).isfinite().all() and model.head.weight is model.token_embedding.weight
    if not rope:
        assert torch.equal(model.position_embedding.weight, state["layers.positional_embedder.weight"])
    # a file that keeps tied tensors once
    del state["layers.final_out.weight"]
    save_file(state, tmp_path / "lm.safetensors")
    saccade.load_authors("relational", tmp_path / "lm.safetensors", module="dat_lm", **arguments)
    state["layers.final_out.weight"] = torch.randn(7, 24)
    save_file(state, tmp_path / "lm.safetensors")
    with pytest.raises(ValueError, match="weight are one tensor here and differ"):
        saccade.load_authors("relational", tmp_path / "lm.safetensors", module="dat_lm", **arguments)


def test_bad_arguments() -> None:
    for bad, message in (
        ({"relational_heads": 5}, r"between 0 and num_heads \(4\), got 5"),
        ({"symbols": "none"}, "symbols must be one of symbolic"),
        ({"relational_heads": 1, "share_attention": True}, "as many heads in both, got 3 and 1"),
        ({"num_kv_heads": 3}, "must group 2 sensory and 2 relational heads alike, got 3"),
        ({"num_relations": 5}, r"must divide the heads' width \(12\), got 5"),
        ({"relation_activation": "cube"}, "must be one of identity"),
        ({"key_dim": 3}, "key_dim must be positive, and even"),
        ({"symbols": "relative", "symbol_options": {"max_distance": 0}}, "max_distance must be at least 1, got 0"),
        ({"symbol_options": {"num_heads": 5}}, r"symbol heads must divide dim \(24\)"),
    ):
        with pytest.raises(ValueError, match=message):
            DualAttention(24, 4, **bad)
    x = tokens(6).float()
    with pytest.raises(ValueError, match="no symbols of its own"):
        DualAttention(24, 4, symbols=None)(x)
    with pytest.raises(ValueError, match="the same for every head"):
        DualAttention(24, 4)(x, mask=torch.ones(1, 4, 6, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="symbols must be"):
        DualAttention(24, 4)(x, symbols=torch.randn(2, 6, 5))
    with pytest.raises(ValueError, match="symbols for 5 positions, got 6"):
        DualAttention(24, 4, symbols="positional", symbol_options={"max_length": 5})(x)
    with pytest.raises(ValueError, match="look to the right take no mask"):
        DualAttention(24, 4, symbols="relational")(x, mask=torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="relation_heads must divide"):
        RETRIEVERS["relational"](24, 5)
    q, k, q_rel, k_rel, symbols, weights = operands(5, 6, kind="tokens")
    with pytest.raises(ValueError, match="relation_weights must be"):
        relational_attend(q, k, q_rel, k_rel, symbols, weights[:, :, :2])
    with pytest.raises(ValueError, match=r"symbols must be .* got"):
        relational_attend(q, k, q_rel, k_rel, symbols[:, :, :3], weights)
    with pytest.raises(ValueError, match="relations' queries and keys do not fit"):
        relational_attend(q, k, q_rel[:, :2], k_rel, symbols, weights)
