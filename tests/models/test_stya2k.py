"""StyA2K: all-to-key attention at its limits, sizes that the release does not take, losses and files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from saccade.models.images import to_picture
from saccade.models.stya2k import (
    A2K,
    Encoder,
    StyA2K,
    global_loss,
    keywise_targets,
    learning_rate,
    mvn,
    stylisation_loss,
)
from saccade.ops.keywise import block, unblock

GOLDEN = Path(__file__).parent.parent / "golden" / "stya2k"
TINY = {"widths": (4, 4, 8, 8, 8), "num_heads": 2, "regions": (4, 2, 2)}


def tiny() -> StyA2K:
    torch.manual_seed(0)
    model = StyA2K(**TINY)
    for parameter in model.parameters():  # at the start all attention is to nearly nothing
        if parameter.requires_grad and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def test_maps_are_normalised_by_channel() -> None:
    x = 3 * torch.randn(2, 4, 5, 6) + 2
    torch.testing.assert_close(mvn(x).mean((2, 3)), torch.zeros(2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(mvn(x).var((2, 3)), torch.ones(2, 4), atol=1e-4, rtol=0)
    assert not mvn(torch.randn(1, 2, 1, 1)).any()


def test_attention_is_a_residual_of_the_content() -> None:
    torch.manual_seed(0)
    module, content, style = A2K(8, 4, 2), torch.randn(1, 8, 6, 7), torch.randn(1, 8, 9, 4)
    for fusion in (module.fusion1, module.fusion2):
        nn.init.zeros_(fusion.weight)
    assert torch.equal(module(content, style), content)


def test_permuted_regions_are_found_again() -> None:
    torch.manual_seed(0)
    module = A2K(16, 4, 1)
    for conv in (module.q2, module.k2):
        conv.weight.data = torch.eye(16)[:, :, None, None]
    content = torch.randn(1, 16, 12, 16)
    order = torch.randperm(12)
    style = unblock(block(content, 4)[:, :, order], 4, (12, 16))
    assert torch.equal(order[module.chosen(content, style)[0, 0]], torch.arange(12))
    assert torch.equal(module.chosen(content, content)[0, 0], torch.arange(12))


@pytest.mark.parametrize(("size", "other"), [((17, 17), (17, 40)), ((33, 18), (64, 21)), ((64, 64), (32, 32))])
def test_any_two_sizes(size: tuple[int, int], other: tuple[int, int]) -> None:
    model = tiny()
    content, style = torch.rand(2, 3, *size), torch.rand(2, 3, *other)
    image = model(content, style).image
    assert image.shape == content.shape and image.isfinite().all()
    assert not torch.allclose(model(content, style.flip(0)).image, image)
    assert model.encoder(content)[4].shape[2:] == tuple(-(-side // 16) for side in size)


def test_the_encoder_is_frozen_and_lets_gradients_through() -> None:
    encoder = Encoder((4, 4, 8, 8, 8))
    images = torch.rand(1, 3, 20, 20, requires_grad=True)
    encoder(images)[4].sum().backward()
    assert images.grad is not None and images.grad.any()
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_without_attention_at_the_third_layer() -> None:
    torch.manual_seed(0)
    model = StyA2K(**TINY, skip=False)
    assert model.attention3 is None and model(torch.rand(1, 3, 20, 20), torch.rand(1, 3, 20, 20)).image.shape[1] == 3


def test_losses() -> None:
    model = tiny()
    content, style = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 48, 32)
    c, s = model.encoder(content), model.encoder(style)
    assert global_loss(s, s) == 0 and global_loss(c, s) > 0
    expected = sum(
        F.mse_loss(x.mean((2, 3)), y.mean((2, 3)))
        + F.mse_loss((x.var((2, 3)) + 1e-5).sqrt(), (y.var((2, 3)) + 1e-5).sqrt())
        for x, y in zip(c[:4], s[:4])
    )
    torch.testing.assert_close(global_loss(c, s), expected)
    targets = keywise_targets(c, s, num_heads=2)
    assert [x.shape for x in targets] == [x.shape for x in c[1:]] and not any(x.requires_grad for x in targets)
    losses = stylisation_loss(model, content, style, num_heads=2)
    torch.testing.assert_close(losses["loss"], 10 * losses["global"] + 1.25 * losses["a2k"])
    losses["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert learning_rate(1) == 2e-4 and learning_rate(4) == pytest.approx(2e-4 * 0.027)


def test_a_style_of_one_value_is_the_target() -> None:
    """Values that are all equal come back twice, by DA over r + 1 less, whatever the keys say."""
    c = [torch.randn(1, 4, 8 // 2**i, 8 // 2**i) for i in range(2)]
    s = [torch.randn(1, 4, 8, 8), torch.full((1, 4, 4, 4), 2.0)]
    (target,) = keywise_targets(c, s, num_heads=2, regions=(2,))
    similar = (target - c[1] - 2) / 2 * 5 - 1  # DA is 2 (sum s + 1) / (r + 1)
    assert ((similar > 0) & (similar < 4)).all()


def test_a_file_for_each_part(tmp_path: Path) -> None:
    recorded = load_file(GOLDEN / "network.a.safetensors")
    files = {}
    for part in ("encoder", "A2K", "transform", "decoder"):
        stem, extra = f"param.{part}.", "module." if part == "A2K" else ""
        state = {extra + name[len(stem) :]: x for name, x in recorded.items() if name.startswith(stem)}
        if part == "encoder":
            state["45.weight"] = torch.zeros(1)  # the released file goes on
        files[part] = tmp_path / f"{part}.safetensors"
        save_file(state, files[part])
    model = StyA2K.from_files(files, widths=(4, 8, 16, 32, 32))
    image = model(recorded["input.content"], recorded["input.style"]).image
    torch.testing.assert_close(image, recorded["output.y"], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="missing"):
        StyA2K.from_files({"encoder": files["encoder"]}, widths=(4, 8, 16, 32, 32))


def test_two_files_make_one_picture(tmp_path: Path) -> None:
    for name, size in (("content", (20, 30)), ("style", (40, 18))):
        to_picture(torch.rand(3, *size)).save(tmp_path / f"{name}.png")
    model = tiny()
    output = model.predict([tmp_path / "content.png", tmp_path / "style.png"])
    assert output.image.shape == (1, 3, 20, 30)
    assert model.answer(output) == [{"content": "30 x 20", "style": "18 x 40"}]
    with pytest.raises(ValueError, match=r"files must be 2 \(content, style\), got 1"):
        model.predict(tmp_path / "content.png")


def test_refusals() -> None:
    for options, message in (
        ({"widths": (4, 4, 8, 8, 16)}, "last two equal"),
        ({"regions": (4, 2)}, "regions must be three"),
        ({"regions": (4, 0, 2)}, "region must be at least 1"),
        ({"num_heads": 3}, "num_heads must divide dim"),
    ):
        with pytest.raises(ValueError, match=message):
            StyA2K(**{**TINY, **options})
    model, image = tiny(), torch.rand(1, 3, 20, 20)

    def call(content: Tensor, style: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            model(content, style)

    call(image[:, :1], image, "images")
    call(image, image[..., :16], "style must have 17 pixels")
    call(image, image.repeat(2, 1, 1, 1), "as many images")
    with pytest.raises(ValueError, match="agree in batch and channels"):
        A2K(8, 4, 2)(torch.randn(1, 8, 4, 4), torch.randn(2, 8, 4, 4))
