"""SUM: its scans against their definition, the modulation at its limits, conditions, sizes, files and the loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from saccade.models.images import to_picture
from saccade.models.sum import CONDITIONS, SS2D, SUM, Expand, VSSBlock, saliency_loss
from saccade.models.sum.blocks import DIRECTIONS
from saccade.models.sum.losses import WEIGHTS

TINY = {"dims": (8, 16), "depths": (1, 1), "decoder_depths": (1, 1), "states": 3, "prompt_dim": 8}


def moved(module: nn.Module) -> nn.Module:
    """With nothing at its start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()


def test_the_four_directions() -> None:
    """Each pixel's state, one after the other, in each order of the pixels."""
    torch.manual_seed(0)
    module, u = moved(SS2D(3, states=2)).double(), torch.randn(1, 3, 4, 6, dtype=torch.double)
    pixels = [(row, column) for row in range(3) for column in range(4)]
    columns = [(row, column) for column in range(4) for row in range(3)]
    expected = torch.zeros_like(u)
    for k, order in enumerate((pixels, columns, pixels[::-1], columns[::-1])):
        A = -module.log_decay.view(DIRECTIONS, 6, 2)[k].exp()
        h = torch.zeros(6, 2, dtype=torch.double)
        for row, column in order:
            x = u[0, row, column]
            step, b, c = (module.read_proj[k] @ x).split([module.rank, 2, 2])
            step = nn.functional.softplus(module.step_proj[k] @ step + module.step_bias[k])
            h = (step[:, None] * A).exp() * h + (step * x)[:, None] * b
            expected[0, row, column] += h @ c + module.skip.view(DIRECTIONS, 6)[k] * x
    torch.testing.assert_close(module.scanned(u), expected)


def test_turned_by_180_degrees() -> None:
    torch.manual_seed(0)
    module = moved(SS2D(4, states=2))
    with torch.no_grad():
        for parameter in (module.read_proj, module.step_proj, module.step_bias):
            parameter.copy_(parameter[:1].expand_as(parameter))
        for parameter in (module.log_decay, module.skip):
            parameter.copy_(parameter[:8].repeat(DIRECTIONS, *[1] * (parameter.ndim - 1)))
        module.conv.weight.copy_((module.conv.weight + module.conv.weight.flip(2, 3)) / 2)
    x = torch.randn(2, 5, 6, 4)
    torch.testing.assert_close(module(x.flip(1, 2)), module(x).flip(1, 2), rtol=1e-4, atol=1e-5)


def test_starts_as_mamba_does() -> None:
    torch.manual_seed(0)
    module = SS2D(32)
    steps = nn.functional.softplus(module.step_bias)
    assert 1e-3 * 0.99 < steps.min() < 2e-3 and 0.05 < steps.max() < 0.1 * 1.01
    torch.testing.assert_close(module.log_decay.exp()[5], torch.arange(1.0, 17.0))
    assert module.skip.eq(1).all() and module.rank == 2


