"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names, split
from saccade.models.caface.aggregator import ClusterAggregate
from saccade.ops.summary import merged, summarise

#: of the aggregator in a checkpoint of its training
_PREFIX = "aggregator."
_NAMES = Names(
    {
        "style_maker.cfcs.0": "style.statistic_weight",
        "style_maker.relu.weight": "style.activation.weight",
        "style_maker.linear.{leaf}": "style.linear.{leaf}",
        "style_maker.bn.{leaf}": "style.norm.{leaf}",
        "norm_emb.scale": "norm_embedding.scale",
        "norm_emb.pe": None,
        "norm_emb.norm_bn.{leaf}": "norm_embedding.norm.{leaf}",
        "fusion_net.clustering_layer.group_token": "cluster.centres",
        "fusion_net.clustering_layer.blocks.{i}.attn.qkv.{leaf}": split(
            "cluster.blocks.{i}.attention.{part}_proj.{leaf}", "q", "k", "v"
        ),
        "fusion_net.clustering_layer.blocks.{i}.attn.proj.{leaf}": "cluster.blocks.{i}.attention.out_proj.{leaf}",
        "fusion_net.clustering_layer.blocks.{i}.{norm}.{leaf}": "cluster.blocks.{i}.{norm}.{leaf}",
        "fusion_net.clustering_layer.blocks.{i}.mlp.{fc}.{leaf}": "cluster.blocks.{i}.mlp.{fc}.{leaf}",
        "fusion_net.clustering_layer.cluster_block.norm_tokens.{leaf}": "cluster.norm_centres.{leaf}",
        "fusion_net.clustering_layer.cluster_block.norm_x.{leaf}": "cluster.norm_images.{leaf}",
        "fusion_net.clustering_layer.cluster_block.assign.{proj}.{leaf}": "cluster.{proj}.{leaf}",
        "fusion_net.conf_mlp.{i}.skip_connect_gate": "aggregate.blocks.{i}.gate",
        "fusion_net.conf_mlp.{i}.ln.{leaf}": "aggregate.blocks.{i}.norm.{leaf}",
        "fusion_net.conf_mlp.{i}.tokens_mlp_block.{fc}.{leaf}": "aggregate.blocks.{i}.tokens.{fc}.{leaf}",
        "fusion_net.conf_mlp.{i}.channels_mlp_block.{fc}.{leaf}": "aggregate.blocks.{i}.channels.{fc}.{leaf}",
        "fusion_net.conf_mlp.{i}.fc1.{leaf}": "aggregate.fc1.{leaf}",
        "fusion_net.conf_mlp.{i}.fc2.{leaf}": "aggregate.fc2.{leaf}",
    }
)


def _convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In a checkpoint of the training the names have the aggregator's prefix."""
    return _NAMES({name.removeprefix(_PREFIX): tensor for name, tensor in state.items()})


def _build(args: dict[str, Any]) -> nn.Module:
    fusion = args["fusion_net"]
    if not fusion.get("key_query_combined_info_propagate", True):
        raise ValueError("key_query_combined_info_propagate must be True: images and centres see each other")
    lists = {name: fusion[name] for name in ("depths", "num_heads", "num_group_tokens")}
    if any(len(values) != 1 for values in lists.values()):
        raise ValueError(f"one stage of clusters is offered, got {lists}")
    dim, style_dim, norm_dim = fusion["value_dim"], args["style_dim"], args["normemb_dim"]
    weights = fusion.get("confidence_dim", 1)
    if style_dim + norm_dim != fusion["embed_dim"] or weights not in (1, dim):
        raise ValueError(
            f"embed_dim must be style_dim + normemb_dim ({style_dim + norm_dim}) and confidence_dim 1 or value_dim "
            f"({dim}), got {fusion['embed_dim']} and {weights}"
        )
    return ClusterAggregate(
        dim, args["style_channels"], style_dim=style_dim, norm_dim=norm_dim, per_channel=weights > 1,
        depth=lists["depths"][0], num_heads=lists["num_heads"][0], num_centres=lists["num_group_tokens"][0],
    )  # fmt: skip


def _run(module: ClusterAggregate, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    features = inputs["features"]
    style = module.style(inputs["style_stats"])
    share, unit, kept = module.assign(features, style)
    whole = summarise(share, (unit, kept), least=1.0)
    weights = module.weights(whole)
    strength = weights * torch.linalg.vector_norm(whole.means[0], dim=-1, keepdim=True)
    found = {
        "style": style,
        "assignment": share[:, None],
        "cluster_feature": whole.means[0],
        "cluster_style": whole.means[1],
        "confidence_weight": weights,
        "weights": strength / strength.sum(1, keepdim=True),
        "aggregated": module.template(whole),
    }
    summary = None
    for number, (first, last) in enumerate(args.get("chunks", ())):
        new = module.summarise(features[:, first:last], inputs["style_stats"][:, first:last])
        summary = new if summary is None else merged(summary, new)
        found |= {
            f"seq{number}.aggregated": module.template(summary),
            f"seq{number}.cluster_feature": summary.means[0],
            f"seq{number}.cluster_style": summary.means[1],
            f"seq{number}.count": summary.mass,
        }
    return found


PORTS = (AuthorsPort("caface_aggregator", build=_build, convert=_convert, run=_run),)
