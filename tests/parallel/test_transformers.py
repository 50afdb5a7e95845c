"""Models of transformers whose tokens are on several ranks train as one process does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import Ranks, check_forecast
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import saccade
from saccade import parallel

transformers = pytest.importorskip("transformers")
masking_utils = pytest.importorskip("transformers.masking_utils")

from saccade.integrations.handed_masks import hand_over  # noqa: E402

SIZES = {
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Mistral": {"sliding_window": 6},
}


def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **MODELS[name])
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def _batch(rows: int, n: int, rows_are: str = "whole") -> dict[str, Tensor]:
    tokens = torch.randint(31, (rows, n), generator=torch.Generator().manual_seed(1))
    if rows_are == "whole":
        return {"input_ids": tokens, "labels": tokens}
    if rows_are == "packed":  # the second row's begin where ranks' parts do too
        positions = torch.stack([torch.arange(n) % 13, torch.cat([torch.arange(8), torch.arange(n - 8)])])
        return {"input_ids": tokens, "labels": tokens, "position_ids": positions[:rows]}
    real = torch.arange(n) < n - 3 * torch.arange(rows)[:, None]
    return {"input_ids": tokens, "labels": tokens.masked_fill(~real, -100), "attention_mask": real.long()}


def _gradients(model: nn.Module) -> list[Tensor]:
    return [x.grad for x in model.parameters() if x.grad is not None]


def trains(mesh: DeviceMesh, name: str, slug: str, options: dict[str, Any], rows: str, balance: str) -> None:
    model, batch = _model(name), _batch(2, 30, rows)
    with saccade.switch(model, slug, **options):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        alone = [x.clone() for x in _gradients(model)]
        model.zero_grad()
        with parallel(mesh, balance=balance, length=30) as shards:
            share = model(**parallel.shard(batch, shards), use_cache=False).loss
            share.backward()
        said = {"position_ids": torch.arange(30).expand(2, -1), **batch}  # as `shard` says them
        parts = parallel.plan(model, **said, use_cache=False, mesh=shards)
    check_forecast(parts, shards)
    whole = share.detach().clone()
    torch.distributed.all_reduce(whole, group=shards.group)
    torch.testing.assert_close(whole, loss.detach(), atol=1e-5, rtol=1e-5)
    for grad, one in zip(_gradients(model), alone, strict=True):
        torch.distributed.all_reduce(grad, group=shards.group)
        torch.testing.assert_close(grad, one, atol=1e-5, rtol=1e-4)
    if slug == "softmax":
        kind = "halo" if name == "Mistral" else "ring"
        told = set() if rows == "padded" else {("positions", "forward")}
        assert shards.traffic.counts.keys() == {(kind, "forward"), (kind, "backward")} | told


@pytest.mark.parametrize(
    ("name", "slug", "options", "rows", "balance"),
    [
        ("Llama", "softmax", {}, "whole", "contiguous"),
        ("Llama", "softmax", {}, "padded", "head-tail"),
        ("Llama", "softmax", {}, "packed", "contiguous"),
        ("Qwen2", "softmax", {}, "whole", "head-tail"),
        ("Qwen2", "softmax", {}, "packed", "head-tail"),
        ("Mistral", "softmax", {}, "padded", "contiguous"),
        ("Mistral", "softmax", {}, "packed", "contiguous"),
        ("Llama", "moba", {"block_size": 4, "top_k": 2}, "padded", "contiguous"),
        ("Llama", "moba", {"block_size": 4, "top_k": 2}, "packed", "head-tail"),
        ("Llama", "prism", {"block_size": 4, "low_freq_threshold": 0.3}, "padded", "contiguous"),
        ("Llama", "spargeattn", {"block_q": 4, "block_k": 4, "top_k": 0.3}, "packed", "contiguous"),
    ],
)
def test_a_switched_model_trains_with_the_loss_of_one_process(
    ranks: Ranks, name: str, slug: str, options: Any, rows: str, balance: str
) -> None:
    ranks(trains, name, slug, options, rows, balance)


def beside(mesh: DeviceMesh, how: str) -> None:
    """Two rows of a batch on two groups of ranks, each row on two ranks."""
    model, batch = _model("Llama"), _batch(2, 30)
    own = mesh["data"].get_local_rank()
    with saccade.switch(model, "window", left=7):
        model(**batch).loss.backward()
    alone = [x.clone() for x in _gradients(model)]
    model.zero_grad()
    with saccade.switch(model, "window", left=7), parallel(mesh["sequence"], length=30) as shards:
        wrapped: Any = model
        if how == "fully_shard":
            everyone = mesh._flatten("all")
            for layer in model.model.layers:  # type: ignore[union-attr]
                fully_shard(layer, mesh=everyone)
            wrapped = fully_shard(model, mesh=everyone)
        elif how == "DDP":
            wrapped = DistributedDataParallel(model)
        loss = wrapped(**parallel.shard({x: y[own : own + 1] for x, y in batch.items()}, shards), use_cache=False).loss
        # data parallelism takes the mean over all ranks, of which those of a row have shares that add up
        (loss * shards.ranks).backward()
    for x, one in zip(model.parameters(), alone, strict=True):
        assert x.grad is not None
        grad = x.grad.full_tensor() if how == "fully_shard" else x.grad  # type: ignore[attr-defined]
        torch.testing.assert_close(grad, one, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("how", ["DDP", "fully_shard"])
def test_data_parallelism_along_the_other_dimension(ranks: Ranks, how: str) -> None:
    ranks(beside, how, size=0)


def refusing(mesh: DeviceMesh) -> None:
    model = _model("Llama")
    batch = _batch(2, 32, "padded")
    with saccade.switch(model, "softmax"), parallel(mesh, length=32) as shards:
        part = parallel.shard(batch, shards)
        with pytest.raises(ValueError, match="attention_mask describes the whole sequence of 32 tokens"):
            model(**{**part, "attention_mask": part["attention_mask"][:, :8]}, use_cache=False)
        ids = torch.arange(8)[None] // 5
        packed = masking_utils.packed_sequence_compatibility_function(masking_utils.causal_mask_function, ids, ids)
        handed = hand_over(batch_size=1, q_length=8, kv_length=8, mask_function=packed)
        with pytest.raises(ValueError, match="position_ids, which this model does not hand"):
            handed.settle(None)


def test_what_a_model_cannot_be_given(ranks: Ranks) -> None:
    ranks(refusing)
