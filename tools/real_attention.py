"""Sections of docs/real-models.md on what is found inside a language model, untrained: limits of its heads, and its
circuits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.explain.normalization_limits import (
    NormalizationLimits,
    critical_count,
    cumulative_distance,
    expected_distance,
    sensitivity,
    separability_bounds,
    top,
)
from saccade.explain.recording import AttentionRecord, Recording, recorded
from saccade.explain.sparse_attention_decomposition import Circuit, causal_check, circuit, over_prompts
from saccade.extras import new_figure
from saccade.train import models
from saccade.train.data.prompts import english_tokens
from saccade.train.lab import Lab

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image as Picture

# ---------------------------------------------------------------------------- limits

#: of the length, N of which the distance is held against that of random sets
SHARES = (0.01, 0.02, 0.04, 0.06, 0.08, 0.12, 0.16, 0.25, 0.35, 0.5)
#: T, that of the model being 1, and steps of the logits
TEMPERATURES, STEPS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0), (1e-3, 0.1, 10.0)
#: names of `Limits.of_heads`, and what a table calls them
OF_LENGTH = {
    "largest": "largest weight", "mass": "their weight", "distance": "distance", "expected": "of random sets",
    "bound": "bound", "separable": "told apart",
}  # fmt: skip
OF_TOP = {
    "mass": "their weight", "distance": "distance", "bound": "bound", "separable": "told apart",
    "least": "Theorem 2: at least", "most": "at most",
}  # fmt: skip

#: by what was varied, a figure of each head
Figures = dict[tuple[Any, ...], Tensor]


def limits(lab: Lab) -> dict[str, Any]:
    """What normalisation lets SmolLM2's heads tell apart, by length of the text.

    Tokens are their embeddings, of length 1. Of each length the last eight rows count, over four texts; each figure is
    of a head, and what is said of all is the mean of heads and, in brackets, where nine tenths of them lie.
    """
    model, tokenizer = models.load("smollm2-135m")
    lengths, tops = lab.size((64, 128, 256, 512, 1024), (16, 32)), lab.size((1, 5, 10, 20, 50, 100), (1, 5))
    texts = lab.size(4, 1)
    ids_BN = english_tokens(tokenizer, texts * lengths[-1]).view(texts, -1)
    x_BND = F.normalize(model.get_input_embeddings()(ids_BN).float(), dim=-1)
    with torch.no_grad(), recorded(model.model) as recording:
        model.model(input_ids=ids_BN)
    by_length, by_top = of_lengths(recording, x_BND, lengths), of_tops(recording, x_BND, lengths[-1], tops)
    by_step = of_steps(recording, lengths[-1], lab.generator())
    row: dict[str, Any] = {"heads": len(by_length["mass", lengths[0], 0]), "texts": texts}
    above = [by_length["distance", n, 0] > by_length["bound", n, 0] + 1e-3 for n in lengths]
    row["share of heads and lengths whose distance is above its bound"] = float(torch.cat(above).float().mean())
    tables: dict[str, list[list[str]]] = {}
    for sinks, title in ((0, "Top 5 tokens"), (1, "The same without each text's first token")):
        first, last = (float(by_length["distance", n, sinks].mean()) for n in (lengths[0], lengths[-1]))
        growth = math.log(last / first) / math.log(lengths[-1] / lengths[0])
        row[f"exponent of the distance in the length{', without the first token' * sinks}"] = growth
        tables[title] = [["tokens", *OF_LENGTH.values()]]
        tables[title] += [[str(n), *(said(by_length[name, n, sinks]) for name in OF_LENGTH)] for n in lengths]
    for length, count in critical_counts(recording, x_BND, lengths).items():
        row[f"critical number of top tokens of {length}"] = "none up to half" if count is None else count
    title = f"Top N of {lengths[-1]} tokens"
    tables[title] = [["N", *OF_TOP.values()]]
    tables[title] += [[str(n), *(said(by_top[name, n]) for name in OF_TOP)] for n in tops]
    title = f"How far the weights of {lengths[-1]} tokens move by a step of their logits: mean of heads, most of a head"
    tables[title] = [["temperature", *(f"step {step:g}" for step in STEPS), "bound 1 / 2T"]]
    for t in TEMPERATURES:
        figures = [by_step[t, step] for step in STEPS]
        cells = [f"{float(each.mean()):.3g}, {float(each.max()):.3g}" for each in figures]
        tables[title].append([f"{t:g}", *cells, f"{1 / (2 * t):.3g}"])
    return row | {"tables": tables, "pictures": {"limits": pictured(lengths, tops, by_length, by_top, by_step)}}


def said(values: Tensor) -> str:
    """The mean, and between which numbers nine tenths lie."""
    low, high = values.quantile(0.05), values.quantile(0.95)
    return f"{float(values.mean()):.3g} ({float(low):.3g} to {float(high):.3g})"


def last_rows(record: AttentionRecord, length: int, rows: int = 8) -> Tensor:
    """The weights of the last rows of the texts' first `length` tokens, over these."""
    return record.weights(rows=list(range(length - rows, length)))[..., :length]


