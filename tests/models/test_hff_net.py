"""HFF-Net: frequencies in and out, held weights, decomposition, losses, volumes from files, bad arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import saccade
from saccade.cli import main
from saccade.models.hff_net import (
    AdaptiveLaplacian,
    FrequencyCrossAttention,
    HFFNet,
    consolidate,
    decompose,
    directions,
    focal_frequency_loss,
    hff_loss,
    low_band,
    pyramid,
)
from saccade.models.hff_net.claim import bodies
from saccade.models.hff_net.decomposition import fans
from saccade.ops.frequency import laplacian, laplacian_kernel

TINY: dict[str, Any] = {
    "low_channels": 1, "high_channels": 4, "depth": 17, "widths": (2, 3, 4, 4, 6), "side": (3, 4), "reduction": 2
}  # fmt: skip


def open_gates(module: FrequencyCrossAttention, logit: float) -> None:
    """Every attention is sigmoid(logit)."""
    for layer, bias in ((module.semantic.fc2, logit / 2), (module.positional, logit), (module.slice.mean, logit)):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.constant_(layer.bias, bias)


def test_attention_of_one_returns_its_input() -> None:
    torch.manual_seed(0)
    module, x = FrequencyCrossAttention(8, 5, reduction=4).eval(), torch.randn(2, 8, 5, 6, 7)
    open_gates(module, 100)
    torch.testing.assert_close(module(x), x, atol=1e-5, rtol=1e-5)
    open_gates(module, 0)
    torch.testing.assert_close(module(x), x / 8, atol=1e-5, rtol=1e-5)


def test_the_code_multiplies_by_the_attended_map() -> None:
    torch.manual_seed(0)
    module, x = FrequencyCrossAttention(8, 5, reduction=4, reading="code").eval(), torch.randn(1, 8, 5, 6, 7).double()
    module.double()
    open_gates(module, 0)
    spectrum = torch.fft.fftn(x, dim=(2, 3, 4), norm="ortho")
    real, imaginary = spectrum.real, spectrum.imag
    for _ in range(3):
        real, imaginary = real * real / 2, imaginary * real / 2
    expected = torch.fft.ifftn(torch.complex(real, imaginary), dim=(2, 3, 4), norm="ortho").real
    torch.testing.assert_close(module(x), expected)


def test_slices_are_drawn_in_training_alone_unless_asked() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, 5, 5)
    module = FrequencyCrossAttention(4, 3, reduction=2)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))
    released = FrequencyCrossAttention(4, 3, reduction=2, draws="always").eval()
    assert not torch.equal(released(x), released(x))
    for learns in (True, False):
        module = FrequencyCrossAttention(4, 3, reduction=2, reparameterised=learns)
        module(x).sum().backward()
        assert (module.slice.factor.weight.grad is not None) == learns


def test_drawn_slices_have_the_covariance() -> None:
    torch.manual_seed(0)
    module = FrequencyCrossAttention(2, 3, reduction=1, rank=2).slice
    t = torch.rand(1, 3).double()
    module.double()
    factor = module.factor(t)[0].view(3, 2)
    diagonal = F.softplus(module.log_diagonal(t).exp())[0] + 1
    noise = torch.randn(200_000, 2).double(), torch.randn(200_000, 3).double()
    z = module._drawn(t, noise)
    torch.testing.assert_close(z.mean(0), module.mean(t)[0], atol=0.02, rtol=0)
    torch.testing.assert_close(z.T.cov(), factor @ factor.T + diagonal.diag(), atol=0.05, rtol=0.02)


def test_a_batch_is_its_samples() -> None:
    torch.manual_seed(0)
    module, x = FrequencyCrossAttention(4, 3, reduction=2).eval(), torch.randn(3, 4, 3, 5, 6)
    torch.testing.assert_close(module(x), torch.cat([module(each[None]) for each in x]))


def test_laplacian_start() -> None:
    module = AdaptiveLaplacian(3)
    assert torch.equal(module.weight[1, 2], laplacian_kernel(3)) and module.weight.sum() == 0
    one, x = AdaptiveLaplacian(1), torch.randn(2, 1, 5, 6, 7)
    torch.testing.assert_close(one(x), x + laplacian(x, (2, 3, 4)))
    constant = torch.full((1, 1, 5, 5, 5), 2.0)
    torch.testing.assert_close(one(constant)[..., 1:-1, 1:-1, 1:-1], constant[..., 1:-1, 1:-1, 1:-1])
    assert torch.equal(HFFNet(2, **TINY).laplacian.weight[0, 0], laplacian_kernel(3))
    assert not torch.equal(HFFNet(2, **TINY, laplacian_start=False).laplacian.weight[0, 0], laplacian_kernel(3))


def test_what_matters_is_held_at_the_laplacian() -> None:
    torch.manual_seed(0)
    model = HFFNet(3, **TINY)
    torch.nn.init.normal_(model.laplacian.weight)
    samples = [bodies(1, 17, torch.Generator().manual_seed(seed)) for seed in range(2)]
    taps = consolidate(model, samples)
    share = taps.float().mean((2, 3, 4))
    assert taps.shape == model.laplacian.weight.shape and (share > 0).all() and (share < 0.5).all()
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    before = model.laplacian.kernel().detach().clone()
    for low, high, labels in samples:
        optimiser.zero_grad()
        hff_loss(model(low, high), labels, 3, model).backward()
        optimiser.step()
    after, target = model.laplacian.kernel(), laplacian_kernel(3).expand_as(taps)
    assert torch.equal(after[taps], target[taps]) and (after[~taps] != before[~taps]).all()
    again = HFFNet(3, **TINY)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.laplacian.held, taps)


def test_low_band() -> None:
    ramp = torch.arange(12.0, dtype=torch.double) * 2 + torch.arange(9.0, dtype=torch.double)[:, None]
    torch.testing.assert_close(low_band(ramp[None])[0, 2:-2, 2:-2], ramp[2:-2, 2:-2])
    assert torch.allclose(low_band(torch.ones(1, 3, 2)), torch.ones(1, 3, 2))


def test_low_band_mirrors_as_scipy_does() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    x = numpy.random.default_rng(0).normal(size=(7, 5))
    taps = numpy.array([-0.05, 0.25, 0.6, 0.25, -0.05])
    expected = ndimage.correlate1d(ndimage.correlate1d(x, taps, 0, mode="reflect"), taps, 1, mode="reflect")
    torch.testing.assert_close(low_band(torch.from_numpy(x)[None])[0], torch.from_numpy(expected))


def test_pyramid() -> None:
    constant = torch.full((1, 6, 7), 3.0, dtype=torch.double)
    for level in (1, 2):
        low, high = pyramid(constant, level)
        torch.testing.assert_close(low, constant)
        assert high.abs().max() < 1e-12
    x = torch.randn(2, 7, 5, dtype=torch.double)
    low, high = pyramid(x, 1)
    assert low.shape == high.shape == x.shape
    torch.testing.assert_close(pyramid(x.mT, 1)[1], high.mT)


def test_fan_filters() -> None:
    """Their responses: near 1 where |row frequency| is above the column's or below it, near 0 on the other side."""
    frequencies = torch.fft.fftfreq(64)
    rows, columns = torch.meshgrid(frequencies, frequencies, indexing="ij")
    responses = []
    for filter_ in fans():
        reach = filter_.shape[0] // 2
        padded = F.pad(filter_, (0, 64 - filter_.shape[1], 0, 64 - filter_.shape[0])).roll((-reach, -reach), (0, 1))
        response = torch.fft.fft2(padded)
        assert (
            response.imag.abs().max() < 1e-12
            and torch.equal(filter_, filter_.flip(0))
            and torch.equal(filter_, filter_.flip(1))
        )
        responses.append(response.real)
    wide = (columns.abs() - rows.abs()) > 0.3
    tall = (rows.abs() - columns.abs()) > 0.3
    sides = [[float(response[side].abs().mean()) for side in (wide, tall)] for response in responses]
    assert sides[0][0] > 0.9 and sides[0][1] < 0.1
    assert sides[1][1] > 0.9 and sides[1][0] < 0.1


