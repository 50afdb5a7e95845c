"""FEAT: guidance, what it is at the start, still images, channel attention, and its diffusion."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from saccade import catalogue
from saccade.models.diffusion import Denoised, Diffusion
from saccade.models.feat import FEAT, ChannelAttention, ChannelBlock, Mixer, WKVBlock
from saccade.models.images import to_picture
from saccade.ops.wkv import wkv_reference

SIZE = (3, 4)


def tokens(frames: int = 2, dim: int = 8) -> Tensor:
    return torch.randn(2, frames, 12, dim)


def alive(module: torch.nn.Module) -> torch.nn.Module:
    """With numbers in the place of all zeros, so that nothing is hidden."""
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize("axis", ["space", "time"])
def test_without_alpha_there_is_no_guidance(axis: str) -> None:
    torch.manual_seed(0)
    mixer, x, res = Mixer(8, axis), tokens(), tokens()
    torch.testing.assert_close(mixer(x, SIZE, res), mixer(x, SIZE))
    alive(mixer)
    assert not torch.allclose(mixer(x, SIZE, res), mixer(x, SIZE))


def test_space_is_rows_then_columns_of_each_frame_and_time_each_position() -> None:
    torch.manual_seed(0)
    k, v = tokens(3), tokens(3)
    mixer = Mixer(8, distance="published")
    expected = torch.empty_like(v)
    for b in range(2):
        for f in range(3):
            rows = wkv_reference(k[b, f][None], v[b, f][None], mixer.decay[0] / 12, mixer.first[0] / 12)[0]
            order = torch.arange(12).view(SIZE).T.flatten()
            columns = wkv_reference(k[b, f, order][None], rows[order][None], mixer.decay[1] / 12, mixer.first[1] / 12)
            expected[b, f, order] = columns[0].detach()
    torch.testing.assert_close(mixer.over_space(k, v, SIZE), expected)
    mixer = Mixer(8, "time", distance="published")
    for b in range(2):
        for n in range(12):
            over = wkv_reference(k[b, :, n][None], v[b, :, n][None], mixer.decay[0] / 3, mixer.first[0] / 3)
            expected[b, :, n] = over[0].detach()
    torch.testing.assert_close(mixer.over_time(k, v), expected)


def test_at_the_start_blocks_change_nothing_and_the_network_is_a_convolution() -> None:
    torch.manual_seed(0)
    x, c = tokens(), torch.randn(2, 8)
    for axis in ("space", "time"):
        assert torch.equal(WKVBlock(8, axis)(x, c, SIZE, x), x)
    assert not torch.equal(ChannelBlock(8, 2)(x, c, SIZE), x)  # whose gates are not 0
    model = FEAT(dim=8, depth=2, num_heads=2)
    latents = torch.randn(2, 3, 4, 6, 8)
    said = model(latents, torch.tensor([3, 900]))
    whole = torch.cat([said.noise, said.variance], 2)
    torch.testing.assert_close(whole, model.skip(latents.flatten(0, 1)).unflatten(0, (2, 3)))


def test_still_images_do_not_meet_the_clip() -> None:
    torch.manual_seed(0)
    model = alive(FEAT(dim=8, depth=4, num_heads=2, skip=False)).eval()
    latents, step = torch.randn(1, 5, 4, 6, 4), torch.tensor([500])
    with_stills = model(latents, step, stills=2).noise
    torch.testing.assert_close(with_stills[:, :3], model(latents[:, :3], step).noise)
    changed = latents.clone()
    changed[:, 3:] += 1
    assert torch.equal(model(changed, step, stills=2).noise[:, :3], with_stills[:, :3])
    assert not torch.allclose(model(latents, step).noise[:, :3], with_stills[:, :3])


def test_channel_attention() -> None:
    torch.manual_seed(0)
    attention, (q, k, v) = ChannelAttention(8, 2), torch.randn(3, 2, 2, 4, 12)
    torch.testing.assert_close(attention.weights(q, k).sum(-1), torch.ones(2, 2, 4))
    order = torch.randperm(12)
    expected = attention.attend(q, k, v)[..., order]
    torch.testing.assert_close(attention.attend(q[..., order], k[..., order], v[..., order]), expected)


def test_the_step_reaches_every_block() -> None:
    torch.manual_seed(0)
    model = alive(FEAT(dim=8, depth=2, num_heads=2))
    latents = torch.randn(1, 2, 4, 4, 4)
    one, other = (model(latents, torch.tensor([step])).noise for step in (10, 11))
    assert (one - other).abs().max() > 1e-4
    waves = model.step_embedding.fc1.in_features
    assert waves == 256


@pytest.mark.parametrize("learn_variance", [False, True])
def test_options(learn_variance: bool) -> None:
    model = FEAT(3, dim=8, depth=2, num_heads=2, patch=3, learn_variance=learn_variance, skip=False)
    said = model(torch.randn(2, 1, 3, 6, 9), torch.tensor([1, 2]))
    assert said.noise.shape == (2, 1, 3, 6, 9) and (said.variance is not None) == learn_variance


def test_a_patch_goes_back_to_its_place() -> None:
    """Row, column and channel of a patch are those of the head's outputs, in this order."""
    model = FEAT(1, dim=4, depth=2, num_heads=2, learn_variance=False, skip=False)
    model.head.bias.data = torch.arange(4.0)
    y = model(torch.randn(1, 1, 1, 4, 6), torch.tensor([0])).noise[0, 0, 0]
    assert torch.equal(y, torch.tensor([[0.0, 1.0], [2.0, 3.0]]).repeat(2, 3))


