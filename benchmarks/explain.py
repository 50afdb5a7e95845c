"""What looking inside costs: `python benchmarks/explain.py [CASE ...]`.

- **maps**: `saccade.explain` of 512 tokens on MiniLM, every map that takes no call or maximum flow for each token,
  without faithfulness: goal 5 s on two cores. Beside it a call of the model, each map alone once the model has run, and
  the sets of parts of which faithfulness asks the model.
- **memory**: rollout of the last of 4096 tokens through random causal layers, beside the bytes of all of one layer's
  attention: at most a quarter.
- **circuit**: sparse attention decomposition of all heads of SmolLM2-135M (30 layers of 9) on a prompt of 64 tokens:
  one pass, every score that fires taken apart into singular directions, and what each head, MLP and token wrote to
  these. Goal 60 s on two cores. Beside it a call of the model.
- **tensorlens**: the operator of a random encoder at one input, relevance alone: the peak of tensors of all rows
  (L x L), and of one, for L and 2 L tokens, beside the L x D x L x D tensor that is never made. Goals: at most 5 % of
  it, and four times as much at most for twice the tokens, O(L^2 + L D). At a size where that tensor can be had, both
  say the same.

Figures are kept with `--json FILE`, to which a later run of other cases adds; `--markdown FILE` writes them as a page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saccade.bench import records
from saccade.bench.records import Kept, Verdict
from saccade.explain.explanation import explain, subject
from saccade.explain.linearised import LinearModel
from saccade.explain.maps import rollout
from saccade.explain.methods import METHODS, chosen
from saccade.explain.recording import AttentionRecord
from saccade.explain.sparse_attention_decomposition import decompose, read
from saccade.explain.tensorlens import relevance, slices, tensorlens
from saccade.ops.measure import fastest, peak_bytes

TOKENS, SECONDS = 512, 5.0
LONG, LAYERS, HEADS, SHARE = 4096, 4, 8, 0.25
PROMPT, CIRCUIT_SECONDS = 64, 60.0
LENS_WIDTH, LENS_TOKENS, LENS_SHARE = 128, (64, 128), 0.05


def minilm(quick: bool) -> tuple[Any, dict[str, Tensor]]:
    """The encoder, or a tiny one, and so many tokens."""
    if quick:
        import transformers

        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        model = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=99)).eval()
    else:
        from saccade.train.models import load

        model, _ = load("minilm")
    ids = torch.arange(TOKENS)[None] % (model.config.vocab_size // 2) + model.config.vocab_size // 4
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def maps_row(quick: bool) -> dict[str, Any]:
    model, inputs = minilm(quick)
    seen = subject(model, inputs)
    names, run = chosen(seen, None), seen.run()

    def call() -> None:
        with torch.no_grad():
            model(**inputs)

    calls = [call, partial(explain, model, inputs, faithful=False), *(partial(METHODS[n], seen, run) for n in names)]
    plain, seconds, *each = fastest(*calls, repeats=1 if quick else 5, budget=30.0)
    # five random maps and the others, each by two curves of seventeen sets and four shares of parts, both ways
    sets = 2 + 64 + (5 + len(names)) * 2 * (17 + 4)
    return {
        "tokens": TOKENS,
        "seconds": seconds,
        "call_seconds": plain,
        "sets": sets,
        "maps": dict(zip(names, each, strict=True)),
    }


def memory_row(quick: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    length = 256 if quick else LONG
    layers = []
    for number in range(LAYERS):
        q, k = torch.randn(2, 1, HEADS, length, 16)
        layers.append(AttentionRecord(str(number), number, None, q, k, k, None, 0.25, None, q.mT, causal=True))
    bytes_ = peak_bytes(lambda: rollout(layers, rows=[-1]))
    return {"tokens": length, "bytes": bytes_, "attention_bytes": 4 * HEADS * length**2}


def circuit_row(quick: bool) -> dict[str, Any]:
    """Every firing of every head, and its writers."""
    if quick:
        import transformers

        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        torch.manual_seed(0)
        model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=99)).eval()
    else:
        from saccade.train.models import load

        model, _ = load("smollm2-135m")
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    half = torch.randint(vocabulary // 4, vocabulary // 2, (1, PROMPT // 2), generator=generator)
    inputs = {"input_ids": torch.cat([half, half], 1)}  # what is said twice is what induction heads fire at

    def trace() -> tuple[int, int, int]:
        stream = read(model, inputs)
        layers = [decompose(stream, number) for number in range(len(stream.layers))]
        heads = {firing[:2] for layer in layers for firing in layer.firings}
        return len(stream.layers), len(heads), sum(len(layer.firings) for layer in layers)

    def call() -> None:
        with torch.no_grad():
            model(**inputs)

    plain, seconds = fastest(call, trace, repeats=1 if quick else 2, budget=150.0)
    layers, heads, firings = trace()
    return {
        "tokens": PROMPT,
        "seconds": seconds,
        "call_seconds": plain,
        "layers": layers,
        "heads": heads,
        "firings": firings,
    }


def tensorlens_row(quick: bool) -> dict[str, Any]:
    """Peaks of relevance by products, and how far the tensor's own relevance is from them where it can be had."""
    import transformers

    width, lengths = (16, (8, 16)) if quick else (LENS_WIDTH, LENS_TOKENS)
    sizes = {"hidden_size": width, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 4 * width}
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=99)).eval()

    def inputs(length: int) -> dict[str, Tensor]:
        return {"input_ids": torch.arange(length)[None] % 99}

    row: dict[str, Any] = {"width": width, "tokens": list(lengths)}
    row["bytes"] = [peak_bytes(partial(tensorlens, model, inputs(length))) for length in lengths]
    row["one_bytes"] = [peak_bytes(partial(tensorlens, model, inputs(length), rows=[-1])) for length in lengths]
    row["tensor_bytes"] = [4 * (length * width) ** 2 for length in lengths]
    operator = LinearModel(model, inputs(8))
    x, y = operator.x_BLD, operator.y_BLV
    whole = torch.stack([slices(operator, i, y)[0] for i in range(8)])  # T (L, V, L, D)
    dense = torch.einsum("iv,ivjd,jd->ij", y[0], whole, x[0])
    row["error"] = float((relevance(operator, x, y)[0] - dense).abs().max() / dense.abs().max())
    return row