def joined(found: Mapping[tuple[Any, ...], list[Tensor]]) -> Figures:
    """Layers behind each other."""
    return {key: torch.cat(parts) for key, parts in found.items()}


def of_lengths(recording: Recording, x_BND: Tensor, lengths: Sequence[int]) -> Figures:
    """(name, length, tokens left out at the front) -> a figure of each head, of the top 5 tokens."""
    found: dict[tuple[Any, ...], list[Tensor]] = {}
    for record in recording.layers:
        for length in lengths:
            weights = last_rows(record, length)
            for sinks in (0, 1):
                for name, each in NormalizationLimits(5, sinks=sinks)(weights, x_BND[:, :length]).of_heads().items():
                    found.setdefault((name, length, sinks), []).append(each)
    return joined(found)


def of_tops(recording: Recording, x_BND: Tensor, length: int, tops: Sequence[int]) -> Figures:
    """(name, N) -> a figure of each head, and Theorem 2's bounds of what can be told apart."""
    found: dict[tuple[Any, ...], list[Tensor]] = {}
    for record in recording.layers:
        weights = last_rows(record, length)
        for count in tops:
            named = NormalizationLimits(count)(weights, x_BND[:, :length]).of_heads()
            bounds = separability_bounds(weights, x_BND[:, None, None, :length], top(weights, count))
            named |= {name: each.mean((0, 2)) for name, each in zip(("least", "most"), bounds, strict=True)}
            for name, each in named.items():
                found.setdefault((name, count), []).append(each)
    return joined(found)


def of_steps(recording: Recording, length: int, generator: torch.Generator) -> Figures:
    """(temperature, step) -> how far each head's weights of the last row move."""
    found: dict[tuple[Any, ...], list[Tensor]] = {}
    for record in recording.layers:
        logits_BHM = record.scores(rows=[length - 1])[:, :, 0, :length]
        for t in TEMPERATURES:
            for step in STEPS:
                moved = sensitivity(logits_BHM, t, step, generator=generator).mean(0)
                found.setdefault((t, step), []).append(moved)
    return joined(found)


def critical_counts(recording: Recording, x_BND: Tensor, lengths: Sequence[int]) -> dict[int, int | None]:
    """The smallest N at which heads' distances are not told from those of random sets, by length."""
    critical = {}
    for length in lengths:
        counts = sorted({max(1, round(share * length)) for share in SHARES})
        tokens = x_BND[:, None, None, :length]
        ours, random = list[Tensor](), list[Tensor]()
        for record in recording.layers:
            weights = last_rows(record, length)
            apart = [cumulative_distance(weights, tokens, top(weights, count)) for count in counts]
            by_chance = [expected_distance(weights, tokens, count)[0] for count in counts]
            ours.append(torch.stack([each.mean((0, 2)) for each in apart], 1))
            random.append(torch.stack([each.mean((0, 2)) for each in by_chance], 1))
        critical[length] = critical_count(torch.cat(ours), torch.cat(random), counts)
    return critical


