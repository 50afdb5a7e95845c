"""CLIP's towers against transformers' CLIPModel, and what they refuse."""

import pytest
import torch
from torch import nn

from saccade.layers.clip import OPENAI, Clip, ClipText, ClipVision


def small(**text):
    torch.manual_seed(0)
    vision = ClipVision(image_size=12, patch=4, dim=8, depth=3, num_heads=2, embed_dim=6)
    return Clip(vision, ClipText(vocabulary=20, context=7, dim=12, depth=2, num_heads=3, embed_dim=6, **text)).eval()


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_equals_transformers(activation):
    transformers = pytest.importorskip("transformers")
    sizes = {"intermediate_size": 20, "num_attention_heads": 2, "hidden_act": activation}
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={"hidden_size": 12, "num_hidden_layers": 2, "vocab_size": 30, "max_position_embeddings": 9,
                         "eos_token_id": 29, **sizes},
            vision_config={"hidden_size": 8, "num_hidden_layers": 3, "image_size": 12, "patch_size": 4, **sizes},
            projection_dim=6,
        )
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = Clip.from_transformers(theirs)
    x, ids = torch.randn(2, 3, 12, 12), torch.randint(3, 28, (4, 9))
    ids[torch.arange(4), torch.tensor([2, 8, 5, 5])] = 29
    with torch.no_grad():
        want, got = theirs(pixel_values=x, input_ids=ids, output_hidden_states=True), ours(x, ids)
        for name in ("image_embeds", "text_embeds", "logits_per_image"):
            torch.testing.assert_close(getattr(got, name), getattr(want, name), atol=1e-5, rtol=1e-5)
        for mine, their in zip(ours.vision.states(x), want.vision_model_output.hidden_states, strict=True):
            torch.testing.assert_close(mine, their, atol=1e-5, rtol=1e-5)
        for mine, their in zip(ours.text.states(ids), want.text_model_output.hidden_states, strict=True):
            torch.testing.assert_close(mine, their, atol=1e-5, rtol=1e-5)


def test_what_follows_the_end_of_a_text_does_not_matter():
    for end in (None, 19):
        clip = small(end=end)
        ids = torch.tensor([[1, 2, 19, 0, 0, 0], [1, 19, 3, 4, 5, 6]])
        other = torch.tensor([[1, 2, 19, 9, 9, 9], [1, 19, 0, 0, 0, 0]])
        torch.testing.assert_close(clip.text(ids), clip.text(other))
        torch.testing.assert_close(clip.text(ids)[:1], clip.text(ids[:1, :3]))


def test_tokens_changed_between_blocks_go_on():
    vision, x = small().vision, torch.randn(2, 3, 12, 12)
    states = vision.states(x, adapt=lambda i, tokens: tokens.zero_() if i == 1 else tokens)
    assert len(states) == 4 and states[2].abs().sum() == 0
    torch.testing.assert_close(states[3], vision.blocks[2](torch.zeros_like(states[3])))
    torch.testing.assert_close(vision.tokens(x, skip=1), vision.norm_last(vision.states(x)[2]))
    torch.testing.assert_close(vision.proj(vision.tokens(x)[:, 0]), vision(x))


def test_images_of_another_size_and_openai_names():
    clip = small()
    assert clip.vision(torch.randn(1, 3, 17, 8)).shape == (1, 6)
    names = {
        "visual.proj": torch.randn(8, 6), "visual.class_embedding": torch.randn(8), "logit_scale": torch.tensor(1.0),
        "transformer.resblocks.1.attn.in_proj_bias": torch.arange(36.0), "input_resolution": torch.tensor(12),
    }  # fmt: skip
    ours = OPENAI(names)
    assert set(ours) <= set(clip.state_dict())
    assert ours["text.blocks.1.attention.k_proj.bias"][0] == 12
    assert all(clip.state_dict()[name].shape == tensor.shape for name, tensor in ours.items())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda clip: clip.vision.states(torch.randn(1, 3, 12, 12), skip=4), "skip must be between 0 and"),
        (lambda clip: clip.text(torch.zeros(1, 8, dtype=torch.long)), "between 1 and 7 tokens, got 8"),
        (lambda clip: clip.text(torch.zeros(1, 3)), "integers"),
        (lambda clip: Clip(clip.vision, ClipText(depth=0, embed_dim=None)), "one embed_dim, got 6 and None"),
        (lambda clip: Clip.from_transformers(nn.Linear(2, 2)), "CLIPModel was expected, got Linear"),
        (lambda clip: ClipText(vocabulary=0), "vocabulary and context must be positive"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call(small())
