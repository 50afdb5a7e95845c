"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names, split
from saccade.catalogue.names import Place, laid
from saccade.catalogue.ports import Arguments
from saccade.models.videolights.fusion import BiCMF
from saccade.models.videolights.losses import Criterion, SpanMatcher, Targets
from saccade.models.videolights.network import Trained, VideoLights
from saccade.models.videolights.refinement import FeatureRefinement


def _attention(theirs: str, ours: str) -> dict[str, Place]:
    return {
        f"{theirs}.in_proj_weight": split(f"{ours}.{{part}}_proj.weight", "q", "k", "v"),
        f"{theirs}.in_proj_bias": split(f"{ours}.{{part}}_proj.bias", "q", "k", "v"),
        f"{theirs}.out_proj.{{leaf}}": f"{ours}.out_proj.{{leaf}}",
    }


def _layers(theirs: str, ours: str, count: int) -> dict[str, Place]:
    """Linears of an MLP, that stand without their ReLUs in the authors' names."""
    return {f"{theirs}.layers.{i}.{{leaf}}": f"{ours}.{2 * i}.{{leaf}}" for i in range(count)}


def _same(*names: str) -> dict[str, Place]:
    return {f"{name}.{{leaf}}": f"{name}.{{leaf}}" for name in names}


_REFINEMENT = Names({
    "sim_w": "likeness",
    "cor_v_w": "clip_factor",
    "cor_q_w": "word_factor",
    "word_to_sentence_pool.weight": "pool",
    "mixer.conv1d.weight": laid("mix.weight", lambda weight: weight.squeeze(2)),
    "mixer.conv1d.bias": "mix.bias",
})  # fmt: skip
_BICMF = Names({
    **_attention("cross_attn_1", "words_to_clips"),
    **_attention("cross_attn_2", "clips_to_words"),
    **_attention("cross_attn_3", "fused"),
    **_same(*(f"linear{i}" for i in range(1, 6)), "norm1", "norm3", "norm4", "activation"),
    "norm2.{leaf}": None,  # never called
})  # fmt: skip
_NETWORK = Names({
    **{
        f"input_{theirs}_proj.{{i}}.{name}": place
        for theirs, ours in (("txt", "text_map"), ("vid", "video_map"))
        for name, place in (
            ("LayerNorm.{leaf}", f"{ours}.norms.{{i}}.{{leaf}}"),
            ("net.{n}.conv1d.weight", laid(f"{ours}.maps.{{i}}.weight", lambda weight: weight.squeeze(2))),
            ("net.{n}.conv1d.bias", f"{ours}.maps.{{i}}.bias"),
        )
    },
    **_REFINEMENT.within("feature_refinement.", "refinement."),
    **_BICMF.within("transformer.t2v_encoder.layers.{i}.", "fusion.{i}."),
    **Names({
        **_attention("self_attn", "attention"), **_same("linear1", "linear2", "norm1", "norm2", "activation")
    }).within("transformer.encoder.layers.{i}.", "encoder.{i}."),
    **Names({
        **{f"{side}_{name}_proj.{{leaf}}": f"maps.{side}_{name}.{{leaf}}" for side, name in (
            ("sa", "qcontent"), ("sa", "qpos"), ("sa", "kcontent"), ("sa", "kpos"), ("sa", "v"),
            ("ca", "qcontent"), ("ca", "qpos"), ("ca", "kcontent"), ("ca", "kpos"), ("ca", "v"), ("ca", "qpos_sine"),
        )},
        "self_attn.out_proj.{leaf}": "self_out.{leaf}",
        "cross_attn.out_proj.{leaf}": "cross_out.{leaf}",
        **_same("linear1", "linear2", "norm1", "norm2", "norm3", "activation"),
    }).within("transformer.decoder.layers.{i}.", "decoder.layers.{i}."),
    **_layers("transformer.decoder.query_scale", "decoder.scale", 2),
    **_layers("transformer.decoder.ref_point_head", "decoder.place", 2),
    **_layers("transformer.decoder.ref_anchor_head", "decoder.width", 2),
    **_layers("transformer.decoder.bbox_embed", "decoder.move", 3),
    "transformer.decoder.norm.{leaf}": "decoder.norm.{leaf}",
    "query_embed.weight": "decoder.anchors",
    "class_embed.{leaf}": "classify.{leaf}",
    **_layers("span_embed", "span", 3),
    "saliency_proj1.{leaf}": "clip_saliency.{leaf}",
    "saliency_proj2.{leaf}": "whole_saliency.{leaf}",
    "saliency_proj_mr.{leaf}": "feedback.map.{leaf}",
    **{f"gru_extractor.gru.{name}_l0": f"feedback.gru.{name}" for name in (
        "weight_ih", "weight_hh", "bias_ih", "bias_hh",
    )},
    "contrastive_align_projection_query.{leaf}": "query_space.{leaf}",
    "contrastive_align_projection_txt.{leaf}": "word_space.{leaf}",
    "contrastive_align_projection_vid.{leaf}": "clip_space.{leaf}",
    "global_rep_token": "whole",
    "global_rep_pos": "whole_place",
    "txt_position_embed.{rest*}": None,  # words have no positions
})  # fmt: skip
#: what a decoder of one layer has in the code and never calls
_OF_SEVERAL = ("transformer.decoder.query_scale.", "transformer.decoder.bbox_embed.")


