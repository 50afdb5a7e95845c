"""UPLiFT: the local attender at its limits, steps, backbones of all sorts, and the loss."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.models.uplift import OFFSETS, SD15_VAE, LocalAttender, UPLiFT, local_attend, pyramid_loss
from saccade.models.uplift.attender import _one_after_the_other, added
from saccade.models.upsampling import backbone_features, main_directions

TINY = {"encoder_widths": (4, 4, 6, 6, 8), "decoder_width": 20}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def gathered(weights: Tensor, values: Tensor) -> Tensor:
    """The definition: every neighbour of every fine position is looked up."""
    (_, K, Y, X), (H, W) = weights.shape, values.shape[2:]
    scale = Y // H
    out = torch.zeros(*values.shape[:2], Y, X, dtype=values.dtype)
    for k, (i, j) in enumerate(OFFSETS[K]):
        rows = (torch.arange(Y) // scale + i).clamp(0, H - 1)
        columns = (torch.arange(X) // scale + j).clamp(0, W - 1)
        out += weights[:, k, None] * values[:, :, rows[:, None], columns]
    return out


@pytest.mark.parametrize("K", sorted(OFFSETS))
@pytest.mark.parametrize(("size", "scale"), [((1, 1), 2), ((1, 5), 1), ((4, 3), 2), ((3, 7), 3)])
def test_the_attender_is_its_definition(K: int, size: tuple[int, int], scale: int) -> None:
    assert len(set(OFFSETS[K])) == K and (0, 0) in OFFSETS[K]
    values = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    fine = [scale * n for n in size]
    weights = torch.randn(2, K, *fine, dtype=torch.float64, requires_grad=True)
    ours, wanted = local_attend(weights, values), gathered(weights, values)
    torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(_one_after_the_other(weights, values, scale), wanted)
    given = torch.randn_like(ours)
    for mine, theirs in zip(*(torch.autograd.grad(out, (weights, values), given) for out in (ours, wanted))):
        torch.testing.assert_close(mine, theirs)


def test_gradients() -> None:
    weights = torch.rand(1, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    values = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(local_attend, (weights, values))


def test_weights_sum_to_one_and_the_output_stays_among_its_neighbours() -> None:
    module, guide, values = LocalAttender(20), torch.randn(2, 20, 8, 10), torch.randn(2, 6, 4, 5)
    torch.testing.assert_close(module.weights(guide).sum(1), torch.ones(2, 8, 10))
    constant = torch.full((2, 6, 4, 5), 3.0)
    torch.testing.assert_close(module(guide, constant), torch.full((2, 6, 8, 10), 3.0))
    out = module(guide, values)
    padded = F.pad(values, (2, 2, 2, 2), mode="replicate")
    most, least = (F.interpolate(F.max_pool2d(sign * padded, 5, 1), scale_factor=2) * sign for sign in (1, -1))
    assert (out <= most + 1e-6).all() and (out >= least - 1e-6).all()
    half = LocalAttender(20).bfloat16()(guide.bfloat16(), values.bfloat16())
    assert half.dtype == torch.bfloat16


def test_weights_alike_are_the_mean_and_one_on_the_cell_is_nearest() -> None:
    module, values = LocalAttender(20, 9, residual=False), torch.randn(1, 3, 4, 5)
    nn.init.zeros_(module.proj.weight)
    nn.init.zeros_(module.proj.bias)
    means = F.avg_pool2d(F.pad(values, (1, 1, 1, 1), mode="replicate"), 3, 1)
    torch.testing.assert_close(module(torch.randn(1, 20, 8, 10), values), F.interpolate(means, scale_factor=2.0))
    module.proj.bias.data[4] = 1e4
    nearest = F.interpolate(values, scale_factor=3.0)
    torch.testing.assert_close(module(torch.randn(1, 20, 12, 15), values), nearest)


def test_of_the_same_size_it_is_a_filter_of_softmax_weights() -> None:
    module, guide, values = LocalAttender(12, 9), torch.randn(1, 12, 4, 5), torch.randn(1, 3, 4, 5)
    weights = (module.proj(guide) + guide[:, :9]).softmax(1)
    patches = F.unfold(F.pad(values, (1, 1, 1, 1), mode="replicate"), 3).unflatten(1, (3, 9)).unflatten(3, (4, 5))
    torch.testing.assert_close(module(guide, values), (patches * weights[:, None]).sum(2))


def test_channels_that_are_missing_are_zeros() -> None:
    x = torch.randn(1, 3, 2, 2)
    assert torch.equal(added(x, torch.ones(1, 5, 2, 2)), x + 1)
    assert torch.equal(added(x, torch.ones(1, 2, 2, 2))[:, 2:], x[:, 2:])
    assert LocalAttender(4)(torch.randn(1, 4, 4, 4), torch.randn(1, 2, 2, 2)).shape == (1, 2, 4, 4)


def network(**changes: object) -> UPLiFT:
    return UPLiFT(10, 8, **{**TINY, **changes}).eval()


@pytest.mark.parametrize("changes", [{}, {"enc_resample": "bilinear", "norm": "layer"}, {"attender": None}])
def test_two_steps_are_a_step_twice(changes: dict[str, object]) -> None:
    model, image, x = network(**changes), torch.rand(1, 3, 16, 24), torch.randn(1, 10, 2, 3)
    out = model(image, x, iters=2)
    encoded = model.encode(image)
    first = model.step(x, encoded)
    assert torch.equal(out.steps[0], first) and torch.equal(out.features, model.step(first, encoded))
    assert [tuple(y.shape) for y in model(image, x).steps] == [(1, 10, 2 << i, 3 << i) for i in (1, 2, 3)]
    assert model(image, x, size=(7, 9)).features.shape == (1, 10, 7, 9)


def test_without_sharing_the_image_grows_with_the_features() -> None:
    model, image, x = network(enc_share=False), torch.rand(1, 3, 16, 24), torch.randn(1, 10, 2, 3)
    first, second = model(image, x, iters=2).steps
    grown = F.interpolate(image, scale_factor=2, mode="bilinear")
    assert torch.equal(first, network_like(model)(image, x, iters=1).features)
    assert torch.equal(second, model.step(first, model.encode(grown)))


def network_like(model: UPLiFT) -> UPLiFT:
    other = network()
    other.load_state_dict(model.state_dict())
    return other


def test_a_shift_by_whole_cells_shifts_the_interior() -> None:
    model = network()
    image, x = torch.rand(1, 3, 96, 96), torch.randn(1, 10, 12, 12)
    # enlarging with aligned corners is not the same everywhere: without it the step would be exact
    model.decoder.enlarged = lambda z: model.decoder.up(z)  # type: ignore[method-assign]
    whole, shifted = (model(image.roll(16 * n, 3), x.roll(2 * n, 3), iters=1).features for n in (0, 1))
    torch.testing.assert_close(shifted[..., 12:-8], whole[..., 8:-12], rtol=1e-4, atol=1e-5)


def test_patches_of_14_pixels_are_enlarged_to_16() -> None:
    model = UPLiFT(10, 14, **TINY).eval()
    assert (model.cell, model.iters, UPLiFT(10, 16, **TINY).iters, UPLiFT(10, 8, **TINY).iters) == (16, 4, 4, 3)
    image, x = torch.rand(1, 3, 28, 42), torch.randn(1, 10, 2, 3)
    seen: list[Tensor] = []
    model.encoder[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    assert model(image, x).features.shape == (1, 10, 32, 48)
    assert torch.equal(seen[0], F.interpolate(image, (32, 48), mode="bilinear", antialias=True))


def test_noise_comes_from_the_generator() -> None:
    model = UPLiFT(**{**SD15_VAE, **TINY, "refiner_blocks": 2}).eval()
    image, x = torch.rand(1, 3, 16, 24), torch.randn(1, 4, 2, 3)
    first, again, other = (
        model(image, x, generator=torch.Generator().manual_seed(seed)).features for seed in (0, 0, 1)
    )
    assert first.shape == (1, 4, 8, 12) and torch.equal(first, again) and not torch.equal(first, other)


class Tokens(nn.Module):
    """A class token and two registers, then patches in raster order, as transformers gives them."""

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        maps = F.avg_pool2d(pixel_values, 8).repeat(1, 4, 1, 1)[:, :10]
        return SimpleNamespace(
            last_hidden_state=torch.cat([torch.full((len(maps), 3, 10), 9.0), maps.flatten(2).mT], 1)
        )


def test_backbones(tmp_path: Path) -> None:
    image = torch.rand(2, 3, 16, 24)
    maps = F.avg_pool2d(image, 8).repeat(1, 4, 1, 1)[:, :10]
    torch.testing.assert_close(backbone_features(Tokens(), image, 8), maps)
    torch.testing.assert_close(backbone_features(lambda x: Tokens()(x).last_hidden_state, image, 8), maps)
    assert backbone_features(lambda x: maps, image, 8) is maps
    for wrong in (lambda x: maps[..., :2], lambda x: None, lambda x: maps.flatten(2).mT[:, :5]):
        with pytest.raises(ValueError, match=r"must give maps \(batch, channels, 2, 3\)"):
            backbone_features(wrong, image, 8)
    model = network()
    with pytest.raises(ValueError, match="on\\(backbone\\)"):
        model(image)
    before = len(model.state_dict())
    model.on(Tokens())
    torch.testing.assert_close(model(image).features, model(image, maps).features)
    assert len(model.state_dict()) == before and not any(isinstance(m, Tokens) for m in model.modules())


def test_files(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    pillow.frombytes("RGB", (21, 30), bytes(range(210)) * 9).save(tmp_path / "a.png")
    model = network().on(Tokens())
    out = model.predict(tmp_path / "a.png")
    assert out.features.shape == (1, 10, 30, 21) and out.steps[0].shape == (1, 10, 4, 3) and len(out.steps) == 4
    assert model.answer(out) == [{"features": "3 x 4 -> 21 x 30, 10 channels"}]
    assert model.picture(out).size == (63, 30)
    mean, directions = main_directions(torch.randn(2, 2, 4, 5))
    assert mean.shape == (2,) and directions.shape == (2, 3)


def test_loss() -> None:
    model = UPLiFT(3, 4, **TINY)
    sizes: list[tuple[int, ...]] = []

    def backbone(image: Tensor) -> Tensor:
        sizes.append(tuple(image.shape[2:]))
        return F.avg_pool2d(image, 4)

    image = torch.rand(2, 3, 32, 48)
    loss = pyramid_loss(model, backbone, image, depth=2)
    assert sizes == [(32, 48), (16, 24), (8, 12)]
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    pyramid = [image, *(F.interpolate(image, size, mode="bilinear", antialias=True) for size in sizes[1:3])]
    truth = [backbone(each) for each in pyramid]
    one, (first, second) = model(pyramid[1], truth[1], iters=1).features, model(pyramid[2], truth[2], iters=2).steps
    wanted = F.mse_loss(one, truth[0]) + F.mse_loss(first, truth[1]) + F.mse_loss(second, truth[0])
    torch.testing.assert_close(pyramid_loss(model, backbone, image, depth=2), wanted)
    noisy = [
        pyramid_loss(model, backbone, image, depth=2, noise=1, generator=torch.Generator().manual_seed(0))
        for _ in range(2)
    ]
    assert torch.equal(*noisy) and noisy[0] > wanted
    with pytest.raises(ValueError, match="multiple of 4 x 2"):
        pyramid_loss(model, backbone, image, depth=4)


def test_refusals() -> None:
    model = network()
    for given, said in (
        (lambda: LocalAttender(8, 7), "offsets must be one of"),
        (lambda: local_attend(torch.rand(1, 7, 2, 2), torch.rand(1, 1, 1, 1)), "offsets"),
        (lambda: local_attend(torch.rand(1, 5, 3, 2), torch.rand(1, 1, 2, 1)), "whole number of times"),
        (lambda: local_attend(torch.rand(2, 5, 2, 2), torch.rand(1, 1, 1, 1)), "one batch"),
        (lambda: LocalAttender(8, 5)(torch.rand(1, 7, 2, 2), torch.rand(1, 1, 1, 1)), r"x must be \(batch, 8"),
        (lambda: UPLiFT(4, 8, norm="group"), "norm must be"),
        (lambda: UPLiFT(4, 0), "positive"),
        (lambda: UPLiFT(4, 1), "iters"),
        (lambda: UPLiFT(4, 8, convolutions=3), "convolutions"),
        (lambda: model(torch.rand(1, 1, 16, 16), torch.rand(1, 10, 2, 2)), "images"),
        (lambda: model(torch.rand(1, 3, 16, 16), torch.rand(1, 9, 2, 2)), r"x must be \(batch, 10"),
        (lambda: model(torch.rand(1, 3, 16, 16), torch.rand(2, 10, 2, 2)), "features must be of 1"),
    ):
        with pytest.raises(ValueError, match=said):
            given()
