"""CNNtention's three modules at their limits, and the networks' sizes."""

from __future__ import annotations

import pytest
import torch

from saccade import attention_map
from saccade.vision.cnntention import MultiHeadAttention2d, ResidualCBAM, ResNet20, SelfAttention2d, cnntention


@pytest.mark.parametrize("form", ["self", "multi-head"])
def test_gamma_zero_is_the_identity(form: str) -> None:
    x = torch.randn(2, 8, 5, 4)
    assert torch.equal(cnntention(8, form)(x), x)  # type: ignore[arg-type]
    torch.manual_seed(0)
    plain, with_attention = ResNet20(blocks=(1, 1, 1)).eval(), ResNet20(form=form, blocks=(1, 1, 1)).eval()  # type: ignore[arg-type]
    with_attention.load_state_dict(plain.state_dict(), strict=False)
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(with_attention(images), plain(images))


def test_zero_keys_give_the_mean() -> None:
    torch.manual_seed(0)
    module, x = SelfAttention2d(8, weighted=False), torch.randn(2, 8, 5, 4)
    torch.nn.init.zeros_(module.key.weight)
    torch.nn.init.zeros_(module.key.bias)
    torch.testing.assert_close(module(x), x + module.value(x).mean((2, 3), keepdim=True))
    torch.testing.assert_close(attention_map(module, x), torch.full((2, 1, 20, 20), 1 / 20))


def test_one_head_is_scaled_self_attention_with_names_exchanged() -> None:
    torch.manual_seed(0)
    many, single = MultiHeadAttention2d(8, 1), SelfAttention2d(8, scaled=True)
    single.query.load_state_dict(many.key.state_dict())
    single.key.load_state_dict(many.query.state_dict())
    single.value.load_state_dict(many.value.state_dict())
    torch.nn.init.dirac_(many.linear.weight)
    torch.nn.init.zeros_(many.linear.bias)
    for module in (many, single):
        torch.nn.init.constant_(module.gamma, 0.7)
    x = torch.randn(2, 8, 5, 4)
    torch.testing.assert_close(many(x), single(x))
    torch.testing.assert_close(attention_map(many, x).sum(-1), torch.ones(2, 1, 20))


@pytest.mark.parametrize("form", ["self", "multi-head"])
def test_order_of_positions(form: str) -> None:
    torch.manual_seed(0)
    module, x = cnntention(8, form), torch.randn(2, 8, 5, 4)  # type: ignore[arg-type]
    torch.nn.init.constant_(module.gamma, 0.7)
    order = torch.randperm(20)
    shuffled = x.flatten(2)[:, :, order].view_as(x)
    torch.testing.assert_close(module(shuffled), module(x).flatten(2)[:, :, order].view_as(x))


def test_cbam_lies_between_once_and_twice() -> None:
    torch.manual_seed(0)
    module, x = ResidualCBAM(8, reduction=4), torch.randn(2, 8, 5, 4)
    ratio = module(x) / x
    assert ((ratio > 1) & (ratio < 2)).all()
    for layer in (module.down, module.up, module.conv):
        torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(module.conv.bias)
    torch.testing.assert_close(module(x), 1.25 * x)


@pytest.mark.parametrize(
    ("form", "arguments", "parameters"),
    [(None, {}, 269_722), ("self", {}, 286_189), ("multi-head", {}, 291_677), ("cbam", {"reduction": 8}, 271_363)],
)
def test_parameters(form: str | None, arguments: dict[str, int], parameters: int) -> None:
    model = ResNet20(10, form, **arguments)  # type: ignore[arg-type]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert ResNet20(10, in_channels=1)(torch.randn(2, 1, 9, 7)).shape == (2, 10)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="form"):
        cnntention(8, "none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_heads"):
        MultiHeadAttention2d(8, 3)
    with pytest.raises(ValueError, match="kernel_size"):
        ResidualCBAM(8, 4)
    with pytest.raises(ValueError, match="channels"):
        SelfAttention2d(0)
    with pytest.raises(ValueError, match="x must be"):
        SelfAttention2d(8)(torch.randn(1, 4, 3, 3))
