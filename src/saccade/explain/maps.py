"""Maps of what an output looked at, from the attention that `recorded` keeps: from each input token to each output one.

| map | relevance R (B, N, M) of the inputs M to the outputs N |
|---|---|
| raw | mean over heads of one layer's A |
| rollout | product over layers of (A + I) / rows, heads averaged (Abnar and Zuidema, arXiv 2005.00928) |
| flow | the most that can flow from an input to an output through that graph (the same paper) |
| gradient x attention | R <- R + mean_h max(0, dL/dA * A) R, from R = I (Chefer et al., arXiv 2103.15679) |

All are of self-attention; layers whose tokens differ in number cannot be composed.

Shape letters: B batch, N outputs, M inputs, H heads, D head dim, K key heads, E value dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from saccade.explain.recording import AttentionRecord
from saccade.extras import need

__all__ = ["flow", "gradient_attention", "raw", "rollout"]

#: capacities of the flow are whole numbers of this part
_PART = 10**6


def raw(records: Sequence[AttentionRecord], layer: int = -1) -> Tensor:
    """The mean over heads of a layer's attention, (B, N, M).

    Args:
        records: of one model's layers, in order.
        layer: which of them.

    Raises:
        ValueError: if there are none.
    """
    return _some(records)[layer].weights().mean(1)


def rollout(records: Sequence[AttentionRecord], *, start: int = 0, kept: float = 0.5) -> Tensor:
    """Attention multiplied through the layers, the residual path in it, (B, N, N).

        R = prod_l ((1 - r) mean_h A_l + r I) / rows

    Args:
        records: of one model's layers, in order.
        start: the first layer that counts.
        kept: r, what the residual path keeps.

    Raises:
        ValueError: if there are no layers, or they are no self-attention of the same tokens.
    """
    return _composed(_some(records[start:]), lambda record: (1 - kept) * record.weights().mean(1), kept)


def gradient_attention(records: Sequence[AttentionRecord]) -> Tensor:
    """Attention weighed by what it does to the scalar that was called backward, (B, N, N).

    Args:
        records: of one model's layers, in order, after the backward pass.

    Raises:
        RuntimeError: if nothing was called backward.
        ValueError: if there are no layers, or they are no self-attention of the same tokens.
    """
    return _composed(
        _some(records),
        lambda record: (record.weights().detach() * record.gradients()).clamp(min=0).mean(1),
        1.0,
        normalised=False,
    )


def flow(records: Sequence[AttentionRecord], output: int = -1) -> Tensor:
    """How much can flow from each input to one output, (B, M); capacities are those of `rollout`'s layers.

    Takes a maximum flow for each input: seconds for some tens of tokens, minutes for hundreds.

    Args:
        records: of one model's layers, in order.
        output: the token that is explained.

    Raises:
        ImportError: if scipy is not installed.
        ValueError: if there are no layers, or they are no self-attention of the same tokens.
    """
    sparse, graphs = need("scipy.sparse", "attention flow"), need("scipy.sparse.csgraph", "attention flow")
    layers = [_with_identity(0.5 * record.weights().mean(1), 0.5, True) for record in _some(records)]
    B, N, _ = layers[0].shape
    output = range(N)[output]
    found = torch.zeros(B, N)
    for b in range(B):
        # node l N + i is token i before layer l; an edge leads from it to all that attend to it
        after, before = torch.meshgrid(torch.arange(N), torch.arange(N), indexing="ij")
        begin = torch.cat([before.flatten() + i * N for i in range(len(layers))])
        end = torch.cat([after.flatten() + (i + 1) * N for i in range(len(layers))])
        capacity = torch.cat([(each[b].detach().cpu().double() * _PART).round().int().flatten() for each in layers])
        size = (len(layers) + 1) * N
        graph = sparse.csr_array((capacity.numpy(), (begin.numpy(), end.numpy())), shape=(size, size))
        for token in range(N):
            sink = len(layers) * N + output
            found[b, token] = graphs.maximum_flow(graph, token, sink).flow_value / _PART
    return found


def _composed(
    records: Sequence[AttentionRecord],
    of: Callable[[AttentionRecord], Tensor],
    kept: float,
    *,
    normalised: bool = True,
) -> Tensor:
    """The layers' matrices with the residual path, later ones on the left."""
    result: Tensor | None = None
    for record in records:
        matrix = _with_identity(of(record), kept, normalised)
        result = matrix if result is None else matrix @ result
    assert result is not None
    return result


def _with_identity(matrix_BNM: Tensor, kept: float, normalised: bool) -> Tensor:
    """
    Raises:
        ValueError: if it is not square.
    """
    if matrix_BNM.shape[1] != matrix_BNM.shape[2]:
        N, M = matrix_BNM.shape[1:]
        raise ValueError(f"layers must be self-attention of all tokens at once, got one of {N} queries and {M} keys")
    whole = matrix_BNM + kept * torch.eye(matrix_BNM.shape[1], device=matrix_BNM.device)
    return whole / whole.sum(-1, keepdim=True).clamp(min=1e-12) if normalised else whole


def _some(records: Sequence[AttentionRecord]) -> Sequence[AttentionRecord]:
    """
    Raises:
        ValueError: if there are none, or they have not the same tokens.
    """
    if not records:
        raise ValueError("no layer was recorded: call the model inside `recorded`")
    counts = {record.q_BHND.shape[2] for record in records}
    if len(counts) > 1:
        raise ValueError(
            f"layers must have the same tokens, got {sorted(counts)}; `recording.of(name)` gives one tower's"
        )
    return records
