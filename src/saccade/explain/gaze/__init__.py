"""How well a network tells where people look: maps, targets of a gaze, and scanpaths, in double precision.

| measure | of | best | source |
|---|---|---|---|
| `nss` | a map at fixations | high | Peters 2005 |
| `correlation` (CC), `similarity` (SIM), `divergence` (KL) | a map and a density | 1, 1, 0 | Bylinskii 2019 |
| `auc_judd`, `auc_borji`, `shuffled_auc` | a map at fixations and elsewhere | 1 | Judd 2009; Borji 2013; Zhang 2008 |
| `information_gain` | a map and a baseline, bits a fixation | high | Kuemmerer 2015 |
| `gaze_auc`, `gaze_distance` | a heat map of one gaze | 1, 0 | Recasens 2015 |
| `in_out_precision` | whether targets are in the picture | 1 | Chong 2020 |
| `string_edit_distance` | scanpaths, by cells | 0 | Levenshtein 1966; Foulsham 2008 |
| `scanmatch` | scanpaths, by near cells and durations | 1 | Cristino 2010 |
| `multimatch` | scanpaths, as saccades; five figures | 1 | Jarodzka 2010; Dewhurst 2012 |
| `sequence_score` | scanpaths, by clusters of fixations or regions | 1 | Yang 2020 |
| `time_delay_similarity`, `warping_distance` | scanpaths, by points | 1, 0 | Wang 2011; Berndt 1994 |

A map is (H, W) of any values, and is brought to the size of what it is held against, bilinearly. Fixations are a map
(H, W) of 0 and 1 (`fixation_map`), a scanpath is (N, 2 or 3): x and y in pixels, and milliseconds where there are
durations. A map of one value says nothing: NSS and CC are 0, every AUC is 1/2.

The survey of Cartella and others ("Trends, Applications, and Challenges in Human Attention Modelling", arXiv
2402.18673) finds AUC and NSS the most robust. Its authors' own tools differ from the standard definitions in places;
where they do, an argument (`eps`, `ddof`, `counts_itself`) gives theirs.
"""

from saccade.explain.gaze.agreement import diversity_score, histogram_divergence, pairwise, recalled
from saccade.explain.gaze.maps import (
    area_under,
    auc_borji,
    auc_judd,
    blurred,
    correlation,
    density_map,
    divergence,
    fixation_counts,
    fixation_map,
    information_gain,
    map_scores,
    next_fixation_scores,
    nss,
    resized,
    shuffled_auc,
    similarity,
)
from saccade.explain.gaze.multimatch import DIMENSIONS, multimatch, simplified
from saccade.explain.gaze.scanpaths import (
    aligned,
    cells,
    nearness,
    on_image,
    scanmatch,
    scanpath_scores,
    string_edit_distance,
    string_edit_similarity,
    time_delay_distance,
    time_delay_distances,
    time_delay_similarity,
    warping_distance,
)
from saccade.explain.gaze.sequences import Clusters, clusters, match, regions, repeated, sequence_score
from saccade.explain.gaze.targets import gaze_auc, gaze_distance, in_out_precision, peak, target_box

__all__ = [
    "DIMENSIONS",
    "Clusters",
    "aligned",
    "area_under",
    "auc_borji",
    "auc_judd",
    "blurred",
    "cells",
    "clusters",
    "correlation",
    "density_map",
    "divergence",
    "diversity_score",
    "fixation_counts",
    "fixation_map",
    "gaze_auc",
    "gaze_distance",
    "histogram_divergence",
    "in_out_precision",
    "information_gain",
    "map_scores",
    "match",
    "multimatch",
    "nearness",
    "next_fixation_scores",
    "nss",
    "on_image",
    "pairwise",
    "peak",
    "recalled",
    "regions",
    "repeated",
    "resized",
    "scanmatch",
    "scanpath_scores",
    "sequence_score",
    "shuffled_auc",
    "similarity",
    "simplified",
    "string_edit_distance",
    "string_edit_similarity",
    "target_box",
    "time_delay_distance",
    "time_delay_distances",
    "time_delay_similarity",
    "warping_distance",
]