def test_directions() -> None:
    x = torch.randn(1, 9, 12, dtype=torch.double)
    assert directions(x).shape == (1, 4, 9, 12)
    # a wave in one direction is seen by one band
    r, c = torch.meshgrid(torch.arange(36.0), torch.arange(36.0), indexing="ij")
    strongest = set()
    for down, right in ((1, 3), (-1, 3), (3, 1), (3, -1)):
        wave = torch.cos(2 * torch.pi / 12 * (down * r + right * c))
        energy = directions(wave[None].double(), 1)[0, :, 8:-8, 8:-8].square().mean((1, 2))
        assert energy.max() > 0.7 * energy.sum()  # by filters of 9 and 7 taps
        strongest.add(int(energy.argmax()))
    assert len(strongest) == 4


def test_directions_move_with_their_band() -> None:
    from saccade.models.hff_net.decomposition import _around, _quincunx

    x = torch.randn(2, 8, 9, dtype=torch.double)
    for filter_ in (*fans(), *map(_quincunx, fans())):
        moved = _around(x.roll((2, 5), (1, 2)), filter_)
        torch.testing.assert_close(moved, _around(x, filter_).roll((2, 5), (1, 2)))
    # the lattice, tap by tap
    k, y = fans()[1], torch.zeros(8, 9, dtype=torch.double)
    for i in range(7):
        for j in range(7):
            y += k[i, j] * x[0].roll(((i - 3) + (j - 3), (j - 3) - (i - 3)), (0, 1))
    torch.testing.assert_close(_around(x, _quincunx(k))[0], y)