def pictured(
    lengths: Sequence[int], tops: Sequence[int], by_length: Figures, by_top: Figures, by_step: Figures
) -> Picture:
    """Four panels: distance by length, distance against its bound, what is told apart by N, steps by temperature."""
    figure = new_figure(11, 8)
    (growth, against), (apart, moves) = figure.subplots(2, 2)
    growth.plot(lengths, torch.stack([by_length["distance", n, 0] for n in lengths]), color="#cccccc", linewidth=0.4)
    for name, label in (("distance", "distance"), ("expected", "of random sets"), ("bound", "bound")):
        growth.plot(lengths, [float(by_length[name, n, 0].mean()) for n in lengths], marker="o", label=label)
    growth.set(xlabel="tokens", ylabel="cumulative distance, N = 5", xscale="log", yscale="log")
    for n in lengths:
        against.plot(by_length["bound", n, 0], by_length["distance", n, 0], ".", markersize=3, label=f"{n} tokens")
    against.axline((1, 1), (2, 2), color="black", linewidth=0.6)
    against.set(xlabel="bound", ylabel="distance of a head", xscale="log", yscale="log")
    apart.plot(tops, torch.stack([by_top["separable", n] for n in tops]), color="#cccccc", linewidth=0.4)
    for name, label in (("separable", "told apart"), ("least", "at least, by Theorem 2")):
        apart.plot(tops, [float(by_top[name, n].mean()) for n in tops], marker="o", label=label)
    apart.set(xlabel=f"N of {lengths[-1]} tokens", ylabel="share of the top N", xscale="log", ylim=(-0.05, 1.05))
    for step in STEPS:
        moves.plot(
            TEMPERATURES, [float(by_step[t, step].max()) for t in TEMPERATURES], marker="o", label=f"step {step:g}"
        )
    moves.plot(TEMPERATURES, [1 / (2 * t) for t in TEMPERATURES], "--", color="black", label="1 / 2T")
    moves.set(xlabel="temperature", ylabel="sensitivity, most of a head", xscale="log", yscale="log")
    for axis in (growth, against, apart, moves):
        axis.legend()
    return drawn(figure)


def drawn(figure: Figure) -> Picture:
    """A figure as a picture."""
    from PIL import Image

    held = BytesIO()
    figure.savefig(held, format="png", dpi=90, bbox_inches="tight")
    return Image.open(held).convert("RGB").quantize(64)


# ---------------------------------------------------------------------------- circuits

#: {0} and {1} in the order of the prompt, {2} who gives: the other one is asked for; and a pair of names
GIVING = {
    "When {0} and {1} went to the store, {2} gave a drink to": ("Mary", "John"),
    "After {0} and {1} had lunch together, {2} gave a book to": ("Tom", "Anna"),
    "While {0} and {1} were working at the office, {2} handed a letter to": ("Alice", "James"),
    "Yesterday {0} and {1} met at the station, and {2} gave a ticket to": ("Paul", "Sarah"),
    "Then {0} and {1} sat down in the garden, and {2} passed a cup to": ("Emma", "David"),
    "Once {0} and {1} had found the ring, {2} decided to give it to": ("Peter", "Laura"),
}
#: words of which texts without a meaning are made
WORDS = (
    "apple", "river", "stone", "music", "window", "paper", "garden", "winter", "bottle", "market", "silver", "engine",
    "forest", "island", "dinner", "rocket", "bridge", "camera", "pencil", "doctor", "summer", "yellow", "castle",
    "planet",
)  # fmt: skip
PLACES = {"local": "at the head that reads", "global": "in the stream"}


def giving() -> Iterator[tuple[str, str, str]]:
    """Text, who receives and who gives: in each sentence either may give, and either is named first."""
    for sentence, pair in GIVING.items():
        for receives, gives in (pair, pair[::-1]):
            for first, second in ((receives, gives), (gives, receives)):
                yield sentence.format(first, second, gives), receives, gives


def repeated(count: int, generator: torch.Generator) -> Iterator[tuple[str, str, None]]:
    """Eight words, and the first few of them again; and the word that comes next."""
    for number in range(count):
        chosen = [WORDS[i] for i in torch.randperm(len(WORDS), generator=generator)[:8].tolist()]
        again = 3 + number % 4
        yield " ".join([*chosen, *chosen[:again]]), chosen[again], None


