"""One call of a transformers model as what was written to its stream, and the form by which each head reads it.

    x_l = gain * c / scale + shift,   c = r_l (less its mean, of LayerNorm),   r_l = tokens + positions
          + sum_{l' < l} (sum_h z_h W_O,h + bias + mlp)_l',      q_i = R_i Q^T [c_i / scale_i; 1]

Weights are read off by calls: projections of unit vectors, whatever modules make them; gain and shift stand in Q and K.
What cannot be so written, such as norms of queries, or norms behind what is written, is refused.

Shape letters: E = D + 1 width of a token and the 1 behind it, D width, R width of queries and keys, L layers, H heads,
K key heads, N tokens, F firings, W writers, V width of values, or words of the vocabulary, P
probes; of a record B batch, C channels, E head dim, M keys.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.explain.recording import AttentionRecord, recorded
from saccade.explain.sparse_attention_decomposition.decomposition import singular
from saccade.explain.subjects import names_of
from saccade.layers.attention_interface import attention_layers
from saccade.layers.watching import evaluating
from saccade.layers.wrapping import Report, changing

#: (row, token) or (row, token, token against it), or None
Lead = tuple[int, int] | tuple[int, int, int] | None
#: what a call gave and what its parts sum to may differ by, of the largest number
_CLOSE = 2e-3


class Writer(NamedTuple):
    """What writes to the stream: "tokens", "positions", "bias" (of the attention's output), "mlp", or "head".

    Attributes:
        kind: as above.
        layer: of it; -1 of tokens and positions.
        head: of a head, else -1.
    """

    kind: str
    layer: int = -1
    head: int = -1

    def __str__(self) -> str:
        return {"head": f"{self.layer}.{self.head}", "mlp": f"mlp {self.layer}", "bias": f"bias {self.layer}"}.get(
            self.kind, self.kind
        )


@dataclass
class Layer:
    """How the heads of a layer read the stream, and what they wrote.

    Attributes:
        name: path of the attention's module.
        record: its queries, keys and weights.
        x_NE: c / scale with a 1 behind it.
        scale_N: of the norm.
        query_HER, key_KER, value_KEV: Q, K and W_V with gains and biases, the latter as last row.
        turn_NRR: R_i of rotary positions, None where there are none.
        out_HVD: W_O.
        bias_D: of the attention's output.
        given_ND: r_l.
        written_ND: by the attention.
    """

    name: str
    record: AttentionRecord
    x_NE: Tensor
    scale_N: Tensor
    query_HER: Tensor
    key_KER: Tensor
    value_KEV: Tensor
    turn_NRR: Tensor | None
    out_HVD: Tensor
    bias_D: Tensor
    given_ND: Tensor
    written_ND: Tensor

    @property
    def z_NHV(self) -> Tensor:
        """What the heads made of their values."""
        return self.record.out_BNHE[0].detach().float()

    def key_head(self, head: int) -> int:
        """The key head of a head."""
        return head // (len(self.query_HER) // len(self.key_KER))

    def form(self, head: int, destination: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u, sigma and v of a head's Omega at pairs of tokens, (F, E, R), (F, R), (F, E, R).

        Of rotary positions it depends on the distance alone, and is taken apart once for each.

        Args:
            head: its number.
            destination, source: i and j, (F,).
        """
        q_ER, k_ER = self.query_HER[head], self.key_KER[self.key_head(head)]
        if self.turn_NRR is None:
            return tuple(each.expand(len(source), *each.shape) for each in singular(q_ER, k_ER))  # type: ignore[return-value]
        distance, place_F = (destination - source).unique(return_inverse=True)
        first = torch.stack([(place_F == k).nonzero()[0, 0] for k in range(len(distance))])
        turn = self.turn_NRR[destination[first]].mT @ self.turn_NRR[source[first]]
        return tuple(each[place_F] for each in singular(q_ER, k_ER, turn))  # type: ignore[return-value]


@dataclass
class Stream:
    """What `read` gives.

    Attributes:
        labels: of the tokens.
        layers: in their order.
        tokens_ND: what embeddings wrote.
        positions_ND: what learned positions wrote, None where there are none.
        logits_NV: what the model said.
        gradients: of the named logit's lead by what the heads made of their values, (L, N, H), summed with it.
        target: (row, token, token that it is held against) whose logits' difference is explained.
    """

    labels: list[str]
    layers: list[Layer]
    tokens_ND: Tensor
    positions_ND: Tensor | None
    logits_NV: Tensor
    gradients: Tensor
    target: tuple[int, int, int]

    def mlp(self, layer: int) -> Tensor:
        """What a layer's MLP wrote, (N, D): what the next layer is given less what is known of it."""
        return self.layers[layer + 1].given_ND - self.layers[layer].given_ND - self.layers[layer].written_ND

    def writers(self, layer: int) -> list[Writer]:
        """Who wrote to the stream below a layer, in the order of `contributions`."""
        found = [Writer("tokens"), *([] if self.positions_ND is None else [Writer("positions")])]
        for number, each in enumerate(self.layers[:layer]):
            found += [Writer("head", number, head) for head in range(len(each.out_HVD))]
            found += [Writer("bias", number), Writer("mlp", number)]
        return found

    def written(self, writer: Writer, position: int) -> Tensor:
        """What a writer wrote to a token, (D,)."""
        if writer.kind == "tokens":
            return self.tokens_ND[position]
        if writer.kind == "positions":
            assert self.positions_ND is not None
            return self.positions_ND[position]
        layer = self.layers[writer.layer]
        if writer.kind == "mlp":
            return self.mlp(writer.layer)[position]
        if writer.kind == "bias":
            return layer.bias_D
        return layer.z_NHV[position, writer.head] @ layer.out_HVD[writer.head]

    def contributions(self, layer: int, signal_FE: Tensor, position_F: Tensor) -> Tensor:
        """C of every writer below a layer, (F, W); with signal_E they sum to the signal along the token.

        Args:
            layer: that reads.
            signal_FE: of `signals`.
            position_F: the tokens that are read.
        """
        signal_FD = signal_FE[:, :-1]

        def along(written_ND: Tensor) -> Tensor:
            return (written_ND[position_F] * signal_FD).sum(-1, keepdim=True)

        found = [along(each) for each in (self.tokens_ND, self.positions_ND) if each is not None]
        for number, each in enumerate(self.layers[:layer]):
            onto_FHV = torch.einsum("fd,hvd->fhv", signal_FD, each.out_HVD)
            found += [(onto_FHV * each.z_NHV[position_F]).sum(-1), signal_FD @ each.bias_D[:, None]]
            found.append(along(self.mlp(number)))
        return torch.cat(found, 1) / self.layers[layer].scale_N[position_F, None]


def read(model: nn.Module, inputs: Mapping[str, Tensor], target: Lead = None, tokenizer: Any = None) -> Stream:
    """Run a model once, and take its attention apart as a sum of what was written.

    Args:
        model: of transformers, for language, with norms before its attention.
        inputs: of one text without padding, by the names of the model's arguments.
        target: (row, token, token against it); without the last, against the likeliest other; None for the likeliest
            token at the last row.
        tokenizer: names the tokens.

    Raises:
        ImportError: if transformers is not installed.
        ValueError: if the inputs are not such, or the model's stream is no such sum.
    """
    ids_BN = inputs.get("input_ids")
    if ids_BN is None or len(ids_BN) != 1 or not inputs.get("attention_mask", torch.ones(1)).all():
        raise ValueError("inputs must hold input_ids of one text, without padding")
    if getattr(model.config, "residual_multiplier", 1.0) != 1.0:
        raise ValueError(f"{type(model).__name__} scales what is written to its stream: it cannot be taken apart")
    heard = _Heard()
    modules = dict(model.named_modules())
    with evaluating(model), changing(model, Report("read")) as changes, torch.enable_grad():
        changes.after(model.get_input_embeddings(), heard.embedding)  # type: ignore[operator]
        for module in modules.values():
            if "Norm" in type(module).__name__:
                changes.after(module, heard.norm)
            elif isinstance(module, nn.Embedding) and module is not model.get_input_embeddings():  # type: ignore[operator]
                changes.after(module, heard.positions)
        with recorded(model) as recording:
            for name in attention_layers(model):
                changes.before(modules[name], heard.call)
                changes.after(modules[name], heard.output)
                for inner in modules[name].modules():
                    changes.before(inner, lambda *call: heard.projection(recording.layers, *call))
            told = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
            logits_NV = model(**inputs, **told).logits[0]
            records = list(recording.layers)
            row, token, against = _target(logits_NV.detach(), target)
            lead = logits_NV[row, token] - logits_NV[row, against]
            outs = [record.out_BNHE for record in records]
            gradients = torch.autograd.grad(lead, outs)
    if len(records) != len(heard.outputs):
        raise ValueError(f"{type(model).__name__} calls its attention several times")
    with evaluating(model), torch.no_grad():
        layers = [
            _layer(model, modules[record.name], record, heard, number, [*modules])
            for number, record in enumerate(records)
        ]
        labels = names_of(ids_BN[0].tolist(), tokenizer)
        effect = [(out * grad)[0].detach().float().sum(-1) for out, grad in zip(outs, gradients, strict=True)]
        given = layers[0].given_ND
        positions = heard.learned(given)
        return Stream(
            labels, layers, given if positions is None else given - positions, positions, logits_NV.detach().float(),
            torch.stack(effect), (row, token, against),
        )  # fmt: skip


def _target(logits_NV: Tensor, target: Lead) -> tuple[int, int, int]:
    rows, width = logits_NV.shape
    row, *tokens = (-1, int(logits_NV[-1].argmax())) if target is None else target
    if not -rows <= row < rows or len(tokens) not in (1, 2) or not all(0 <= token < width for token in tokens):
        raise ValueError(f"target must be a row below {rows} and one or two tokens below {width}, got {target}")
    first, second = logits_NV[row].topk(2).indices.tolist()
    against = tokens[1] if len(tokens) == 2 else second if tokens[0] == first else first
    return row % rows, tokens[0], against


class _Heard:
    """What hooks hear of a call. Tensors are kept, so that no other takes the place by which they are known."""

    def __init__(self) -> None:
        self.norms: dict[int, tuple[nn.Module, Tensor, Tensor]] = {}
        self.calls: list[dict[str, Any]] = []
        self.outputs: list[Tensor] = []
        self.projections: dict[int, nn.Module] = {}
        self.embedded: list[Tensor] = []

    def embedding(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        """From here on there are gradients, whatever of the model is trained."""
        return output.detach().requires_grad_()

    def norm(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        self.norms[id(output)] = module, args[0], output

    def positions(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        self.embedded.append(output.detach())

    def call(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.calls.append({"args": args, "kwargs": kwargs})

    def output(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.outputs.append(output[0] if isinstance(output, tuple) else output)

    def projection(self, records: Sequence[AttentionRecord], module: nn.Module, args: Any, kwargs: Any) -> None:
        """A module that is called with what the heads gave is the one that projects it."""
        if records and args and isinstance(args[0], Tensor):
            out = records[-1].out_BNHE
            if args[0].data_ptr() == out.data_ptr() and args[0].numel() == out.numel():
                self.projections.setdefault(len(records) - 1, module)

    def learned(self, given_ND: Tensor) -> Tensor | None:
        """The sum of what other embeddings than that of tokens wrote."""
        found = [each for each in self.embedded if each.shape[-2:] == given_ND.shape]
        return (
            sum((each.reshape(-1, *given_ND.shape)[0].float() for each in found), torch.zeros_like(given_ND))
            if found
            else None
        )


def _layer(
    model: nn.Module, attention: nn.Module, record: AttentionRecord, heard: _Heard, number: int, names: list[str]
) -> Layer:
    """
    Raises:
        ValueError: if the layer's attention is not what the file's head says.
    """
    kind = type(model).__name__
    x = record.x_BNC
    norm, given, _ = heard.norms.get(id(x), (None, None, None))
    name = next((each for each, module in model.named_modules() if module is norm), "")
    block = record.name.rsplit(".", 1)[0]
    if norm is None or x is None or given is None or not name.startswith(f"{block}."):
        raise ValueError(f"{kind} has no norm before the attention of layer {number}: its stream is no sum")
    if any(before is heard.outputs[number] for _, before, _ in heard.norms.values()):
        raise ValueError(f"{kind} has a norm behind its attention: its stream is no sum")
    if number not in heard.projections:
        raise ValueError(f"{kind} projects what its heads give by no module of its own")
    x_ND, given_ND = x[0].detach().float(), given[0].detach().float()
    gain_D, shift_D, centred = _affine(norm, x)
    c_ND = given_ND - given_ND.mean(-1, keepdim=True) if centred else given_ND
    scale_N = (gain_D * c_ND).square().sum(-1) / (gain_D * c_ND * (x_ND - shift_D)).sum(-1)
    x_NE = F.pad(c_ND / scale_N[:, None], (0, 1), value=1.0)
    probed, turn_NRR = _probe(model, attention, heard.calls[number], x)
    query_HER, key_KER, value_KEV = (_folded(each, gain_D, shift_D, centred) for each in probed)
    projection = heard.projections[number]
    heads, width = record.out_BNHE.shape[2:]
    eye = torch.eye(heads * width, dtype=x.dtype, device=x.device)
    bias_D = projection(torch.zeros_like(eye[:1]))[0].float()
    out_HVD = (projection(eye).float() - bias_D).view(heads, width, -1)
    written_ND = heard.outputs[number][0].detach().float()
    layer = Layer(
        record.name, record, x_NE, scale_N, query_HER, key_KER, value_KEV, turn_NRR, out_HVD, bias_D, given_ND,
        written_ND,
    )  # fmt: skip
    q_HNR, k_KNR = x_NE @ query_HER, x_NE @ key_KER
    if turn_NRR is not None:
        q_HNR, k_KNR = ((turn_NRR @ each[..., None])[..., 0] for each in (q_HNR, k_KNR))
    _same(q_HNR, record.q_BHND[0], f"the queries of layer {number} of {kind} are not linear in its normalised stream")
    _same(k_KNR, record.k_BKMD[0], f"the keys of layer {number} of {kind} are not linear in its normalised stream")
    summed = torch.einsum("nhv,hvd->nd", layer.z_NHV, out_HVD) + bias_D
    _same(summed, written_ND, f"what layer {number} of {kind} writes is not the sum of its heads")
    return layer


def _same(ours: Tensor, theirs: Tensor, otherwise: str) -> None:
    theirs = theirs.detach().float()
    if ours.shape != theirs.shape or (ours - theirs).abs().max() > _CLOSE * theirs.abs().max().clamp(min=1e-6):
        raise ValueError(f"{otherwise}: it cannot be taken apart")


def _affine(norm: nn.Module, like: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Gain and shift (D,) of a norm, and whether the mean is off: by calls with vectors so long that eps is none."""
    D = like.shape[-1]
    wave_D = 1000 * (1 - 2 * (torch.arange(D, device=like.device) % 2)).to(like.dtype)
    shift_D, of_ones_D, of_wave_D = (
        norm(each.view(1, 1, D))[0, 0].float() for each in (torch.zeros_like(wave_D), wave_D.abs(), wave_D)
    )
    centred = bool((of_ones_D - shift_D).abs().max() < 1e-3 * (of_wave_D - shift_D).abs().max())
    wave_D = wave_D.float()
    plain_D = wave_D - wave_D.mean() if centred else wave_D
    return (of_wave_D - shift_D) * plain_D.square().mean().sqrt() / plain_D, shift_D, centred


def _folded(weight_PHR: Tensor, gain_D: Tensor, shift_D: Tensor, centred: bool) -> Tensor:
    """A weight with its bias as last row, that reads c / scale; along the mean, which is away, it reads nothing."""
    bias_HR = weight_PHR[0]
    plain_HDR = (weight_PHR[1:] - bias_HR).transpose(0, 1)
    row_H1R = (shift_D @ plain_HDR + bias_HR)[:, None]
    read_HDR = gain_D[:, None] * plain_HDR
    if centred:
        read_HDR = read_HDR - read_HDR.mean(1, keepdim=True)
    return torch.cat([read_HDR, row_H1R], 1)


def _probe(
    model: nn.Module, attention: nn.Module, call: Mapping[str, Any], x: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """Queries, keys and values (P, H, R) of 0 and of the unit vectors, without positions; and what positions turn."""
    D = x.shape[-1]
    probe_PD = torch.cat([torch.zeros_like(x[0, :1]), torch.eye(D, dtype=x.dtype, device=x.device)])
    kwargs = {key: None if key in _OF_TOKENS else value for key, value in call["kwargs"].items()}
    kwargs.pop("hidden_states", None)
    turn_NRR, places = None, call["kwargs"].get("position_embeddings")
    if places is not None:
        kwargs["position_embeddings"] = tuple(
            torch.full_like(each[:, :1], value).expand(-1, D + 1, -1)
            for each, value in zip(places, (1, 0), strict=True)
        )
    with recorded(model) as recording:
        attention(probe_PD[None], *call["args"][1:], **kwargs)
        (record,) = recording.layers
    if places is not None:
        turn = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        if turn is None:
            raise ValueError(f"it is not known how {type(attention).__name__} turns queries by their positions")
        R = record.q_BHND.shape[-1]
        unit_R1NR = torch.eye(R, dtype=x.dtype, device=x.device)[:, None, None].expand(-1, 1, x.shape[1], -1)
        turn_NRR = turn(unit_R1NR, unit_R1NR, *places)[0][:, 0].permute(1, 2, 0).float()
    probed = (each[0].transpose(0, 1).float() for each in (record.q_BHND, record.k_BKMD, record.v_BKME))
    return tuple(probed), turn_NRR  # type: ignore[return-value]


#: arguments of an attention that are of its tokens, and not of those that probe it
_OF_TOKENS = ("attention_mask", "past_key_values", "past_key_value", "position_ids", "cache_position")