def test_modulation_of_nothing_is_none() -> None:
    torch.manual_seed(0)
    block, x = moved(VSSBlock(6, 4, prompt_dim=8, states=2)), torch.randn(2, 4, 5, 6)
    condition = torch.tensor([0, 3])
    assert block.mlp is not None and block.prompts is not None
    modulated = block(x, condition)
    assert not torch.allclose(modulated, block(x))
    shift_in, scale_in, shift_out, scale_out, scale_sum = block.modulation(condition)
    normed = block.norm(x) * (1 + scale_in) + shift_in
    u, gate = block.scan.in_proj(normed).chunk(2, 3)
    summed = block.scan.scanned(nn.functional.silu(block.scan.conv(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1))
    y = block.scan.norm(summed * (1 + scale_sum)) * (1 + scale_out) + shift_out
    torch.testing.assert_close(modulated, x + block.scan.out_proj(y * nn.functional.silu(gate)))
    nn.init.zeros_(block.mlp[4].weight)
    nn.init.zeros_(block.mlp[4].bias)
    torch.testing.assert_close(block(x, condition), block(x), rtol=0, atol=0)


def test_conditions() -> None:
    torch.manual_seed(0)
    model, image = moved(SUM(**TINY, condition="interface")), torch.randn(2, 3, 16, 24)
    maps = [model(image, torch.full((2,), k)).heatmap for k in range(4)]
    assert all(not torch.allclose(maps[0], other) for other in maps[1:])
    assert torch.equal(model(image).heatmap, maps[3]) and CONDITIONS[3] == "interface"
    hot = torch.tensor([[0.0, 1, 0, 0], [0, 0, 1, 0]])
    torch.testing.assert_close(model(image, hot).heatmap, torch.stack([maps[1][0], maps[2][1]]))
    with torch.no_grad():
        for blocks in model.decoder:
            blocks[0].prompts.copy_(blocks[0].prompts[:1].expand(4, -1))
    assert torch.equal(model(image, torch.tensor([0, 0])).heatmap, model(image, torch.tensor([2, 3])).heatmap)
    plain = SUM(**TINY, conditions=0).eval()
    assert plain(image).heatmap.shape == (2, 16, 24) and not any("prompts" in name for name in plain.state_dict())


def test_a_map_grows() -> None:
    torch.manual_seed(0)
    module, x = Expand(8), torch.randn(1, 2, 3, 8)
    apart = module.expand(x).view(1, 2, 3, 2, 2, 4)
    y = module(x)
    assert y.shape == (1, 4, 6, 4)
    torch.testing.assert_close(y[0, 3, 2], module.norm(apart[0, 1, 1, 1, 0]))


def test_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SUM(**TINY)
    model.image_size = (32, 32)
    to_picture(torch.rand(3, 20, 30)).save(tmp_path / "image.png")
    said = model.predict(tmp_path / "image.png")
    assert said.heatmap.shape == (1, 20, 30) and said.heatmap.min() >= 0 and said.heatmap.max() <= 1
    assert model.picture(said).size == (30, 20) and len(model.answer(said)) == 1
    model.condition = 2
    assert not torch.equal(model.predict(tmp_path / "image.png").heatmap, said.heatmap)


def test_loss() -> None:
    torch.manual_seed(0)
    g = torch.rand(2, 6, 7, dtype=torch.double)
    fixated = (torch.rand(2, 6, 7) > 0.8).double()
    total, terms = saliency_loss(g, g, fixated)
    for name, value in {"kl": 0.0, "cc": 1.0, "sim": 1.0, "mse": 0.0}.items():
        torch.testing.assert_close(terms[name], torch.tensor(value, dtype=torch.double), atol=1e-12, rtol=1e-9)
    standard = (g - g.mean((1, 2), keepdim=True)) / g.flatten(1).std(1)[:, None, None]
    nss = torch.stack([standard[i][fixated[i] > 0].mean() for i in (0, 1)]).mean()
    torch.testing.assert_close(terms["nss"], nss)
    torch.testing.assert_close(total, -3 - nss)
    p = torch.rand(2, 6, 7, dtype=torch.double).requires_grad_()
    total, terms = saliency_loss(p, g, fixated)
    torch.testing.assert_close(total, sum((WEIGHTS[name] * term for name, term in terms.items()), torch.zeros(())))
    assert torch.autograd.gradcheck(lambda p: saliency_loss(p, g, fixated)[0], p)
    share = [x / x.sum((1, 2), keepdim=True) for x in (p, g)]
    torch.testing.assert_close(terms["kl"], (share[1] * (share[1] / share[0]).log()).sum((1, 2)).mean())
    assert "nss" not in saliency_loss(p, g)[1]
    constant, _ = saliency_loss(torch.full_like(g, 0.5), g, fixated)
    assert constant.isfinite()
    assert torch.allclose(saliency_loss(p, g, weights={"mse": 1.0})[0], (p - g).square().mean())


def test_bad_arguments() -> None:
    model = SUM(**TINY)
    image = torch.randn(2, 3, 16, 16)
    for call, message in (
        (lambda: model(image[:, :, :12]), "sides must be multiples of 8"),
        (lambda: model(image[:, :1]), "x must be images"),
        (lambda: model(image, torch.tensor([0, 1, 2])), r"condition must be \(2,\)"),
        (lambda: model(image, torch.rand(2)), r"condition must be \(2,\) of integers"),
        (lambda: SUM((8, 24), (1, 1), (1, 1)), "dims must double"),
        (lambda: SUM((8, 16), (1, 1), (1,)), "one for each of 2 stages"),
        (lambda: SUM(**TINY, condition="books"), "condition must be one of mouse"),
        (lambda: SUM(**TINY, condition=4), "condition must be below 4"),
        (lambda: SS2D(4, kernel_size=2), "kernel_size odd"),
        (lambda: Expand(5), "multiple of factor"),
        (lambda: VSSBlock(4, 2, prompt_dim=1), "prompt_dim 2 or more"),
        (lambda: saliency_loss(image[:, 0], image[:, 0, 1:]), "map and density"),
        (lambda: saliency_loss(image[:, 0], image[:, 0], image), "fixations must be"),
        (lambda: saliency_loss(image[:, 0], image[:, 0], weights={"auc": 1.0}), "weights must be of kl"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
