"""The objectives: soft attention, the marginal likelihood and its bounds, and estimators of their gradients.

Shape letters: B batch, T steps of the target, S places of the memory, D their width, H width of a query, V words,
K samples.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from saccade.adapt.variational_attention.latent import (
    LatentAttention,
    categorical_kl,
    dirichlet_kl,
    dirichlet_sample,
    gumbel_weights,
    log_weights,
)
from saccade.layers.objective import Objective

#: objective -> whether it needs a posterior
OBJECTIVES = {
    "soft": False,
    "exact": False,
    "hard": False,
    "hard-sample": False,
    "enumerate": True,
    "sample": True,
    "gumbel": True,
    "wake-sleep": True,
    "dirichlet-hard": False,
    "dirichlet": True,
}
#: what each estimator estimates, which is what evaluation computes
_ENUMERATED = {"hard-sample": "hard", "sample": "enumerate", "gumbel": "enumerate", "wake-sleep": "enumerate"}
BASELINES = ("soft", "leave-one-out", "none")

#: terms by name, (B, T)
Terms = dict[str, Tensor]


class VariationalAttention(LatentAttention):
    """Queries, a memory and words -> the loss by which attention, posterior and emission are trained.

    Every objective is a sum over words, divided by rows. Terms of the loss:

    - `emission`: what the words cost;
    - `kl`: KL(q || p), with a gradient by both;
    - `score`: its gradient is the score function's, with the baseline taken off; its value says nothing;
    - `baseline`: the soft prediction's cost, where `train_baseline`;
    - `prior`, `posterior`: of wake-sleep, -log p and -log q of the weighed draws.

    In evaluation an estimator's objective is enumerated: nothing is drawn. Only the Dirichlet's are drawn always.

    Args:
        dim, memory_dim, vocabulary, score, attention_dim, drop: see `LatentAttention`.
        objective: of `OBJECTIVES`.
        samples: K, of what draws.
        temperature: tau of "gumbel".
        kl: weight of `kl`.
        baseline: of the score function's estimators, of `BASELINES`: the soft prediction's log-probability, or the mean
            of the other draws', or 0.
        train_baseline: the soft prediction is trained as well.
        pad: the word that stands for none; its steps do not count.
        at_once: places whose words are scored at a time, computed again in the backward pass: memory T at_once V in the
            place of T S V. All at once where None.

    Raises:
        ValueError: if a number is out of range, or an option is unknown.

    >>> attention = VariationalAttention(6, 4, 9)
    >>> h, x, y = torch.randn(2, 3, 6), torch.randn(2, 5, 4), torch.randint(9, (2, 3))
    >>> loss, terms = attention(h, x, y, posterior=torch.randn(2, 3, 5))
    >>> sorted(terms), attention.predict(h, x).shape
    (['emission', 'kl', 'score'], torch.Size([2, 3, 9]))
    """

    def __init__(
        self,
        dim: int,
        memory_dim: int,
        vocabulary: int,
        objective: str = "sample",
        *,
        score: str = "mlp",
        attention_dim: int | None = None,
        samples: int = 1,
        temperature: float = 0.1,
        kl: float = 1.0,
        baseline: str = "soft",
        train_baseline: bool = False,
        pad: int | None = None,
        drop: float = 0.0,
        at_once: int | None = None,
    ) -> None:
        super().__init__(dim, memory_dim, vocabulary, score=score, attention_dim=attention_dim, drop=drop)
        if objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
        if baseline not in BASELINES:
            raise ValueError(f"baseline must be one of {', '.join(BASELINES)}, got {baseline!r}")
        if samples < 1 or temperature <= 0 or (at_once is not None and at_once < 1):
            raise ValueError(
                f"samples, temperature and at_once must be positive, got {samples}, {temperature} and {at_once}"
            )
        if baseline == "leave-one-out" and samples < 2:
            raise ValueError(f"samples must be 2 or more for baseline='leave-one-out', got {samples}")
        self.objective, self.samples, self.temperature, self.pad = objective, samples, temperature, pad
        self.baseline, self.train_baseline, self.at_once = baseline, train_baseline, at_once
        self.weights = {"kl": kl}

    @property
    def needs_posterior(self) -> bool:
        """Whether a call asks for one."""
        return OBJECTIVES[self.objective]

    def forward(
        self,
        h_BTH: Tensor,
        x_BSD: Tensor,
        y_BT: Tensor,
        posterior: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        draws: Tensor | None = None,
    ) -> Objective:
        """
        Args:
            h_BTH: queries, a step each.
            x_BSD: the memory.
            y_BT: words.
            posterior: scores (B, T, S) of q, or log q; of networks that saw the words. Needed where
                `needs_posterior`, unused elsewhere.
            mask: of the memory (B, S), True is a real place; each row has one.
            draws: what is drawn in training, in the place of what would be: places (K, B, T), or for "gumbel" numbers
                (K, B, T, S) from [0, 1).

        Raises:
            ValueError: if they do not fit together.
        """
        self._check(h_BTH, x_BSD, mask)
        if y_BT.shape != h_BTH.shape[:2]:
            raise ValueError(f"words must be {tuple(h_BTH.shape[:2])}, one for each query, got {tuple(y_BT.shape)}")
        scores_BTS = self.scores(h_BTH, x_BSD)
        if self.needs_posterior and (posterior is None or posterior.shape != scores_BTS.shape):
            given = None if posterior is None else tuple(posterior.shape)
            raise ValueError(f"posterior must be {tuple(scores_BTS.shape)} for {self.objective!r}, got {given}")
        real_BT = torch.ones_like(y_BT, dtype=torch.bool) if self.pad is None else y_BT != self.pad
        y_BT = y_BT.masked_fill(~real_BT, 0)
        objective = self.objective if self.training else _ENUMERATED.get(self.objective, self.objective)
        if objective.startswith("dirichlet"):
            drawn = posterior if self.needs_posterior else None
            found = self._dirichlet(h_BTH, x_BSD, y_BT, scores_BTS, drawn, mask)
        else:
            log_p_BTS = log_weights(scores_BTS, mask)
            log_q_BTS = log_p_BTS if posterior is None or not self.needs_posterior else log_weights(posterior, mask)
            found = self._categorical(objective, h_BTH, x_BSD, y_BT, log_p_BTS, log_q_BTS, draws)
        terms = {name: (each_BT * real_BT).sum() / len(y_BT) for name, each_BT in found.items()}
        loss = torch.stack([self.weights.get(name, 1.0) * term for name, term in terms.items()]).sum()
        return Objective(loss.to(h_BTH.dtype), {name: term.to(h_BTH.dtype) for name, term in terms.items()})

    def predict(self, h_BTH: Tensor, x_BSD: Tensor, *, mask: Tensor | None = None, top: int | None = None) -> Tensor:
        """log p(y | x, h), (B, T, V), without the posterior.

        That of soft attention for "soft", of the mean over `samples` draws for the Dirichlet's, and else
        log sum_j p_j f(x_j).

        Args:
            h_BTH, x_BSD, mask: as in the call.
            top: only that many of the likeliest places, whose weights are made to sum to 1; whatever the objective.

        Raises:
            ValueError: if they do not fit together, or `top` is not positive.
        """
        self._check(h_BTH, x_BSD, mask)
        if top is not None and top < 1:
            raise ValueError(f"top must be positive, got {top}")
        scores_BTS = self.scores(h_BTH, x_BSD)
        log_p_BTS = log_weights(scores_BTS, mask)
        if top is not None and top < x_BSD.shape[1]:
            log_p_BTS, place_BTS = log_p_BTS.topk(top, -1)
            return self._marginal(h_BTH, _at(x_BSD, place_BTS), log_p_BTS.log_softmax(-1))
        if top is None and self.objective == "soft":
            return self.log_words(h_BTH, self.context(x_BSD, log_p_BTS.exp()))
        if top is None and self.objective.startswith("dirichlet"):
            z_KBTS = dirichlet_sample(_alpha(scores_BTS, mask), self.samples, mask)
            return _log_mean(self.log_words(h_BTH, self.context(x_BSD, z_KBTS)))
        return self._marginal(h_BTH, x_BSD[:, None], log_p_BTS)

    def prior(self, h_BTH: Tensor, x_BSD: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """p, (B, T, S): what attention looks at. Arguments and errors as in the call."""
        self._check(h_BTH, x_BSD, mask)
        return log_weights(self.scores(h_BTH, x_BSD), mask).exp().to(h_BTH.dtype)

    def context(self, x_BSD: Tensor, weights: Tensor) -> Tensor:
        """sum_j w_j x_j, (..., B, T, D), of weights (..., B, T, S)."""
        return weights.to(x_BSD.dtype) @ x_BSD

    def _categorical(
        self,
        objective: str,
        h_BTH: Tensor,
        x_BSD: Tensor,
        y_BT: Tensor,
        log_p_BTS: Tensor,
        log_q_BTS: Tensor,
        draws: Tensor | None,
    ) -> Terms:
        """Where there is no posterior, log q is log p, and KL is not asked for."""
        if objective == "soft":
            return {"emission": -self.log_word(h_BTH, self.context(x_BSD, log_p_BTS.exp()), y_BT)}
        if objective == "exact":
            return {"emission": -(log_p_BTS + self._every_place(h_BTH, x_BSD, y_BT)).logsumexp(-1)}
        if objective in ("hard", "enumerate"):
            found = {"emission": -(log_q_BTS.exp() * self._every_place(h_BTH, x_BSD, y_BT)).sum(-1)}
        elif objective == "gumbel":
            shape = (self.samples, *log_q_BTS.shape)
            uniform = torch.rand(shape, dtype=log_q_BTS.dtype, device=h_BTH.device) if draws is None else draws
            weights_KBTS = gumbel_weights(log_q_BTS, uniform, self.temperature)
            found = {"emission": -self.log_word(h_BTH, self.context(x_BSD, weights_KBTS), y_BT).mean(0)}
        else:
            place_KBT = self._drawn(log_q_BTS) if draws is None else draws
            log_f_KBT = self.log_word(h_BTH, _at(x_BSD, place_KBT.movedim(0, -1)).movedim(-2, 0), y_BT)
            log_q_KBT, log_p_KBT = (_of_draws(logs, place_KBT) for logs in (log_q_BTS, log_p_BTS))
            if objective == "wake-sleep":
                return wake_sleep(log_f_KBT, log_p_KBT, log_q_KBT)
            found = {"emission": -log_f_KBT.mean(0)}
            baseline = self._baseline(log_f_KBT, h_BTH, x_BSD, y_BT, log_p_BTS)
            found["score"] = -((log_f_KBT - baseline).detach() * log_q_KBT).mean(0)
            if self.train_baseline:
                found["baseline"] = -self.log_word(h_BTH, self.context(x_BSD, log_p_BTS.exp()), y_BT)
        if self.needs_posterior:
            found["kl"] = categorical_kl(log_q_BTS, log_p_BTS)
        return found

    def _dirichlet(
        self,
        h_BTH: Tensor,
        x_BSD: Tensor,
        y_BT: Tensor,
        scores_BTS: Tensor,
        posterior: Tensor | None,
        mask: Tensor | None,
    ) -> Terms:
        """E log f - KL; without a posterior z is drawn from the prior, as the generative part is trained first."""
        prior_BTS = _alpha(scores_BTS, mask)
        drawn_BTS = prior_BTS if posterior is None else _alpha(posterior, mask)
        z_KBTS = dirichlet_sample(drawn_BTS, self.samples, mask)
        found = {"emission": -self.log_word(h_BTH, self.context(x_BSD, z_KBTS), y_BT).mean(0)}
        if posterior is not None:
            found["kl"] = dirichlet_kl(drawn_BTS, prior_BTS, mask)
        return found

    def _every_place(self, h_BTH: Tensor, x_BSD: Tensor, y_BT: Tensor) -> Tensor:
        """log f(x_j)_y of all j, (B, T, S)."""
        h, y = h_BTH[:, :, None], y_BT[:, :, None]
        if self.at_once is None:
            return self.log_word(h, x_BSD[:, None], y)
        pieces = [
            checkpoint(self.log_word, h, x, y, use_reentrant=False) for x in x_BSD[:, None].split(self.at_once, 2)
        ]
        return torch.cat(pieces, -1)

    def _marginal(self, h_BTH: Tensor, x_BTSD: Tensor, log_p_BTS: Tensor) -> Tensor:
        """log sum_j p_j f(x_j), (B, T, V); T of the memory may be 1."""
        total_BTV: Tensor | None = None
        size = self.at_once or x_BTSD.shape[2]
        for x, log_p in zip(x_BTSD.split(size, 2), log_p_BTS.split(size, 2), strict=True):
            part_BTV = (log_p[..., None] + self.log_words(h_BTH[:, :, None], x)).logsumexp(2)
            total_BTV = part_BTV if total_BTV is None else torch.logaddexp(total_BTV, part_BTV)
        assert total_BTV is not None
        return total_BTV

    def _drawn(self, log_q_BTS: Tensor) -> Tensor:
        """Places (K, B, T), drawn from q."""
        flat = torch.multinomial(log_q_BTS.exp().flatten(0, 1), self.samples, replacement=True)
        return flat.T.reshape(self.samples, *log_q_BTS.shape[:2])

    @torch.no_grad()
    def _baseline(
        self, log_f_KBT: Tensor, h_BTH: Tensor, x_BSD: Tensor, y_BT: Tensor, log_p_BTS: Tensor
    ) -> Tensor | float:
        if self.baseline == "soft":
            return self.log_word(h_BTH, self.context(x_BSD, log_p_BTS.exp()), y_BT)
        if self.baseline == "leave-one-out":
            return (log_f_KBT.sum(0) - log_f_KBT) / (len(log_f_KBT) - 1)
        return 0.0

    def _check(self, h_BTH: Tensor, x_BSD: Tensor, mask: Tensor | None) -> None:
        if h_BTH.ndim != 3 or h_BTH.shape[2] != self.dim:
            raise ValueError(f"queries must be (batch, steps, {self.dim}), got {tuple(h_BTH.shape)}")
        if x_BSD.ndim != 3 or x_BSD.shape[2] != self.memory_dim or len(x_BSD) != len(h_BTH) or not x_BSD.shape[1]:
            wanted = f"({len(h_BTH)}, places, {self.memory_dim})"
            raise ValueError(f"the memory must be {wanted} with a place at least, got {tuple(x_BSD.shape)}")
        if mask is None:
            return
        if mask.dtype != torch.bool or mask.shape != x_BSD.shape[:2]:
            raise ValueError(f"mask must be bool {tuple(x_BSD.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}")
        if not torch.compiler.is_compiling() and not bool(mask.any(1).all()):
            raise ValueError("mask must leave a real place in each row")


def wake_sleep(log_f_KBT: Tensor, log_p_KBT: Tensor, log_q_KBT: Tensor) -> Terms:
    """Costs of K draws of q, each weighed by w_k, which is p f / q of them, made to sum to 1, and has no gradient.

    Args:
        log_f_KBT, log_p_KBT, log_q_KBT: of the draws.
    """
    weight_KBT = (log_p_KBT - log_q_KBT + log_f_KBT).softmax(0).detach()
    parts = {"emission": log_f_KBT, "prior": log_p_KBT, "posterior": log_q_KBT}
    return {name: -(weight_KBT * logs_KBT).sum(0) for name, logs_KBT in parts.items()}


def _alpha(scores_BTS: Tensor, mask_BS: Tensor | None) -> Tensor:
    """exp of the scores; 1 at padding, which counts nowhere."""
    wide_BTS = scores_BTS.to(torch.promote_types(scores_BTS.dtype, torch.float32))
    return (wide_BTS if mask_BS is None else wide_BTS.masked_fill(~mask_BS[:, None], 0)).exp()


def _at(x_BSD: Tensor, place_BTK: Tensor) -> Tensor:
    """x of places (B, T, K), (B, T, K, D)."""
    rows_B = torch.arange(len(x_BSD), device=x_BSD.device)
    return x_BSD[rows_B[:, None, None], place_BTK]


def _of_draws(logs_BTS: Tensor, place_KBT: Tensor) -> Tensor:
    """(K, B, T)."""
    return logs_BTS.gather(-1, place_KBT.movedim(0, -1)).movedim(-1, 0)


def _log_mean(logs: Tensor) -> Tensor:
    """log of the mean of probabilities over the first axis."""
    return logs.logsumexp(0) - torch.tensor(float(len(logs))).log().to(logs)