def test_what_the_authors_never_use_is_dropped() -> None:
    torch.manual_seed(0)
    port = catalogue.port("feat", "network")
    model = FEAT(dim=4, depth=2, num_heads=2)
    time = {"blocks.1.att.spatial_decay": torch.zeros(1, 4), "blocks.1.att.dwconv1d.weight": torch.ones(4, 1, 3)}
    space = {"blocks.0.att.spatial_decay": torch.zeros(2, 4), "blocks.0.att.dwconv1d.weight": torch.ones(4, 1, 3)}
    found = port.convert({**time, **space, "restormers.0.attn.alpha": torch.zeros(8)})
    assert set(found) == {"time.0.mixer.decay", "time.0.mixer.shift_time.weight", "space.0.mixer.decay"}
    assert found.keys() <= model.state_dict().keys()


def test_published_sizes() -> None:
    with torch.device("meta"):
        small, large = FEAT.from_config("FEAT-S"), FEAT.from_config("FEAT-L")
    assert [len(x) for x in (small.space, small.time, small.channels)] == [9, 9, 9]
    assert small.embed.out_channels == 512 and large.embed.out_channels == 1024
    assert large.channels[0].attention.num_heads == 16


def test_images_are_seen_as_a_clip(tmp_path: object) -> None:
    torch.manual_seed(0)
    for name in "ab":
        to_picture(torch.rand(3, 7, 10)).save(tmp_path / f"{name}.png")
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    model = FEAT(3, dim=8, depth=2, num_heads=2)
    assert model.predict(files).image.shape == (2, 3, 7, 10)
    with pytest.raises(ValueError, match="needs use_vae"):
        FEAT(dim=8, depth=2, num_heads=2).predict(files)

    class Coder:
        config = SimpleNamespace(scaling_factor=0.5)

        def encode(self, images: Tensor) -> object:
            latents = torch.cat([images, images[:, :1]], 1)[..., ::8, ::8]
            return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents))

        def decode(self, latents: Tensor) -> object:
            return SimpleNamespace(sample=latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3))

    model = FEAT(dim=8, depth=2, num_heads=2)
    model.use_vae(Coder())
    assert model.predict(files).image.shape == (2, 3, 7, 10)
    assert not any("vae" in name for name in model.state_dict())


