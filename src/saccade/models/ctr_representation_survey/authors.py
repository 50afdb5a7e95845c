"""How modules of the survey's first author, for methods of its field, map to ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.names import Place
from saccade.catalogue.ports import Arguments
from saccade.models.click import fm
from saccade.models.ctr_representation_survey.dimension import binary_step
from saccade.models.ctr_representation_survey.generation import OptInter
from saccade.models.ctr_representation_survey.network import ClickModel
from saccade.models.ctr_representation_survey.selection import (
    AdaFS,
    autofield_gates,
    lpfs_gates,
    lpfs_plus_gates,
    temperature_at,
)

#: the first-order term and the MLP of all of them
_SHARED: dict[str, Place] = {
    "linear.fc.weight": "first.table.weight",
    "linear.bias": "first.bias",
    "mlp.mlp.{i}.{leaf}": "interaction.mlp.{i}.{leaf}",
}
_SIZES = {"latent_dim": "dim", "field_dim": "fields", "mlp_dims": "hidden", "mlp_dropout": "drop"}


def _ids(inputs: Mapping[str, Tensor], fields: list[int]) -> Tensor:
    """The authors' ids count through all fields, ours from 0 in each."""
    x = inputs["x"]
    return x - x.new_tensor((0, *accumulate(fields[:-1])))


