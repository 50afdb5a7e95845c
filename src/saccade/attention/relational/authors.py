"""How the authors' modules, parameters and arguments map to ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.attention.relational.layers import DualAttention, RelationalAttention
from saccade.attention.relational.model import DualAttentionLM
from saccade.attention.relational.symbols import RETRIEVERS
from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import calls

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
_LM = Names({
    "layers.token_embedder.{leaf}": "token_embedding.{leaf}",
    "layers.positional_embedder.{leaf}": "position_embedding.{leaf}",
    **_SYMBOLS.within("layers.symbol_retrievers.{i}.", "retrievers.{i}."),
    "layers.blocks.{i}.norm1.{leaf}": "blocks.{i}.norm1.{leaf}",
    "layers.blocks.{i}.norm2.{leaf}": "blocks.{i}.norm2.{leaf}",
    **_DUAL.within("layers.blocks.{i}.dual_attn.", "blocks.{i}.attention."),
    "layers.blocks.{i}.ff_block.linear1.{leaf}": "blocks.{i}.mlp.inner.{leaf}",
    "layers.blocks.{i}.ff_block.linear2.{leaf}": "blocks.{i}.mlp.out.{leaf}",
    "layers.blocks.{i}.ff_block.linear3.{leaf}": "blocks.{i}.mlp.factor.{leaf}",
    "layers.norm.{leaf}": "norm.{leaf}",
    "layers.final_out.{leaf}": "head.{leaf}",
})  # fmt: skip


def _known(args: dict[str, Any], *names: str) -> None:
    unknown = sorted(set(args) - set(names))
    if unknown:
        raise ValueError(f"this port knows the arguments {', '.join(names)}, got {', '.join(unknown)}")


_BRANCH = ("n_kv_heads", "add_bias_kv", "add_bias_out")
_RELATIONAL = (*_BRANCH, "key_dim", "n_relations", "rel_proj_dim", "rel_activation", "symmetric_rels")


def _relational_arguments(args: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_relations": args.get("n_relations"),
        "relation_dim": args.get("rel_proj_dim"),
        "relation_activation": args.get("rel_activation") or "identity",
        "symmetric": bool(args.get("symmetric_rels", False)),
        "key_dim": args.get("key_dim"),
    }


def _build_relational(args: dict[str, Any]) -> nn.Module:
    _known(args, "d_model", "n_heads", "total_n_heads", "dropout", "use_relative_positional_symbols", *_RELATIONAL)
    dim, heads = int(args["d_model"]), int(args["n_heads"])
    return RelationalAttention(
        dim,
        heads,
        num_kv_heads=args.get("n_kv_heads"),
        head_dim=dim // int(args.get("total_n_heads") or heads),
        proj_bias=bool(args.get("add_bias_out", False)),
        kv_bias=bool(args.get("add_bias_kv", False)),
        dropout=float(args.get("dropout") or 0.0),
        **_relational_arguments(args),
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


def _build_dual(args: dict[str, Any]) -> nn.Module:
    names = ("d_model", "n_heads_sa", "n_heads_ra", "dropout", "sa_kwargs", "ra_kwargs", "share_attn_params")
    _known(args, *names)
    return DualAttention(
        int(args["d_model"]),
        int(args["n_heads_sa"]) + int(args["n_heads_ra"]),
        True,
        symbols=None,
        dropout=float(args.get("dropout") or 0.0),
        **_dual_arguments(args),
    )


def _dual_arguments(args: dict[str, Any]) -> dict[str, Any]:
    sensory, relational = args.get("sa_kwargs") or {}, args.get("ra_kwargs") or {}
    _known(sensory, *_BRANCH)
    _known(relational, "use_relative_positional_symbols", *_RELATIONAL)
    return {
        "relational_heads": int(args["n_heads_ra"]),
        "num_kv_heads": (sensory.get("n_kv_heads"), relational.get("n_kv_heads")),
        "proj_bias": tuple(bool(branch.get("add_bias_out", False)) for branch in (sensory, relational)),
        "kv_bias": tuple(bool(branch.get("add_bias_kv", False)) for branch in (sensory, relational)),
        "share_attention": bool(args.get("share_attn_params", False)),
        **_relational_arguments(relational),
    }


def _run_dual(module: DualAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    x = inputs["x"]
    outputs = {"y": module(x, symbols=_pairs(inputs["symbols"], x, args))}
    if module.relational is not None:
        outputs["attn_ra"] = _looked_inside(module.relational, x, True, True)
        outputs["relations"] = module.relational.relations(x)
    return outputs


def _retriever_arguments(args: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Kind and arguments of a retriever, from the authors' names of its arguments."""
    if "max_rel_pos" in args:
        _known(args, "symbol_dim", "max_rel_pos")
        return "relative", {"max_distance": int(args["max_rel_pos"])}
    if "max_length" in args:
        _known(args, "symbol_dim", "max_length")
        return "positional", {"max_length": int(args["max_length"])}
    if "nbhd_delta" in args:
        names = ("d_model", "rel_n_heads", "symbolic_attn_n_heads", "n_symbols", "nbhd_delta", "causal_nbhd")
        _known(args, *names, "include_self", "normalize_rels", "dropout")
        return "relational", {
            "relation_heads": int(args["rel_n_heads"]),
            "num_heads": int(args["symbolic_attn_n_heads"]),
            "num_symbols": int(args["n_symbols"]),
            "distance": int(args["nbhd_delta"]),
            "causal": bool(args.get("causal_nbhd", True)),
            "include_self": bool(args.get("include_self", False)),
            "normalize": bool(args.get("normalize_rels", True)),
        }
    _known(args, "d_model", "n_heads", "n_symbols", "dropout")
    return "symbolic", {"num_heads": int(args["n_heads"]), "num_symbols": int(args["n_symbols"])}


