"""AdapTac: whom the force believes, missing modalities, forces to come, weights of the losses, bad arguments."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saccade.fusion.visuo_tactile import (
    AttentionLayer,
    CrossAttentionFusion,
    ForceDenoiser,
    ForceGuidedFusion,
    ForcePredictor,
    SelfAttentionFusion,
    WeightedAttention,
    force_targets,
    guide,
    prediction_weight,
    scaled_force,
    training_loss,
)
from saccade.ops.diffusion import noised

FORMS = pytest.mark.parametrize("form", ["attention", "decoder"])


def _fusion(form: str, **changes: int) -> ForceGuidedFusion:
    torch.manual_seed(0)
    sizes = {"dim": 8, "visual": 5, "tactile": 5, "force": 6, "num_heads": 2, **changes}
    return ForceGuidedFusion(**sizes, form=form).eval()


def _streams(rows: int = 6, batch: int = 3) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    return torch.randn(rows, 5), torch.randn(rows, 5), torch.randn(batch, 6)


def test_the_paper_s_form_is_its_equation() -> None:
    module, (visual, tactile, force) = _fusion("attention"), _streams()
    fused = module(visual, tactile, force)
    for r in range(6):
        e_f = module.force_proj(force[r // 2])
        e = torch.stack([module.visual_proj(visual[r]), module.tactile_proj(tactile[r])])
        q, k, v = e_f @ module.layer.q_proj.weight.T, e @ module.layer.k_proj.weight.T, e @ module.layer.v_proj.weight.T
        weights = (k @ q / 8**0.5).softmax(0)
        torch.testing.assert_close(fused.weights[r, 0], weights)
        torch.testing.assert_close(fused.features[r], weights @ v)


@FORMS
def test_weights_sum_to_1_and_modalities_can_be_swapped(form: str) -> None:
    module, (visual, tactile, force) = _fusion(form), _streams()
    fused = module(visual, tactile, force)
    torch.testing.assert_close(fused.weights.sum(-1), torch.ones(fused.weights.shape[:2]))
    module.visual_proj, module.tactile_proj = module.tactile_proj, module.visual_proj
    other = module(tactile, visual, force)
    torch.testing.assert_close(other.features, fused.features)
    torch.testing.assert_close(other.weights, fused.weights.flip(-1))


def test_the_force_changes_the_mixture_alone() -> None:
    module, (visual, _, force) = _fusion("attention"), _streams()
    module.tactile_proj.load_state_dict(module.visual_proj.state_dict())
    fused = module(visual, visual, force)
    torch.testing.assert_close(fused.weights, torch.full_like(fused.weights, 0.5))
    torch.testing.assert_close(module(visual, visual, 10 * force).features, fused.features)


@FORMS
def test_a_missing_modality_has_no_weight(form: str) -> None:
    module, (visual, tactile, force) = _fusion(form), _streams()
    there = torch.tensor([True, False, True, False, True, True])
    fused = module(visual, tactile, force, masks=(None, there))
    assert fused.weights[~there][..., 0].eq(1).all() and fused.weights[~there][..., 1].eq(0).all()
    torch.testing.assert_close(fused.features[there], module(visual, tactile, force).features[there])
    alone = module(visual, None, force)
    torch.testing.assert_close(alone.features[~there], fused.features[~there])
    assert alone.weights[..., 0].eq(1).all()
    touched = module(None, tactile, force, masks=(None, there))
    assert touched.weights[~there].eq(0).all() and touched.weights[there][..., 1].eq(1).all()
    assert touched.features.isfinite().all()


def test_layers_are_torch_s() -> None:
    torch.manual_seed(0)
    x, memory = torch.randn(2, 4, 8), torch.randn(2, 3, 8)
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    for first, activation in ((False, "relu"), (True, "gelu")):
        theirs = nn.TransformerDecoderLayer(8, 2, 12, 0.0, activation, batch_first=True, norm_first=first).eval()
        ours = AttentionLayer(8, 2, 12, norm_first=first, activation=activation).eval()
        for own, other in ((ours.attention, theirs.self_attn), (ours.memory, theirs.multihead_attn)):
            _same(own, other)
        ours.mlp.fc1, ours.mlp.fc2 = theirs.linear1, theirs.linear2
        ours.norms = nn.ModuleList([theirs.norm1, theirs.norm2, theirs.norm3])
        torch.testing.assert_close(ours(x, memory, causal)[0], theirs(x, memory, ~causal))
    assert SelfAttentionFusion(8, 5, 7, num_heads=2)(torch.randn(3, 5), torch.randn(3, 7)).shape == (3, 2, 8)
    assert CrossAttentionFusion(8, num_heads=2, hidden=4)(x, memory).shape == memory.shape


def _same(ours: WeightedAttention, theirs: nn.MultiheadAttention) -> None:
    for part, weight, bias in zip("qkv", theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3)):
        getattr(ours, f"{part}_proj").load_state_dict({"weight": weight, "bias": bias})
    ours.out_proj = theirs.out_proj


def _denoiser(**changes: object) -> ForceDenoiser:
    torch.manual_seed(0)
    sizes = {"condition": 5, "horizon": 4, "observations": 2, "dim": 8, "depth": 2, "num_heads": 2}
    return ForceDenoiser(**{**sizes, **changes}).eval()


def test_forces_to_come_do_not_read_later_ones() -> None:
    denoiser, noisy, condition = _denoiser(), torch.randn(2, 4, 3), torch.randn(2, 2, 5)
    times = torch.tensor([3, 70])
    out = denoiser(noisy, times, condition)
    for t in range(4):
        changed = noisy.clone()
        changed[:, t] += 1
        other = denoiser(changed, times, condition)
        assert torch.equal(other[:, :t], out[:, :t]) and not torch.equal(other[:, t], out[:, t])
    later = condition.clone()
    later[:, 1] += 1  # the second observation, which the first step does not see
    other = denoiser(noisy, times, later)
    assert torch.equal(other[:, 0], out[:, 0]) and not torch.equal(other[:, 1], out[:, 1])
    assert not torch.equal(denoiser(noisy, times + 1, condition)[:, 0], out[:, 0])
    free = _denoiser(causal=False)
    assert not torch.equal(free(noisy, times, later)[:, 0], free(noisy, times, condition)[:, 0])


class _Knows(ForceDenoiser):
    """A denoiser that knows what comes."""

    def forward(self, noisy_BKF, times_B, condition_BSD):
        self.seen = [*getattr(self, "seen", []), (noisy_BKF, times_B)]
        return condition_BSD[:, :1, :1].expand_as(noisy_BKF)


def test_sampling_leads_to_what_the_denoiser_says() -> None:
    denoiser = _Knows(3, 5, 4, 2, dim=8, depth=1, num_heads=2)
    predictor, condition = ForcePredictor(denoiser), torch.full((2, 2, 5), 0.4)
    sampled = predictor.sample(condition, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sampled, torch.full((2, 4, 3), 0.4))
    times = [int(t[0]) for _, t in denoiser.seen]
    assert times == list(range(95, -1, -5))
    noise = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    eps = (noise - predictor.alphas_T[95].sqrt() * 0.4) / (1 - predictor.alphas_T[95]).sqrt()
    torch.testing.assert_close(denoiser.seen[1][0], noised(torch.tensor(0.4), eps, predictor.alphas_T[90]).float())
    torch.testing.assert_close(predictor(5 * condition), torch.ones(2, 4, 3))  # cut off
    loss, start = predictor.loss(torch.full((2, 4, 3), 0.5), condition)
    torch.testing.assert_close(loss, torch.tensor(0.01))
    assert start.eq(0.4).all()
    unbound = ForcePredictor(denoiser, steps=1, bound=None)
    torch.testing.assert_close(unbound(5 * condition), torch.full((2, 4, 3), 2.0))


def test_prediction_learns() -> None:
    torch.manual_seed(0)
    predictor = ForcePredictor(_denoiser(drop=0.0).train())
    optimizer, generator = torch.optim.Adam(predictor.parameters(), lr=1e-2), torch.Generator().manual_seed(0)
    condition = torch.randn(16, 2, 5, generator=generator)
    forces = condition[:, :1, :3].tanh().expand(-1, 4, -1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss, _ = predictor.loss(forces, condition, generator=generator)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])


def test_guides_targets_and_weights() -> None:
    observed, predicted = torch.ones(2, 1, 3), torch.zeros(2, 4, 3)
    assert guide(observed, predicted).shape == (2, 15) and guide(observed, None).shape == (2, 3)
    assert torch.equal(guide(observed, predicted, "observed"), observed[:, 0])
    assert torch.equal(guide(observed, predicted, "predicted"), predicted.flatten(1))
    forces = torch.arange(4.0)[:, None]
    assert force_targets(forces, 2)[..., 0].tolist() == [[1, 2], [2, 3], [3, 3], [3, 3]]
    assert scaled_force(torch.tensor([10.0, -2.0])).tolist() == pytest.approx([1.0, -0.4])
    assert scaled_force(torch.tensor([10.0]), 2).item() == 5
    assert [prediction_weight(p) for p in (0, 0.5, 0.625, 0.75, 1)] == [0, 0, 0.5, 1, 1]
    assert training_loss(torch.tensor(2.0), torch.tensor(3.0), 0.5) == 17
    for kind, message in (("all", "kind must be one of both"), ("predicted", "needs predictions")):
        with pytest.raises(ValueError, match=message):
            guide(observed, None, kind)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: _fusion("mean"), "form must be one of attention, decoder, got 'mean'"),
        (lambda: _fusion("attention", force=0), "widths must be positive"),
        (lambda: _fusion("decoder", num_heads=3), "num_heads"),
        (lambda: _denoiser(dim=7), "dim even"),
        (lambda: _denoiser(horizon=0), "must be positive"),
        (lambda: ForcePredictor(_denoiser(), 100, 30), "steps must be a divisor of times, got 30 and 100"),
    ],
)
def test_refusals(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_bad_calls() -> None:
    module, (visual, tactile, force) = _fusion("attention"), _streams()
    for inputs, masks, message in (
        ((visual[:, :4], tactile, force), None, r"visual must be \(rows, 5\), got \(6, 4\)"),
        ((visual, tactile[:4], force), None, r"tactile must be \(rows, 5\), got \(4, 5\) beside 6 rows"),
        ((visual, tactile, force[:, :2]), None, r"force must be \(batch, 6\)"),
        ((visual[:5], tactile[:5], force), None, "divides the 5 rows"),
        ((None, None, force), None, "one must be there"),
        ((visual, tactile, force), (torch.ones(6), None), r"masks must be bool \(6,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            module(*inputs, masks=masks)
    denoiser = _denoiser()
    for noisy, condition in (
        (torch.zeros(2, 3, 3), torch.zeros(2, 2, 5)),
        (torch.zeros(2, 4, 3), torch.zeros(2, 1, 5)),
    ):
        with pytest.raises(ValueError, match="noisy and condition must be"):
            denoiser(noisy, torch.zeros(2), condition)
