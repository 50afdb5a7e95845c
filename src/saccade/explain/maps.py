"""Maps of what an output looked at, from the attention that `recorded` keeps: from each input token to each output one.

| map | relevance R (B, N, M) of the inputs M to the outputs N |
|---|---|
| raw | mean over heads of one layer's A |
| rollout | product over layers of (A + I) / rows, heads averaged (Abnar and Zuidema, arXiv 2005.00928) |
| flow | the most that can flow from an input to an output through that graph (the same paper) |
| gradient x attention | R <- R + mean_h max(0, dL/dA * A) R, from R = I (Chefer et al., arXiv 2103.15679) |

All are of self-attention; layers whose tokens differ in number cannot be composed. What is wanted of few outputs is
made from the last layer down, some rows of each layer's A at a time: memory O(N) beside those rows, and no product of
two N x N matrices.

Shape letters: B batch, N outputs, M inputs, H heads, n outputs that are wanted, c those at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from saccade.explain.recording import Attends
from saccade.extras import need

__all__ = ["flow", "gradient_attention", "occlusion", "raw", "rollout"]

#: capacities of the flow are whole numbers of this part
_PART = 10**6

#: numbers of outputs; or weights (n, N) by which outputs are summed
Rows = Sequence[int] | Tensor | None
#: a record and some of its rows -> (B, rows, M)
_Layer = Callable[[Attends, Tensor], Tensor]


def raw(records: Sequence[Attends], layer: int = -1, *, rows: Rows = None, memory_mb: float = 64.0) -> Tensor:
    """The mean over heads of a layer's attention, (B, n, M).

    Args:
        records: of one model's layers, in order.
        layer: which of them.
        rows: the outputs that are wanted, all where None; or weights (n, N) by which they are summed.
        memory_mb: bound of the rows of A that are made at a time, in MiB.

    Raises:
        ValueError: if there are none.
    """
    record = _some(records)[layer]
    begin_BnN = _begin(record, rows)
    result = begin_BnN.new_zeros(*begin_BnN.shape[:2], record.shape[3])
    for chosen in _pieces(begin_BnN, record, memory_mb):
        result += begin_BnN[:, :, chosen] @ _weights(record, chosen)
    return result


def rollout(
    records: Sequence[Attends],
    *,
    start: int = 0,
    kept: float = 0.5,
    rows: Rows = None,
    memory_mb: float = 64.0,
) -> Tensor:
    """Attention multiplied through the layers, the residual path in it, (B, n, N).

        R = prod_l ((1 - r) mean_h A_l + r I) / rows

    Args:
        records: of one model's layers, in order.
        start: the first layer that counts.
        kept: r, what the residual path keeps.
        rows, memory_mb: as of `raw`.

    Raises:
        ValueError: if there are no layers, or they are no self-attention of the same tokens.
    """

    def layer(record: Attends, chosen: Tensor) -> Tensor:
        return (1 - kept) * _weights(record, chosen, size=True)

    return _composed(_some(records[start:]), layer, kept, rows, memory_mb)


def gradient_attention(records: Sequence[Attends], *, rows: Rows = None, memory_mb: float = 64.0) -> Tensor:
    """Attention weighed by what it does to the scalar that was called backward, (B, n, N).

    Args:
        records: of one model's layers, in order, after the backward pass.
        rows, memory_mb: as of `raw`.

    Raises:
        RuntimeError: if nothing was called backward.
        ValueError: if there are no layers, or they are no self-attention of the same tokens.
    """

    def layer(record: Attends, chosen: Tensor) -> Tensor:
        # both are made for this: in place, long rows take half the time
        return record.weights(rows=chosen).detach().mul_(record.gradients(rows=chosen)).clamp_(min=0).mean(1).cpu()

    return _composed(_some(records), layer, 1.0, rows, memory_mb, normalised=False)


def occlusion(
    score: Callable[[Tensor], Tensor], parts: int, *, together: int = 32, device: torch.device | None = None
) -> Tensor:
    """What taking each part away costs, f(all) - f(all but one), (parts,); it needs no attention.

    Args:
        score: sets of kept parts, bool (S, parts) -> f (S,).
        parts: how many.
        together: sets of one call.
        device: of the sets.
    """
    kept = ~torch.eye(parts, dtype=torch.bool, device=device)
    whole = score(torch.ones(1, parts, dtype=torch.bool, device=device))
    return whole - torch.cat([score(some) for some in kept.split(together)])


def flow(records: Sequence[Attends], output: int | Tensor = -1) -> Tensor:
    """How much can flow from each input to one output, (B, M); capacities are those of `rollout`'s layers.

    To one output of one or two layers it is a sum. Else it takes a maximum flow for each input: of six layers of MiniLM
    less than half a second for 128 tokens, some five for 256, more than ten times as much for twice as many.

    Args:
        records: of one model's layers, in order.
        output: the token that is explained; or weights (N,) by which outputs are read, the capacities of a last step.

    Raises:
        ImportError: if it is no sum, and scipy is not installed.
        ValueError: if there are no layers, or they are no self-attention of the same tokens.
    """
    layers = [_capacities(record) for record in _some(records)]
    if isinstance(output, Tensor):
        return _maximum_flow(layers, output)
    if len(layers) == 1:
        return layers[0][:, output]
    if len(layers) == 2:  # each token between is on one way alone, as wide as its narrower edge
        return torch.minimum(layers[0], layers[1][:, output, :, None]).sum(1)
    return _maximum_flow(layers, torch.eye(layers[0].shape[1])[output])


def _maximum_flow(layers: Sequence[Tensor], reads_N: Tensor) -> Tensor:
    """From each token before the first layer (B, N, N) to what reads those after the last, (B, N).

    A token's own edges are those of the source, so that one graph serves all; of the last layer there are only the
    outputs that are read, and edges too narrow to count are left out.
    """
    B, N, _ = layers[0].shape
    found = torch.zeros(B, N)
    for b in range(B):
        parts = [(each[b].detach().cpu().double() * _PART).round().int() for each in layers]
        reads = (reads_N.cpu().double() * _PART).round().int()
        found[b] = torch.tensor(_flows(parts, reads), dtype=torch.double) / _PART
    return found


def _flows(layers: Sequence[Tensor], reads_N: Tensor) -> list[int]:
    """From each token, in whole numbers."""
    sparse, graphs = need("scipy.sparse", "attention flow"), need("scipy.sparse.csgraph", "attention flow")
    first_NN, *between = layers
    N, read = len(reads_N), reads_N.nonzero()[:, 0]
    # node 0 is the source, 1 + l N + i token i after layer l, the last one the sink
    sink = 1 + len(layers) * N
    begin, end, capacity = [torch.zeros(N, dtype=torch.long)], [torch.arange(1, N + 1)], [torch.zeros(N).int()]
    for number, each in enumerate(between):
        after, before = each.nonzero().unbind(1)
        if number + 1 == len(between):
            seen = torch.isin(after, read)
            after, before = after[seen], before[seen]
        begin.append(1 + number * N + before)
        end.append(1 + (number + 1) * N + after)
        capacity.append(each[after, before])
    begin.append(1 + (len(layers) - 1) * N + read)
    end.append(torch.full_like(read, sink))
    capacity.append(reads_N[read])
    edges = torch.cat(capacity).numpy(), (torch.cat(begin).numpy(), torch.cat(end).numpy())
    graph = sparse.csr_array(edges, shape=(sink + 1, sink + 1))
    found = []
    for token in range(N):
        graph.data[:N] = first_NN[:, token].numpy()  # the source's row is the first
        found.append(int(graphs.maximum_flow(graph, 0, sink).flow_value))
    return found


def _composed(
    records: Sequence[Attends],
    layer: _Layer,
    kept: float,
    rows: Rows,
    memory_mb: float,
    *,
    normalised: bool = True,
) -> Tensor:
    """Rows of the product of the layers' matrices with the residual path, later ones on the left."""
    for record in records:
        _check_square(record)
    result = _begin(records[-1], rows)
    for record in reversed(records):
        after, result = result, kept * result
        if normalised:
            result = torch.zeros_like(after)
        for chosen in _pieces(after, record, memory_mb):
            matrix_BcM, read_Bnc = layer(record, chosen), after[:, :, chosen]
            if normalised:
                whole_Bc = (matrix_BcM.sum(-1) + kept).clamp(min=1e-12)
                read_Bnc = read_Bnc / whole_Bc[:, None]
                result[:, :, chosen] += kept * read_Bnc
            result += read_Bnc @ matrix_BcM
    return result


