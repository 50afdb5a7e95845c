"""Causal linear attention with decay in Triton, forward and backward: what calls the kernels.

Shape letters: B batch, H query heads, K key heads, N tokens in T chunks of C, R = B H rows, D feature width, E value
width.
"""

from __future__ import annotations

from itertools import product
from math import ceil

import torch
from torch import Tensor

from saccade.ops.triton.launching import block, contiguous_rows, launch, products, work_type

__all__ = ["MOST_CHANNELS", "attend", "chunk_of", "extra_bytes", "gradients", "rehearse"]

#: tokens of a chunk and columns of a tile, at most; half as many where products are of float32: twice the registers
CHUNK, COLUMNS = 64, 64

#: tokens of half a chunk where each channel decays by itself
HALF = 16

#: features that may each have their own decay: a tile holds them all
MOST_CHANNELS = 256

_FORMS = ("none", "head", "token", "channel")
_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def attend(
    q_BHND: Tensor,
    k_BKND: Tensor,
    v_BKNE: Tensor,
    state_BHDE: Tensor,
    form: str,
    factors_BHND: Tensor | None,
    powers: tuple[Tensor, Tensor, Tensor] | None,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, N, E) in `dtype`, and the state after the last token, float32.

    Args:
        q_BHND, k_BKND, v_BKNE: float32, bfloat16 or float16; K divides H.
        state_BHDE: before the first token, float32.
        form: what the decays vary by: "none", "head", "token" or "channel".
        factors_BHND: float32, the last axis 1 by token; None by head and where nothing decays.
        powers: by head, the products in a chunk of `chunk_of` tokens, float32: from its start to each token, inclusive,
            (H, C); from each, exclusive, to its end, (H, C); between two of them, (H, C, C), 0 above the diagonal.
        scale: of the scores.
        dtype: of the output.
    """
    call = _Call(q_BHND, k_BKND, v_BKNE, form, factors_BHND, powers, scale)
    before, last = call.states(state_BHDE.contiguous())
    return call.outputs(call.scores(), before, dtype), last


def gradients(
    q_BHND: Tensor,
    k_BKND: Tensor,
    v_BKNE: Tensor,
    state_BHDE: Tensor,
    form: str,
    factors_BHND: Tensor | None,
    powers: tuple[Tensor, Tensor, Tensor] | None,
    scale: float,
    grad_BHNE: Tensor,
    grad_last_BHDE: Tensor,
    of_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of queries, keys, values, state, and of the decays' logarithms by token, (B, H, N, 1 or D) float32.

    Args:
        q_BHND, k_BKND, v_BKNE, state_BHDE, form, factors_BHND, powers, scale: as in `attend`.
        grad_BHNE: of the output.
        grad_last_BHDE: of the state after the last token, float32.
        of_decay: whether the last is wanted, else None.
    """
    call = _Call(q_BHND, k_BKND, v_BKNE, form, factors_BHND, powers, scale)
    grad = contiguous_rows(grad_BHNE)
    scored, (before, _) = call.scores(), call.states(state_BHDE.contiguous())
    after, of_state = call.states(grad_last_BHDE.contiguous(), grad)
    of_scores, logs = call.grad_scores(grad, scored, of_decay)
    of_v = call.grad_values(grad, scored, after)
    of_q, of_k, logs = call.grad_queries_keys(grad, of_scores, before, after, logs)
    return of_q, call.by_key_head(of_k, k_BKND), call.by_key_head(of_v, v_BKNE), of_state, logs


def chunk_of(form: str, dtype: torch.dtype) -> int:
    """Tokens of a chunk.

    Args:
        form: as in `attend`.
        dtype: of the inputs.
    """
    if form == "channel":
        return 2 * HALF
    return CHUNK // 2 if work_type(dtype) == torch.float32 else CHUNK


def extra_bytes(B: int, H: int, N: int, D: int, E: int, dtype: torch.dtype, form: str) -> int:
    """Memory of the forward pass beyond inputs and outputs.

    Args:
        B, H, N, D, E: sizes.
        dtype: of the inputs.
        form: as in `attend`.
    """
    C = chunk_of(form, dtype)
    decays = {"none": 0, "head": 0, "token": 4 * C * (C + 2), "channel": 4 * C * 2 * D}[form]
    return B * H * ceil(N / C) * (work_type(dtype).itemsize * (C * C + D * E) + decays)


