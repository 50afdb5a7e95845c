"""The visual sentinel: two softmaxes that agree, no sentinel, hulls, both variants, the encoder of released files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from saccade.models.visual_sentinel import (
    AdaptiveAttention,
    ReleasedAttention,
    SentinelGate,
    VisualSentinel,
    adaptive,
    learning_rate,
    optimisers,
)
from saccade.models.visual_sentinel.authors import PORTS

SMALL = {"vocab_size": 11, "dim": 12, "word_dim": 8, "attention_dim": 7, "channels": 10}
GOLDEN = Path(__file__).parents[1] / "golden" / "visual-sentinel" / "decoder.a.safetensors"


def small(**changes: object) -> VisualSentinel:
    torch.manual_seed(0)
    return VisualSentinel(**{**SMALL, **changes}).eval()  # type: ignore[arg-type]


def given(regions: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, regions, 10), torch.randint(1, 11, (2, 4))


def parts(kind: type, regions: int = 5) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(2)
    attention = (AdaptiveAttention(12, 7) if kind is AdaptiveAttention else ReleasedAttention(12)).eval()
    v, h, s = torch.randn(3, regions, 12), torch.randn(3, 12), torch.randn(3, 12)
    return attention, (v, attention.prepare(v), h, s)


@pytest.mark.parametrize("kind", [AdaptiveAttention, ReleasedAttention])
def test_regions_weigh_what_the_sentinel_leaves(kind: type) -> None:
    attention, (v, prepared, h, s) = parts(kind)
    found, added = attention(v, prepared, h, s)
    alone, _ = attention(v, prepared, h, None)
    torch.testing.assert_close(found.alpha.sum(1), torch.ones(3))
    torch.testing.assert_close(found.alpha, alone.alpha)
    mapped = s if kind is AdaptiveAttention else attention.sentinel_map(s).relu()
    assert torch.equal(added, h) == (kind is AdaptiveAttention)
    expected = (1 - found.beta)[:, None] * alone.seen + found.beta[:, None] * mapped
    torch.testing.assert_close(found.seen, expected)
    every = torch.cat([v, mapped[:, None]], 1)
    assert (found.seen <= every.amax(1) + 1e-6).all() and (found.seen >= every.amin(1) - 1e-6).all()
    order = torch.randperm(5)
    turned, _ = attention(v[:, order], prepared[:, order], h, s)
    torch.testing.assert_close(turned.alpha, found.alpha[:, order])
    torch.testing.assert_close(turned.seen, found.seen)


def test_scores_at_the_ends_leave_regions_or_sentinel() -> None:
    z, v, s = torch.randn(3, 5), torch.randn(3, 5, 12), torch.randn(3, 12)
    looks = adaptive(z, v, torch.full((3,), -1e4), s)
    torch.testing.assert_close(looks.seen, (z.softmax(1)[:, :, None] * v).sum(1))
    assert not looks.beta.any()
    remembers = adaptive(z, torch.zeros_like(v), torch.full((3,), 1e4), s)
    torch.testing.assert_close(remembers.seen, s)
    torch.testing.assert_close(remembers.beta, torch.ones(3))
    plain = adaptive(z, v, None, None)
    torch.testing.assert_close(plain.seen, looks.seen)
    model = small(sentinel=False)
    assert (model(*given()).looks == 1).all() and not any("sentinel" in name for name, _ in model.named_parameters())


def test_the_gate_by_hand() -> None:
    gate = SentinelGate(16, 12).eval()
    x, h, m = torch.randn(2, 16), torch.randn(2, 12), torch.randn(2, 12)
    expected = (x @ gate.of_input.weight.T + h @ gate.of_state.weight.T).sigmoid() * m.tanh()
    torch.testing.assert_close(gate(x, h, m), expected)
    assert gate.of_input.bias is None and SentinelGate(16, 12, bias=True).of_input.bias is not None


def test_the_lstm_is_torchs() -> None:
    model, (maps, captions) = small(), given()
    torch.manual_seed(3)
    lstm = torch.nn.LSTM(16, 12, batch_first=True)
    model.load_state_dict(
        {
            **model.state_dict(),
            "of_input.weight": lstm.weight_ih_l0,
            "of_input.bias": lstm.bias_ih_l0,
            "of_hidden.weight": lstm.weight_hh_l0,
            "of_hidden.bias": lstm.bias_hh_l0,
        }
    )
    state = model.start(maps)
    words = model.words(captions)
    x = torch.cat([words, state.whole[:, None].expand(-1, 4, -1)], 2)
    _, (hidden, memory) = lstm(x)
    for word in captions.unbind(1):
        _, state = model.advance(word, state)
    torch.testing.assert_close(state.hidden, hidden[0])
    torch.testing.assert_close(state.memory, memory[0])


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_words_generated_are_words_told(variant: str) -> None:
    model, (maps, captions) = small(variant=variant), given()
    gone = model.generate(maps, most=5, beams=2)
    said = model(maps, gone.words)
    for row, length in enumerate(gone.lengths.tolist()):
        until = min(length + 1, gone.words.shape[1])
        score = -torch.nn.functional.cross_entropy(said.logits[row, :until], gone.words[row, :until], reduction="sum")
        torch.testing.assert_close(gone.scores[row], score)
        torch.testing.assert_close(gone.looks[row, :until], said.looks[row, :until])
    other = captions.clone()
    other[:, 2] = other[:, 2] % 10 + 1
    torch.testing.assert_close(model(maps, other).logits[:, :3], model(maps, captions).logits[:, :3])
    assert (model.before_logits is None) == (variant == "paper")


def test_only_regions_that_are_there_are_seen() -> None:
    model, (maps, captions) = small(), given()
    present = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    state = model.start(maps, present)
    said = model.told(captions, state)
    assert not said.attention[0, :, 4:].any()
    some = model.told(captions[:1], model.start(maps[:1, :4]))
    torch.testing.assert_close(said.logits[:1], some.logits)
    torch.testing.assert_close(said.looks[:1], some.looks)


def test_whole_released_files_load(tmp_path: Path) -> None:
    own = small(resnet=18)
    assert own.channels == 512
    turned = {f"layer{i}": str(i + 3) for i in range(1, 5)} | {"conv1": "0", "bn1": "1"}
    theirs = {}
    for name, tensor in load_file(GOLDEN).items():
        if name.startswith("param."):
            theirs[f"decoder.{name[6:]}"] = tensor
    from saccade.layers.resnet import TORCHVISION

    ours_of = TORCHVISION({f"{name}": torch.tensor(0) for name in _torchvision_names(own)})
    for torchvision, ours in zip(_torchvision_names(own), ours_of):
        first, _, rest = torchvision.partition(".")
        theirs[f"encoder.resnet_conv.{turned[first]}.{rest}"] = own.trunk.state_dict()[ours].clone()
    for name, (rows, columns) in {"affine_a": (12, 512), "affine_b": (8, 512)}.items():
        theirs[f"encoder.{name}.weight"] = torch.randn(rows, columns)
        theirs[f"encoder.{name}.bias"] = torch.randn(rows)
    save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, tmp_path / "model.safetensors")
    sizes = {"vocab_size": 15, "dim": 12, "word_dim": 8, "attention_dim": 49, "resnet": 18}
    model = VisualSentinel.from_authors(tmp_path / "model.safetensors", **sizes)
    assert torch.equal(model.region_map.weight, theirs["encoder.affine_a.weight"])
    assert torch.equal(model.trunk.stem[0].weight, theirs["encoder.resnet_conv.0.weight"])
    assert model.generate(torch.rand(1, 3, 64, 64), most=3).attention.shape[2] == 4
    with pytest.raises(ValueError, match=r"encoder\.other"):
        PORTS[0].convert({"encoder.other": torch.zeros(1)})


def _torchvision_names(model: VisualSentinel) -> list[str]:
    """Of each tensor of the trunk torchvision's name."""
    found = []
    for name in model.trunk.state_dict():
        stage = name.split(".")
        if stage[0] == "stem":
            found.append(f"{'conv1' if stage[1] == '0' else 'bn1'}.{stage[2]}")
            continue
        inner = {"shortcut": "downsample"}.get(stage[3], stage[3].replace("norm", "bn"))
        found.append(".".join([f"layer{int(stage[1]) + 1}", stage[2], inner, *stage[4:]]))
    return found