def test_decomposition() -> None:
    x = torch.randn(2, 3, 4, 9, 11)
    low, high = decompose(x)
    assert low.shape == x.shape and high.shape == (2, 12, 4, 9, 11)
    for bands in (low, high):
        assert bands.amin((2, 3, 4)).eq(-1).all() and bands.amax((2, 3, 4)).eq(1).all()
    assert torch.equal(decompose(x[:, 1:2])[1], high[:, 4:8])
    assert ((low + 1) * 255 / 2).sub(((low + 1) * 255 / 2).round()).abs().max() < 1e-3
    assert all(torch.equal(bands, torch.full_like(bands, -1)) for bands in decompose(torch.ones(1, 1, 2, 5, 5)))


def test_spectra_agree() -> None:
    a, b = torch.randn(2, 3, 4, 5, 6).double().requires_grad_(), torch.randn(2, 3, 4, 5, 6).double()
    assert focal_frequency_loss(a, a) == 0 and torch.equal(focal_frequency_loss(a, b), focal_frequency_loss(b, a))
    assert torch.autograd.grad(focal_frequency_loss(a, a.detach()), a)[0].isfinite().all()
    distance = torch.fft.fftn(a - b, dim=(2, 3, 4), norm="ortho").abs().square()
    weight = distance.sqrt() / distance.sqrt().amax((2, 3, 4), keepdim=True)
    torch.testing.assert_close(focal_frequency_loss(a, b), (weight * distance).mean())


def test_loss_trains_all() -> None:
    torch.manual_seed(0)
    model, (low, high, labels) = HFFNet(3, **TINY), bodies(1, 17, torch.Generator().manual_seed(0))
    output = model(low, high)
    assert [tuple(head.shape) for head in output.heads] == [(1, 3, 17, 17, 17)] * 2 + [(1, 4, 17, 17, 17)] * 2
    assert torch.equal(output.logits, output.heads[0])
    hff_loss(output, labels, 0, model).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match="training"):
        hff_loss(model.eval()(low, high), labels, 0)
    model.kept = "high"
    assert torch.equal(model(low, high).logits, model.branches(low, high)[1])


@pytest.mark.parametrize("size", [(32, 32), (5, 9), (1, 1)])
def test_sizes(size: tuple[int, int]) -> None:
    model = HFFNet(2, **TINY).eval()
    assert model(torch.randn(1, 1, 17, *size), torch.randn(1, 4, 17, *size)).logits.shape == (1, 2, 17, *size)