def _build_retriever(args: dict[str, Any]) -> nn.Module:
    kind, options = _retriever_arguments(args)
    return RETRIEVERS[kind](int(args["d_model"] if "d_model" in args else args["symbol_dim"]), **options)


_NORMS = {"layernorm": "layer", "rmsnorm": "rms", "none": "none"}
_RETRIEVALS = {
    "symbolic_attention": "symbolic",
    "positional_symbols": "positional",
    "position_relative": "relative",
}


def _build_lm(args: dict[str, Any]) -> nn.Module:
    _known(
        args,
        *("vocab_size", "d_model", "n_layers", "n_heads_sa", "n_heads_ra", "dff", "dropout_rate", "activation"),
        *("norm_first", "norm_type", "max_block_size", "symbol_retrieval", "symbol_retrieval_kwargs", "pos_enc_type"),
        *("sa_kwargs", "ra_kwargs", "share_attn_params", "bias"),  # their `bias` reaches nothing
    )
    kind, options = _retriever_arguments(args.get("symbol_retrieval_kwargs") or {})
    if _chosen("symbol_retrieval", args.get("symbol_retrieval"), _RETRIEVALS, kind) != kind:
        raise ValueError(f"symbol_retrieval_kwargs are those of {kind} symbols, got {args['symbol_retrieval']}")
    positions = {"RoPE": True, "pos_emb": False}
    return DualAttentionLM(
        int(args["vocab_size"]),
        int(args["d_model"]),
        int(args["n_layers"]),
        int(args["n_heads_sa"]) + int(args["n_heads_ra"]),
        symbols=kind,
        symbol_options=options,
        rope=_chosen("pos_enc_type", args.get("pos_enc_type"), positions, False),
        max_length=int(args["max_block_size"]),
        hidden=args.get("dff"),
        activation=str(args.get("activation", "swiglu")),
        norm_first=bool(args.get("norm_first", True)),
        norm=_chosen("norm_type", str(args.get("norm_type", "layernorm")).lower(), _NORMS, "layer"),
        dropout=float(args.get("dropout_rate") or 0.0),
        **_dual_arguments(args),
    )


def _chosen(name: str, value: Any, names: Mapping[str, Any], default: Any) -> Any:
    """Our word for theirs."""
    if value is not None and value not in names:
        raise ValueError(f"{name} must be one of {', '.join(names)}, got {value!r}")
    return default if value is None else names[value]


def _run_lm(module: DualAttentionLM, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    logits = module(inputs["ids"])
    loss = F.cross_entropy(logits.flatten(0, 1), inputs["targets"].flatten())
    return {"logits": logits, "loss": loss.reshape(1)}


PORTS = (
    AuthorsPort("relational_attention", build=_build_relational, convert=_RELATIONS, run=_run_relational),
    AuthorsPort("dual_attention", build=_build_dual, convert=_DUAL, run=_run_dual),
    AuthorsPort(
        "symbolic_attention",
        build=_build_retriever,
        convert=_SYMBOLS,
        run=calls("x", gives="symbols"),
    ),
    AuthorsPort(
        "position_relative_symbols",
        build=_build_retriever,
        convert=_SYMBOLS,
        run=lambda module, inputs, args: {"symbols": module.pairs(inputs["x"].shape[1])},
    ),
    AuthorsPort(
        "relational_symbolic_attention",
        build=_build_retriever,
        convert=_SYMBOLS,
        run=calls("x", gives="symbols"),
    ),
    AuthorsPort("dat_lm", build=_build_lm, convert=_LM, run=_run_lm),
)
