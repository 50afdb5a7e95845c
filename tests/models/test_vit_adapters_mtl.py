"""Adapters of several tasks: at their limits Swin's own layers, tasks apart, affinities, around transformers' Swin."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import catalogue
from saccade.layers.window_attention import WindowAttention
from saccade.models.multitask import Multitask
from saccade.models.vit_adapters_mtl import (
    AdaptedBlock,
    Bottleneck,
    FiLM,
    MultitaskSwin,
    SwinAdapters,
    TaskAdaptedAttention,
    TaskAffinity,
    TaskBias,
    TaskDecoder,
    TaskScaledNorm,
    berhu,
    block_diagonal,
    depth_loss,
    multitask_loss,
    similarities,
)


def _network(**changes: object) -> MultitaskSwin:
    torch.manual_seed(0)
    network = catalogue.create("vit-adapters-mtl", **{**catalogue.part("vit-adapters-mtl").example, **changes})
    for name, parameter in network.named_parameters():
        if name.endswith("task_bias.matrix"):
            nn.init.normal_(parameter)
    assert isinstance(network, MultitaskSwin)
    return network.eval()


def test_film_of_zeros_is_the_identity_and_a_scaled_norm_then_a_layer_norm() -> None:
    torch.manual_seed(0)
    film, norm, x, omega = FiLM(5, 4), TaskScaledNorm(4, 5), torch.randn(2, 3, 6, 4), torch.randn(2, 5)
    nn.init.normal_(norm.weight)
    assert not torch.equal(film(x, omega), x)
    for each in (film, norm.film):
        nn.init.zeros_(each.modulation.weight)
    assert torch.equal(film(x, omega), x) and torch.equal(film.shared(x[0], omega)[1], x[0])
    torch.testing.assert_close(norm(x, omega), F.layer_norm(x, [4], norm.weight, norm.bias))


@pytest.mark.parametrize(
    ("tokens", "condition", "blocks"), [(16, 64, 4), (9, 27, 3), (49, 343, 7), (9, 20, 2), (4, 30, 7)]
)
def test_the_bias_stands_in_blocks_on_the_diagonal(tokens: int, condition: int, blocks: int) -> None:
    torch.manual_seed(0)
    module = TaskBias(condition, tokens)
    assert module.blocks == blocks
    bias = module(torch.randn(1, condition).expand(2, -1))
    torch.testing.assert_close(bias[0], bias[1])
    side = -(-tokens // blocks)
    number = torch.arange(tokens) // side
    same = number[:, None] == number
    assert not bias[:, ~same].any() and bias[:, same].all()
    nn.init.normal_(module.matrix)
    rows = module.film.shared(module.matrix, torch.ones(1, condition))
    full = torch.block_diag(*rows[0].split(side))[:tokens, :tokens]
    torch.testing.assert_close(block_diagonal(rows, blocks)[0], full)


@pytest.mark.parametrize(("grid", "window", "shift"), [((8, 8), 4, 2), ((7, 9), 3, 1), ((4, 4), 4, 0), ((2, 5), 3, 1)])
def test_task_adapted_attention(grid: tuple[int, int], window: int, shift: int) -> None:
    """Against all pairs, with the task's matrix and the windows of a shifted map written out."""
    torch.manual_seed(0)
    module = TaskAdaptedAttention(6, 2, window**3, window, shift=shift)
    nn.init.normal_(module.task_bias.matrix)
    x, omega = torch.randn(2, *grid, 6), torch.randn(2, window**3)
    out = module(x, omega)
    full = [-(-n // window) * window for n in grid]
    y = F.pad(x, (0, 0, 0, full[1] - grid[1], 0, full[0] - grid[0]))
    at = []
    for n in full:
        moved = (torch.arange(n) - (shift if n > window else 0)) % n if n <= window else torch.arange(n) - shift
        at.append((moved.div(window, rounding_mode="floor"), moved % window))
    number = (at[0][0][:, None] * 1000 + at[1][0]).flatten()
    place = (at[0][1][:, None] * window + at[1][1]).flatten()
    q, k, v = module.qkv(y.flatten(1, 2)).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT / 3**0.5 + module.position_bias()[:, place[:, None], place]
    scores = scores + module.task_bias(omega)[:, place[:, None], place][:, None]
    scores = scores.masked_fill(number[:, None] != number, -torch.inf)
    expected = module.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)).unflatten(1, full)
    torch.testing.assert_close(out, expected[:, : grid[0], : grid[1]])

    nn.init.zeros_(module.task_bias.matrix)
    nn.init.zeros_(module.task_bias.film.modulation.weight)
    plain = WindowAttention(6, 2, window_size=window, shift=shift)
    plain.load_state_dict({name: t for name, t in module.state_dict().items() if "task_bias" not in name})
    torch.testing.assert_close(module(x, omega), plain(x))
    values = torch.randn(2, 2, grid[0] * grid[1], 5)
    torch.testing.assert_close(module.mix(x, values, omega), plain.mix(x, values))


