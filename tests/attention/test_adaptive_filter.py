from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import attention_map, catalogue
from saccade.attention.adaptive_filter import (
    AdaptiveFilterAttention,
    AdaptiveFilterNetwork,
    Dynamics,
    Weighting,
    adaptive_filter_attend,
    common_frame,
)
from saccade.attention.adaptive_filter.claim import simulate
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.ops import measure

DOUBLE = torch.float64


def dynamics(form: str = "isotropic", H: int = 2, d: int = 4, **switched_off: None) -> Dynamics:
    generator = torch.Generator().manual_seed(1)
    shape = (H, d) if form == "tensor" else (H,)

    def positive(low: float) -> Tensor:
        return low + torch.rand(shape, generator=generator, dtype=DOUBLE)

    parts = {
        "decay": -0.3 * positive(0.1),
        "frequency": torch.randn(H, d, generator=generator, dtype=DOUBLE),
        "process_noise": positive(0.1),
        "key_noise": positive(0.2),
        "query_noise": positive(0.2),
    }
    return Dynamics(**{**parts, **switched_off})


def heads(N: int = 13, d: int = 4, B: int = 2, H: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(3, B, H, N, 2 * d, generator=torch.Generator().manual_seed(N), dtype=DOUBLE))


def as_complex(x: Tensor) -> Tensor:
    return torch.complex(*x.chunk(2, -1))


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    system: Dynamics,
    *,
    temp: Tensor,
    nu: Tensor,
    weighting: Weighting | None = None,
    values: Dynamics | None = None,
    rotate_values: bool | None = True,
    times: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The formulas of the module's docstring with tensors over pairs and channels, residuals by their definition."""
    weighting, values = weighting or Weighting(), values or system
    q, k, v = (as_complex(x) for x in (q, k, v))
    N, d = q.shape[2], q.shape[3]
    t = torch.arange(N, dtype=DOUBLE) if times is None else times
    tau = (t[:, None] - t).abs()[..., None]

    def shaped(x: Tensor | None) -> Tensor:
        return torch.zeros(q.shape[1], 1, 1, 1, dtype=DOUBLE) if x is None else x.view(x.shape[0], 1, 1, -1)

    def growth(s: Dynamics) -> Tensor:
        return (shaped(s.decay) * tau).clamp(*weighting.exponents).exp()

    def variance(s: Dynamics) -> Tensor:
        own = tau if s.decay is None else (1 - growth(s) ** 2) / (-2 * shaped(s.decay))
        return shaped(s.process_noise) * own + shaped(s.key_noise) * growth(s) ** 2 + shaped(s.query_noise)

    def phase(s: Dynamics) -> Tensor:
        return torch.exp(1j * shaped(s.frequency) * tau)

    carried = growth(system) * phase(system) * k[:, :, None]
    misfit = (q[..., None, :] - carried).abs().square()
    if weighting.residual == "dot":
        misfit = -2 * (q[..., None, :].conj() * carried).real
    scale = {
        "none": torch.ones_like(tau),
        "precision": 1 / (nu.view(-1, 1, 1, 1) * variance(system)),
        "linear": 1 / (shaped(system.process_noise) * tau + shaped(system.key_noise)),
    }[weighting.multiplicative]
    bias = {
        "none": torch.zeros_like(tau),
        "precision": -variance(values).log(),
        "linear": -nu.view(-1, 1, 1, 1) * tau,
    }[weighting.additive]
    fit = (misfit * scale / d).sum(-1, keepdim=True)
    scores = temp.view(-1, 1, 1, 1) * (bias - (fit.log1p() if weighting.robust else fit))
    scores = scores.masked_fill(~torch.ones(N, N, dtype=torch.bool).tril()[..., None], -torch.inf)
    turned = torch.exp(-1j * shaped(values.frequency) * t[:, None, None])[:, :, 0]  # into the common frame
    if rotate_values is None:
        values = values._replace(frequency=None)
    out = (scores.softmax(-2) * growth(values) * phase(values) * v[:, :, None]).sum(-2)
    if rotate_values is False:
        out = out * turned
    return torch.cat([out.real, out.imag], -1), scores.logsumexp(-2)


