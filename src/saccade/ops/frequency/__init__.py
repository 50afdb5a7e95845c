"""Maps and volumes by their frequencies: Fourier, cosines, wavelets, the Laplacian; of any size, over any axes.

| file        | what it holds                                                                            |
|-------------|------------------------------------------------------------------------------------------|
| `dct`       | statistics of channels over a cosine basis, on a grid of reference                       |
| `extension` | what a signal is beyond its ends                                                         |
| `fourier`   | a function applied to the spectrum; learned spectral filters at any size                 |
| `wavelets`  | the discrete wavelet transform and its inverse, by convolution                           |
| `laplacian` | the discrete Laplacian; weights that matter, held at their target (elastic consolidation) |
"""

from saccade.ops.frequency.dct import cosine_basis, dct_statistics, dct_statistics_reference
from saccade.ops.frequency.extension import EXTENSIONS, extend
from saccade.ops.frequency.fourier import on_spectrum, resize_spectrum, spectral_filter
from saccade.ops.frequency.laplacian import (
    consolidated,
    elastic_penalty,
    fisher_information,
    important,
    laplacian,
    laplacian_kernel,
)
from saccade.ops.frequency.wavelets import WaveletFilters, dwt, idwt, orthogonal_filters, wavelet_filters

__all__ = [
    "EXTENSIONS",
    "WaveletFilters",
    "consolidated",
    "cosine_basis",
    "dct_statistics",
    "dct_statistics_reference",
    "dwt",
    "elastic_penalty",
    "extend",
    "fisher_information",
    "idwt",
    "important",
    "laplacian",
    "laplacian_kernel",
    "on_spectrum",
    "orthogonal_filters",
    "resize_spectrum",
    "spectral_filter",
    "wavelet_filters",
]