def test_a_bottleneck_passes_a_third() -> None:
    torch.manual_seed(0)
    module = Bottleneck(4, 9)
    out = module(torch.randn(1, 50, 9), torch.randn(1, 4))[0]
    assert torch.linalg.matrix_rank(out - out.mean(0)) == 3


def test_tasks_are_answered_apart() -> None:
    network, images = _network(), torch.randn(3, 3, 16, 16)
    task_id = torch.tensor([0, 1, 0])
    all_tasks, asked = network(images), network(images, task_id)
    assert [logits.shape for logits in all_tasks.logits] == [(3, 3, 16, 16), (3, 1, 16, 16)] and all_tasks.rows is None
    assert [rows.tolist() for rows in asked.rows] == [[0, 2], [1]]
    for logits, rows, expected in zip(asked.logits, asked.rows, all_tasks.logits):
        torch.testing.assert_close(logits, expected[rows])
    order = torch.tensor([2, 0, 1])
    moved = network(images[order], task_id[order])
    torch.testing.assert_close(moved.logits[0], asked.logits[0][[1, 0]])
    torch.testing.assert_close(moved.logits[1], asked.logits[1])
    none = network(images, torch.zeros(3, dtype=torch.long))
    assert none.logits[1].shape == (0, 1, 16, 16)
    none.logits[0].sum().backward()
    assert all(p.grad is None for p in network.decoders[1].parameters())


def test_images_of_any_size() -> None:
    network = _network()
    for size in ((16, 16), (15, 9), (1, 1), (40, 23)):
        assert all(logits.shape[2:] == size for logits in network(torch.randn(1, 3, *size)).logits)


def test_without_adapters_and_conditions_it_is_a_swin_for_all_tasks() -> None:
    network = _network(adapter=False, conditioned_blocks=((), ()))
    maps = network.encode(torch.randn(2, 3, 16, 16))
    for map_BHWC in maps:
        torch.testing.assert_close(*map_BHWC.chunk(2))
    assert not any(isinstance(module, (AdaptedBlock, Bottleneck)) for module in network.modules())
    assert _network(adapter=False).encode(torch.randn(2, 3, 16, 16))[-1].std() > 0


def test_frozen_parameters_get_no_gradient() -> None:
    network = _network().freeze()
    sum(logits.square().sum() for logits in network(torch.randn(1, 3, 16, 16)).logits).backward()
    for name, parameter in network.named_parameters():
        frozen = name.startswith(("stages.0.blocks.0", "stages.0.merge"))
        assert (parameter.grad is None) == frozen, name


def test_affinities() -> None:
    torch.manual_seed(0)
    same, other = torch.randn(2, 3), torch.randn(2, 3)
    other -= (other * same).sum() / same.square().sum() * same
    found = similarities([same, 2 * same, other])
    torch.testing.assert_close(found, torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]]), atol=1e-6, rtol=0)
    module = TaskAffinity(3, rate=1.0)
    torch.testing.assert_close(module.weights, torch.full((3, 3), 1 / 3))
    module.update([same, 2 * same, other])
    torch.testing.assert_close(module.weights.sum(1), torch.ones(3))
    expected = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]]).exp()
    torch.testing.assert_close(module.weights, expected / expected.sum(1, keepdim=True))
    with pytest.raises(ValueError, match="gradients must be 3 of one shape, got 2"):
        module.update([same, other])

    network, images = _network(affinities=True), torch.randn(2, 3, 16, 16)
    maps = network.encode(images)
    torch.testing.assert_close(*maps[-1].chunk(2))  # at first all tasks have one embedding
    parts = [[m.split(2)[t] for m in maps] for t in range(2)]
    losses = [decoder(part).square().mean() for decoder, part in zip(network.decoders, parts)]
    gradients = torch.autograd.grad(sum(losses), maps[-1])[0].split(2)
    network.affinity.update(gradients)
    assert network.affinity.weights[0, 0] > network.affinity.weights[0, 1]
    apart = network.encode(images)[-1].split(2)
    assert not torch.allclose(*apart)