OPTIONS = [
    {},
    {"robust": False},
    {"additive": "none"},
    {"additive": "linear"},
    {"multiplicative": "none"},
    {"multiplicative": "linear"},
    {"robust": False, "residual": "dot", "multiplicative": "linear", "additive": "linear"},
    {"exponents": (-1.0, 1.0)},
]
SWITCHES = [{}, {"decay": None}, {"process_noise": None}, {"decay": None, "process_noise": None}, {"frequency": None}]
TEMP, NU = torch.tensor([0.7, 1.3], dtype=DOUBLE), torch.tensor([0.8, 2.0], dtype=DOUBLE)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("switched_off", SWITCHES)
def test_isotropic_equals_its_definition(options: dict, switched_off: dict) -> None:
    q, k, v = heads()
    system, weighting = dynamics(**switched_off), Weighting(**options)
    given = {"temperature_H": TEMP, "robustness_H": NU, "weighting": weighting}
    ours = adaptive_filter_attend(q, k, v, system, **given)
    for x, y in zip(ours, naive(q, k, v, system, temp=TEMP, nu=NU, weighting=weighting), strict=True):
        torch.testing.assert_close(x, y, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("options", [{}, {"robust": False}])
@pytest.mark.parametrize("switched_off", SWITCHES)
def test_tensor_form_equals_its_definition_forward_and_backward(options: dict, switched_off: dict) -> None:
    q, k, v = (x.requires_grad_() for x in heads(9))
    system = dynamics("tensor", **switched_off)
    leaves = [q, k, v, *(x.requires_grad_() for x in system if x is not None)]
    shaped = {"temperature_H": TEMP, "robustness_H": NU, "weighting": Weighting(**options)}
    ours = adaptive_filter_attend(q, k, v, system, **shaped)[0]

    def general() -> Tensor:
        # weights of each channel, one misfit for all: the definition
        P = []
        t = torch.arange(9, dtype=DOUBLE)
        tau = (t[:, None] - t).abs()[..., None]
        a = 0 * tau if system.decay is None else system.decay[:, None, None] * tau
        grown = tau if system.decay is None else (1 - (2 * a).exp()) / (-2 * system.decay[:, None, None])
        noise = 0.0 if system.process_noise is None else system.process_noise[:, None, None] * grown
        P = 1 / (noise + system.key_noise[:, None, None] * (2 * a).exp() + system.query_noise[:, None, None])
        turn = 0 * tau if system.frequency is None else system.frequency[:, None, None] * tau
        carry = (a + 1j * turn).exp()
        r = as_complex(q)[..., None, :] - carry * as_complex(k)[:, :, None]
        fit = (P * r.abs().square()).sum(-1, keepdim=True) / (NU[:, None, None, None] * 4)
        W = P * (1 / (1 + fit) if shaped["weighting"].robust else (-fit).exp())
        W = W ** TEMP[:, None, None, None] * torch.ones(9, 9, dtype=DOUBLE).tril()[..., None]
        out = (W * carry * as_complex(v)[:, :, None]).sum(-2) / W.sum(-2)
        return torch.cat([out.real, out.imag], -1)

    torch.testing.assert_close(ours, general())
    for x, y in zip(
        torch.autograd.grad(ours.square().sum(), leaves),
        torch.autograd.grad(general().square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


def test_tensor_form_with_equal_channels_is_the_isotropic_form() -> None:
    q, k, v = heads(17)
    system = dynamics()
    wide = Dynamics(*(x if n == 1 else x[:, None].expand(2, 4) for n, x in enumerate(system)))
    given = {"temperature_H": TEMP, "robustness_H": NU}
    one, log_one = adaptive_filter_attend(q, k, v, system, **given)
    other, log_other = adaptive_filter_attend(q, k, v, wide, **given)
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(log_one.expand(-1, -1, -1, 4), log_other)


def test_separate_dynamics_equal_their_definition() -> None:
    q, k, v = heads()
    values = Dynamics(*(0.5 * x for x in dynamics()))
    given = {"temperature_H": TEMP, "robustness_H": NU, "value_dynamics": values}
    for turn in (True, False, None):
        ours, _ = adaptive_filter_attend(q, k, v, dynamics(), **given, rotate_values=turn)
        expected, _ = naive(q, k, v, dynamics(), temp=TEMP, nu=NU, values=values, rotate_values=turn)
        torch.testing.assert_close(ours, expected)


def test_the_authors_leave_the_estimate_in_the_common_frame() -> None:
    """Their rotate_values = 0 still turns values; the latent estimate is the one before the output norm."""
    arguments = {"seq_len": 32, "d_e": 16, "d_k_total": 8, "d_v_total": 8, "n_heads": 2, "rotate_values": 0}
    port = catalogue.port("adaptive-filter", "isotropic_afa0")
    torch.manual_seed(0)
    module = port.build({**arguments, "use_complex_output_norm": 1, "use_inner_residual": 0}).double().eval()
    turned = port.build({**arguments, "use_inner_residual": 0, "rotate_values": 1}).double().eval()
    nn.init.uniform_(module.output_norm.weight, 1, 2)
    turned.load_state_dict({k: x for k, x in module.state_dict().items() if k != "output_norm.weight"})
    x = torch.randn(2, 1, 9, 16, dtype=DOUBLE)
    latent, expected = (
        torch.view_as_complex(port.run(m, {"x": x}, arguments)["est_latent"].contiguous()) for m in (module, turned)
    )
    angles = torch.arange(9, dtype=DOUBLE)[:, None, None] * module.dynamics().frequency
    torch.testing.assert_close(latent, expected * torch.exp(-1j * angles))
    z = module.output_norm(torch.cat([latent.real, latent.imag], -1).transpose(1, 2))
    grown = z * module.dynamics().decay[:, None, None].exp()
    grown = common_frame(grown, module.dynamics().frequency, torch.ones(1, 1, dtype=DOUBLE), back=True)
    torch.testing.assert_close(module(x[:, 0]), module.out_proj(grown.transpose(1, 2).flatten(2)))
    with pytest.raises(ValueError, match="use_complex_input_norm must be 0 or 1"):
        port.build({**arguments, "use_complex_input_norm": 2})


def test_the_variance_solves_its_equation_and_its_limit() -> None:
    system = dynamics()
    steps, sigma, eta = 20000, system.process_noise, system.key_noise
    V, step = eta.clone(), 5.0 / 20000
    for _ in range(steps):  # midpoint rule
        middle = V + step / 2 * (2 * system.decay * V + sigma)
        V = V + step * (2 * system.decay * middle + sigma)
    growth = (5.0 * system.decay).expm1()
    torch.testing.assert_close(system.variance(growth, torch.tensor(5.0)), V + system.query_noise, rtol=1e-7, atol=0)
    slow = [system._replace(decay=torch.full((2,), mu, dtype=DOUBLE)) for mu in (0.0, -1e-9)]
    q, k, v = heads()
    none = adaptive_filter_attend(q, k, v, system._replace(decay=None))[0]
    for almost in slow:
        torch.testing.assert_close(adaptive_filter_attend(q, k, v, almost)[0], none, atol=1e-6, rtol=1e-6)


def test_zero_noise_limit_is_complex_softmax_attention() -> None:
    q, k, v = heads()
    system = dynamics(decay=None, process_noise=None)._replace(frequency=dynamics().frequency)
    t = torch.arange(13, dtype=DOUBLE)
    turned = [as_complex(x) * torch.exp(-1j * system.frequency[:, None] * t[:, None]) for x in (q, k, v)]
    causal = ~torch.ones(13, 13, dtype=torch.bool).tril()
    products = (turned[0].conj() @ turned[1].mT).real * 2 * TEMP[:, None, None] / 4
    expected = products.masked_fill(causal, -torch.inf).softmax(-1) + 0j
    expected = expected @ turned[2] * torch.exp(1j * system.frequency[:, None] * t[:, None])
    for bias in ("none", "precision"):
        weighting = Weighting(False, "dot", bias, "none")
        ours = adaptive_filter_attend(q, k, v, system, temperature_H=TEMP, weighting=weighting)[0]
        torch.testing.assert_close(as_complex(ours), expected)
    # with |k| fixed the full residual says the same
    k = F.normalize(k, dim=-1)
    full, dot = (
        adaptive_filter_attend(q, k, v, system, weighting=Weighting(False, residual, "none", "none"))[0]
        for residual in ("full", "dot")
    )
    torch.testing.assert_close(full, dot)


def test_without_noise_the_fast_path_is_the_tiled_one() -> None:
    q, k, v = heads(40)
    still = dynamics(decay=None, process_noise=None)
    almost = still._replace(process_noise=torch.zeros(2, dtype=DOUBLE))
    for residual in ("full", "dot"):
        for multiplicative in ("none", "precision", "linear"):
            weighting = Weighting(False, residual, "precision", multiplicative)
            pair = [adaptive_filter_attend(q, k, v, s, robustness_H=NU, weighting=weighting) for s in (still, almost)]
            for x, y in zip(*pair, strict=True):
                torch.testing.assert_close(x, y)


@pytest.mark.parametrize("kind", ["MultiheadAttention", "rope"])
def test_from_softmax_is_that_softmax_attention(kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 19, 16)
    if kind == "rope":
        theirs = SoftmaxAttention(16, 2, causal=True)
        expected = theirs(x)
    else:
        theirs = nn.MultiheadAttention(16, 2, batch_first=True)
        expected = theirs(x, x, x, attn_mask=nn.Transformer.generate_square_subsequent_mask(19))[0]
    ours = AdaptiveFilterAttention.from_softmax(theirs)
    torch.testing.assert_close(ours(x), expected, atol=2e-6, rtol=1e-5)
    cache = ours.new_cache(2)
    steps = [ours(x[:, i : i + 1], cache=cache) for i in range(19)]
    torch.testing.assert_close(torch.cat(steps, 1), expected, atol=2e-6, rtol=1e-5)


LAYERS = [
    {},
    {"form": "tensor", "inner_residual": "precision"},
    {"robust": False, "inner_residual": "precision", "input_norm": True, "output_norm": True},
    {"separate_dynamics": True, "value_head_dim": 12, "rotation": "fixed", "inner_residual": "sum"},
    {"robust": False, "residual": "dot", "additive": "linear", "rotation": "none", "predict": False},
    {"decay": False, "process_noise": False, "robust": False, "rotation": "rope", "inner_residual": "none"},
    {"exponents": (-0.5, 0.5), "rotate_values": None},
]


def layer(**options: object) -> AdaptiveFilterAttention:
    torch.manual_seed(0)
    return AdaptiveFilterAttention(16, 2, seq_len=32, **options).double().eval()


@pytest.mark.parametrize("options", LAYERS)
def test_layer_decodes_shifts_and_pads(options: dict) -> None:
    module, x = layer(**options), torch.randn(2, 21, 16, dtype=DOUBLE)
    with torch.no_grad():
        expected = module(x)
        cache = module.new_cache(2)
        pieces = [module(x[:, :5], cache=cache), module(x[:, 5:9], cache=cache)]
        pieces += [module(x[:, i : i + 1], cache=cache) for i in range(9, 21)]
        torch.testing.assert_close(torch.cat(pieces, 1), expected)
        times = torch.arange(21.0)
        torch.testing.assert_close(module(x, times=times), expected)
        torch.testing.assert_close(module(x, times=(times + 7.5).expand(2, 21)), expected)
        # what is masked has no influence, wherever it stands
        mask = torch.ones(2, 21, dtype=torch.bool)
        mask[:, :4] = False
        changed = x.clone()
        changed[:, :4] = torch.randn(2, 4, 16, dtype=DOUBLE)
        torch.testing.assert_close(module(changed, mask=mask)[:, 4:], module(x, mask=mask)[:, 4:])
        torch.testing.assert_close(module(x, mask=mask)[:, 4:], module(x[:, 4:]))


def test_irregular_times_in_pieces() -> None:
    module, x = layer(), torch.randn(2, 12, 16, dtype=DOUBLE)
    times = torch.rand(2, 12).cumsum(-1)
    cache = module.new_cache(2)
    pieces = [module(x[:, i : i + 4], cache=cache, times=times[:, i : i + 4]) for i in (0, 4, 8)]
    torch.testing.assert_close(torch.cat(pieces, 1), module(x, times=times))
    assert not torch.allclose(module(x), module(x, times=times))


def test_bare_weights_sum_to_one_and_the_map_is_decayed() -> None:
    module, x = layer(), torch.randn(2, 11, 16, dtype=DOUBLE)
    eye = torch.eye(11, dtype=DOUBLE).expand(2, 2, 11, 11)
    A = module.mix(x, eye, decay=False)
    torch.testing.assert_close(A.sum(-1), torch.ones(2, 2, 11, dtype=DOUBLE))
    assert not A.triu(1).any()
    lag = (torch.arange(11)[:, None] - torch.arange(11)).tril()
    torch.testing.assert_close(attention_map(module, x), A * (module.dynamics().decay[:, None, None] * lag).exp())


def test_infinite_robustness_leaves_the_lag() -> None:
    q, k, v = heads()
    weighting = Weighting(additive="precision", multiplicative="precision")
    given = {"weighting": weighting, "robustness_H": 1e12}
    static, other = (adaptive_filter_attend(x, y, v, dynamics(), **given)[0] for x, y in ((q, k), (k, q)))
    torch.testing.assert_close(static, other, atol=1e-8, rtol=1e-8)


def test_an_outlier_gets_less_than_its_precision() -> None:
    q, k, _ = heads()
    system = dynamics(frequency=None)
    k = q.clone()
    k[:, :, 5] += 30.0
    marks = torch.zeros(2, 2, 13, 8, dtype=DOUBLE)
    marks[:, :, 5] = 1.0
    robust, static = (
        adaptive_filter_attend(q, k, marks, system, robustness_H=nu, value_dynamics=system)[0] for nu in (1.0, 1e12)
    )
    assert (robust[:, :, 6:] < 0.1 * static[:, :, 6:]).all()


def test_conjugate_frequencies_give_conjugate_modes() -> None:
    q, k, v = heads()
    system = dynamics()
    mirror = [torch.cat([a, -b], -1) for a, b in (x.chunk(2, -1) for x in (q, k, v))]
    ours = as_complex(adaptive_filter_attend(q, k, v, system)[0])
    mirrored = adaptive_filter_attend(*mirror, system._replace(frequency=-system.frequency))[0]
    torch.testing.assert_close(as_complex(mirrored), ours.conj())


def test_large_common_offset_keeps_single_precision() -> None:
    """The residual by dot products in float32 against its definition in float64, where q and k nearly agree."""
    q, k, v = heads(33)
    k = q + 1e-3 * k
    system = dynamics()
    expected = naive(q, k, v, system, temp=TEMP, nu=NU)[0]
    single = Dynamics(*(x.float() for x in system))
    given = {"temperature_H": TEMP.float(), "robustness_H": NU.float()}
    ours = adaptive_filter_attend(q.float(), k.float(), v.float(), single, **given)[0]
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


def test_memory_is_linear() -> None:
    torch.manual_seed(0)
    module = AdaptiveFilterAttention(16, 2, seq_len=2048)

    def peak(N: int) -> int:
        x = torch.randn(1, N, 16, requires_grad=True)
        return measure.peak_bytes(lambda: module(x).sum().backward())

    assert peak(2048) < 2048**2 * 2 * 4 * 4  # less than four arrays of all pairs; the tiles are of one size
    tensor = AdaptiveFilterAttention(16, 2, seq_len=256, form="tensor")
    x = torch.randn(1, 256, 16, requires_grad=True)
    assert measure.peak_bytes(lambda: tensor(x).sum().backward()) < 256**2 * 2 * 4 * 4 * 40


def test_sampling_adds_noise_of_the_estimate_to_the_last_token() -> None:
    module = AdaptiveFilterAttention(16, 2, seq_len=32, proj_bias=False).eval()
    nn.init.eye_(module.out_proj.weight)
    x = torch.randn(1, 9, 16).expand(4000, 9, 16)
    with torch.no_grad():
        sampled, plain = module(x, sample=True), module(x)
        log_precision = module.estimate(x[:1])[2]
    assert torch.equal(sampled[:, :-1], plain[:, :-1])
    measured = (sampled - plain)[:, -1].unflatten(-1, (2, 8)).square().mean((0, 2))
    expected = ((-log_precision[0, :, -1, 0]).exp() + module.dynamics().query_noise) / 2
    torch.testing.assert_close(measured, expected, rtol=0.05, atol=0)


def test_network_and_simulation() -> None:
    generator = torch.Generator().manual_seed(0)
    still = torch.zeros(2, 2)
    states, seen = simulate(still, torch.zeros(2000, 2), process_noise=0.3, key_noise=0.5, generator=generator)
    assert states.shape == seen.shape == (2000, 101, 2)
    assert states[:, -1].var().item() == pytest.approx(3.0, rel=0.1)  # sigma^2 t_f
    assert (seen - states).var().item() == pytest.approx(0.5, rel=0.1)
    decaying, _ = simulate(-torch.eye(2), torch.ones(1, 2), process_noise=0.0, key_noise=0.0, generator=generator)
    assert decaying[0, -1, 0].item() == pytest.approx(math.exp(-10.0), rel=0.06)
    network = AdaptiveFilterNetwork(2, 16, 2, num_heads=2, seq_len=101)
    out = network(seen[:3], mask=torch.ones(3, 101, dtype=torch.bool))
    assert out.shape == (3, 101, 2) and out.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"causal": False}, "causal must be True"),
        ({"residual": "dot"}, "robust weights need"),
        ({"additive": "log"}, "additive must be"),
        ({"multiplicative": "linear", "key_noise": False}, "needs key_noise=True"),
        ({"value_head_dim": 4}, "shared dynamics"),
        ({"head_dim": 6}, "divisible by 4"),
        ({"head_dim": 7}, "must be even"),
        ({"form": "dense"}, "form must be"),
        ({"form": "tensor", "additive": "none"}, "form='tensor' has one dynamics"),
        ({"inner_residual": "some"}, "inner_residual must be"),
        ({"rotation": "half"}, "rotation must be"),
        ({"seq_len": 0}, "seq_len must be positive"),
        ({"robust": False, "residual": "half"}, "residual must be"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveFilterAttention(16, 2, **arguments)


def test_bad_calls() -> None:
    module, x = layer(), torch.randn(2, 5, 16, dtype=DOUBLE)
    with pytest.raises(ValueError, match="times must be"):
        module(x, times=torch.arange(4))
    with pytest.raises(ValueError, match="takes no context"):
        module(x, x)
    with pytest.raises(ValueError, match="no matrix of a head"):
        layer(form="tensor").mix(x, x)
    with pytest.raises(ValueError, match="divides by the keys' noise"):
        adaptive_filter_attend(*heads(), dynamics(key_noise=None), weighting=Weighting(multiplicative="linear"))


@pytest.mark.parametrize(
    "options",
    [
        {"inner_residual": "precision"},
        {"inner_residual": "none"},
        {"multiplicative": "linear"},
        {"additive": "none", "multiplicative": "none"},
        {"decay": False},
        {"process_noise": False, "key_noise": False},
        {"separate_dynamics": True, "rotate_values": False, "predict": False},
        {"form": "tensor"},
    ],
)
def test_what_options_leave_unused_is_not_trained(options: dict) -> None:
    module = AdaptiveFilterAttention(16, 2, seq_len=32, **options)
    module(torch.randn(2, 9, 16)).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in module.parameters())
    assert module.gate_prior.requires_grad == (options.get("inner_residual") == "precision")