def _autofield(module: ClickModel, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    ids = _ids(inputs, args["field_dim"])
    embed = module.embed(ids) * autofield_gates(inputs["arch"], args.get("beta", 1.0))[:, None]
    return {"embed": embed, "logit": module.logit(embed, ids)}


def _lpfs(module: ClickModel, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    ids, a = _ids(inputs, args["field_dim"]), inputs["arch"]
    options = {"alpha": args.get("alpha", 100), "tau": args.get("tao", 2), "initial": args.get("init_val", 1.0)}
    gates = {
        "lpfs": lpfs_gates(a, args["epsilon_lpfs"]),
        "lpfspp": lpfs_plus_gates(a, args["epsilon_lpfspp"], **options),
    }
    found = {f"gate_{name}": gate for name, gate in gates.items()}
    return found | {
        f"logit_{name}": module.logit(module.embed(ids) * gate[:, None], ids) for name, gate in gates.items()
    }


def _adafs(module: ClickModel, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    ids = _ids(inputs, args["field_dim"])
    selection = module.selection
    assert isinstance(selection, AdaFS)
    said = module(ids)
    selection.pretraining = True
    pretraining = module(ids).embeddings
    selection.pretraining = False
    return {"embed": said.embeddings, "logit": said.logits, "embed_pretrain": pretraining}


def _optfs(module: ClickModel, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    ids = _ids(inputs, args["field_dims"])
    found: dict[str, Tensor] = {}
    module.table.temperature = args.get("temp", 1.0)
    for name, ticket in (("soft", False), ("ticket", True)):
        module.table.ticket = ticket
        said = module(ids)
        found |= {f"embed_{name}": said.embeddings, f"logit_{name}": said.logits[:, None]}
    module.table.ticket = False
    return found | {"reg": module.table.open()[None]}


def _optembed(module: ClickModel, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    ids, table = _ids(inputs, args["field_dim"]), module.table
    said = module(ids)
    found = {"feature_mask": table.row_mask(), "embed_test": said.embeddings, "logit_test": said.logits}
    replaces, table.replaces = table.replaces, False  # the evolution model has no other form
    table.choose(inputs["candidate"].tolist())
    embed = module.embed(ids)
    table.choose(None)
    table.replaces = replaces
    with torch.enable_grad():
        points = inputs["step_points"].clone().requires_grad_()
        (slope,) = torch.autograd.grad(binary_step(points).sum(), points)
    assert module.first is not None
    logit = fm(embed) + module.first(ids)
    return found | {"embed_candidate": embed, "logit_candidate_fm": logit, "step_grad": slope}


def _optinter_search(args: dict[str, Any]) -> nn.Module:
    """How many rows the table has is recorded, not how many each field: the last has what the others, of one, leave."""
    numeric, count = args["cont_field"], args["cate_field"]
    options = {"width": args["comb_embedding_dim"], "crosses": args["comb_feature"]}
    if "selected_pairs" in args:
        options["pairs"] = [tuple(pair) for pair in args["selected_pairs"]]
    return ClickModel(
        [*[1] * (count - 1), args["cate_cont_feature"] - numeric - count + 1],
        numeric,
        args["orig_embedding_dim"],
        generation="optinter",
        interaction="fnn",
        hidden=args["hidden_dims"],
        norm="layer",
        first_order=False,
        generation_options=options,
    )


def _optinter_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    last = 4 * sum(name.startswith("fc_layers.") and name.endswith(".weight") for name in state)
    table: dict[str, Place] = {
        "orig_embeddings_table.weight": "table.weight",
        "comb_embeddings_table.weight": "generation.cross.weight",
        "addition_embedding_table.weight": "generation.factors.weight",
        "arch_parameters": "generation.logits",
        "fc_layers.{i}.{leaf}": _layer(0),
        "norm_layers.{i}.{leaf}": _layer(1),
        "output_layer.{leaf}": f"interaction.mlp.{last}.{{leaf}}",
    }
    return Names(table)(state)


def _layer(place: int) -> Callable[[Mapping[str, str]], str]:
    """Of four layers for each width: linear, norm, ReLU, dropout."""
    return lambda texts: f"interaction.mlp.{4 * int(texts['i']) + place}.{texts['leaf']}"


def _optinter(module: ClickModel, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    generation = module.generation
    assert isinstance(generation, OptInter)
    generation.temperature = temperature_at(args.get("step", 0), args.get("tau", 5e-5))
    cates = inputs["cates"]
    start = torch.tensor((0, *accumulate(module.fields[:-1])), device=cates.device)
    said = module(cates - args["cont_field"] - start, inputs["conts"], inputs["combs"])
    return {"prob": said.logits.sigmoid()[:, None], "alpha": generation.shares()}


PORTS = (
    AuthorsPort(
        "autofield_deepfm",
        build=Arguments(ClickModel, _SIZES),
        convert=Names({**_SHARED, "embedding": "table.weight"}),
        run=_autofield,
    ),
    AuthorsPort(
        "lpfs_fm",
        build=Arguments(ClickModel, _SIZES, interaction="fm"),
        convert=Names({**_SHARED, "embedding": "table.weight"}),
        run=_lpfs,
    ),
    AuthorsPort(
        "adafs_fm",
        build=Arguments(ClickModel, _SIZES, interaction="fm", selection="adafs"),
        convert=Names({**_SHARED, "embedding": "table.weight", "controller.0.{leaf}": "selection.controller.{leaf}"}),
        run=_adafs,
    ),
    AuthorsPort(
        "optfs_deepfm",
        build=Arguments(
            ClickModel,
            {
                "latent_dim": "dim",
                "field_dims": "fields",
                "mlp_dims": "hidden",
                "mlp_dropout": "drop",
                "use_bn": ("norm", {True: "batch", False: "none"}),
                "mask_initial": ("table_options", lambda c: {"initial": c}),
            },
            defaults={"use_bn": True},
            first_order=False,
            derived={"table": lambda args: "optfs"},
        ),
        convert=Names(
            {
                "dnn.mlp.{i}.{leaf}": "interaction.mlp.{i}.{leaf}",
                "mask_embedding.embedding": "table.weight",
                "mask_embedding.mask_weight": "table.mask_logits",
                "mask_embedding.init_weight": None,  # the weights to which retraining goes back
            }
        ),
        run=_optfs,
    ),
    AuthorsPort(
        "optembed_deepfm",
        build=Arguments(
            ClickModel,
            _SIZES,
            derived={
                "table": lambda args: "optembed",
                "table_options": lambda args: {
                    "threshold": {"field": "field"}.get(args.get("mode_threshold", "field"), "value"),
                    "oov": "zero" if args.get("mode_oov", "zero") == "zero" else "vector",
                    "p": args.get("norm", 1),
                },
            },
            norm="batch",
        ),
        convert=Names(
            {**_SHARED, "embedding": "table.weight", "threshold": "table.threshold", "oov_embedding": "table.oov"}
        ),
        run=_optembed,
    ),
    AuthorsPort("optinter_search", build=_optinter_search, convert=_optinter_names, run=_optinter),
)
