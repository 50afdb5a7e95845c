"""The three primitives: weighted sums of rows, their products with queries, and sums into rows.

    gather_sum (rows, i, w)_k = sum_s w_ks rows[i_ks]           derivatives: scatter_sum in rows, gather_dot in w
    gather_dot (q, rows, i)_ks = q_k . rows[i_ks]               derivatives: gather_sum in q, scatter_sum in rows
    scatter_sum(i, w, g)_r = sum over (k, s) with i_ks = r of w_ks g_k

Shape letters: R rows of D channels, K sums, S rows of a sum.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.native import gather


@torch.library.custom_op("saccade::gather_sum", mutates_args=())
def gather_sum(rows_RD: Tensor, index_KS: Tensor, weight_KS: Tensor) -> Tensor:
    """sum_s weight_ks rows[index_ks], (K, D). Indices are int32 or int64, in single or double precision.

    Args:
        rows_RD: what is read.
        index_KS: which rows, S for each sum.
        weight_KS: how much of each.
    """
    if not index_KS.numel() or not rows_RD.shape[1]:
        return rows_RD.new_zeros(index_KS.shape[0], rows_RD.shape[1])
    if gather.in_c(rows_RD, len(rows_RD)):
        return gather.gather(rows_RD, index_KS, weight_KS)
    return F.embedding_bag(
        index_KS.contiguous(), rows_RD.contiguous(), per_sample_weights=weight_KS.contiguous(), mode="sum"
    )


@torch.library.custom_op("saccade::gather_dot", mutates_args=())
def gather_dot(query_KD: Tensor, rows_RD: Tensor, index_KS: Tensor) -> Tensor:
    """query_k . rows[index_ks], (K, S).

    Args:
        query_KD: a vector for each sum.
        rows_RD: what is read.
        index_KS: which rows.
    """
    K, S = index_KS.shape
    if not index_KS.numel() or not rows_RD.shape[1]:
        return rows_RD.new_zeros(K, S)
    if gather.in_c(rows_RD, len(rows_RD)):
        return gather.gather_dot(query_KD, rows_RD, index_KS)
    if rows_RD.device.type != "cpu":
        return (rows_RD[index_KS] @ query_KD[:, :, None])[..., 0]
    if rows_RD.shape[0] <= S:
        return (query_KD @ rows_RD.T).gather(1, index_KS.long())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that sparse tensors are in beta
        starts = torch.arange(0, K * S + 1, S, dtype=index_KS.dtype)
        pairs = torch.sparse_csr_tensor(
            starts, index_KS.reshape(-1), rows_RD.new_zeros(K * S), (K, rows_RD.shape[0]), check_invariants=False
        )
        products = torch.sparse.sampled_addmm(pairs, query_KD.contiguous(), rows_RD.contiguous().T, beta=0.0)
        return products.values().view(K, S)


def plain_dot(query_KD: Tensor, rows_RD: Tensor, index_KS: Tensor) -> Tensor:
    """`gather_dot` in operators that every exporter knows."""
    gathered = rows_RD.index_select(0, index_KS.reshape(-1)).view(*index_KS.shape, -1)
    return (gathered @ query_KD[:, :, None])[..., 0]


@torch.library.custom_op("saccade::scatter_sum", mutates_args=())
def scatter_sum(index_KS: Tensor, weight_KS: Tensor, grad_KD: Tensor, rows: int) -> Tensor:
    """Row r is the sum of weight_ks grad_k over the pairs (k, s) with index_ks = r, (rows, D).

    Args:
        index_KS: which rows are added to.
        weight_KS: how much.
        grad_KD: what is added.
        rows: R, the number of rows.
    """
    S = index_KS.shape[1]
    if not index_KS.numel() or not rows or not grad_KD.shape[1]:
        return grad_KD.new_zeros(rows, grad_KD.shape[1])
    if gather.in_c(grad_KD, rows):
        return gather.scatter(index_KS, weight_KS, grad_KD, rows)
    flat, weights = index_KS.reshape(-1), weight_KS.reshape(-1)
    if grad_KD.device.type != "cpu":
        out = grad_KD.new_zeros(rows, grad_KD.shape[1])
        return out.index_add_(0, flat, (weight_KS[..., None] * grad_KD[:, None]).flatten(0, 1))
    # sums over sorted pairs: an addition to rows in random order would go to memory each time
    order = flat.int().argsort()
    starts = F.pad(flat.bincount(minlength=rows).cumsum(0), (1, 0))
    return F.embedding_bag(
        order // S,
        grad_KD.contiguous(),
        starts,
        per_sample_weights=weights[order],
        mode="sum",
        include_last_offset=True,
    )


@gather_sum.register_fake
def _(rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return rows.new_empty(index.shape[0], rows.shape[1])


@gather_dot.register_fake
def _(query: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    return rows.new_empty(index.shape)


@scatter_sum.register_fake
def _(index: Tensor, weight: Tensor, grad: Tensor, rows: int) -> Tensor:
    return grad.new_empty(rows, grad.shape[1])


def _keep_sum(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_sum(ctx: Any, grad: Tensor) -> Any:
    rows, index, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    of_rows = scatter_sum(index, weight, grad, rows.shape[0]) if needs[0] else None
    return of_rows, None, gather_dot(grad, rows, index) if needs[2] else None


def _differentiate_dot(ctx: Any, grad: Tensor) -> Any:
    query, rows, index = ctx.saved_tensors
    needs = ctx.needs_input_grad
    of_query = gather_sum(rows, index, grad) if needs[0] else None
    return of_query, scatter_sum(index, grad, query, rows.shape[0]) if needs[1] else None, None


def _keep_scatter(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])


def _differentiate_scatter(ctx: Any, grad: Tensor) -> Any:
    index, weight, rows = ctx.saved_tensors
    needs = ctx.needs_input_grad
    of_weight = gather_dot(rows, grad, index) if needs[1] else None
    return None, of_weight, gather_sum(grad, index, weight) if needs[2] else None, None


gather_sum.register_autograd(_differentiate_sum, setup_context=_keep_sum)
gather_dot.register_autograd(_differentiate_dot, setup_context=_keep_sum)
scatter_sum.register_autograd(_differentiate_scatter, setup_context=_keep_scatter)
