"""Past one machine: one sequence in parts, one on each rank of a dimension of a device mesh.

    mesh = init_device_mesh("cuda", (2, 8), mesh_dim_names=("data", "sequence"))
    with saccade.parallel(mesh["sequence"]):                # every tensor holds this rank's part of the sequence
        out = saccade.attend(q, k, v, mask=masks.causal())  # the mask describes the whole of it

Inside, a function of a sequence gives this rank's part of what one process would give, forward and backward; so do the
layers that are made of them and the `saccade_*` attention implementations in transformers. What has no rule for parts
is refused. A gradient of a parameter is this rank's share: summed over the ranks it is that of one process.

    parallel(mesh, balance=, unit=, length=, timeout=)      the context; as a value it is a `Shards`
    parallel.shard(x, mesh, ...), unshard(...)      this rank's part of a tensor or of a batch, and the whole again
    parallel.replicated()                           inside: tensors are whole after all
    parallel.traffic()                              every byte that was sent and received, forward and backward
    parallel.plan(function, ..., mesh=)             the same of one call, a layer or a model, before it runs

How it goes on: `saccade.ops.sharding` says who holds which tokens (`Layout`) and who needs which (`Needs`), without a
tensor. A function is marked `saccade.ops.sharding.in_parts`; a row of its name in `saccade.parallel.rows.ROWS` computes
it, called `row(shards, function, *arguments, **options)` with the context suspended, so that `function` in it is the
plain one; a forecast of its name in `saccade.parallel.forecasts` says what that costs, by asking who is sent what where
the row asks it. Rows move tensors by `exchange`, `gather` and `gather_parts` of `saccade.parallel.exchange` alone,
which have gradients and count every byte in `shards.traffic` under the name that they are given; by those `deals` cuts
a batch in another way, and `dense.halo` fetches what a mask asks for.
"""

from __future__ import annotations

from saccade.callable_package import callable_package

#: name -> the module that has it
_LAZY = {
    "Shards": "context",
    "Traffic": "counted",
    "plan": "forecasts",
    "replicated": "context",
    "shard": "batches",
    "traffic": "context",
    "unshard": "batches",
}

__getattr__ = callable_package(__name__, "context.parallel", _LAZY)
