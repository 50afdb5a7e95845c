"""The forward and the backward pass over the tiles of all parts.

    S = scale * Q K_box^T + bias,   P = softmax(S),   O = P V_box,   lse = log sum exp(S)
    dS = P * (dO V_box^T - rowsum(dO * O) + dlse)
    dQ = scale * dS K_box,   dK_box += scale * dS^T Q,   dV_box += P^T dO

Shape letters: C independent grids (batch x key heads), G query heads that share a key head, N tokens, X channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saccade.ops.scratch import Scratch, scratch
from saccade.ops.windows.layout import cut_grids
from saccade.ops.windows.portions import Field, Piece, Portion, apart, cut_pieces, cut_portions


class _Softmax:
    """P = softmax(scale q k^T + bias) of a piece."""

    def __init__(self, piece: Piece, q: Tensor, k: Tensor, bias: Tensor, scale: float, room: Scratch) -> None:
        self.scores = piece.scores(q.shape[2], k.shape[2], "scores", room)
        self.bias, self.scale = bias.expand(self.scores.shape[1], -1, -1), scale
        self.calls = list(zip(*(x.unbind() for x in (piece.of(q), piece.of(k.mT), self.scores))))

    def run(self, lse: Tensor | None) -> None:
        for q, k, out in self.calls:
            torch.baddbmm(self.bias, q, k, alpha=self.scale, out=out)
        if lse is None:
            torch.softmax(self.scores, -1, out=self.scores)
            return
        top = self.scores.amax(-1)
        torch.softmax(self.scores, -1, out=self.scores)
        # the largest weight is exp(top - lse)
        torch.sub(top, self.scores.amax(-1).log_(), out=lse)


class Forward:
    """The calls of portions of one size, on their buffers."""

    def __init__(self, portion: Portion, x: dict[str, Field], scale: float, room: Scratch, limit: int) -> None:
        part, self.load, self.store = portion.part, list[Any](), list[Any]()
        q = portion.rows(x["queries"], "queries", room, self.load, [])
        k = portion.boxes(portion.keys(x["keys"], "keys", room, self.load))
        v = portion.boxes(portion.keys(x["values"], "values", room, self.load))
        out = portion.rows(x["out"], "out", room, [], self.store)
        lse = portion.rows(x["lse"], "lse", room, [], self.store)[..., 0] if "lse" in x else None
        bias = part.bias(q)
        self.pieces = []
        for piece in cut_pieces(q.shape[0], q.shape[1], part.rows * part.box * q.element_size(), limit):
            softmax = _Softmax(piece, q, k, bias, scale, room)
            calls = list(zip(*(y.unbind() for y in (softmax.scores, piece.of(v), piece.of(out)))))
            self.pieces.append((softmax, calls, None if lse is None else piece.of(lse)))

    def run(self, portion: Portion, x: dict[str, Field]) -> None:
        _load(portion, x, self.load)
        for softmax, calls, lse in self.pieces:
            softmax.run(lse)
            for weights, v, out in calls:
                torch.bmm(weights, v, out=out)
        for name, buffer in self.store:
            portion.tiles(x[name]).copy_(buffer)


class Backward:
    """Writes dQ and adds dK and dV to their strips; "delta" is rowsum(dO * O) - dlse, negated."""

    def __init__(self, portion: Portion, x: dict[str, Field], scale: float, room: Scratch, limit: int) -> None:
        part, self.scale, self.load, self.store, self.add = portion.part, scale, list[Any](), list[Any](), list[Any]()
        q = portion.rows(x["queries"], "queries", room, self.load, [])
        k = portion.boxes(portion.keys(x["keys"], "keys", room, self.load))
        v = portion.boxes(portion.keys(x["values"], "values", room, self.load))
        go = portion.rows(x["grad_out"], "grad_out", room, self.load, [])
        delta = portion.rows(x["delta"], "delta", room, self.load, []).expand(-1, -1, -1, part.box)
        gq = portion.rows(x["grad_queries"], "grad_queries", room, [], self.store)
        gk = portion.keys(x["grad_keys"], "grad_keys", room, self.add)
        gv = portion.keys(x["grad_values"], "grad_values", room, self.add)
        bias = part.bias(q)
        self.pieces = []
        for piece in cut_pieces(q.shape[0], q.shape[1], part.rows * part.box * q.element_size(), limit):
            softmax = _Softmax(piece, q, k, bias, scale, room)
            weights, ds = softmax.scores, piece.scores(part.rows, part.box, "grad_scores", room)
            here = [piece.of(y).unbind() for y in (q, k, v.mT, go, delta, gq)]
            scores_calls = list(zip(here[4], here[3], here[2], ds.unbind()))
            query_calls = list(zip(ds.unbind(), here[1], here[5]))
            key_calls: list[tuple[Tensor, Tensor, Tensor, float]] = []
            for first, number in apart(part.segments[0]):
                columns = slice(first * part.inner, (first + number) * part.inner)
                for grads, w, rows in ((gv, weights, here[3]), (gk, ds, here[0])):
                    boxes = piece.of(portion.boxes(grads, first, number)).unbind()
                    key_calls += zip(boxes, w[..., columns].mT.unbind(), rows, [scale if w is ds else 1.0] * len(rows))
            self.pieces.append((softmax, ds, scores_calls, query_calls, key_calls))

    def run(self, portion: Portion, x: dict[str, Field]) -> None:
        _load(portion, x, self.load)
        for _, buffer in self.add:
            buffer.zero_()
        for softmax, ds, scores_calls, query_calls, key_calls in self.pieces:
            softmax.run(None)
            for delta, go, v, out in scores_calls:
                torch.baddbmm(delta, go, v, out=out)
            ds.mul_(softmax.scores)
            for grads, k, out in query_calls:
                torch.baddbmm(out, grads, k, beta=0, alpha=self.scale, out=out)
            # chunk after chunk: those of one tile meet those of the next
            for boxes, weights, rows, alpha in key_calls:
                boxes.baddbmm_(weights, rows, alpha=alpha)
        for name, buffer in self.store:
            portion.tiles(x[name]).copy_(buffer)
        for name, buffer in self.add:
            portion.add(buffer, x[name])


def _load(portion: Portion, x: dict[str, Field], buffers: Sequence[tuple[str, Tensor]]) -> None:
    for name, buffer in buffers:
        buffer.copy_(portion.strips(x[name]) if name in ("keys", "values") else portion.tiles(x[name]))


def run_parts(
    kind: type[Forward] | type[Backward],
    key: tuple[Any, ...],
    tensors: dict[str, Tensor],
    sizes: dict[str, tuple[int, int, int]],
    scale: float,
    limit: int,
) -> None:
    """All parts of all grids, on tensors (C, G, N, X)."""
    keys = tensors["keys"]
    C, width = keys.shape[0], keys.shape[3] + tensors["values"].shape[3]
    # tensors made in inference mode cannot be written to outside of it
    mode = torch.is_inference_mode_enabled()
    key = (kind, *key, C, width, keys.shape[3], scale, limit, keys.dtype, keys.device, tuple(tensors), mode)
    width = width if kind is Forward else 2 * width
    with scratch(key, keys.dtype, keys.device) as room:
        for number, grid in enumerate(cut_grids(*key[1:5], kind is Backward)):
            fields = {
                name: Field(x, grid, sizes["keys" if name in _OF_KEYS else "queries"]) for name, x in tensors.items()
            }
            for place, part in enumerate(grid.parts):
                for portion in cut_portions(part, grid, C, width, keys.element_size()):
                    name = (number, place, portion.size)
                    bound = room.bound.get(name)
                    if bound is None:
                        bound = kind(portion, fields, scale, room, limit)
                        # what works on the tensors themselves is for this call only
                        if not part.whole and not part.straight:
                            room.bound[name] = bound
                    bound.run(portion, fields)


_OF_KEYS = ("keys", "values", "grad_keys", "grad_values")
