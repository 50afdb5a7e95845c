"""How the authors' modules, parameters and arguments map to ours: tables, but for the runs that look inside or call
twice, and for what the authors' nested arguments say together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.attention.relational.layers import DualAttention, RelationalAttention
from saccade.attention.relational.model import DualAttentionLM
from saccade.attention.relational.symbols import RETRIEVERS
from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Argument, Arguments, calls

_LINEAR = Names({
    "wq.{leaf}": "q_proj.{leaf}",
    "wk.{leaf}": "k_proj.{leaf}",
    "wv.{leaf}": "v_proj.{leaf}",
    "wo.{leaf}": "out_proj.{leaf}",
})  # fmt: skip
_RELATIONS = Names({
    "wq_attn.{leaf}": "q_proj.{leaf}",
    "wk_attn.{leaf}": "k_proj.{leaf}",
    "wq_rel.{leaf}": "q_rel_proj.{leaf}",
    "wk_rel.{leaf}": "k_rel_proj.{leaf}",
    "wv.{leaf}": "v_proj.{leaf}",
    "wo.{leaf}": "out_proj.{leaf}",
    "wr": "relation_weights",
})  # fmt: skip
_DUAL = Names(_LINEAR.within("self_attention.", "sensory.") | _RELATIONS.within("relational_attention.", "relational."))
_SYMBOLIC = Names({
    "q_proj.{leaf}": "q_proj.{leaf}",
    "template_features": "template_features",
    "symbol_library": "symbol_library",
})  # fmt: skip
_SYMBOLS = Names({
    **_SYMBOLIC.table,
    **_SYMBOLIC.within("symbolic_attention.", "symbolic_attention."),
    "k_proj.{leaf}": "k_proj.{leaf}",
    "model_dim_proj.{leaf}": "in_proj.{leaf}",
    "symbol_library.weight": "symbol_library",  # of positions: an embedding
    "rel_pos_enc.rel_pos_embeddings": "table",
})  # fmt: skip


def _language_model(mlp: Names) -> Names:
    return Names({
        "layers.token_embedder.{leaf}": "token_embedding.{leaf}",
        "layers.positional_embedder.{leaf}": "position_embedding.{leaf}",
        **_SYMBOLS.within("layers.symbol_retrievers.{i}.", "retrievers.{i}."),
        "layers.blocks.{i}.norm1.{leaf}": "blocks.{i}.norm1.{leaf}",
        "layers.blocks.{i}.norm2.{leaf}": "blocks.{i}.norm2.{leaf}",
        **_DUAL.within("layers.blocks.{i}.dual_attn.", "blocks.{i}.attention."),
        **mlp.within("layers.blocks.{i}.ff_block.", "blocks.{i}.mlp."),
        "layers.norm.{leaf}": "norm.{leaf}",
        "layers.final_out.{leaf}": "head.{leaf}",
    })  # fmt: skip


_PLAIN = _language_model(Names({"linear1.{leaf}": "fc1.{leaf}", "linear2.{leaf}": "fc2.{leaf}"}))
_GATED = _language_model(Names({
    "linear1.{leaf}": "gate_proj.{leaf}",
    "linear2.{leaf}": "down_proj.{leaf}",
    "linear3.{leaf}": "up_proj.{leaf}",
}))  # fmt: skip


def _convert_lm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their first layer is a gate where there is a third."""
    return (_GATED if any(".ff_block.linear3." in name for name in state) else _PLAIN)(state)