def _convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not any(name.startswith("transformer.decoder.layers.1.") for name in state):
        state = {name: tensor for name, tensor in state.items() if not name.startswith(_OF_SEVERAL)}
    return _NETWORK(state)


def _run_network(module: VideoLights, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    said = module(inputs["src_vid"], inputs["src_txt"], inputs["src_vid_mask"] > 0, inputs["src_txt_mask"] > 0)
    found = {
        "pred_logits": said.logits,
        "pred_spans": said.pred_spans,
        "saliency_scores": said.saliency,
        "saliency_scores_neg": said.saliency_neighbour,
        "saliency_scores_mr": said.saliency_feedback,
        "proj_queries": said.queries,
        "proj_txt_mem": said.words,
        "proj_vid_mem": said.clips,
        "src_txt": said.word_features,
        "src_vid": said.clip_features,
    }
    earlier = said.auxiliary or []
    for number, (logits, spans) in enumerate(zip(earlier[::3], earlier[1::3])):
        found |= {f"aux{number}_logits": logits, f"aux{number}_spans": spans}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _run_refinement(module: FeatureRefinement, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    masks = inputs["video_mask"] > 0, inputs["query_mask"] > 0
    return {"video": module(inputs["video"], inputs["query"], *masks)}


def _run_bicmf(module: BiCMF, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    """Theirs are (tokens, batch, width): the whole's token, clips, words, of which the clips change alone."""
    src, pos, there = inputs["src"].transpose(0, 1), inputs["pos"].transpose(0, 1), inputs["padding"] == 0
    clips, words = slice(1, 1 + args["video_length"]), slice(1 + args["video_length"], None)
    fused = module(src[:, clips], src[:, words], pos[:, clips], pos[:, words], there[:, clips], there[:, words])
    return {"src": torch.cat([src[:, :1], fused, src[:, words]], 1).transpose(0, 1)}


def _build_criterion(args: dict[str, Any]) -> nn.Module:
    build = Arguments(
        Criterion,
        {
            "eos_coef": "background",
            "temperature": "temperature",
            "saliency_margin": "margin",
            "hard_pos_neg_loss_coef": "hard",
            "mr_to_hd_loss_coef": "feedback",
            "cos_sim_loss_coef": "similarity",
        },
        matcher=SpanMatcher(
            *(args.get(f"cost_{name}", value) for name, value in (("span", 10), ("giou", 1), ("class", 4)))
        ),
    )
    return build(args)


def _run_criterion(module: Criterion, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    said = Trained(
        inputs["pred_logits"], inputs["pred_spans"], inputs["saliency_scores"],
        saliency_neighbour=inputs["saliency_scores_neg"], saliency_feedback=inputs["saliency_scores_mr"],
        queries=inputs["proj_queries"], words=inputs["proj_txt_mem"], clip_features=inputs["src_vid"],
        word_features=inputs["src_txt"],
    )  # fmt: skip
    targets = Targets(
        inputs["target_spans"].split(inputs["target_counts"].tolist()), inputs["saliency_all_labels"],
        inputs["saliency_pos_index"] > 0,
        torch.stack([inputs["saliency_pos_labels"], inputs["saliency_neg_labels"]], -1), inputs["video_mask"] > 0,
    )  # fmt: skip
    terms = module(said, targets, args.get("epoch_i", 0)).terms
    matches = module.matcher(said.logits, said.pred_spans, targets.spans)
    theirs = {"span": "span", "giou": "giou", "label": "label", "saliency": "saliency", "align": "contrastive_align"}
    return {
        **{f"loss_{name}": terms[ours].reshape(1) for ours, name in theirs.items()},
        "matched_queries": torch.cat([query for query, _ in matches]),
        "matched_targets": torch.cat([truth for _, truth in matches]),
    }


PORTS = (
    AuthorsPort(
        "video_light",
        build=Arguments(
            VideoLights,
            {
                "vid_dim": "video_dim",
                "txt_dim": "text_dim",
                "hidden_dim": "dim",
                "nheads": "num_heads",
                "dim_feedforward": "feedforward",
                "bicmf_layers": "fusion_layers",
                "enc_layers": "encoder_layers",
                "dec_layers": "decoder_layers",
                "num_queries": "num_queries",
                "contrastive_hdim": "contrastive_dim",
                "n_input_proj": "projection_layers",
            },
            ends=False,  # which are among the features that it is given
        ),
        convert=_convert,
        run=_run_network,
    ),
    AuthorsPort(
        "feature_refinement",
        build=Arguments(FeatureRefinement, {"d_model": "dim"}),
        convert=_REFINEMENT,
        run=_run_refinement,
    ),
    AuthorsPort(
        "bicmf",
        build=Arguments(BiCMF, {"d_model": "dim", "nhead": "num_heads", "dim_feedforward": "feedforward"}),
        convert=_BICMF,
        run=_run_bicmf,
    ),
    AuthorsPort("criterion", build=_build_criterion, convert=dict, run=_run_criterion),
)