@pytest.mark.parametrize("deep", [5, 17, 40])
def test_files(deep: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = HFFNet(2, **TINY)
    numpy.save(tmp_path / "head.npy", numpy.random.default_rng(0).normal(size=(deep, 20, 18)))
    output = model.predict(tmp_path / "head.npy")
    assert output.logits.shape == (1, 2, deep, 20, 18) and output.logits.isfinite().all() and model.training
    assert model.picture(output).height >= 20
    assert sum(model.answer(output)[0].values()) == pytest.approx(1)
    stacked = HFFNet(2, **{**TINY, "low_channels": 2, "high_channels": 8})
    numpy.save(tmp_path / "two.npy", numpy.random.default_rng(1).normal(size=(2, deep, 5, 6)))
    assert stacked.predict(tmp_path / "two.npy").logits.shape == (1, 2, deep, 5, 6)
    if deep == 17:
        volume = torch.from_numpy(numpy.load(tmp_path / "head.npy")).float()[None, None]
        assert torch.equal(model.eval()(*decompose(volume)).logits, output.logits)


def test_files_that_are_no_volumes(tmp_path: Path) -> None:
    model = HFFNet(2, **TINY)
    numpy.save(tmp_path / "flat.npy", numpy.zeros((4, 4)))
    numpy.save(tmp_path / "objects.npy", numpy.array([{}, []], dtype=object), allow_pickle=True)
    numpy.save(tmp_path / "nan.npy", numpy.full((2, 2, 2), numpy.nan))
    (tmp_path / "text.npy").write_text("no numbers")
    (tmp_path / "empty.npy").write_bytes(b"")
    for name in ("flat", "objects", "nan", "text", "empty"):
        with pytest.raises(ValueError, match=f"{name}.npy"):
            model.predict(tmp_path / f"{name}.npy")
    with pytest.raises(OSError, match="no volume"):
        model.predict(tmp_path / "missing.npy")
    with pytest.raises(OSError, match="folder"):
        model.predict(tmp_path)
    numpy.save(tmp_path / "good.npy", numpy.zeros((2, 3, 4)))
    numpy.save(tmp_path / "other.npy", numpy.zeros((2, 3, 5)))
    with pytest.raises(ValueError, match="1 sequences of one head, got 2"):
        model.predict([tmp_path / "good.npy"] * 2)
    with pytest.raises(ValueError, match="one size"):
        model.predict([tmp_path / "good.npy", tmp_path / "other.npy"])


def test_a_released_file_computes_as_released(tmp_path: Path) -> None:
    tensors = load_file("tests/golden/hff-net/network.a.safetensors")
    state = {name.removeprefix("param."): t for name, t in tensors.items() if name.startswith("param.")}
    save_file({**state, "laplacian_target": torch.zeros(2, 2, 3, 3, 3)}, tmp_path / "released.safetensors")
    changes = {
        "num_classes": 2,
        "low_channels": 1,
        "high_channels": 2,
        "depth": 32,
        "widths": (3, 4, 4, 6, 6),
        "side": (4, 3, 4),
    }
    model = HFFNet.from_authors(tmp_path / "released.safetensors", **changes, reduction=2)
    assert model.low.attend4.reading == model.high.attend5.reading == "code"
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    own = HFFNet.from_authors(tmp_path / "own.safetensors", **changes, reduction=2)
    assert own.low.attend4.reading == "attention"
    network = saccade.load_authors(
        "hff-net", tmp_path / "released.safetensors", num_classes=2, in_chs1=1, in_chs2=2, slices=[4, 2],
        widths=[3, 4, 4, 6, 6], side=[4, 3], reduction=2,
    )  # fmt: skip
    assert torch.equal(network.low.head.weight, model.low.head.weight)


def test_refusals() -> None:
    for bad, message in (
        ({"widths": (1, 2)}, "five widths"),
        ({"branch": "both"}, "branch must be one of low, high"),
        ({"reading": "paper"}, "reading must be one of attention, code"),
        ({"draws": "sometimes"}, "draws must be one of"),
        ({"reduction": 9}, r"reduction must be between 1 and the number of channels \(4\), got 9"),
    ):
        with pytest.raises(ValueError, match=message):
            HFFNet(2, **{**TINY, **bad})
    model = HFFNet(2, **TINY)
    low, high = torch.randn(1, 1, 17, 4, 4), torch.randn(1, 4, 17, 4, 4)
    with pytest.raises(ValueError, match=r"low must be \(batch, 1, 17, height, width\)"):
        model(low[:, :, :16], high)
    with pytest.raises(ValueError, match=r"high must be \(batch, 4, 17"):
        model(low, high[:, :2])
    with pytest.raises(ValueError, match="one size"):
        model(low, high[..., :3])
    with pytest.raises(ValueError, match="more than 16 voxels"):
        HFFNet(2, **{**TINY, "depth": 16})(low[:, :, :16], high[:, :, :16])
    with pytest.raises(ValueError, match="channels must be positive"):
        AdaptiveLaplacian(0)
    with pytest.raises(ValueError, match="level"):
        pyramid(torch.zeros(1, 4, 4), 3)
    with pytest.raises(ValueError, match="sequences"):
        decompose(torch.zeros(4, 4, 4))


def test_the_command_takes_a_volume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numpy.save(tmp_path / "head.npy", numpy.random.default_rng(0).normal(size=(17, 20, 18)))
    model = "hff-net:num_classes=2,low_channels=1,high_channels=4,depth=17,widths=(2,3,4,4,6),side=(3,4),reduction=2"
    with pytest.raises(SystemExit) as ended:
        main(["run", model, str(tmp_path / "head.npy"), "--out", str(tmp_path / "head.png")])
    assert not ended.value.code and "class 0" in capsys.readouterr().out
    assert (tmp_path / "head.png").stat().st_size > 100
    with pytest.raises(SystemExit) as ended:
        main(["run", "hff-net", str(tmp_path / "none.npy")])
    assert ended.value.code == 2 and "no volume at" in capsys.readouterr().err