def test_losses() -> None:
    found, truth = torch.tensor([0.0, 1.0, 4.0]), torch.zeros(3)
    assert berhu(found, truth, 0.5).item() == pytest.approx((0 + 1 + (16 + 4) / 4) / 3)
    depth = torch.tensor([[[0.0, 3.0]]])
    logits = (((65536 / (depth + 1)) - 1) / 65535).clamp(max=1 - 1e-7).logit()[:, None]
    assert depth_loss(logits, depth).item() < 1
    output = Multitask([torch.zeros(2, 3, 1, 2), logits])
    loss, terms = multitask_loss(output, [torch.zeros(2, 1, 2, dtype=torch.long), depth], weights=(2.0, 0.0))
    assert terms["0"].item() == pytest.approx(torch.tensor(3.0).log().item())
    torch.testing.assert_close(loss, 2 * terms["0"])
    with pytest.raises(ValueError, match="one for each of 2 tasks, got 1, 2 and 2"):
        multitask_loss(output, [depth])


def _swin(**changes: object) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"image_size": 32, "embed_dim": 6, "depths": [2, 2, 1], "num_heads": [1, 2, 2], "window_size": 2}
    return transformers.SwinModel(transformers.SwinConfig(**{**sizes, **changes})).eval()


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_around_a_swin_of_transformers() -> None:
    swin, images, task_id = _swin().requires_grad_(False), torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 0])
    adapters = SwinAdapters(swin, 2, conditioned_blocks=((1,), (0, 1), ()))
    decoder = TaskDecoder(adapters.channels, 3, (1, 1, 1), (1, 2, 2), (2, 2, 2), last=4).eval()
    before, hooks = swin(images).last_hidden_state, _hooks(swin)
    weights = {name: t.clone() for name, t in swin.state_dict().items()}
    with adapters(swin, task_id) as maps:
        inside = swin(images).last_hidden_state
    assert not torch.allclose(inside, before)
    assert [m.shape for m in maps] == [(3, 8, 8, 6), (3, 4, 4, 12), (3, 2, 2, 24)]
    decoder(maps).square().sum().backward()
    assert not [name for name, p in adapters.named_parameters() if p.grad is None]
    assert all(p.grad is None for p in swin.parameters())
    assert _hooks(swin) == hooks and torch.equal(swin(images).last_hidden_state, before)
    assert all(torch.equal(t, weights[name]) for name, t in swin.state_dict().items())

    with pytest.raises(RuntimeError, match="stop"), adapters(swin, task_id):
        raise RuntimeError("stop")
    assert _hooks(swin) == hooks
    with adapters(swin, task_id), pytest.raises(ValueError, match="one for each of 2 images, got 3"):
        swin(images[:2])
    for stage in adapters.adapted:
        for block in stage.values():
            for module in block.modules():
                if isinstance(module, FiLM):
                    nn.init.zeros_(module.modulation.weight)
    with adapters(swin, task_id):
        torch.testing.assert_close(swin(images).last_hidden_state, before)


