"""Reading maps at points between their pixels: one and many scales, bilinear and discrete, and biases there.

Every form is a weighted sum of rows of a map whose channels lie together, out_k = sum_s w_ks row[i_ks]: a bilinear
sample is a sum of four rows, and multi-scale deformable attention

    out[b, n, h] = sum_s a[b, n, h, s] * sample(level of s, location[b, n, h, s])

is a sum of 4 S rows. So samples are never made: three primitives carry everything, forward and backward, and each
other's derivatives are among them (differentiable any number of times):

    gather_sum (rows, i, w)_k = sum_s w_ks rows[i_ks]           derivatives: scatter_sum in rows, gather_dot in w
    gather_dot (q, rows, i)_ks = q_k . rows[i_ks]               derivatives: gather_sum in q, scatter_sum in rows
    scatter_sum(i, w, g)_r = sum over (k, s) with i_ks = r of w_ks g_k

In single precision on CPUs they are C (`ops.native.gather`). Elsewhere on CPUs they run on `embedding_bag`, on the
sampled product of sparse matrices, and on an `embedding_bag` over the sorted indices: rows are read once, in the cache,
and added in registers.

A bias that depends on where a key's sampling point lies relative to a query (`bias_at_points`), from a table with one
cell per pixel of displacement: all queries of a grid see a point at the same fraction of a cell, so the bias of a
point is a crop of the table, as large as the grid, and shifted by that fraction. Grid sampling would find four cells
anew for every pair.

Coordinates are (x, y), in pixels, a whole number in the middle of a pixel: `pixels` makes them of normalised ones.
Points outside the map read zeros ("zeros") or the nearest pixel of the border ("border"), as in `F.grid_sample`.
Discrete forms have gradients in weights and maps, none in locations.

`roi_align` reads the maps of a pyramid inside boxes, from each box's level, by the same sums.

Exporters (torch.export, ONNX) see operators of torch's own, and grid sampling in none but `bias_at_points`. Numbers of
images may stay open (`dynamic_shapes`).
"""

from saccade.ops.deformable.attend import deformable_attend, deformable_attend_reference
from saccade.ops.deformable.convolution import deformable_conv
from saccade.ops.deformable.crops import bias_at_points
from saccade.ops.deformable.points import Samples, level_pixels, pixels, sample, samples
from saccade.ops.deformable.regions import roi_align
from saccade.ops.deformable.sums import gather_dot, gather_sum, scatter_sum

__all__ = [
    "Samples",
    "bias_at_points",
    "deformable_attend",
    "deformable_attend_reference",
    "deformable_conv",
    "gather_dot",
    "gather_sum",
    "level_pixels",
    "pixels",
    "roi_align",
    "sample",
    "samples",
    "scatter_sum",
]
