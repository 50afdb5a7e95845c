"""How the tools of six of the survey's authors map to ours: measures alone, without parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saccade.catalogue.ports import of_function
from saccade.explain import gaze

Inputs = dict[str, Tensor]
Measure = Callable[[Tensor, Tensor], float]


def _paths(inputs: Inputs, kind: str) -> list[Tensor]:
    """Scanpaths that are laid end to end."""
    path = torch.stack([inputs[f"{kind}_{name}"] for name in ("x", "y", "duration")], 1)
    return list(path.split(inputs[f"{kind}_lengths"].tolist()))


def _both(inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    return _paths(inputs, "real"), _paths(inputs, "generated")


def _size(args: dict[str, Any]) -> tuple[int, int]:
    return args["height"], args["width"]


def _double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.double)


def _maps(module: Any, inputs: Inputs, args: dict[str, Any]) -> Inputs:
    at, density = inputs["fixations"], inputs["density"]
    jitter = 1e-7 if args.get("jitter") else 0.0
    found = {
        "cc_constant": _double(gaze.correlation(torch.full(at.shape, 0.3), density)),
        "map_from_points": gaze.density_map(inputs["points"], (at.shape[0], at.shape[1]), args["sigma"]),
    }
    for name in ("p", "q"):
        figures = {
            "auc_judd": gaze.auc_judd(inputs[name], at, jitter=jitter, counts_itself=True),
            "kldiv": gaze.divergence(inputs[name], density, eps=1e-12),
            "nss_sample_std": gaze.nss(inputs[name], at, ddof=1),
            "nss_population_std": gaze.nss(inputs[name], at),
            "cc": gaze.correlation(inputs[name], density),
        }
        found |= {f"{measure}_{name}": _double(value) for measure, value in figures.items()}
    return found


def _string_edit(module: Any, inputs: Inputs, args: dict[str, Any]) -> Inputs:
    n, size = args["n"], _size(args)

    def measure(cost: int) -> Measure:
        return lambda a, b: gaze.string_edit_distance(a, b, size, grid=(n, n), cost=cost)

    real, generated = _both(inputs)
    return {
        "distance": gaze.pairwise(measure(1), real, generated),
        "distance_cost2": gaze.pairwise(measure(2), real, generated),
    }


def _time_delay(module: Any, inputs: Inputs, args: dict[str, Any]) -> Inputs:
    (real, generated), size = _both(inputs), _size(args)

    def unscaled(reduce: Callable[[Tensor], Tensor]) -> Tensor:
        tables = [
            gaze.pairwise(lambda a, b, k=k: float(reduce(gaze.time_delay_distances(a, b, k))), real, generated)  # type: ignore[misc]
            for k in args["k"]
        ]
        return torch.stack(tables, -1)

    return {
        "similarity": gaze.pairwise(lambda a, b: gaze.time_delay_similarity(a, b, size), real, generated),
        "distance": gaze.pairwise(lambda a, b: gaze.time_delay_distance(a, b, size), real, generated),
        "unscaled_mean": unscaled(Tensor.mean),
        "unscaled_hausdorff": unscaled(Tensor.amax),
    }


def _multimatch(module: Any, inputs: Inputs, args: dict[str, Any]) -> Inputs:
    (real, generated), size = _both(inputs), _size(args)
    angle = 45.0 if args.get("grouping") else None

    def table(columns: int) -> Tensor:
        rows = [[gaze.multimatch(a[:, :columns], b[:, :columns], size, angle=angle) for b in generated] for a in real]
        return torch.stack([torch.stack(row) for row in rows])

    pairs = [gaze.multimatch(a, b, size, angle=angle) for i, a in enumerate(real) for b in real[i + 1 :]]
    return {"similarity": table(3), "no_duration": table(2), "self_similarity": torch.stack(pairs)}


def _scanmatch(module: Any, inputs: Inputs, args: dict[str, Any]) -> Inputs:
    bins, size = (args["x_bins"], args["y_bins"]), _size(args)
    shift = torch.tensor([*args.get("offset", (0.0, 0.0)), 0.0], dtype=torch.double)
    real, generated = ([path - shift for path in paths] for paths in _both(inputs))
    threshold, gap = args["threshold"], args["gap"]

    def measure(time_bin: float) -> Measure:
        return lambda a, b: gaze.scanmatch(a, b, size, bins=bins, time_bin=time_bin, threshold=threshold, gap=gap)

    found = {"substitution_rows": gaze.nearness(bins, threshold)[[0, 100]]}
    for time_bin in args["time_bins_ms"]:
        found[f"score_{time_bin}ms"] = gaze.pairwise(measure(time_bin), real, generated)
        found[f"self_{time_bin}ms"] = gaze.pairwise(measure(time_bin), real)
    found["real_sequence_0ms"] = torch.tensor([cell for path in real for cell in gaze.cells(path, size, bins)])
    return found


def _sequences(module: Any, inputs: Inputs, args: dict[str, Any]) -> Inputs:
    real, generated = _both(inputs)
    where, most = gaze.clusters(real, args["bandwidth_factors"]), args["truncate"]

    def plain(a: Tensor, b: Tensor) -> float:
        return gaze.sequence_score(a, b, where, most=most)

    def timed(a: Tensor, b: Tensor) -> float:
        return gaze.sequence_score(a, b, where, time_bin=args["tempbin_ms"], most=most)

    def semantic(a: Tensor, b: Tensor) -> float:
        return gaze.sequence_score(a, b, inputs["segmentation"], most=most)

    score, time_score = gaze.pairwise(plain, generated, real), gaze.pairwise(timed, generated, real)
    human, model = gaze.pairwise(timed, real), gaze.pairwise(timed, generated)
    others = [[plain(a, b) for j, b in enumerate(real) if j != i] for i, a in enumerate(real)]
    return {
        "estimated_bandwidth": _double(where.estimated),
        "bandwidth": _double(where.bandwidth),
        "cluster_centers": where.centres,
        "real_symbols": torch.tensor([symbol for path in real for symbol in where.symbols(path)]),
        "generated_symbols": torch.tensor([symbol for path in generated for symbol in where.symbols(path)]),
        "score": score,
        "time_score": time_score,
        "semantic_score": gaze.pairwise(semantic, generated, real),
        "score_mean": score.mean(1),
        "score_max": score.amax(1),
        "recall": _double(gaze.recalled(score, args["threshold"])),
        "time_recall": _double(gaze.recalled(time_score, args["threshold"])),
        "self_score": torch.tensor(others, dtype=torch.double),
        "self_time_score": human,
        "model_time_score": model,
        "diversity_time_score": _double(gaze.diversity_score(time_score, human, model)),
        "kl_time": _double(gaze.histogram_divergence(human, time_score, args["bins"])),
    }


PORTS = (
    of_function("saliency_metrics", _maps),
    of_function("string_edit_distance", _string_edit),
    of_function("time_delay_embedding", _time_delay),
    of_function("multimatch", _multimatch),
    of_function("scanmatch", _scanmatch),
    of_function("sequence_score", _sequences),
)
