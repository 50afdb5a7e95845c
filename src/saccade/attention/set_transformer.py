"""Set Transformer: attention blocks for sets, and encoder-decoder models of them.

Lee et al., "Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks", arXiv 1810.00825.

    MAB(X, Y) = O + relu(fc_o(O)),   O_h = Q_h + softmax(Q_h K_h^T / sqrt(C)) V_h      Q = fc_q(X); K, V of Y
    SAB(X) = MAB(X, X)                                              time O(n^2)
    ISAB_m(X) = MAB(X, MAB(I, X)),   I learned, m points            time O(n m)
    PMA_k(X) = MAB(S, X),            S learned, k seeds

Choices where paper and code differ, as the code makes them: the softmax is scaled by the whole width C
(`scale="width"`; the paper's by the head's is `"head"`), the residual adds the projected query, there is no layer norm
unless asked for (`layer_norm=True`, after attention and after fc_o, is the paper's), and no feed-forward before PMA.

Shape letters: B batch, N elements, M elements of the other set, C width, H heads, D = C / H, K seeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Claim, ClaimResult, register
from saccade.ops import masks
from saccade.ops.attend import attend

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab

Scale = Literal["width", "head"]


class MAB(nn.Module):
    """Multi-head attention block from one set to another.

    Args:
        query_dim, key_dim: widths of the two sets' elements.
        dim: C, the width of the output.
        num_heads: H, a divisor of C.
        layer_norm: normalise after attention and after the feed-forward layer.
        scale: "width": scores are divided by sqrt(C), as the authors' code does; "head": by sqrt(C / H).

    Raises:
        ValueError: if heads do not divide, or `scale` is neither.
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        dim: int,
        num_heads: int = 4,
        *,
        layer_norm: bool = False,
        scale: Scale = "width",
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim ({dim}), got {num_heads}")
        if scale not in ("width", "head"):
            raise ValueError(f"scale must be 'width' or 'head', got {scale!r}")
        self.query_dim, self.key_dim, self.dim, self.num_heads = query_dim, key_dim, dim, num_heads
        self.scale = (dim if scale == "width" else dim // num_heads) ** -0.5
        self.fc_q, self.fc_k, self.fc_v = nn.Linear(query_dim, dim), nn.Linear(key_dim, dim), nn.Linear(key_dim, dim)
        self.fc_o = nn.Linear(dim, dim)
        self.ln0 = nn.LayerNorm(dim) if layer_norm else nn.Identity()
        self.ln1 = nn.LayerNorm(dim) if layer_norm else nn.Identity()

    def forward(self, x_BNC: Tensor, y_BMC: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """MAB(x, y); `mask` (B, M), True = a real element of `y`. A set without any gives no attention.

        Raises:
            ValueError: if shapes do not fit.
        """
        for name, tokens, width in (("x", x_BNC, self.query_dim), ("y", y_BMC, self.key_dim)):
            if tokens.ndim != 3 or tokens.shape[-1] != width:
                raise ValueError(f"{name} must be (batch, elements, {width}), got {tuple(tokens.shape)}")
        real = None
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != y_BMC.shape[:2]:
                raise ValueError(f"mask must be bool {tuple(y_BMC.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}")
            real = masks.padding(mask)
        q, k, v = (
            p(z).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for p, z in ((self.fc_q, x_BNC), (self.fc_k, y_BMC), (self.fc_v, y_BMC))
        )
        out_BNC = (q + attend(q, k, v, mask=real, scale=self.scale)).transpose(1, 2).flatten(2)
        out_BNC = self.ln0(out_BNC)
        return self.ln1(out_BNC + F.relu(self.fc_o(out_BNC)))


class SAB(nn.Module):
    """Self-attention among the elements of a set: MAB(X, X)."""

    def __init__(self, in_dim: int, dim: int, num_heads: int = 4, **block: Any) -> None:
        super().__init__()
        self.mab = MAB(in_dim, in_dim, dim, num_heads, **block)

    def forward(self, x_BNC: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.mab(x_BNC, x_BNC, mask=mask)


class ISAB(nn.Module):
    """The same through `num_inds` learned points: MAB(X, MAB(I, X)), linear in the set's size."""

    def __init__(self, in_dim: int, dim: int, num_heads: int = 4, num_inds: int = 32, **block: Any) -> None:
        super().__init__()
        if num_inds < 1:
            raise ValueError(f"num_inds must be at least 1, got {num_inds}")
        self.I = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, num_inds, dim)))
        self.mab0 = MAB(dim, in_dim, dim, num_heads, **block)
        self.mab1 = MAB(in_dim, dim, dim, num_heads, **block)

    def forward(self, x_BNC: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.mab1(x_BNC, self.mab0(self.I.expand(x_BNC.shape[0], -1, -1), x_BNC, mask=mask))


class PMA(nn.Module):
    """Pooling by attention of `num_seeds` learned seeds: MAB(S, X)."""

    def __init__(self, dim: int, num_heads: int = 4, num_seeds: int = 1, **block: Any) -> None:
        super().__init__()
        if num_seeds < 1:
            raise ValueError(f"num_seeds must be at least 1, got {num_seeds}")
        self.S = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, num_seeds, dim)))
        self.mab = MAB(dim, dim, dim, num_heads, **block)

    def forward(self, x_BNC: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.mab(self.S.expand(x_BNC.shape[0], -1, -1), x_BNC, mask=mask)


class SetTransformer(nn.Module):
    """Encoder of (I)SABs, pooling, decoder of SABs, a linear layer: a set in, K outputs that its order does not change.

    Args:
        in_dim: width of an element.
        num_outputs, out_dim: K outputs of that width.
        num_inds: inducing points of the encoder's ISABs; None for SABs.
        dim, num_heads, layer_norm, scale: of all blocks.
        encoder_blocks: 2, as published.
        decoder_blocks: SABs after pooling: the code's model has 2, the point-cloud one 0.
        dropout: before and after pooling (0.5 for point clouds).
    """

    def __init__(
        self,
        in_dim: int,
        num_outputs: int,
        out_dim: int,
        num_inds: int | None = 32,
        dim: int = 128,
        num_heads: int = 4,
        *,
        encoder_blocks: int = 2,
        decoder_blocks: int = 2,
        dropout: float = 0.0,
        **block: Any,
    ) -> None:
        super().__init__()
        widths = [in_dim] + [dim] * max(0, encoder_blocks - 1)
        self.enc = nn.ModuleList(
            SAB(width, dim, num_heads, **block) if num_inds is None else ISAB(width, dim, num_heads, num_inds, **block)
            for width in widths
        )
        self.drop = nn.Dropout(dropout)
        self.pool = PMA(dim, num_heads, num_outputs, **block)
        self.dec = nn.ModuleList(SAB(dim, dim, num_heads, **block) for _ in range(decoder_blocks))
        self.out = nn.Linear(dim, out_dim)

    def forward(self, x_BNC: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """(B, N, in_dim) -> (B, K, out_dim); `mask` (B, N), True = a real element."""
        for block in self.enc:
            x_BNC = block(x_BNC, mask=mask)
        y_BKC = self.drop(self.pool(self.drop(x_BNC), mask=mask))
        for block in self.dec:
            y_BKC = block(y_BKC)
        return self.out(y_BKC)


class DeepSet(nn.Module):
    """The paper's baseline: an MLP per element, mean (or max, sum) over the set, an MLP."""

    def __init__(
        self,
        in_dim: int,
        num_outputs: int,
        out_dim: int,
        dim: int = 128,
        *,
        pool: Literal["mean", "max", "sum"] = "mean",
    ) -> None:
        super().__init__()
        self.num_outputs, self.pool = num_outputs, pool
        self.enc = _mlp(in_dim, dim, dim)
        self.dec = _mlp(dim, dim, num_outputs * out_dim)

    def forward(self, x_BNC: Tensor) -> Tensor:
        z_BNC = self.enc(x_BNC)
        pooled = z_BNC.amax(1) if self.pool == "max" else z_BNC.sum(1) if self.pool == "sum" else z_BNC.mean(1)
        return self.dec(pooled).unflatten(-1, (self.num_outputs, -1))


def _mlp(in_dim: int, dim: int, out_dim: int) -> nn.Sequential:
    widths = [in_dim, dim, dim, dim, out_dim]
    layers: list[nn.Module] = []
    for first, second in zip(widths, widths[1:]):
        layers += [nn.Linear(first, second), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class SetAttention(nn.Module):
    """An SAB, or an ISAB, as a sequence mechanism without positions.

    Args:
        dim: C.
        num_heads: H.
        causal: must be False.
        num_inds: inducing points, linear time; None: every element attends to every other.
        layer_norm, scale: `MAB`'s.

    Raises:
        ValueError: if `causal` is True, or a number does not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        causal: bool = False,
        *,
        num_inds: int | None = 32,
        layer_norm: bool = False,
        scale: Scale = "width",
    ) -> None:
        super().__init__()
        if causal:
            raise ValueError("a set has no order: got causal=True")
        self.dim, self.num_heads, self.causal = dim, num_heads, causal
        whole = num_inds is None
        block: dict[str, Any] = {"layer_norm": layer_norm, "scale": scale}
        self.block = SAB(dim, dim, num_heads, **block) if whole else ISAB(dim, dim, num_heads, num_inds or 0, **block)

    def forward(
        self, x_BNC: Tensor, context_BMC: Tensor | None = None, *, mask: Tensor | None = None, cache: None = None
    ) -> Tensor:
        """Attend within `x_BNC`, or to the set `context_BMC` (MAB; through the inducing points where there are any)."""
        if cache is not None:
            raise ValueError("a set has no order, so there is nothing to decode")
        if context_BMC is None:
            return self.block(x_BNC, mask=mask)
        if isinstance(self.block, SAB):
            return self.block.mab(x_BNC, context_BMC, mask=mask)
        points = self.block.I.expand(context_BMC.shape[0], -1, -1)
        return self.block.mab1(x_BNC, self.block.mab0(points, context_BMC, mask=mask))


def mixture_log_likelihood(x_BND: Tensor, raw_BKP: Tensor) -> tuple[Tensor, Tensor]:
    """Mean log-likelihood of points under the Gaussian mixture that a model put out, and its weights (B, K).

    raw[0] is the weight's logit, then D means, then one deviation for all axes or one for each, through softplus:
    log p(x) = logsumexp_k( log N(x; mu_k, diag sigma_k^2) + log(pi_k + 1e-10) ).

    Raises:
        ValueError: if `raw` has neither 1 + D + 1 nor 1 + 2 D channels.
    """
    width = x_BND.shape[-1]
    if raw_BKP.shape[-1] not in (2 + width, 1 + 2 * width):
        raise ValueError(f"a mixture has {2 + width} or {1 + 2 * width} numbers a component, got {raw_BKP.shape[-1]}")
    pi_BK = raw_BKP[..., 0].softmax(-1)
    mean, sigma = raw_BKP[..., 1 : 1 + width], F.softplus(raw_BKP[..., 1 + width :])
    normal = torch.distributions.Normal(mean[:, None], sigma[:, None].expand(-1, -1, -1, width), validate_args=False)
    log_BNK = normal.log_prob(x_BND[:, :, None]).sum(-1) + (pi_BK + 1e-10).log()[:, None]
    return log_BNK.logsumexp(-1).mean(), pi_BK


def mixture_sets(
    batch: int, components: int = 4, *, sizes: tuple[int, int] = (300, 600), generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Points of Gaussian mixtures, (B, N, 2), and the true mixtures as `mixture_log_likelihood` reads them.

    N ~ U{300 .. 599}, pi ~ Dirichlet(1), mu ~ U[-4, 4]^2, sigma 0.3.
    """
    n = int(torch.randint(*sizes, (1,), generator=generator))
    exponential = -torch.rand(batch, components, generator=generator).clamp(min=1e-12).log()
    pi = exponential / exponential.sum(-1, keepdim=True)
    mean = torch.rand(batch, components, 2, generator=generator) * 8 - 4
    label = torch.multinomial(pi, n, replacement=True, generator=generator)
    noise = 0.3 * torch.randn(batch, n, 2, generator=generator)
    points = mean.gather(1, label[..., None].expand(-1, -1, 2)) + noise
    sigma = torch.full((batch, components, 1), 0.3).expm1().log()  # softplus's inverse
    return points, torch.cat([pi.log()[..., None], mean, sigma], -1)


def _rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pooling and output layer stand among the decoder's blocks in the authors' model."""
    last = max(int(key.split(".")[1]) for key in state if key.startswith("dec."))
    found = {}
    for key, tensor in state.items():
        part, _, inside = key.partition(".")
        number, _, rest = inside.partition(".")
        if part == "dec" and number == "0":
            key = f"pool.{rest}"
        elif part == "dec":
            key = f"out.{rest}" if int(number) == last else f"dec.{int(number) - 1}.{rest}"
        found[key] = tensor
    return found


def _run_model(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    y = module(inputs["x"])
    likelihood, pi = mixture_log_likelihood(inputs["x"], y)
    return {"y": y, "pi": pi, "mean_log_likelihood": likelihood[None]}


def _claim(lab: Lab) -> ClaimResult:
    """The largest of 1 to 10 numbers (only attention pooling finds it), and mixtures of Gaussians."""
    measured: dict[str, float] = {}
    dim = lab.size(64, 8)

    def numbers() -> Iterator[tuple[Tensor, Tensor]]:
        generator = lab.generator()
        while True:
            n = int(torch.randint(1, 11, (1,), generator=generator))
            x = torch.rand(lab.size(128, 4), n, 1, generator=generator) * 100
            yield x, x.amax(1, keepdim=True)

    def distance(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).abs().mean()

    held_out = torch.Generator().manual_seed(10**6 + lab.seed)
    tests = [torch.rand(256, n, 1, generator=held_out) * 100 for n in range(1, 11)]
    models: dict[str, Any] = {
        "attention": lambda: SetTransformer(1, 1, 1, None, dim),
        "mean": lambda: DeepSet(1, 1, 1, dim),
        "max": lambda: DeepSet(1, 1, 1, dim, pool="max"),
    }
    for name, build in models.items():
        with lab.seeded():
            model = build()
        lab.train(model, numbers(), distance, 1200, lr=1e-3, description=f"largest number, {name}")
        with torch.no_grad():
            errors = [distance(model.eval(), (x, x.amax(1, keepdim=True))) for x in tests]
        measured[f"largest_number_error_{name}"] = torch.stack(errors).mean().item()

    def mixtures() -> Iterator[tuple[Tensor, Tensor]]:
        generator = lab.generator()
        while True:
            yield mixture_sets(lab.size(10, 2), 3, sizes=lab.size((100, 200), (10, 20)), generator=generator)

    def likelihood(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return -mixture_log_likelihood(batch[0], model(batch[0]))[0]

    points, truth = mixture_sets(lab.size(200, 2), 3, generator=held_out)
    measured["mixture_log_likelihood_truth"] = mixture_log_likelihood(points, truth)[0].item()
    clusterers: dict[str, Any] = {
        "attention": lambda: SetTransformer(2, 3, 4, 16, dim),
        "mean": lambda: DeepSet(2, 3, 4, dim),
    }
    for name, build in clusterers.items():
        with lab.seeded():
            model = build()
        lab.train(model, mixtures(), likelihood, 1000, lr=1e-3, description=f"mixtures, {name}")
        with torch.no_grad():
            found = mixture_log_likelihood(points, model.eval()(points))[0].item()
        measured[f"mixture_log_likelihood_{name}"] = found
    x = torch.randn(1, lab.size(8192, 64), dim, generator=lab.generator())
    full, induced = SetAttention(dim, 4, num_inds=None), SetAttention(dim, 4, num_inds=16)
    with torch.no_grad():
        measured["isab_speedup_at_8k"] = lab.seconds(lambda: full(x), 3) / lab.seconds(lambda: induced(x), 3)
    better = measured["largest_number_error_attention"] < 0.5 * measured["largest_number_error_mean"]
    closer = measured["mixture_log_likelihood_attention"] > measured["mixture_log_likelihood_mean"]
    return ClaimResult(measured, holds=better and closer and measured["isab_speedup_at_8k"] > 2)


register(
    "set-transformer",
    kind="sequence",
    summary="Attention blocks for sets: among elements, through learned points in linear time, pooling by seeds.",
    supports=("bidirectional", "cross", "padding"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="dense",
    note="with num_inds the time is linear: queries and keys meet in m learned points",
    complexity="SAB: time O(N^2 C); ISAB: time O(N m C), memory O((N + m) C)",
    invariants=(
        "blocks commute with any order of the elements, pooling and the model do not see it",
        "every element twice changes no output of PMA and ISAB, nor of SAB for each element",
        "fc_o = 0 without layer norm leaves the projected query plus its attention; a single key is taken whole",
        "ISAB is two MABs; the true mixture has the oracle's likelihood",
    ),
    build=SetAttention,
    example={"dim": 16, "num_heads": 4, "num_inds": 5},
    ports=(
        AuthorsPort(
            "mab",
            build=lambda a: MAB(a["dim_Q"], a["dim_K"], a["dim_V"], a["num_heads"], layer_norm=a.get("ln", False)),
            convert=dict,
            run=lambda module, inputs, args: {"y": module(inputs["q"], inputs["k"])},
        ),
        AuthorsPort(
            "sab",
            build=lambda a: SAB(a["dim_in"], a["dim_out"], a["num_heads"], layer_norm=a.get("ln", False)),
            convert=dict,
            run=lambda module, inputs, args: {"y": module(inputs["x"])},
        ),
        AuthorsPort(
            "isab",
            build=lambda a: ISAB(
                a["dim_in"], a["dim_out"], a["num_heads"], a["num_inds"], layer_norm=a.get("ln", False)
            ),
            convert=dict,
            run=lambda module, inputs, args: {"y": module(inputs["x"])},
        ),
        AuthorsPort(
            "pma",
            build=lambda a: PMA(a["dim"], a["num_heads"], a["num_seeds"], layer_norm=a.get("ln", False)),
            convert=dict,
            run=lambda module, inputs, args: {"y": module(inputs["x"])},
        ),
        AuthorsPort(
            "set_transformer",
            build=lambda a: SetTransformer(
                a["dim_input"],
                a["num_outputs"],
                a["dim_output"],
                a.get("num_inds", 32),
                a.get("dim_hidden", 128),
                a.get("num_heads", 4),
                layer_norm=a.get("ln", False),
            ),
            convert=_rename,
            run=_run_model,
        ),
    ),
    claim=Claim(
        paper="attention pools what a mean cannot: largest number to 0.2, not 2.1; mixtures at -1.5, not -2.0",
        expected="half the mean's error on the largest number, a higher likelihood of mixtures, ISAB linear in time",
        run=_claim,
    ),
)
