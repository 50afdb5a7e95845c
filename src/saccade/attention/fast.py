"""Fastmax: the softmax's exponential cut off after p terms, so that attention to all tokens factorises exactly.

Gerami, Hoover, Dulepet, Duraiswami, "FAST: Factorizable Attention for Speeding up Transformers", arXiv 2402.07901.

    A_ij = f(q^_i . k^_j) / sum_m f(q^_i . k^_m),   f(x) = a0 + a1 x + a2 x^2,   a = 1, 1, 1/2 (p = 2), 1, 1, 0 (p = 1)
    o_i = F_i / G_i,   F_i = a0 sum_j v_j + a1 q^_i sum_j k^_j^T v_j + a2 vec(q^_i q^_i^T) sum_j vec(k^_j k^_j^T)^T v_j

and G the same with 1 in the place of v_j; causal: sums over j <= i. Nothing is approximated after f: no sampling, no
sparsity. For p = 2 and the default a, f(x) = (1 + (1 + x)^2) / 2 >= 1/2: all weights are positive. For p = 1 they are
while x > -1, which "centered" and "limited" see to.

| paper | here |
|---|---|
| p | `degree` |
| q^, k^ | `fastmax_normalize`, four published forms, see there |
| denum_term t | `temperature`: x = q.k / (t sqrt(D)) where "plain", else q^.k^ / t |
| a0, a1, a2, lim | `coefficients`, `limit` |

The matrix k^ k^^T is symmetric: D (D + 1) / 2 of its entries are kept (`saccade.ops.expansion.Polynomial`), so that the
state of a head has (1 + D + D (D + 1) / 2) (E + 1) numbers. Inside a chunk of tokens f is computed as it stands.

Choices that the paper leaves open or where its codes differ:
- normalisation: the experiments' ("centered") takes its statistics over all tokens, so that a causal model sees the
  future. A causal layer therefore starts with "standardized", the paper's text, which is a matter of each token alone;
  other layers with "centered". "limited" is strictly causal with a fixed `norm_bound`.
- dropout is on the features of the highest degree, of queries and keys independently, as in the authors' "quadratic"
  form; an entry and its mirror image are one feature here, and fall together.
- positions: the library's relative position matrix is switched off in favour of rotary q and k; so here.

Shape letters: B batch, H heads, K key heads, N queries, M keys, D head dim, E value width, F features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from saccade.catalogue import AuthorsPort, Claim, ClaimResult, register
from saccade.layers.cache import StateCache
from saccade.layers.state_attention import StateAttention
from saccade.ops.expansion import Polynomial, expanded_attend, in_segments
from saccade.ops.heads import repeat_heads
from saccade.ops.linear import linear_attend

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab

Normalization = Literal["plain", "centered", "limited", "standardized"]
NORMALIZATIONS = ("plain", "centered", "limited", "standardized")


def fastmax_normalize(
    x_BHND: Tensor,
    normalization: Normalization,
    *,
    valid_BN: Tensor | None = None,
    limit: float = 1.0,
    norm_bound: float | None = None,
) -> Tensor:
    """q^ or k^, in the four published forms; statistics are over the tokens marked in `valid_BN`.

    plain         x (the experiments' `normalize = 0`)
    centered      y / max_n |y_n|,  y = x - mean over the tokens of the head   (`normalize = 1`)
    limited       limit x / max_n |x_n|  (the CUDA library); with `norm_bound`, limit x / norm_bound
    standardized  each token less its mean over channels, over its standard deviation (the paper's text)
    """
    wide = x_BHND if x_BHND.dtype == torch.float64 else x_BHND.float()
    if normalization == "plain" or not x_BHND.numel():
        return wide
    if normalization == "standardized":
        return F.layer_norm(wide, wide.shape[-1:])
    if normalization == "limited" and norm_bound is not None:
        return wide * (limit / norm_bound)
    keep = None if valid_BN is None else valid_BN[:, None, :, None]
    if normalization == "centered":
        if keep is None:
            wide = wide - wide.mean(2, keepdim=True)
        else:
            wide = wide - (wide * keep).sum(2, keepdim=True) / keep.sum(2, keepdim=True).clamp(min=1)
    if keep is not None:  # before the norm: other tokens could be of any size
        wide = wide.masked_fill(~keep, 0.0)
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    largest = norm.amax(2, keepdim=True).clamp(min=torch.finfo(norm.dtype).tiny)
    return wide / largest * (limit if normalization == "limited" else 1.0)


def fastmax_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    *,
    degree: int = 2,
    normalization: Normalization = "centered",
    causal: bool = False,
    mask_BM: Tensor | None = None,
    query_mask_BN: Tensor | None = None,
    temperature: float | None = None,
    coefficients: tuple[float, float, float] = (1.0, 1.0, 0.5),
    limit: float = 1.0,
    norm_bound: float | None = None,
    dropout: float = 0.0,
    state: Tensor | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
) -> Any:
    """o_i = sum_j f(q^_i . k^_j) v_j / sum_j f(q^_i . k^_j), see the top of this file; a row without keys gives zeros.

    Args:
        degree: p, 1 or 2.
        normalization, limit, norm_bound: of q and k, see `fastmax_normalize`.
        causal: sums over j <= i. The statistics of "centered" and "limited" without a bound still see all tokens.
        mask_BM: bool, True = real key; query_mask_BN: the same for queries (of the statistics only).
        temperature: t; None: 8 where "plain", else 1.
        coefficients: a0, a1, a2.
        dropout: of features, see the top of this file.
        state: sums over earlier tokens (B, H, F, E + 1); return_state: also return them after the last token.
        chunk_size: of the causal form; the result does not depend on it.

    Returns:
        out (B, H, N, E), or (out, state).

    Raises:
        ValueError: if shapes do not fit or an option is unknown.
    """
    if degree not in (1, 2):
        raise ValueError(f"degree must be 1 or 2, got {degree}")
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {', '.join(NORMALIZATIONS)}, got {normalization!r}")
    if dropout and (state is not None or return_state):
        raise ValueError("dropout is for training: it takes and returns no state")
    plain = normalization == "plain"
    temperature = (8.0 if plain else 1.0) if temperature is None else temperature
    divisor = temperature * math.sqrt(q_BHND.shape[3]) if plain else temperature
    kernel = Polynomial(*coefficients[:2], coefficients[2] if degree == 2 else 0.0)

    def normalize(x: Tensor, valid_BN: Tensor | None) -> Tensor:
        return fastmax_normalize(x, normalization, valid_BN=valid_BN, limit=limit, norm_bound=norm_bound)

    def mean(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, before: Tensor | None, keep: bool
    ) -> tuple[Tensor, Any]:
        H = q_BHND.shape[1]
        q, k = (normalize(q, None), normalize(k, None)) if by_token else (q, k)
        # the last column counts keys: f(0) = 1, so that a key of zeros would have weight
        v = torch.cat([v.to(q.dtype), v.new_ones(*v.shape[:3], 1, dtype=q.dtype)], -1)
        if mask is not None:
            v = v.masked_fill(~mask[:, None, :, None], 0.0)
        q, k, v = q / divisor, repeat_heads(k, H), repeat_heads(v, H)
        if dropout:
            out = _sums_with_dropout(q, k, v, kernel, dropout, causal)
        else:
            out = expanded_attend(
                q, k, v, kernel, causal=causal, state=before, return_state=keep, chunk_size=chunk_size
            )
        out, after = out if keep else (out, None)
        total = out[..., -1:]
        out = torch.where(total == 0, 0.0, out[..., :-1] / torch.where(total == 0, 1.0, total))
        return out, after

    by_token = normalization in ("plain", "standardized") or (normalization == "limited" and norm_bound is not None)
    q, k = (q_BHND, k_BKMD) if by_token else (normalize(q_BHND, query_mask_BN), normalize(k_BKMD, mask_BM))
    if causal and not dropout:
        out, after = in_segments(mean, q, k, v_BKME, mask_BM, state, return_state)
    else:
        out, after = mean(q, k, v_BKME, mask_BM, state, return_state)
    out = out.to(q_BHND.dtype)
    return (out, after) if return_state else out


def _sums_with_dropout(q: Tensor, k: Tensor, v: Tensor, kernel: Polynomial, rate: float, causal: bool) -> Tensor:
    """The features themselves, piece by piece, each drawn again with the same seed for its gradient."""

    def features(x: Tensor, query: bool) -> Tensor:
        a0, a1, a2 = (kernel.a0, kernel.a1, kernel.a2) if query else (1.0, 1.0, 1.0)
        parts = [torch.full_like(x[..., :1], a0)]
        if not kernel.a2:
            return torch.cat([*parts, a1 * F.dropout(x, rate)], -1)
        rows, columns = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
        weights = torch.where(rows == columns, a2, 2 * a2) if query else 1.0
        return torch.cat([*parts, a1 * x, F.dropout(x[..., rows] * x[..., columns], rate) * weights], -1)

    def within(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        return linear_attend(features(q, True), features(k, False), v, state=state, return_state=True)

    def gather(k: Tensor, v: Tensor) -> Tensor:
        return features(k, False).transpose(-1, -2) @ v

    def read(q: Tensor, total: Tensor) -> Tensor:
        return features(q, True) @ total

    size, out = 256, []
    pieces = [x.split(size, 2) for x in (q, k, v)]
    if causal:
        state = None
        for q_, k_, v_ in zip(*pieces, strict=True):
            part, state = checkpoint(within, q_, k_, v_, state, use_reentrant=False)
            out.append(part)
        return torch.cat(out, 2)
    total = torch.stack([checkpoint(gather, *kv, use_reentrant=False) for kv in zip(*pieces[1:], strict=True)]).sum(0)
    return torch.cat([checkpoint(read, q_, total, use_reentrant=False) for q_ in pieces[0]], 2)


class FastmaxAttention(StateAttention):
    """Multi-head or grouped-query Fastmax; projections, positions and call as in `QKVAttention`.

    Args:
        dim, num_heads, causal: as there.
        degree, temperature, coefficients, limit, norm_bound, dropout: as in `fastmax_attend`.
        normalization: None: "standardized" where causal, else "centered".
        projections: `QKVAttention`'s other arguments.

    Raises:
        ValueError: if an option is unknown or out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = False,
        *,
        degree: int = 2,
        normalization: Normalization | None = None,
        temperature: float | None = None,
        coefficients: tuple[float, float, float] = (1.0, 1.0, 0.5),
        limit: float = 1.0,
        norm_bound: float | None = None,
        dropout: float = 0.0,
        **projections: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, **projections)
        if normalization is None:
            normalization = "standardized" if causal else "centered"
        if degree not in (1, 2):
            raise ValueError(f"degree must be 1 or 2, got {degree}")
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {', '.join(NORMALIZATIONS)}, got {normalization!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        for name, value in (("temperature", temperature), ("limit", limit), ("norm_bound", norm_bound)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        a0, a1, a2 = coefficients
        if degree == 2 and not (a2 > 0 and a1 * a1 <= 4 * a0 * a2):
            raise ValueError(
                f"coefficients need a2 > 0 and a1^2 <= 4 a0 a2 to keep weights positive, got {coefficients}"
            )
        self.dropout, self.normalization = dropout, normalization
        self.options: dict[str, Any] = {
            "degree": degree,
            "normalization": normalization,
            "temperature": temperature,
            "coefficients": coefficients,
            "limit": limit,
            "norm_bound": norm_bound,
        }

    def aggregate(self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, **call: Any) -> Any:
        dropout = self.dropout if self.training and not call.get("return_state") else 0.0
        return fastmax_attend(q_BHND, k_BKMD, v_BKME, **call, **self.options, dropout=dropout)

    def new_cache(  # type: ignore[override]
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> StateCache:
        """An empty cache; its state has (1 + D + D (D + 1) / 2) (D + 1) numbers a head.

        Raises:
            ValueError: if the normalisation depends on tokens still to come.
        """
        if self.normalization == "centered" or (self.normalization == "limited" and not self.options["norm_bound"]):
            raise ValueError(
                f"normalization {self.normalization!r} looks at all tokens and cannot decode: use 'standardized', "
                "'plain', or 'limited' with norm_bound"
            )
        return super().new_cache(batch_size, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, degree={self.options['degree']}, normalization={self.normalization!r}"


# The authors' functions.


def _run_experiments(module: nn.Module, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    q, k, v = (inputs[name] for name in "qkv")
    forms: dict[str, Normalization] = {"norm0": "plain", "norm1": "centered"}
    return {
        f"p{degree}.{'causal' if causal else 'full'}.{name}": fastmax_attend(
            q,
            k,
            v,
            degree=degree,
            causal=causal,
            normalization=form,
            temperature=args.get("denum_term", 8.0) if form == "plain" else None,
        )
        for degree in (1, 2)
        for causal in (False, True)
        for name, form in forms.items()
    }


def _run_library(module: nn.Module, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    q, k, v = (inputs[name] for name in "qkv")
    normalized = bool(args.get("normalize", 0))
    return {
        f"p{degree}.{'causal' if causal else 'full'}": fastmax_attend(
            q,
            k,
            v,
            degree=degree,
            causal=causal,
            normalization="limited" if normalized else "plain",
            # without normalisation the library has x = q . k
            temperature=None if normalized else q.shape[-1] ** -0.5,
            coefficients=(args.get("a0", 1.0), args.get("a1", 1.0), args.get("a2", 0.5)),
            limit=args.get("lim", 1.0),
        )
        for degree in (1, 2)
        for causal in (False, True)
    }


# The claim: softmax's accuracy in time linear in the length.


def _claim(lab: Lab) -> ClaimResult:
    from saccade.layers.softmax_attention import SoftmaxAttention

    measured: dict[str, float] = {}
    lengths = lab.size((4096, 16384), (64, 128))
    for width in lab.progress((32, 64), "speed by head dim"):
        times = []
        for length in lengths:
            q, k, v = torch.randn(3, 1, 4, length, width, generator=lab.generator())
            fast = partial(fastmax_attend, q, k, v, causal=True, normalization="standardized")
            dense = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
            times.append(lab.seconds(fast, 3))
            measured[f"times_as_fast_as_sdpa_at_{length}_head_dim_{width}"] = lab.seconds(dense, 1) / times[-1]
        exponent = math.log(times[1] / times[0]) / math.log(lengths[1] / lengths[0])
        measured[f"exponent_of_time_head_dim_{width}"] = exponent
    ways = {
        "softmax": lambda: SoftmaxAttention(64, 4),
        "fastmax2": lambda: FastmaxAttention(64, 4, normalization="standardized"),
        "fastmax2_centered": lambda: FastmaxAttention(64, 4),
        "fastmax1": lambda: FastmaxAttention(64, 4, degree=1),
    }
    for name, way in ways.items():
        measured[f"{name}_accuracy"] = _accuracy(lab, name, way)
    softmax, second, centered, first = (measured[f"{name}_accuracy"] for name in ways)
    linear = max(measured[f"exponent_of_time_head_dim_{width}"] for width in (32, 64)) < 1.1
    return ClaimResult(
        measured,
        holds=linear and second > softmax - 0.03,
        note=f"early in training (200 steps); the normalisation decides: both centered, where weights are nearly "
        f"even, degree 2 is {centered - first:+.2f} from degree 1 and {centered - softmax:+.2f} from softmax",
    )


def _accuracy(lab: Lab, name: str, mixer: Any) -> float:
    """On held-out digits, read as 64 tokens of grey."""
    digits, batch = lab.data.digits(), lab.size(64, 4)
    tokens, test = ((images.flatten(1) * 16).long() for images in (digits.train_images, digits.test_images))
    model = lab.sequence_model(lambda _: mixer(), vocab=17, dim=64, layers=2, classes=10)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        generator = lab.generator()
        while True:
            rows = torch.randint(len(tokens), (batch,), generator=generator)
            yield tokens[rows], digits.train_labels[rows]

    def loss(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(pair[0]), pair[1])

    lab.train(model, batches(), loss, 200, lr=2e-3, description=name)
    with torch.no_grad():
        return (model.eval()(test).argmax(-1) == digits.test_labels).float().mean().item()


register(
    "fast",
    kind="sequence",
    summary="Fastmax: exp as a polynomial of degree 1 or 2, factorised exactly; linear time, constant-size state.",
    supports=("causal", "bidirectional", "cross", "padding", "decoding", "grouped-heads", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="linear/kernel",
    complexity="time O(N D^(p+1)), state O(D^(p+1) / 2) a head whatever the length",
    invariants=(
        "the factorised form equals the matrix of f(q . k), for p = 1 and 2, full and causal, forward and backward",
        "weights of a row sum to 1, and are positive for p = 2",
        "large temperature: error against softmax falls with its cube (p = 2), square (p = 1); at infinity the mean",
        "a causal output does not change with later tokens (plain, limited with a bound, standardized)",
        "padded keys count neither in sums nor in statistics",
        "a state stepped token by token equals the parallel form",
    ),
    build=FastmaxAttention,
    example={"dim": 16, "num_heads": 4, "num_kv_heads": 2},
    ports=(
        AuthorsPort("fastmax", build=lambda args: nn.Identity(), convert=dict, run=_run_experiments),
        AuthorsPort("fastmax_limit", build=lambda args: nn.Identity(), convert=dict, run=_run_library),
    ),
    claim=Claim(
        paper="Fastmax keeps softmax's accuracy while time and memory are linear in the number of tokens",
        expected="digits read as 64 tokens, 200 steps: Fastmax of degree 2 (standardized) within 0.03 of softmax or "
        "above; the paper's order of degrees 2 > 1 is reported, like for like, without a verdict; "
        "time from 4k to 16k tokens has an exponent below 1.1, and at 16k is below SDPA's",
        run=_claim,
    ),
)
