"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments, of_function
from saccade.models.dream.draft import DreamDraft, FeatureBlock
from saccade.models.dream.drafting import grow
from saccade.models.dream.selection import attention_entropy, kept_tokens, select_features
from saccade.ops.masks import causal
from saccade.ops.trees import accept_paths, ancestors, depths, leaf_paths

_ARGUMENTS = {
    "hidden_size": "dim",
    "intermediate_size": "hidden",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "rms_norm_eps": "eps",
}
_DRAFT = Arguments(DreamDraft, {**_ARGUMENTS, "rope_theta": "rope_base"})
_NAMES = Names(
    {
        "layers.0.self_attn.o_proj.{leaf}": "first.self_attn.out_proj.{leaf}",
        "layers.2.self_attn.o_proj.{leaf}": "last.self_attn.out_proj.{leaf}",
        "layers.0.{name*}": "first.{name}",
        "layers.1.{name*}": "features.{name}",
        "layers.2.{name*}": "last.{name}",
        "norm.weight": "norm.weight",
        # the target's own embedding lies in released files too, and is not read
        "embed_tokens.weight": None,
    }
)


def _run_draft(module: DreamDraft, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    cache = module.new_cache()
    out = module(inputs["inputs_embeds"], inputs["target_features"], cache=cache)
    found = {"hidden": out.hidden, "hidden_after_layer0": out.mid}
    if "inputs_embeds_step2" in inputs:
        more = module(inputs["inputs_embeds_step2"], inputs["target_features_step2"], cache=cache)
        found["hidden_step2"] = more.hidden
    return found


def _run_tree(module: DreamDraft, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    table, head = inputs["embed_weight"], inputs["head_weight"]
    ids_1N, cache = inputs["input_ids"], module.new_cache()
    hidden = module(F.embedding(ids_1N, table), inputs["target_features"], cache=cache).hidden[0, -1]
    tree = grow(
        module,
        cache,
        hidden,
        int(ids_1N[0, -1]),
        lambda ids: F.embedding(ids, table),
        lambda x: F.linear(x, head),
        total_tokens=args.get("total_tokens", 63),
        depth=args.get("depth", 5),
        top_k=args.get("top_k", 8),
    )
    parents = torch.tensor(tree.parents)
    return {
        "draft_tokens": torch.tensor([tree.tokens]),
        "retrieve_indices": leaf_paths(parents),
        "tree_mask": ancestors(parents)[None, None].float(),
        "tree_position_ids": depths(parents),
    }


def _run_layer(module: FeatureBlock, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    x, features = inputs["hidden_states"], inputs["cross_attention_states"]
    return {"hidden": module(x, features, mask=causal(features.shape[1] - x.shape[1]))}


def _run_selection(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    attentions, eps, fraction = inputs["attentions"], args.get("eps", 1e-8), args.get("fraction", 0.4)
    found = {
        f"mid_{criterion}": select_features(
            list(inputs["hidden_states"]), list(attentions), criterion, fraction=fraction, eps=eps
        )[0]
        for criterion in ("sum", "entropy", "mutual")
    }
    looked = attentions[: int(fraction * len(attentions))]
    return {"entropy": torch.stack([attention_entropy(a, eps) for a in looked]), **found}


def _run_pruning(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    ids_1N = inputs["input_ids"]
    kept = kept_tokens(inputs["attention"][0], ids_1N[0] == args["image_token_id"], args.get("keep_ratio", 0.5))
    return {name: inputs[name][:, kept] for name in ("input_ids", "embeds", "features")}


def _run_verify(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    best, accepted, behind = accept_paths(inputs["candidates"], inputs["logits"])
    return {"best_candidate": best[None], "accept_length": accepted[None], "next_logits": behind}


PORTS = (
    AuthorsPort("draft_model", build=_DRAFT, convert=_NAMES, run=_run_draft),
    AuthorsPort("draft_tree", build=_DRAFT, convert=_NAMES, run=_run_tree),
    AuthorsPort(
        "cross_attention_layer",
        build=Arguments(FeatureBlock, _ARGUMENTS),
        convert=Names({"{name*}": "{name}"}),
        run=_run_layer,
    ),
    of_function("feature_selection", _run_selection),
    of_function("visual_token_pruning", _run_pruning),
    of_function("verify_greedy", _run_verify),
)