CASES: Mapping[str, Callable[[bool], dict[str, Any]]] = {
    "maps": maps_row,
    "memory": memory_row,
    "circuit": circuit_row,
    "tensorlens": tensorlens_row,
}


def verdicts(kept: Kept) -> list[Verdict]:
    found = []
    if (row := kept.get("maps")) is not None:
        words = f"seconds of all quick maps of {row['tokens']} tokens on MiniLM:"
        found.append(Verdict(words, SECONDS, row["seconds"], row["seconds"] <= SECONDS, ceiling=True))
    if (row := kept.get("memory")) is not None:
        share = row["bytes"] / row["attention_bytes"]
        words = f"memory of a rollout of {row['tokens']} tokens, of one layer's attention:"
        found.append(Verdict(words, SHARE, share, share <= SHARE, ceiling=True))
    if (row := kept.get("circuit")) is not None:
        words = f"seconds of taking all heads of SmolLM2 apart on {row['tokens']} tokens:"
        found.append(Verdict(words, CIRCUIT_SECONDS, row["seconds"], row["seconds"] <= CIRCUIT_SECONDS, ceiling=True))
    if (row := kept.get("tensorlens")) is not None:
        (less, more), tensor = row["bytes"], row["tensor_bytes"][1]
        words = f"memory of TensorLens's relevance of {row['tokens'][1]} tokens, of the tensor's:"
        found.append(Verdict(words, LENS_SHARE, more / tensor, more / tensor <= LENS_SHARE, ceiling=True))
        growth = more / less
        found.append(Verdict("its growth with twice the tokens:", 4.0, growth, growth <= 4.0, ceiling=True))
    return found


def sections(kept: Kept) -> dict[str, list[str]]:
    found = {}
    if (row := kept.get("maps")) is not None:
        lines = [["all of them, with the run", f"{1e3 * row['seconds']:.0f}"]]
        lines += [[name, f"{1e3 * seconds:.0f}"] for name, seconds in row["maps"].items()]
        lines.append(["a call of the model", f"{1e3 * row['call_seconds']:.0f}"])
        found[f"Maps of {row['tokens']} tokens on MiniLM; faithfulness asks {row['sets']} sets of parts"] = (
            records.table(["map", "ms"], lines)
        )
    if (row := kept.get("memory")) is not None:
        figures = [f"{row[name] / 2**20:.1f}" for name in ("bytes", "attention_bytes")]
        found["Memory of a rollout of one token"] = records.table(
            ["tokens", "MiB", "one layer's attention, MiB"], [[str(row["tokens"]), *figures]]
        )
    if (row := kept.get("circuit")) is not None:
        columns = ["tokens", "layers", "heads that fire", "scores taken apart", "s", "a call of the model, s"]
        counts = [str(row[name]) for name in ("tokens", "layers", "heads", "firings")]
        found["Sparse attention decomposition of all heads of SmolLM2-135M"] = records.table(
            columns, [[*counts, *(f"{row[name]:.2f}" for name in ("seconds", "call_seconds"))]], left=0
        )
    if (row := kept.get("tensorlens")) is not None:
        lines = [
            [str(length), *(f"{each / 2**20:,.1f}" for each in figures)]
            for length, *figures in zip(row["tokens"], row["bytes"], row["one_bytes"], row["tensor_bytes"], strict=True)
        ]
        heading = f"TensorLens's relevance, width {row['width']}, 4 blocks; by products and by the tensor alike to "
        found[heading + f"{row['error']:.0e}"] = records.table(
            ["tokens", "all rows, MiB", "one row, MiB", "the tensor, MiB"], lines, left=0
        )
    return found


if __name__ == "__main__":
    records.command(
        __doc__ or "",
        "Speed of looking inside",
        "explain",
        CASES,
        verdicts,
        sections,
        quick="few repeats, a tiny model and few tokens",
    )
