"""How the authors' attention and generator map to ours: one step of a decoder, one query a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.adapt.variational_attention.latent import categorical_kl, gumbel_weights, log_weights
from saccade.adapt.variational_attention.objective import VariationalAttention
from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments


def _run(module: VariationalAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    h, x, places = inputs["query"][:, None], inputs["memory"], inputs["sample_ids"]
    mask = torch.arange(x.shape[1]) < inputs["memory_lengths"][:, None]
    log_p = log_weights(module.scores(h, x), mask)
    log_q = log_weights(inputs["q_log_alpha"][:, None], mask)
    soft = module.context(x, log_p.exp())
    blend = gumbel_weights(log_q, inputs["gumbel_uniform"], module.temperature)
    drawn = x[torch.arange(len(x)), places]
    logs = module.log_words(h, x)
    return {
        "p_alpha": log_p[:, 0].exp(),
        "context_soft": soft[:, 0],
        "h_soft": module.features(h, soft)[:, 0],
        "soft_logp": module.log_words(h, soft)[:, 0],
        "h_enum": module.features(h, x).transpose(0, 1),
        "enum_expected_logp": (log_q[:, 0, :, None].exp() * logs).sum(1),
        "exact_log_marginal": module.predict(h, x, mask=mask)[:, 0],
        "kl_q_p": categorical_kl(log_q, log_p)[:, 0],
        "h_sample": module.features(inputs["query"], drawn),
        "sample_log_q": log_q[:, 0].gather(1, places.T).T,
        "sample_logmean_p": module.log_words(inputs["query"], drawn).logsumexp(0) - torch.tensor(len(places)).log(),
        "h_gumbel": module.features(h, module.context(x, blend))[:, :, 0],
    }


PORTS = (
    AuthorsPort(
        "variational_attention",
        build=Arguments(
            VariationalAttention,
            {
                "tgt_dim": "dim",
                "src_dim": "memory_dim",
                "vocab": "vocabulary",
                "attn_dim": "attention_dim",
                "attn_type": "score",
                "temperature": "temperature",
                "n_samples": "samples",
            },
        ),
        convert=Names(
            {
                "attn.linear_query.{leaf}": "query_proj.{leaf}",
                "attn.linear_in.{leaf}": "query_proj.{leaf}",
                "attn.linear_context.{leaf}": "memory_proj.{leaf}",
                "attn.v.{leaf}": "energy.{leaf}",
                "attn.linear_out.{leaf}": "out.{leaf}",
                "generator.proj.{leaf}": "head.{leaf}",
            }
        ),
        run=_run,
    ),
)