def _begin(record: Attends, rows: Rows) -> Tensor:
    """The weights (B, n, N) with which the outputs of a layer are read."""
    B, _, N, _ = record.shape
    if isinstance(rows, Tensor) and rows.is_floating_point():
        return rows.float().expand(B, *rows.shape).clone()
    chosen = torch.arange(N)
    if rows is not None:
        chosen = chosen[torch.as_tensor(rows)]
    begin_nN = torch.zeros(len(chosen), N)
    begin_nN[torch.arange(len(chosen)), chosen] = 1
    return begin_nN.expand(B, *begin_nN.shape).clone()


def _pieces(read_BnN: Tensor, record: Attends, memory_mb: float) -> Sequence[Tensor]:
    """The outputs that are read at all, so many at a time that their weights, scores and gradients stay in bounds."""
    B, H, _, M = record.shape
    most = max(1, int(memory_mb * 2**20 / (3 * 4 * B * H * M)))
    return read_BnN.abs().amax((0, 1)).nonzero()[:, 0].split(most)


def _weights(record: Attends, chosen: Tensor, *, size: bool = False) -> Tensor:
    """Rows of A on the CPU, the mean over heads; their size where they may have a sign."""
    weights = record.weights(rows=chosen).detach()
    return (weights.abs() if size else weights).mean(1).cpu()


def _check_square(record: Attends) -> None:
    """
    Raises:
        ValueError: if a layer is no self-attention.
    """
    _, _, N, M = record.shape
    if N != M:
        raise ValueError(f"layers must be self-attention of all tokens at once, got one of {N} queries and {M} keys")


def _capacities(record: Attends) -> Tensor:
    """(A + I) / rows of a layer, (B, N, N)."""
    _check_square(record)
    weights = _weights(record, torch.arange(record.shape[2]), size=True)
    whole = weights + torch.eye(weights.shape[1])
    return whole / whole.sum(-1, keepdim=True)


def _some(records: Sequence[Attends]) -> Sequence[Attends]:
    """
    Raises:
        ValueError: if there are none, or they have not the same tokens.
    """
    if not records:
        raise ValueError("no layer was recorded: call the model inside `recorded`")
    counts = {record.shape[2] for record in records}
    if len(counts) > 1:
        raise ValueError(
            f"layers must have the same tokens, got {sorted(counts)}; `recording.of(name)` gives one tower's"
        )
    return records