class Knows:
    """A network that knows x_0, and so the noise."""

    def __init__(self, diffusion: Diffusion, clean: Tensor, variance: float) -> None:
        self.diffusion, self.clean, self.variance = diffusion, clean, variance

    def __call__(self, x: Tensor, step_B: Tensor) -> Denoised:
        kept = self.diffusion.kept.to(x.dtype)[step_B].view(-1, 1)
        noise = (x - kept.sqrt() * self.clean) / (1 - kept).sqrt()
        return Denoised(noise, torch.full_like(x, self.variance))


def test_diffusion_of_a_network_that_knows() -> None:
    torch.manual_seed(0)
    diffusion, clean = Diffusion(), torch.randn(4, 6, dtype=torch.float64)
    step, noise = torch.tensor([1, 10, 500, 999]), torch.randn(4, 6, dtype=torch.float64)
    losses = diffusion.loss(Knows(diffusion, clean, -1.0), clean, step, noise)
    for name in ("mse", "bound"):  # its mean and variance are the posterior's
        torch.testing.assert_close(losses[name], torch.zeros(4, dtype=torch.float64), atol=1e-9, rtol=0)
    assert (diffusion.loss(Knows(diffusion, clean, 1.0), clean, step, noise)["bound"] > 0).all()
    for steps in (1, 7, 250):
        found = diffusion.sample(Knows(diffusion, clean, 0.3), torch.randn_like(clean), steps=steps)
        torch.testing.assert_close(found, clean, atol=1e-6, rtol=1e-6)
    noisy = diffusion.noised(clean, noise, step)
    torch.testing.assert_close(diffusion.cleaned(noisy, noise, step), clean)


def test_the_bound_teaches_variances_alone() -> None:
    torch.manual_seed(0)
    diffusion, clean, noise = Diffusion(100), torch.randn(3, 6), torch.randn(3, 6)
    said = torch.randn(2, 3, 6).requires_grad_()
    losses = diffusion.loss(lambda x, step: Denoised(said[0], said[1]), clean, torch.tensor([0, 1, 99]), noise)
    assert losses["bound"].isfinite().all()
    (grad,) = torch.autograd.grad(losses["bound"].sum(), said, retain_graph=True)
    assert not grad[0].any() and grad[1].all()
    (grad,) = torch.autograd.grad(losses["loss"].sum(), said)
    assert grad.all()
    plain = diffusion.loss(lambda x, step: Denoised(said[0]), clean, torch.tensor([0, 1, 99]), noise)
    assert torch.equal(plain["loss"], losses["mse"]) and not plain["bound"].any()


def test_refusals() -> None:
    for options, message in (
        ({"depth": 3}, "depth even"),
        ({"dim": 9}, "num_heads must divide"),
        ({"distance": "euclid"}, "distance must be one of published, kernel"),
    ):
        with pytest.raises(ValueError, match=message):
            FEAT(**{"dim": 8, "depth": 2, "num_heads": 2, **options})
    with pytest.raises(ValueError, match="axis must be"):
        Mixer(8, "depth")
    model, step = FEAT(dim=8, depth=2, num_heads=2), torch.tensor([1])
    for latents, steps, stills, message in (
        (torch.randn(1, 2, 3, 4, 4), step, 0, "latents must be"),
        (torch.randn(1, 4, 4, 4), step, 0, "latents must be"),
        (torch.randn(1, 2, 4, 5, 4), step, 0, "multiples of 2"),
        (torch.randn(1, 2, 4, 4, 4), torch.tensor([1, 2]), 0, "step must be"),
        (torch.randn(1, 2, 4, 4, 4), step, 2, "stills must be"),
    ):
        with pytest.raises(ValueError, match=message):
            model(latents, steps, stills=stills)
    with pytest.raises(ValueError, match="steps"):
        Diffusion(0)
    with pytest.raises(ValueError, match="steps must be between 1 and 10, got 11"):
        Diffusion(10).sample(lambda x, step: Denoised(x), torch.zeros(1), steps=11)