def test_training_by_two_rates() -> None:
    model = small(stem=(4, 10))
    decoder, encoder = optimisers(model)
    counted = sum(len(group["params"]) for each in (decoder, encoder) for group in each.param_groups)
    assert counted == len(list(model.parameters())) and encoder.param_groups[0]["lr"] == 1e-5
    assert optimisers(small())[1] is None
    assert learning_rate(0) == 4e-4 and learning_rate(120) == pytest.approx(1e-4)


def test_refusals() -> None:
    for arguments, message in (
        ({"dim": 0}, "must be positive"),
        ({"dropout": 1.0}, "dropout"),
        ({"variant": "x"}, "paper or released"),
        ({"stem": (4, 8), "resnet": 18}, "got both"),
        ({"resnet": 17}, "depth must be"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**arguments)
    model, (maps, captions) = small(), given()
    bare = small(channels=0)
    for call, message in (
        (lambda: model(maps[..., 1:], captions), "regions, 10"),
        (lambda: model(maps, captions[:1]), "captions must be"),
        (lambda: model.start(maps, torch.ones(2, 6)), "present must be"),
        (lambda: model.start(None), "got none"),
        (lambda: bare(maps, captions), "see decode"),
        (lambda: bare.decode(torch.rand(2, 5, 12), torch.rand(2, 9), captions), r"v_g \(batch, 8\)"),
        (lambda: model(torch.rand(2, 3, 32, 32), captions), "stem="),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert bare.decode(torch.rand(2, 5, 12), torch.rand(2, 8), captions).logits.shape == (2, 4, 11)