#: of relational heads
_RELATIONAL: dict[str, Argument] = {
    "n_relations": "num_relations",
    "rel_proj_dim": "relation_dim",
    "rel_activation": ("relation_activation", lambda name: name or "identity"),
    "symmetric_rels": "symmetric",
    "key_dim": "key_dim",
}
_BUILD_RELATIONAL = Arguments(
    RelationalAttention,
    {
        "d_model": "dim",
        "n_heads": "num_heads",
        "n_kv_heads": "num_kv_heads",
        "add_bias_out": "proj_bias",
        "add_bias_kv": "kv_bias",
        "dropout": "dropout",
        **_RELATIONAL,
    },
    needed=("n_heads",),
    derived={"head_dim": lambda args: args["d_model"] // (args.get("total_n_heads") or args["n_heads"])},
    inert=("total_n_heads", "use_relative_positional_symbols"),
)


def _flat(args: dict[str, Any]) -> dict[str, Any]:
    """The arguments with those of the sensory heads as `sa_...` and of the relational ones as `ra_...`."""
    flat = {name: value for name, value in args.items() if name not in ("sa_kwargs", "ra_kwargs")}
    for branch in ("sa", "ra"):
        flat |= {f"{branch}_{name}": value for name, value in (args.get(f"{branch}_kwargs") or {}).items()}
    return flat


def _of_both(name: str, default: Any) -> Callable[[dict[str, Any]], tuple[Any, Any]]:
    return lambda args: (args.get(f"sa_{name}", default), args.get(f"ra_{name}", default))


_DUAL_TABLE: dict[str, Argument] = {
    "d_model": "dim",
    "n_heads_ra": "relational_heads",
    "share_attn_params": "share_attention",
    **{f"ra_{theirs}": ours for theirs, ours in _RELATIONAL.items()},
}
_DUAL_DERIVED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "num_heads": lambda args: args["n_heads_sa"] + args["n_heads_ra"],
    "num_kv_heads": _of_both("n_kv_heads", None),
    "proj_bias": _of_both("add_bias_out", False),
    "kv_bias": _of_both("add_bias_kv", False),
}
#: what is read by `derived`, and what does nothing
_DUAL_READ = (
    *("n_heads_sa", "ra_use_relative_positional_symbols"),
    *(f"{branch}_{name}" for branch in ("sa", "ra") for name in ("n_kv_heads", "add_bias_out", "add_bias_kv")),
)
_BUILD_DUAL = Arguments(
    DualAttention,
    {**_DUAL_TABLE, "dropout": "dropout"},
    needed=("n_heads_sa", "n_heads_ra"),
    derived=_DUAL_DERIVED,
    inert=_DUAL_READ,
    causal=True,
    symbols=None,
)

_RETRIEVER_ARGUMENTS = {
    "symbolic": Arguments(
        RETRIEVERS["symbolic"],
        {"d_model": "dim", "n_heads": "num_heads", "n_symbols": "num_symbols"},
        needed=("n_heads", "n_symbols"),
        inert=("dropout",),
    ),
    "positional": Arguments(RETRIEVERS["positional"], {"symbol_dim": "dim", "max_length": "max_length"}, inert=()),
    "relative": Arguments(RETRIEVERS["relative"], {"symbol_dim": "dim", "max_rel_pos": "max_distance"}, inert=()),
    "relational": Arguments(
        RETRIEVERS["relational"],
        {
            "d_model": "dim",
            "rel_n_heads": "relation_heads",
            "symbolic_attn_n_heads": "num_heads",
            "n_symbols": "num_symbols",
            "nbhd_delta": "distance",
            "causal_nbhd": "causal",
            "include_self": "include_self",
            "normalize_rels": "normalize",
        },
        needed=("rel_n_heads", "symbolic_attn_n_heads", "n_symbols"),
        inert=("dropout",),
    ),
}
#: what only one kind of retrievers has
_MARKS = {"max_length": "positional", "max_rel_pos": "relative", "nbhd_delta": "relational"}


def _kind(args: dict[str, Any]) -> str:
    return next((kind for mark, kind in _MARKS.items() if mark in args), "symbolic")


def _build_retriever(args: dict[str, Any]) -> nn.Module:
    return _RETRIEVER_ARGUMENTS[_kind(args)](args)


#: the language model's words
_NORMS = {"layernorm": "layer", "rmsnorm": "rms"}
_RETRIEVALS = {
    "symbolic_attention": "symbolic",
    "positional_symbols": "positional",
    "position_relative": "relative",
}