class _Call:
    """The launches of one call: its tensors, sizes and the products of its decays."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        form: str,
        factors: Tensor | None,
        powers: tuple[Tensor, Tensor, Tensor] | None,
        scale: float,
    ) -> None:
        from saccade.ops.triton import linear_gradients, linear_kernels

        self.kernels, self.gradients = linear_kernels, linear_gradients
        (self.B, self.H, self.N, self.D), self.E = q.shape, v.shape[3]
        self.form, self.scale, self.group = form, float(scale), self.H // k.shape[1]
        self.C = chunk_of(form, q.dtype)
        self.T, self.R = ceil(self.N / self.C), self.B * self.H
        self.programs = self.R * self.T
        self.q, self.k, self.v = (contiguous_rows(x) for x in (q, k, v))
        self.work, self.kinds = work_type(q.dtype), products(q.device, q.dtype)
        self.warps, columns = (8, COLUMNS // 2) if self.work == torch.float32 else (4, COLUMNS)
        self.BD, self.BE = block(self.D, columns), block(self.E, columns)
        self.none = self.new(1)
        # what a form does not have is never read
        self.factors = self.none if factors is None else contiguous_rows(factors)
        self.fore, self.aft, self.between = (self.none,) * 3 if powers is None else powers
        if form == "token":
            self._products_by_token()
        elif form == "channel":
            self._products_by_channel()

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.q.new_empty(shape, dtype=dtype)

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.N, self.D, self.T, self.H, self.group

    def by_key_head(self, x_RND: Tensor, like: Tensor) -> Tensor:
        """(B, K, N, D): the sum over the query heads that share a key head."""
        x = x_RND.unflatten(0, (self.B, self.H // self.group, self.group))
        return (x.sum(2) if self.group > 1 else x[:, :, 0]).to(like.dtype)

    def _products_by_token(self) -> None:
        self.fore, self.aft, self.between = (self.new(self.R, self.T, self.C, *x) for x in ((), (), (self.C,)))
        launch(
            self.kernels.products_by_token, (self.programs,), self.factors, self.fore, self.aft, self.between,
            self.N, self.T, self.H, *self.factors.stride()[:3], C=self.C, warps=2,
        )  # fmt: skip

    def _products_by_channel(self) -> None:
        self.fore, self.aft = (self.new(self.R, self.T, self.C, self.D) for _ in range(2))
        launch(
            self.kernels.products_by_channel, (2 * self.programs, ceil(self.D / self.BD)),
            self.factors, self.fore, self.aft,
            self.N, self.D, self.T, self.H, *self.factors.stride()[:3], HALF=HALF, BD=self.BD, warps=1,
        )  # fmt: skip

    def scores(self) -> Tensor:
        """(R, T, C, C)."""
        out = self.new(self.R, self.T, self.C, self.C, dtype=self.work)
        strides = *self.q.stride()[:3], *self.k.stride()[:3]
        if self.form == "channel":
            launch(
                self.kernels.scores_by_channel, (self.programs,),
                self.q, self.k, self.factors, self.fore, self.aft, out,
                *self.sizes, *strides, *self.factors.stride()[:3], HALF=HALF, BD=block(self.D, MOST_CHANNELS),
                BC=self.BD, warps=self.warps, **self.kinds,
            )  # fmt: skip
        else:
            launch(
                self.kernels.scores, (self.programs,), self.q, self.k, self.between, out, *self.sizes, *strides,
                FORM=self.form, C=self.C, BD=self.BD, warps=self.warps, **self.kinds,
            )  # fmt: skip
        return out

    def states(self, start: Tensor, grad: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Before each chunk (R, T, D, E) and after the last; with `grad`, gradients after each and before the first."""
        reverse = grad is not None
        x, y = (self.k, self.v) if grad is None else (self.q, grad)
        out, end = self.new(self.R, self.T, self.D, self.E, dtype=self.work), torch.empty_like(start)
        launch(
            self.kernels.states, (self.R, ceil(self.D / self.BD), ceil(self.E / self.BE)),
            x, y, self.fore, self.aft, start, out, end, self.N, self.D, self.E, self.T, self.H,
            1 if reverse else self.group, *x.stride()[:3], *y.stride()[:3], self.scale if reverse else 1.0,
            FORM=self.form, C=self.C, BD=self.BD, BE=self.BE, REVERSE=reverse, warps=self.warps,
            **self.kinds,
        )  # fmt: skip
        return out, end

    def outputs(self, scored: Tensor, before: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, H, N, E)."""
        out = self.new(self.B, self.H, self.N, self.E, dtype=dtype)
        launch(
            self.kernels.outputs, (self.programs, ceil(self.E / self.BE)),
            self.q, self.v, self.fore, scored, before, out,
            self.N, self.D, self.E, self.T, self.H, self.group, *self.q.stride()[:3], *self.v.stride()[:3], self.scale,
            FORM=self.form, C=self.C, BD=self.BD, BE=self.BE, warps=self.warps, **self.kinds,
        )  # fmt: skip
        return out

    def grad_scores(self, grad: Tensor, scored: Tensor, of_decay: bool) -> tuple[Tensor, Tensor | None]:
        """Of the scores (R, T, C, C), and what they give for the decays by head and token (R, T, C)."""
        vectors = of_decay and self.form != "channel"
        logs = self.new(self.R, self.T, self.C) if vectors else None
        out = torch.empty_like(scored)
        launch(
            self.gradients.grad_scores, (self.programs,), self.v, grad, self.between, scored, out,
            self.none if logs is None else logs, self.N, self.E, self.T, self.H, self.group,
            *self.v.stride()[:3], *grad.stride()[:3], self.scale,
            FORM=self.form, C=self.C, BE=self.BE, OF_DECAY=vectors, warps=self.warps, **self.kinds,
        )  # fmt: skip
        if of_decay and logs is None:
            logs = self.new(self.B, self.H, self.N, self.D)
        return out, logs

    def grad_values(self, grad: Tensor, scored: Tensor, after: Tensor) -> Tensor:
        """(R, N, E)."""
        out = self.new(self.R, self.N, self.E, dtype=self.q.dtype if self.group == 1 else torch.float32)
        launch(
            self.gradients.grad_values, (self.programs, ceil(self.E / self.BE)),
            self.k, grad, self.fore, self.aft, scored,
            after, out, self.N, self.D, self.E, self.T, self.H, self.group, *self.k.stride()[:3], *grad.stride()[:3],
            self.scale, FORM=self.form, C=self.C, BD=self.BD, BE=self.BE, warps=self.warps, **self.kinds,
        )  # fmt: skip
        return out

    def grad_queries_keys(
        self, grad: Tensor, of_scores: Tensor, before: Tensor, after: Tensor, logs: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(B, H, N, D), (R, N, D), and of the logarithms of the decays (B, H, N, 1 or D)."""
        channel, of_decay, tiles = self.form == "channel", logs is not None, ceil(self.D / self.BD)
        wide = torch.float32 if channel else self.q.dtype
        of_q = self.new(self.B, self.H, self.N, self.D, dtype=wide)
        of_k = self.new(self.R, self.N, self.D, dtype=wide if self.group == 1 else torch.float32)
        strides = *self.q.stride()[:3], *self.k.stride()[:3]
        inside = logs
        if logs is None:
            logs = self.none
        if channel:
            launch(
                self.gradients.grad_scores_by_channel, (self.programs,),
                self.q, self.k, self.factors, self.fore, self.aft,
                of_scores, of_q, of_k, logs, *self.sizes, *strides, *self.factors.stride()[:3],
                HALF=HALF, BD=block(self.D, MOST_CHANNELS), OF_DECAY=of_decay, warps=8, **self.kinds,
            )  # fmt: skip
        elif of_decay:
            logs = self.new(tiles, self.R, self.T, self.C)
        launch(
            self.gradients.grad_queries_keys, (self.programs, tiles), self.q, self.k, self.v, grad, self.fore, self.aft,
            of_scores, before, after, of_q, of_k, logs, self.N, self.D, self.E, self.T, self.H, self.group,
            *strides, *self.v.stride()[:3], *grad.stride()[:3], self.scale,
            FORM=self.form, C=self.C, BD=self.BD, BE=self.BE, OF_DECAY=of_decay, warps=8, **self.kinds,
        )  # fmt: skip
        of_q = of_q.to(self.q.dtype)
        if channel or inside is None:
            return of_q, of_k, logs if of_decay else None
        vectors = (logs.sum(0) + inside).flatten(1)[:, : self.N]
        return of_q, of_k, vectors.unflatten(0, (self.B, self.H)).unsqueeze(-1)


def rehearse(every: bool) -> None:
    """Launch what is launched here, on meta tensors.

    Args:
        every: by all types and forms, else by a choice.
    """
    forms = product(_TYPES, _FORMS) if every else ((torch.float32, "token"), (torch.bfloat16, "channel"))
    for (dtype, form), (B, H, K, N, D) in product(forms, ((2, 16, 4, 4096, 128), (1, 1, 1, 1, 1))):
        q, k, v = (torch.empty(B, heads, N, D, dtype=dtype, device="meta") for heads in (H, K, K))
        state = torch.empty(B, H, D, D, device="meta")
        factors = torch.empty(B, H, N, 1 if form == "token" else D, device="meta")
        C = chunk_of(form, dtype)
        row, square = (torch.empty(H, C, *x, device="meta") for x in ((), (C,)))
        powers = (row, row, square) if form == "head" else None
        given = q, k, v, state, form, factors if form in ("token", "channel") else None, powers, 1.0
        attend(*given, dtype)
        gradients(*given, torch.empty_like(q), state, form != "none")
