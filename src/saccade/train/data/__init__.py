"""Data that needs no network: text, digits, and generators that are themselves the benchmark.

| name | what | from |
|---|---|---|
| `text_bytes` | 465 kB of English | CPython's `pydoc_data.topics` |
| `sentences` | its sentences, topic by topic | the same |
| `read_files` | the user's own files as bytes | |
| `digits` | 1797 images of handwritten digits, 8 x 8 | scikit-learn (extra `saccade[data]`) |
| `paired` | two noisy views of a digit, either may be missing | the same |
| `photographs` | faces, animals, things, in colour or grey | scikit-image (the same extra) |
| `crops` | windows of the same places of such pictures and their labels | |
| `faces`, `degraded` | grey faces, and several degraded views of things | scikit-image, generated |
| `hazy` | such pictures in haze, by its physical model | |
| `view_pairs`, `stereo_pair` | two views of one place, and where pixels of one lie in the other | the same |
| `scenes` | digits and shapes on such windows, and their boxes | generated |
| `gazes` | people who look at things, before such windows | generated |
| `searches` | arrays of objects, and in which order one is searched for | generated |
| `salients` | such windows with a thing that stands out | generated |
| `Market`, `read_log` | clicks on rows of categories whose reasons are known, or of files | generated |
| `described` | coloured shapes and digits, and a sentence of each scene | the same |
| `composed` | pictures of a thing, sentences that describe them or ask for another | generated |
| `solids` | balls and boxes under rays: what cameras see of them | generated |
| `moving` | videos of such windows that move before each other, and where their points are | generated |
| `streams` | sound and picture in which events happen, and a question in words about one | generated |
| `planted_tokens`, `planted_shapes` | words, and forms, of which it is known which decide | generated |
| `english`, `retrieval` | for language models: a text, and questions about a number said before | CPython, generated |
| `recall` | multi-query associative recall | generated (Arora et al., arXiv 2312.04927) |
| `listops` | nested MAX/MIN/MED/SM expressions | generated (Tay et al., arXiv 2011.04006) |

Everything random comes from a `torch.Generator`: the same generator state gives the same data.
"""

from saccade.train.data import solids
from saccade.train.data.clicks import Clicks, Log, Market, read_log
from saccade.train.data.composed import Composed, composed
from saccade.train.data.described import WORDS, Described, described, sentence
from saccade.train.data.draws import generator_at, rows
from saccade.train.data.haze import Hazy, depths, hazy
from saccade.train.data.identities import CONDITIONS, degraded, faces
from saccade.train.data.looking import Gazes, Salients, Searches, gazes, salients, searches
from saccade.train.data.moving import Moving, moving
from saccade.train.data.pairs import ViewPairs, stereo_pair, view_pairs
from saccade.train.data.pictures import PHOTOGRAPHS, Digits, Paired, crops, digits, paired, photographs, recoloured
from saccade.train.data.planted import PlantedShapes, PlantedTokens, planted_shapes, planted_tokens
from saccade.train.data.prompts import DEPTHS, KEYS, Prompt, Retrieval, english, english_tokens, retrieval
from saccade.train.data.scenes import Scenes, scenes
from saccade.train.data.sequences import IGNORE, LISTOPS_TOKENS, listops, recall
from saccade.train.data.streams import Streams, streams
from saccade.train.data.text import read_files, sentences, text_bytes, windows

__all__ = [
    "CONDITIONS",
    "DEPTHS",
    "IGNORE",
    "KEYS",
    "LISTOPS_TOKENS",
    "PHOTOGRAPHS",
    "WORDS",
    "Clicks",
    "Composed",
    "Described",
    "Digits",
    "Gazes",
    "Hazy",
    "Log",
    "Market",
    "Moving",
    "Paired",
    "PlantedShapes",
    "PlantedTokens",
    "Prompt",
    "Retrieval",
    "Salients",
    "Scenes",
    "Searches",
    "Streams",
    "ViewPairs",
    "composed",
    "crops",
    "degraded",
    "depths",
    "described",
    "digits",
    "english",
    "english_tokens",
    "faces",
    "gazes",
    "generator_at",
    "hazy",
    "listops",
    "moving",
    "paired",
    "photographs",
    "planted_shapes",
    "planted_tokens",
    "read_files",
    "read_log",
    "recall",
    "recoloured",
    "retrieval",
    "rows",
    "salients",
    "scenes",
    "searches",
    "sentence",
    "sentences",
    "solids",
    "stereo_pair",
    "streams",
    "text_bytes",
    "view_pairs",
    "windows",
]