def test_what_is_put_around_a_swin_is_the_network_s_own() -> None:
    """The same numbers in both give the same maps."""
    swin = _swin(depths=[2, 2], num_heads=[1, 2])
    blocks = ((1,), (0,))
    adapters = SwinAdapters(swin, 2, conditioned_blocks=blocks)
    own = MultitaskSwin(
        image_size=32, embed_dim=6, depths=(2, 2), num_heads=(1, 2), decoder_depths=(1, 1), window_size=2,
        conditioned_blocks=blocks, drop_path=0.0,
    ).eval()  # fmt: skip
    for parameter in [*swin.parameters(), *adapters.parameters()]:
        nn.init.normal_(parameter, std=0.3)
    state = {"task_embedding.weight": adapters.task_embedding.weight}
    state |= {f"norm.{leaf}": t for leaf, t in adapters.norm.state_dict().items()}
    embeddings = swin.embeddings
    state |= {f"embed.proj.{leaf}": t for leaf, t in embeddings.patch_embeddings.projection.state_dict().items()}
    state |= {f"embed.norm.{leaf}": t for leaf, t in embeddings.norm.state_dict().items()}
    for s, stage in enumerate(swin.encoder.layers):
        for i, block in enumerate(stage.blocks):
            state |= _block(f"stages.{s}.blocks.{i}.", block, adapters.adapted[s]._modules.get(str(i)))
        state |= {f"stages.{s}.bottlenecks.{k}": t for k, t in adapters.bottlenecks[s].state_dict().items()}
        if stage.downsample is not None:
            state |= {f"stages.{s}.merge.{k}": t for k, t in stage.downsample.state_dict().items()}
            state |= {f"stages.{s}.side_merge.{k}": t for k, t in adapters.merges[s].state_dict().items()}
    missing, strange = own.load_state_dict(state, strict=False)
    assert not strange and all(name.startswith("decoders.") for name in missing)
    images, task_id = torch.randn(2, 3, 32, 32), torch.tensor([1, 0])
    with adapters(swin, task_id) as maps:
        swin(images)
    for ours, theirs in zip(own.encode(images, task_id), maps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def _block(place: str, block: nn.Module, by: nn.Module | None) -> dict[str, Tensor]:
    attention = block.attention
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    state = {f"attention.qkv.{leaf}": torch.cat([getattr(p, leaf) for p in parts]) for leaf in ("weight", "bias")}
    state |= {f"attention.proj.{leaf}": t for leaf, t in attention.o_proj.state_dict().items()}
    table = attention.relative_position_bias.relative_position_bias_table
    state["attention.relative_position_bias_table"] = table
    for ours, theirs in (("norm1", "layernorm_before"), ("norm2", "layernorm_after"), ("mlp", "mlp")):
        state |= {f"{ours}.{leaf}": t for leaf, t in getattr(block, theirs).state_dict().items()}
    if by is not None:
        state |= {f"attention.task_bias.{leaf}": t for leaf, t in by.task_bias.state_dict().items()}
        for norm in ("norm1", "norm2"):
            state |= {f"{norm}.film.{leaf}": t for leaf, t in getattr(by, norm).state_dict().items()}
    return {place + name: t for name, t in state.items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task_classes": (3,)}, "one for each task, got 2, 1"),
        ({"embed_dim": 0}, "must be positive"),
        ({"depths": (2,)}, "one entry for each stage, got 1, 2, 2, 2"),
        ({"conditioned_blocks": ((2,), ())}, r"conditioned_blocks of stage 0 must be below 2, got \(2,\)"),
        ({"condition": 3}, "condition must be at least the 4 tokens of a window, got 3"),
    ],
)
def test_refusals(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _network(**arguments)


def test_bad_calls() -> None:
    network, x = _network(), torch.zeros(2, 3, 16, 16)
    for task_id, message in (
        (torch.tensor([0]), "a number for each of 2 images"),
        (torch.tensor([0.0, 1.0]), "a number for each of 2 images"),
        (torch.tensor([0, 2]), r"below 2 and not negative, got \[0, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            network(x, task_id)
    with pytest.raises(ValueError, match=r"x must be images \(batch, 3, height, width\)"):
        network(x[:, :2])
    with pytest.raises(ValueError, match="omega must be one for each image, got 3 for 4"):
        TaskAdaptedAttention(4, 2, 8, 2)(torch.zeros(4, 2, 2, 4), torch.zeros(3, 8))
    with pytest.raises(ValueError, match="channels must double"):
        TaskDecoder((4, 6), 1, (1, 1), (1, 1), (2, 2))
    with pytest.raises(ValueError, match="maps must be 2, got 1"):
        network.decoders[0]([x])
    with pytest.raises(ValueError, match="swin must be a Swin of transformers, got Linear"):
        SwinAdapters(nn.Linear(2, 2), 2)
    swin = _swin()
    with pytest.raises(ValueError, match=r"conditioned_blocks must be blocks of stages of \[2, 2, 1\]"):
        SwinAdapters(swin, 2, conditioned_blocks=((2,), (), ()))
    assert [sorted(each) for each in SwinAdapters(swin, 2).adapted] == [[], ["1"], []]
    with (
        pytest.raises(ValueError, match="must have the stages and blocks"),
        SwinAdapters(swin, 2)(_swin(depths=[1, 1], num_heads=[1, 1]), torch.zeros(1, dtype=torch.long)),
    ):
        pass
