"""HAN: its two attentions at their limits, sizes, ensembles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from saccade.models.han import HAN, ChannelSpatialAttention, LayerAttention, layer_attention, psnr, self_ensemble


def test_gamma_zero_is_the_identity() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 5, 7)
    assert torch.equal(LayerAttention()(x), x.flatten(1, 2))
    assert torch.equal(ChannelSpatialAttention()(x[:, 0]), x[:, 0])


def test_layer_attention() -> None:
    torch.manual_seed(0)
    module = LayerAttention()
    torch.nn.init.constant_(module.gamma, 0.3)
    x = torch.randn(2, 4, 6, 5, 7)
    for invert in (True, False):
        torch.testing.assert_close(layer_attention(x, invert=invert).sum(-1), torch.ones(2, 4))
    # the least similar layer weighs most; with the paper's sign the most similar
    energy = x.flatten(2) @ x.flatten(2).mT
    assert torch.equal(layer_attention(x).argmax(-1), energy.argmin(-1))
    assert torch.equal(layer_attention(x, invert=False).argmax(-1), energy.argmax(-1))
    same = x[:, :1].expand(-1, 4, -1, -1, -1)
    torch.testing.assert_close(layer_attention(same), torch.full((2, 4, 4), 0.25))
    torch.testing.assert_close(module(same), 1.3 * same.flatten(1, 2))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(module(x[:, order]), module(x).unflatten(1, (4, 6))[:, order].flatten(1, 2))


def test_channel_spatial_attention() -> None:
    torch.manual_seed(0)
    module, x = ChannelSpatialAttention(), torch.randn(2, 6, 5, 7)
    torch.nn.init.constant_(module.gamma, 0.4)
    gate = F.conv3d(x[:, None], module.conv.weight, module.conv.bias, padding=1)[:, 0].sigmoid()
    torch.testing.assert_close(module(x), x * (1 + 0.4 * gate))
    torch.nn.init.zeros_(module.conv.weight)
    torch.nn.init.zeros_(module.conv.bias)
    torch.testing.assert_close(module(x), 1.2 * x)


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
def test_sizes(scale: int) -> None:
    model = HAN(scale, groups=2, blocks=1, channels=8, reduction=4)
    assert model(torch.rand(1, 3, 5, 7) * 255).image.shape == (1, 3, 5 * scale, 7 * scale)


def test_at_the_start_layers_do_not_mix() -> None:
    torch.manual_seed(0)
    model = HAN(2, groups=2, blocks=1, channels=8, reduction=4)
    x = torch.rand(1, 3, 6, 6) * 255
    seen: list[torch.Tensor] = []
    assert model.layer_attention is not None
    model.layer_attention.register_forward_hook(lambda m, i, out: seen.append((i[0].flatten(1, 2) - out).abs().max()))
    model(x)
    assert seen == [0.0]
    trunk = HAN(2, groups=2, blocks=1, channels=8, reduction=4, layer_attention=False, channel_spatial=False)
    assert trunk(x).image.shape == (1, 3, 12, 12) and not any("gamma" in name for name, _ in trunk.named_parameters())


def test_ensemble_of_an_equivariant_network_is_the_network() -> None:
    torch.manual_seed(0)
    model = HAN(2, groups=1, blocks=1, channels=8, reduction=4)
    for module in model.modules():  # kernels that look alike from all sides
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            module.weight.data = module.weight.data.mean((2, 3), keepdim=True).expand(-1, -1, 3, 3).clone()
        if isinstance(module, torch.nn.Conv2d) and module.out_channels == 32:
            module.weight.data = module.weight.data.unflatten(0, (8, 4)).mean(1).repeat_interleave(4, 0)
            module.bias.data = module.bias.data.unflatten(0, (8, 4)).mean(1).repeat_interleave(4, 0)
    x = torch.rand(1, 3, 5, 6) * 255
    torch.testing.assert_close(self_ensemble(model, x), model(x).image, atol=1e-3, rtol=1e-5)


def test_psnr() -> None:
    truth = torch.full((1, 3, 8, 8), 0.5)
    assert psnr(truth + 0.1, truth).item() == pytest.approx(20 - 20 * torch.tensor(219 / 255).log10().item(), abs=1e-3)
    assert psnr(truth, truth).item() > 100


def test_refusals() -> None:
    with pytest.raises(ValueError, match="scale"):
        HAN(6)
    with pytest.raises(ValueError, match="reduction"):
        HAN(2, channels=8)
    with pytest.raises(ValueError, match="images"):
        HAN(2, groups=1, blocks=1, channels=8, reduction=4)(torch.rand(1, 1, 4, 4))
