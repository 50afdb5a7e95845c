"""DifFormer and DifFeed: numbering, order of tokens, feedback, noise, what learns, diffusers' U-Net, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from saccade.models.diffssl import (
    AttentionFusion,
    DiffusersUNet,
    DiffusionClassifier,
    FeedbackLayer,
    PooledHead,
    UNet,
)
from saccade.models.diffusion import Diffusion
from saccade.models.images import to_picture

GOLDEN = Path(__file__).parent.parent / "golden" / "diffssl"
UNET = {"width": 8, "factors": (1, 2), "depth": 1, "attention": (1,), "head_dim": 8}
SMALL = {"dim": 16, "num_heads": 4, "depth": 1, "image_size": 16, "unet_sizes": UNET}


def started(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():  # what starts as zero would hide errors
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def network(**changes: object) -> DiffusionClassifier:
    torch.manual_seed(0)
    arguments = {"times": (150,), "first_blocks": (7,), **SMALL, **changes}
    return started(DiffusionClassifier(5, **arguments))


def image(side: int = 16, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


def test_blocks_of_the_papers_unet_have_the_papers_numbers() -> None:
    with torch.device("meta"):
        unet = UNet()
    widths = [256] * 7 + [512] * 6 + [1024] * 12 + [512] * 6 + [256] * 6
    sizes = [256] * 3 + [128] * 3 + [64] * 3 + [32] * 3 + [16] * 3 + [8] * 6 + [16] * 3 + [32] * 3 + [64] * 3
    assert list(unet.channels) == widths and len(unet.up) == 18
    assert [256 // 2**level for level in unet.levels] == [*sizes, *[128] * 3, *[256] * 4]
    faces = [(unet.channels[b - 1], unet.channels[37 - b]) for b in (21, 24, 27, 30, 33, 36)]
    assert faces == [(1024, 1024)] * 2 + [(512, 512)] * 2 + [(256, 256)] * 2


def test_maps_have_the_sizes_that_are_told() -> None:
    unet = started(UNet(**UNET))
    maps = unet.read(image(), torch.tensor([3, 700]), range(1, 10))
    assert [x.shape[1] for x in maps.values()] == list(unet.channels)
    assert [16 // x.shape[2] for x in maps.values()] == [2**level for level in unet.levels]
    assert unet(image(13), torch.tensor([3])).noise.shape == (2, 3, 13, 13)  # odd sizes are joined
    assert unet.read(image(), torch.tensor([3]), ()) == {}


def test_the_order_of_pixels_does_not_matter() -> None:
    torch.manual_seed(0)
    fusion = started(AttentionFusion({3: 6, 5: 4}, {3: 4, 5: 2}, 7, dim=16, num_heads=4, norm="batch"))
    maps = {3: torch.randn(2, 6, 4, 4), 5: torch.randn(2, 4, 2, 2)}
    mixed = {b: x.flatten(2)[..., torch.randperm(x[0, 0].numel())].view_as(x) for b, x in maps.items()}
    torch.testing.assert_close(fusion([mixed]), fusion([maps]))
    torch.testing.assert_close(fusion([dict(reversed(maps.items()))]), fusion([maps]))
    mean = AttentionFusion({3: 6}, {3: 4}, 7, dim=16, num_heads=4, pooled="mean")
    assert mean.class_token is None and mean([{3: maps[3]}]).shape == (2, 7)


def test_feedback_of_zero_leaves_the_second_pass_as_the_first() -> None:
    fed = network(first_blocks=(), second_blocks=(7,), feedback=(6, 7, 8))
    plain = network()
    noise = torch.randn(2, 1, 3, 16, 16)
    plain.head.load_state_dict(fed.head.state_dict())
    plain.unet.load_state_dict(fed.unet.state_dict())
    assert not torch.allclose(fed(image(), noise).logits, plain(image(), noise).logits)
    for layer in fed.feedback.values():
        nn.init.zeros_(layer[1].weight)
        nn.init.zeros_(layer[1].bias)
    assert torch.equal(fed(image(), noise).logits, plain(image(), noise).logits)


def test_layouts_of_the_feedback() -> None:
    for layout in ("C_B_R", "C_G_S", "C_B_R_C_B_R", "Res", "B_C"):
        assert FeedbackLayer(10, 14, layout)(torch.randn(2, 10, 4, 5)).shape == (2, 14, 4, 5)
    assert FeedbackLayer(10, 14, "C_B_R_C_B_R")[3].groups == 14
    for layout in ("X", "B_R"):
        with pytest.raises(ValueError, match="layout must"):
            FeedbackLayer(10, 14, layout)


def test_noise_is_drawn_anew_in_training_alone() -> None:
    model = network()
    assert torch.equal(model(image()).logits, model(image()).logits)
    model.train()
    assert not model.unet.training and not torch.equal(model(image()).logits, model(image()).logits)
    step = torch.zeros(1, dtype=torch.long)
    clean = Diffusion().noised(image(), torch.randn(2, 3, 16, 16), step)
    assert (clean - image()).abs().max() < 0.06  # sqrt(1 - abar_0) = 0.01


def test_heads_and_feedback_learn_and_the_unet_does_not() -> None:
    model = network(second_blocks=(7,), feedback=(6, 8)).train()
    out = model(image())
    assert not out.features[0].requires_grad and out.features[1].requires_grad
    out.logits.square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("unet"))
    assert not any(p.requires_grad for p in model.unet.parameters())
    with torch.no_grad():
        assert len(model.features(image())) == 2


def test_a_unet_of_diffusers_is_read_by_the_same_numbers() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=8,
    ).eval()  # fmt: skip
    ours, unet = UNet(**UNET), DiffusersUNet(theirs)
    assert unet.channels[:6] == ours.channels[:6] and unet.levels == ours.levels
    step = torch.tensor([7, 7])
    before = theirs(image(), step).sample
    maps = unet.read(image(), step, range(1, 10))
    assert [x.shape[1:3] for x in maps.values()] == [(c, 16 // 2**n) for c, n in zip(unet.channels, unet.levels)]
    moved = unet.read(image(), step, (4, 7), {2: torch.ones(2, 8, 4, 4)})
    assert not torch.allclose(moved[4], maps[4]) and not torch.allclose(moved[7], maps[7])
    assert torch.equal(theirs(image(), step).sample, before)
    assert not any(module._forward_hooks for module in theirs.modules())
    sizes = {key: value for key, value in SMALL.items() if key != "unet_sizes"}
    model = DiffusionClassifier(5, theirs, first_blocks=(5,), second_blocks=(7,), feedback=(7, 8), times=(9,), **sizes)
    assert model(image()).logits.shape == (2, 5)


def test_a_linear_head_on_one_map() -> None:
    model = network(head="linear")
    assert isinstance(model.head, PooledHead) and model(image()).logits.shape == (2, 5)
    assert PooledHead(6, 3, pool=1, hidden=(8, 9))(torch.randn(2, 6, 5, 4)).shape == (2, 3)


def test_files_and_heads_of_the_authors(tmp_path: Path) -> None:
    to_picture(torch.rand(3, 20, 18)).save(tmp_path / "a.png")
    model = network()
    output = model.predict(tmp_path / "a.png")
    assert output.logits.shape == (1, 5) and len(model.answer(output)[0]) == 5
    torch.save(model.state_dict(), tmp_path / "own.pt")
    assert torch.equal(network().load(tmp_path / "own.pt").head.head.weight, model.head.head.weight)
    recorded = load_file(GOLDEN / "attention_fusion.a.safetensors")
    state = {name[6:]: tensor for name, tensor in recorded.items() if name.startswith("param.")}
    torch.save(state, tmp_path / "head.pt")
    with pytest.raises(ValueError, match="does not fit the head"):
        model.load(tmp_path / "head.pt")
    ours = AttentionFusion(
        {19: 12, 24: 10, 30: 8}, {19: 4, 24: 4, 30: 8}, 7, steps=2, pool=6, dim=32, num_heads=4, hidden=64
    )
    model.head = ours
    model.load(tmp_path / "head.pt")
    assert torch.equal(ours.class_token, state["intra_inter_block_attention.cls_token"])


def test_bad_arguments() -> None:
    model = network()
    fusion = AttentionFusion({3: 6}, {3: 4}, 7, dim=16, num_heads=4)
    for bad, message in (
        (lambda: model(image()[:, :2]), r"images \(batch, 3, height, width\)"),
        (lambda: model(image(), torch.randn(2, 2, 3, 16, 16)), r"noise must be \(2, 1, 3, 16, 16\)"),
        (lambda: network(first_blocks=(10,)), "blocks must be numbers from 1 to 9"),
        (lambda: network(first_blocks=()), "a block must be read"),
        (lambda: network(times=(1000,)), "times lie from 0 to 999"),
        (lambda: network(second_blocks=(7,)), "second_blocks need feedback"),
        (lambda: network(second_blocks=(7,), feedback=(5,)), "feedback must be of the way up, from block 6"),
        (lambda: network(head="cosine"), "head must be 'attention' or 'linear'"),
        (lambda: network(head="linear", first_blocks=(5, 7)), "a linear head reads one map"),
        (lambda: network(norm="group"), "norm must be 'layer' or 'batch'"),
        (lambda: network(unet=nn.Identity()), "must be a UNet2DModel of diffusers, got Identity"),
        (lambda: UNet(width=0), "must be positive"),
        (lambda: AttentionFusion({}, {}, 7), "of the same blocks, one at least"),
        (lambda: fusion([]), "maps must be of 1 noise steps"),
        (lambda: fusion([{4: torch.randn(2, 6, 4, 4)}]), r"of the blocks 3, got \[4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
