"""Variational attention: where attention looks is a latent variable, of which training maximises the likelihood.

Deng, Kim, Chiu, Guo, Rush, "Latent Alignment and Variational Attention", NeurIPS 2018, arXiv 1807.03756.

    p(z = j | x, h) = softmax_j(s_j),   f(c) = softmax(W_v tanh(W_o [h; c] + b_o) + b_v)
    soft       log f(sum_j p_j x_j)_y                         exact      log sum_j p_j f(x_j)_y
    hard       sum_j p_j log f(x_j)_y                         variational  sum_j q_j log f(x_j)_y - KL(q || p)

with q(z | x, y) of a network that sees the answer, in training alone. What estimates the last two, z ~ q (or p):

| `objective`      | paper                                         | gradient, or cost                             |
|------------------|-----------------------------------------------|-----------------------------------------------|
| `sample`         | score function, soft baseline B; its method   | grad log f(x_z) + (log f(x_z) - B) grad log q |
| `hard-sample`    | the same of the hard bound, z ~ p             |                                               |
| `gumbel`         | sum_j a_j x_j, a = softmax((log q + g) / tau) | by a                                          |
| `wake-sleep`     | K draws, w = softmax(log p - log q + log f)   | -w (log f + log p + log q), w fixed           |
| `dirichlet`      | z on the simplex, Dirichlet(exp s)            | by z; KL in closed form                       |
| `dirichlet-hard` | z ~ the prior: what that one trains first     | by z                                          |

beside `soft`, `exact`, `hard` and `enumerate`, which take every place.

| here                | paper, authors' code                         | default                          |
|---------------------|----------------------------------------------|----------------------------------|
| `samples`           | K                                            | 1; 5 for wake-sleep              |
| `temperature`       | tau                                          | 0.1                              |
| `kl`                | alpha                                        | 1                                |
| `predict`           | sum_j p_j f(x_j), or of the `top` k (K-max)  |                                  |
| `InferenceNetwork`  | q of sentences, `bigbrnn`                    | 512 a direction                  |
| `AnswerPosterior`   | q of answers about images                    |                                  |
| `Translator`        | their network, dropout 0.3                   | 512, 1024, 768; uniform in 0.1   |
| `Halving`           | Adam 3e-4, eps 1e-8, batches of 6 sentences  | 30 epochs                        |

Source of what the paper leaves open: the authors' code. Its rewards are right for one draw; here each draw has its own,
or is compared with the others (`baseline="leave-one-out"`). The first state of the decoder is a linear map of the mean
of the memory. `Translator.advance` is what a beam search takes (theirs: 10 beams), for instance
`saccade.models.beams.search`. Evaluation draws nothing: it enumerates what an estimator estimates.
"""

from __future__ import annotations

import torch

from saccade.adapt.variational_attention.latent import (
    SCORES,
    LatentAttention,
    categorical_kl,
    dirichlet_kl,
    dirichlet_sample,
    gumbel_weights,
    log_weights,
)
from saccade.adapt.variational_attention.objective import BASELINES, OBJECTIVES, VariationalAttention, wake_sleep
from saccade.adapt.variational_attention.posterior import READERS, AnswerPosterior, InferenceNetwork
from saccade.adapt.variational_attention.translator import Halving, State, Translator
from saccade.catalogue import register

__all__ = [
    "BASELINES",
    "OBJECTIVES",
    "READERS",
    "SCORES",
    "AnswerPosterior",
    "Halving",
    "InferenceNetwork",
    "LatentAttention",
    "State",
    "Translator",
    "VariationalAttention",
    "categorical_kl",
    "dirichlet_kl",
    "dirichlet_sample",
    "gumbel_weights",
    "log_weights",
    "wake_sleep",
]


def _inputs(module: torch.nn.Module, size: int) -> tuple[torch.Tensor, ...]:
    places = size + 2
    words = torch.arange(2 * size).view(2, size) % 9
    return torch.randn(2, size, 6), torch.randn(2, places, 4), words, torch.randn(2, size, places)


register(
    "variational-attention",
    kind="objective",
    summary="Attention as a latent place: its marginal likelihood, or a bound with a posterior that saw the answer.",
    taxonomy={"sequences": "distinctive", "levels": "single", "positions": "hard", "representations": "single"},
    efficiency="",
    complexity="emissions a word: 1 soft, 2 sampled (with the baseline), S enumerated or exact; prediction S, or k",
    invariants=(
        "with one place all objectives are one, and KL is 0",
        "q = p: the bound is the hard one",
        "the bound lies below the marginal likelihood, and is it where q is the exact posterior",
        "the estimator's gradient is the bound's on average, and the baseline lowers its variance alone",
        "a prior that is sure: exact is soft; an emission that is linear: soft is marginal",
        "padding has no weight, and adds nothing to KL",
    ),
    build=VariationalAttention,
    example={"dim": 6, "memory_dim": 4, "vocabulary": 9, "attention_dim": 5},
    inputs=_inputs,
)
