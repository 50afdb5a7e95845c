"""Batch norms that stay as they are, and that go into the convolutions before them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.layers.convolution import conv_norm_act
from saccade.layers.fusing import fuse_norms, fused
from saccade.layers.norms import FrozenBatchNorm, freeze_norms
from saccade.layers.residual import BasicBlock, Bottleneck, pooled_shortcut


def drawn(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    return module


def network() -> nn.Module:
    return drawn(
        nn.Sequential(
            conv_norm_act(3, 4, 3, 2, bias=True),
            BasicBlock(4, 6, 2, shortcut=pooled_shortcut(4, 6, 2)),
            Bottleneck(6, 2, shortcut=pooled_shortcut(6, 8, 1)),
            conv_norm_act(8, 8, 5, groups=8, dilation=2, activation=None),
        )
    )


def image() -> Tensor:
    return torch.randn(2, 3, 19, 13, generator=torch.Generator().manual_seed(1))


def test_frozen_norms_are_those_of_evaluation_in_training_too() -> None:
    model = network()
    expected = model.eval()(image())
    names = {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}
    frozen = freeze_norms(model).train()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules()) and set(frozen.state_dict()) == names
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    torch.testing.assert_close(frozen(image()), expected)
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen.state_dict().items())
    assert all(p.ndim == 4 or name == "0.0.bias" for name, p in frozen.named_parameters())
    live = network()
    live.load_state_dict(frozen.state_dict())  # either way
    frozen.load_state_dict(live.state_dict())


def test_fused_is_the_same_function_with_fewer_steps() -> None:
    for model in (network().eval(), freeze_norms(network()).eval()):
        expected = model(image())
        fuse_norms(model)
        assert not any(isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm)) for m in model.modules())
        torch.testing.assert_close(model(image()), expected, atol=1e-5, rtol=1e-5)
    conv, norm = nn.Conv2d(3, 4, 3), drawn(nn.BatchNorm2d(4)).eval()
    torch.testing.assert_close(fused(conv, norm)(image()), norm(conv(image())), atol=1e-5, rtol=1e-5)
    following = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    assert isinstance(fuse_norms(following)[1], nn.BatchNorm2d)  # it has no numbers of its own


def test_a_shortcut_that_averages_skips_no_pixel() -> None:
    x = image()[..., :13, :].requires_grad_()
    shortcut = pooled_shortcut(3, 3, 2).eval()
    nn.init.constant_(shortcut[1].weight, 1.0)
    out = shortcut(x)
    assert out.shape[2:] == (7, 7)
    out.sum().backward()
    assert (x.grad != 0).all()
    plain = pooled_shortcut(3, 3, 1, 2).eval()
    assert plain(x).shape[2:] == (7, 7) and isinstance(plain[0], nn.Identity)
