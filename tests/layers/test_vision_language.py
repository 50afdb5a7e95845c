"""Finding decoder, image tokens, attention and pixels in models that are known by what they have."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from saccade.layers import vision_language as vl
from saccade.layers.wrapping import Report, changing
from saccade.train.tiny import TINY, tiny


@pytest.mark.parametrize("name", TINY)
def test_models_of_transformers(name: str) -> None:
    pytest.importorskip("transformers")
    prompted = tiny(name)
    model = prompted.model
    assert vl.image_token(model) == 3
    assert len(vl.attention_modules(vl.decoder_of(model))) == 3
    assert vl.image_tokens(model, prompted.inputs["input_ids"]).sum() == 2 * prompted.visual
    assert vl.images_of(prompted.inputs) == 2 and vl.images_of({}) is None
    pictures = vl.Pictures.of(model, prompted.processor, prompted.inputs)
    images = pictures.images()
    assert len(images) == 2 and all(x.ndim == 3 and x.min() >= 0 and x.max() <= 1 for x in images)
    assert pictures.owners(2) == [0, 1]
    again = vl.Pictures.of(model, prompted.processor, {**prompted.inputs, "pixel_values": pictures.back(images)})
    for one, other in zip(images, again.images()):
        torch.testing.assert_close(one, other)
    with changing(model, Report("test")) as changes:
        assert vl.attend_openly(changes, vl.decoder_of(model)) == "sdpa"
        found = []
        changes.after(
            vl.attention_modules(vl.decoder_of(model))[1],
            lambda module, args, kwargs, output: found.append(vl.weights_of(output, 1)),
        )
        model(**prompted.inputs)
    N = prompted.inputs["input_ids"].shape[1]
    assert found[0].shape == (2, 4, N, N) and vl.decoder_of(model).config._attn_implementation == "sdpa"


def test_patches_lie_as_transformers_lays_them() -> None:
    """Of Qwen2-VL: squares of 2 x 2 patches, one after the other."""
    image = torch.rand(3, 16, 24)
    patch = image.view(3, 4, 4, 6, 4).permute(1, 3, 0, 2, 4)  # rows, columns, channels, 4, 4
    order = [patch[2 * y + i, 2 * x + j] for y in range(2) for x in range(3) for i in range(2) for j in range(2)]
    pixels = torch.stack(order)[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1)
    pictures = vl.Pictures(pixels, (0.0,), (1.0,), torch.tensor([[1, 4, 6]]), merge=2, patch=4, frames=2)
    torch.testing.assert_close(pictures.images()[0], image)
    torch.testing.assert_close(pictures.back([image]), pixels)


def test_what_is_no_image_stays_none() -> None:
    pixels = torch.rand(2, 2, 3, 4, 4)
    pixels[1, 1] = 0
    pictures = vl.Pictures(pixels, (0.1,), (0.5,))
    assert pictures.owners(2) == [0, 0, 1, 1]
    assert not pictures.back([x + 0.1 for x in pictures.images()])[1, 1].any()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="has no decoder"):
        vl.decoder_of(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"names no image token: set model\.config\.image_token_id"):
        vl.image_token(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="must have input_ids"):
        vl.image_tokens(nn.Linear(2, 2), None)
    with pytest.raises(ValueError, match="no blocks"):
        vl.attention_modules(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"layer 4 gives no attention weights: load .* or be kind"):
        vl.weights_of((torch.ones(1), None), 4, "be kind")
    with pytest.raises(ValueError, match="carve must read the prompt: give the model's processor"):
        vl.tokenizer_of(None, "carve")
    with pytest.raises(ValueError, match="agla needs images: the call has no pixel_values"):
        vl.Pictures.of(nn.Linear(2, 2), None, {}, "agla")
    with pytest.raises(ValueError, match="pixel_values must be"):
        vl.Pictures(torch.ones(3, 3), (0.0,), (1.0,))
    with pytest.raises(ValueError, match="each of the 2 rows must have as many images, got 3"):
        vl.Pictures(torch.ones(3, 3, 4, 4), (0.0,), (1.0,)).owners(2)
    with (
        pytest.raises(ValueError, match="no config of attention"),
        changing(nn.Linear(2, 2), Report("test")) as changes,
    ):
        vl.attend_openly(changes, SimpleNamespace())  # type: ignore[arg-type]
