"""Where attention looks as a latent variable: its prior, what is said given a place, how far a posterior is from it.

Shape letters: B batch, T steps of the target, S places of the memory, D their width, H width of a query and of what is
said from it, V words, K samples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Gamma

SCORES = ("mlp", "general")


def log_weights(scores_BTS: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """log softmax over real places, -inf at padding; in fp32 at least. What it gives it leaves as it is.

    Args:
        scores_BTS: of places.
        mask_BS: True is a real place; all are where None.
    """
    scores_BTS = scores_BTS.to(torch.promote_types(scores_BTS.dtype, torch.float32))
    if mask_BS is not None:
        scores_BTS = scores_BTS.masked_fill(~mask_BS[:, None], -torch.inf)
    return scores_BTS.log_softmax(-1)


def categorical_kl(log_q_BTS: Tensor, log_p_BTS: Tensor) -> Tensor:
    """sum_j q_j (log q_j - log p_j), (B, T); places where q is 0 add nothing.

    Args:
        log_q_BTS, log_p_BTS: of `log_weights`, with one mask.
    """
    apart_BTS = torch.where(log_q_BTS > -torch.inf, log_q_BTS - log_p_BTS, 0)
    return (log_q_BTS.exp() * apart_BTS).sum(-1)


def gumbel_weights(log_q_BTS: Tensor, uniform_KBTS: Tensor, temperature: float) -> Tensor:
    """softmax((log q - log(-log u)) / tau), (K, B, T, S); at tau towards 0 one place each, drawn from q.

    Args:
        log_q_BTS: of `log_weights`.
        uniform_KBTS: u, from [0, 1).
        temperature: tau.
    """
    noise_KBTS = -(1e-20 - (uniform_KBTS + 1e-20).log()).log()
    return ((log_q_BTS + noise_KBTS) / temperature).softmax(-1)


def dirichlet_sample(alpha_BTS: Tensor, samples: int, mask_BS: Tensor | None = None) -> Tensor:
    """Draws (K, B, T, S) of Dirichlet(alpha) over the real places, differentiable by alpha; 0 at padding.

    Args:
        alpha_BTS: positive.
        samples: K.
        mask_BS: True is a real place.
    """
    part_KBTS = Gamma(alpha_BTS, torch.ones_like(alpha_BTS)).rsample((samples,))
    if mask_BS is not None:
        part_KBTS = part_KBTS * mask_BS[:, None]
    return part_KBTS / part_KBTS.sum(-1, keepdim=True)


def dirichlet_kl(a_BTS: Tensor, b_BTS: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """KL(Dirichlet(a) || Dirichlet(b)) over the real places, (B, T).

    Args:
        a_BTS, b_BTS: positive.
        mask_BS: True is a real place.
    """
    real = 1 if mask_BS is None else mask_BS[:, None]
    a0_BT1, b0_BT1 = ((part * real).sum(-1, keepdim=True) for part in (a_BTS, b_BTS))
    each_BTS = b_BTS.lgamma() - a_BTS.lgamma() + (a_BTS - b_BTS) * (a_BTS.digamma() - a0_BT1.digamma())
    return (a0_BT1.lgamma() - b0_BT1.lgamma())[..., 0] + (each_BTS * real).sum(-1)


class LatentAttention(nn.Module):
    """p(z | x, h) and f(x_z, h): scores of places, and words given the context that a place, or a blend, gives.

        mlp      s_j = v . tanh(W_q h + W_x x_j)                general  s_j = (W h) . x_j
        g(h, c) = tanh(W_o [h; c] + b_o),                       log f = log softmax(W_v g + b_v)

    Args:
        dim: H.
        memory_dim: D.
        vocabulary: V.
        score: of `SCORES`; b_o is there with "mlp" alone, as in the authors' code.
        attention_dim: inner width of "mlp"; H where None.
        drop: dropout of g.

    Raises:
        ValueError: if a number is not positive, or there is no such score.
    """

    def __init__(
        self,
        dim: int,
        memory_dim: int,
        vocabulary: int,
        *,
        score: str = "mlp",
        attention_dim: int | None = None,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        width = dim if attention_dim is None else attention_dim
        if min(dim, memory_dim, vocabulary, width) < 1:
            raise ValueError(
                "dim, memory_dim, vocabulary and attention_dim must be positive, got "
                f"{dim}, {memory_dim}, {vocabulary} and {width}"
            )
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
        self.dim, self.memory_dim, self.vocabulary, self.score = dim, memory_dim, vocabulary, score
        mlp = score == "mlp"
        self.query_proj = nn.Linear(dim, width if mlp else memory_dim, bias=False)
        self.memory_proj = nn.Linear(memory_dim, width, bias=False) if mlp else None
        self.energy = nn.Linear(width, 1, bias=False) if mlp else None
        self.out = nn.Linear(dim + memory_dim, dim, bias=mlp)
        self.head, self.drop = nn.Linear(dim, vocabulary), nn.Dropout(drop)

    def scores(self, h_BTH: Tensor, x_BSD: Tensor) -> Tensor:
        """s, (B, T, S)."""
        query = self.query_proj(h_BTH)
        if self.memory_proj is None or self.energy is None:
            return query @ x_BSD.mT
        return self.energy((query[:, :, None] + self.memory_proj(x_BSD)[:, None]).tanh())[..., 0]

    def features(self, h: Tensor, c: Tensor) -> Tensor:
        """g(h, c), of queries (..., H) and contexts (..., D) whose other axes broadcast: each is projected once."""
        of_query, of_context = self.out.weight.split([self.dim, self.memory_dim], 1)
        return self.drop((F.linear(h, of_query, self.out.bias) + F.linear(c, of_context)).tanh())

    def log_words(self, h: Tensor, c: Tensor) -> Tensor:
        """log f(c), (..., V); in fp32 at least."""
        logits = self.head(self.features(h, c))
        return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def log_word(self, h: Tensor, c: Tensor, y: Tensor) -> Tensor:
        """log f(c)_y, (...), of the words y, which broadcast."""
        logs = self.log_words(h, c)
        return logs.gather(-1, y.expand(logs.shape[:-1])[..., None])[..., 0]