def circuits(lab: Lab) -> dict[str, Any]:
    """Circuits of SmolLM2 on prompts that it solves: their edges cut, and others.

    Every prompt of a kind is tried, and each that the model solves (the right word is its likeliest one) is traced and
    cut; none is left out. Where a circuit has no edges, cutting it lowers nothing. The lead is that of the right word's
    logit over the other name's, or, of repeated words, over the likeliest other one's.
    """
    model, tokenizer = models.load("smollm2-135m")
    row: dict[str, Any] = {}
    tables: dict[str, list[list[str]]] = {}
    kinds = {
        "indirect object": list(giving())[:: lab.size(1, 12)],
        "repeated words": list(repeated(lab.size(12, 1), lab.generator())),
    }
    for kind, prompts in kinds.items():
        leads, falls, traced, roles = list[float](), dict[tuple[str, str], list[float]](), list[Circuit](), []
        ahead = dict.fromkeys(PLACES, 0)
        for text, right, other in prompts:
            inputs = dict(tokenizer(text, return_tensors="pt"))
            token, *against = (one_token(tokenizer, word) for word in (right, other) if word is not None)
            with torch.no_grad():
                logits_V = model(**inputs).logits[0, -1]
            if int(logits_V.argmax()) != token:
                continue
            found = circuit(model, inputs, (-1, token, *against), tokenizer=tokenizer)  # type: ignore[arg-type]
            traced.append(found)
            roles.append(named_roles(inputs["input_ids"][0].tolist(), token, *against))
            leads.append(float(logits_V[token] - logits_V[found.target[2]]))
            if not found.edges:
                for where in PLACES:
                    falls.setdefault((where, "the circuit"), []).append(0.0)
                continue
            for where in PLACES:
                check = causal_check(model, inputs, found, where=where, draws=lab.size(5, 1), seed=lab.seed)
                for name, fall in {"the circuit": check.fall, **check.falls()}.items():
                    falls.setdefault((where, name), []).append(fall)
                least = min(lead for draws in check.others.values() for lead in draws)
                ahead[where] += check.cut < least
        row[kind] = {
            "prompts": len(prompts),
            "solved": len(traced),
            "edges of each circuit": [len(found.edges) for found in traced],
            **{f"cut {PLACES[where]}: prompts where no random cut loses as much": ahead[where] for where in PLACES},
        }
        tables[f"{kind.capitalize()}: the right word's lead, and by how much cuts lower it"] = [
            ["cut", "prompts", "mean", "standard deviation", "least", "most"],
            line("nothing: the lead itself", leads),
            *(line(f"{name}, {PLACES[where]}", falls[where, name]) for where, name in sorted(falls, reverse=True)),
        ]
        if kind == "indirect object":
            tables["Edges that most circuits of the indirect object have"] = shared_edges(traced, roles)
    return row | {"tables": tables}


def line(name: str, values: Sequence[float]) -> list[str]:
    """Of a table, with mean and spread over prompts."""
    found = torch.tensor([*values] or [math.nan])
    figures = (found.mean(), found.std(correction=0), found.min(), found.max())
    return [name, str(len(values)), *(f"{float(each):.2f}" for each in figures)]


def shared_edges(traced: Sequence[Circuit], roles: Sequence[Mapping[int, str]], count: int = 12) -> list[list[str]]:
    """Those that most prompts have, and their mean contribution."""
    common = over_prompts(traced, roles)
    order = sorted(common.weights, key=lambda edge: (-common.prompts[edge], -common.weights[edge]))[:count]
    lines = [["writer", "read by", "at", "prompts", "contribution"]]
    for edge in order:
        lines.append([*map(str, edge), str(common.prompts[edge]), f"{common.weights[edge]:.2f}"])
    return lines


def one_token(tokenizer: Any, word: str) -> int:
    """The token of a word that follows others."""
    (token,) = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    return token


def named_roles(ids: Sequence[int], receives: int, gives: int | None = None) -> dict[int, str]:
    """What tokens of a prompt are: who receives, who gives (first and second time), what follows, and the end."""
    found = {place: "receives" for place, token in enumerate(ids) if token == receives}
    at = [place for place, token in enumerate(ids) if token == gives]
    for place, name in zip(at, ("gives", "gives again"), strict=False):
        found |= {place: name, place + 1: f"after {name}"}
    return found | {len(ids) - 1: "end"}