def _symbol_options(args: dict[str, Any]) -> dict[str, Any]:
    given = args["symbol_retrieval_kwargs"]
    options = _RETRIEVER_ARGUMENTS[_kind(given)].ours(given)
    return {name: value for name, value in options.items() if name != "dim"}


def _symbols(args: dict[str, Any]) -> str:
    kind, said = _kind(args["symbol_retrieval_kwargs"]), args.get("symbol_retrieval")
    if said is not None and _RETRIEVALS.get(said) != kind:
        raise ValueError(f"symbol_retrieval_kwargs are those of {kind} symbols, got symbol_retrieval {said!r}")
    return kind


_BUILD_LM = Arguments(
    DualAttentionLM,
    {
        **_DUAL_TABLE,
        "vocab_size": "vocab",
        "n_layers": "num_layers",
        "dff": "hidden",
        "activation": "activation",
        "norm_first": "norm_first",
        "norm_type": ("norm", lambda name: _NORMS.get(name.lower(), name)),
        "pos_enc_type": ("rope", {"RoPE": True, "pos_emb": False}),
        "max_block_size": "max_length",
        "dropout_rate": "dropout",
    },
    needed=("n_heads_sa", "n_heads_ra", "max_block_size"),
    defaults={"pos_enc_type": "pos_emb"},
    derived={**_DUAL_DERIVED, "symbols": _symbols, "symbol_options": _symbol_options},
    inert=(*_DUAL_READ, "symbol_retrieval", "symbol_retrieval_kwargs", "bias"),  # their `bias` reaches nothing
)


def _pairs(symbols: Tensor, x: Tensor, args: dict[str, Any]) -> Tensor:
    """The authors give symbols of pairs as (N, N, C)."""
    relative = (args.get("ra_kwargs") or args).get("use_relative_positional_symbols", False)
    return symbols[None] if relative and symbols.ndim == 3 else symbols


def _looked_inside(module: RelationalAttention, x: Tensor, causal: bool, rope: bool) -> Tensor:
    module.causal, module.rope = causal, rope
    return module.mix(x, torch.eye(x.shape[1]).to(x).expand(x.shape[0], module.num_heads, -1, -1))


def _run_relational(module: RelationalAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    x, symbols = inputs["x"], _pairs(inputs["symbols"], inputs["x"], args)
    outputs = {"relations": module.relations(x)}
    for suffix, causal in (("", False), ("_causal_rope", True)):
        outputs[f"attn{suffix}"] = _looked_inside(module, x, causal, causal)
        outputs[f"y{suffix}"] = module(x, symbols)
    return outputs


def _run_dual(module: DualAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    x = inputs["x"]
    outputs = {"y": module(x, symbols=_pairs(inputs["symbols"], x, args))}
    if module.relational is not None:
        outputs["attn_ra"] = _looked_inside(module.relational, x, True, True)
        outputs["relations"] = module.relational.relations(x)
    return outputs


def _run_lm(module: DualAttentionLM, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    logits = module(inputs["ids"])
    loss = F.cross_entropy(logits.flatten(0, 1), inputs["targets"].flatten())
    return {"logits": logits, "loss": loss.reshape(1)}


PORTS = (
    AuthorsPort("relational_attention", build=_BUILD_RELATIONAL, convert=_RELATIONS, run=_run_relational),
    AuthorsPort("dual_attention", build=lambda args: _BUILD_DUAL(_flat(args)), convert=_DUAL, run=_run_dual),
    AuthorsPort("symbolic_attention", build=_build_retriever, convert=_SYMBOLS, run=calls("x", gives="symbols")),
    AuthorsPort(
        "position_relative_symbols",
        build=_build_retriever,
        convert=_SYMBOLS,
        run=lambda module, inputs, args: {"symbols": module.pairs(inputs["x"].shape[1])},
    ),
    AuthorsPort(
        "relational_symbolic_attention", build=_build_retriever, convert=_SYMBOLS, run=calls("x", gives="symbols")
    ),
    AuthorsPort("dat_lm", build=lambda args: _BUILD_LM(_flat(args)), convert=_convert_lm, run=_run_lm),
)
