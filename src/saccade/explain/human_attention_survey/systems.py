"""The survey's map: its systems with their place and their tags, and the data sets that it names, as data.

    people    human attention modelled: saliency (a map) or scanpaths (fixations in order)
    models    human attention put into models of vision, vision and language, language, and domains

A tag that our source does not give is empty, but for three kinds that are read from the branch or the name (ours): a
saliency or scanpath system is taken to look freely at images where nothing else is said, and some `use` is in the name.
"""

from __future__ import annotations

from typing import NamedTuple

from saccade.tables import table

#: axis -> its tags
TAGS: dict[str, tuple[str, ...]] = {
    "task": ("saliency", "scanpath"),
    "stimulus": ("image", "video", "text", "360", "driving", "medical"),
    "condition": ("free", "search", "question", "reading"),
    "use": ("input", "supervision", "sequence", "evaluation", "reward"),
}


class System(NamedTuple):
    """One system of the survey.

    Attributes:
        name: the survey's, or what it does.
        year: of its paper; None where our source has none.
        place: branch and twig, "people/saliency".
        task, stimulus, condition, use: tags, of `TAGS`; empty where none is given.
    """

    name: str
    year: int | None
    place: str
    task: str = ""
    stimulus: str = ""
    condition: str = ""
    use: str = ""


def _saliency(name: str, year: int, stimulus: str = "image") -> System:
    return System(name, year, "people/saliency", "saliency", stimulus, "free")


def _scanpath(name: str, year: int, condition: str = "free") -> System:
    return System(name, year, "people/scanpaths", "scanpath", "image", condition)


def _in_model(
    place: str, name: str, year: int | None, stimulus: str = "image", condition: str = "", use: str = ""
) -> System:
    return System(name, year, f"models/{place}", "", stimulus, condition, use)


SYSTEMS: tuple[System, ...] = (
    _saliency("feature integration (Itti)", 1998),
    _saliency("learned from fixations (Judd)", 2009),
    _saliency("SALICON", 2015),
    _saliency("SAM", 2018),
    _saliency("STAViS", 2020, "video"),
    _saliency("multi-duration saliency", 2020),
    _saliency("TranSalNet", 2022),
    _saliency("TempSAL", 2023),
    _saliency("user-aware saliency", 2023),
    _saliency("clustered saliency", 2023),
    _saliency("SalTR", 2024),
    _saliency("SUM", 2025),
    _scanpath("saccadic model", 2015),
    _scanpath("G-Eymol", 2019),
    _scanpath("VQA scanpaths", 2021, "question"),
    _scanpath("DeepGaze III", 2022),
    _scanpath("NeVA", 2022),
    _scanpath("target-absent search", 2022, "search"),
    _scanpath("Gazeformer", 2023, "search"),
    _scanpath("CLIP as zero-shot predictor", 2023),
    _scanpath("HAT", 2024, "search"),
    _scanpath("individualised scanpaths", 2024),
    _scanpath("ART", 2024, "search"),
    _scanpath("GazeXplain", 2024),
    _scanpath("TPP-Gaze", 2025),
    _in_model("vision", "egocentric activity with gaze", None, "video"),
    _in_model("vision", "video object segmentation", None, "video"),
    _in_model("vision", "foveated computation", None),
    _in_model("vision", "sound localisation", None, "video"),
    _in_model("vision", "importance maps for designs", None),
    _in_model("vision", "saliency-guided editing", None, use="input"),
    _in_model("vision", "distraction reduction", None),
    _in_model("vision", "saliency-weighted image quality", None, use="input"),
    _in_model("vision", "360 degree scanpaths for image quality", None, "360", use="sequence"),
    _in_model("vision and language", "gaze-assisted captioning", None, use="input"),
    _in_model("vision and language", "saliency and context attention", None, use="input"),
    _in_model("vision and language", "supervised video attention", None, "video", use="supervision"),
    _in_model("vision and language", "sequential gaze alignment", None, use="sequence"),
    _in_model("vision and language", "VQA-HAT", 2016, condition="question", use="evaluation"),
    _in_model("vision and language", "attention supervision", 2018, condition="question", use="supervision"),
    _in_model("vision and language", "AiR", 2020, condition="question", use="supervision"),
    _in_model("vision and language", "VQA-MHUG", 2021, condition="question", use="evaluation"),
    _in_model("vision and language", "multimodal human-like attention", 2023, condition="question", use="supervision"),
    _in_model("vision and language", "GazeVQA", 2023, condition="question"),
    _in_model("language", "reading comprehension from gaze", None, "text", "reading"),
    _in_model("language", "native language from gaze", None, "text", "reading", "sequence"),
    _in_model("language", "gaze-guided neural attention", 2020, "text", "reading", "supervision"),
    _in_model("language", "synthetic scanpaths", 2023, "text", "reading", "sequence"),
    _in_model("language", "gaze-based reward", 2025, "text", "reading", "reward"),
    _in_model("domains/robotics", "gaze for intention", None),
    _in_model("domains/robotics", "teacher gaze", None),
    _in_model("domains/driving", "DR(eye)VE", 2018, "driving"),
    _in_model("domains/driving", "critical situations", 2018, "driving"),
    _in_model("domains/driving", "DADA", 2019, "driving"),
    _in_model("domains/driving", "semantic gaze", 2020, "driving"),
    _in_model("domains/driving", "MEDIRL", 2021, "driving"),
    _in_model("domains/driving", "FBLNet", 2023, "driving"),
    _in_model("domains/medicine", "chest X-ray gaze data", 2021, "medical"),
    _in_model("domains/medicine", "Follow My Eye", 2022, "medical", use="supervision"),
    _in_model("domains/medicine", "RadioTransformer", 2022, "medical", use="supervision"),
    _in_model("domains/medicine", "GazeRadar", 2022, "medical"),
    _in_model("domains/medicine", "EG-ViT", 2023, "medical", use="input"),
    _in_model("domains/medicine", "shortcut rectification", 2023, "medical"),
    _in_model("domains/medicine", "GazeGNN", 2024, "medical", use="input"),
    _in_model("domains/medicine", "gaze contrastive learning", 2024, "medical"),
    _in_model("domains/medicine", "weak segmentation by gaze", 2024, "medical", use="supervision"),
)

#: what they are of -> data sets that the survey names
DATA_SETS: dict[str, tuple[str, ...]] = {
    "saliency": ("MIT1003", "MIT300", "CAT2000", "SALICON"),
    "search and question": ("COCO-Search18", "OSIE", "AiR-D"),
    "driving": ("DR(eye)VE", "DADA"),
    "egocentric": ("EGTEA Gaze+",),
    "chest X-ray": ("REFLACX", "EGD"),
}


def systems(place: str = "", **tags: str) -> list[System]:
    """The systems at a place, with some tags.

    Args:
        place: the beginning of it, such as "people" or "models/domains"; all where empty.
        **tags: of `TAGS`, an axis each.

    Raises:
        ValueError: if there is no such axis, tag or place.

    >>> [system.name for system in systems("people", condition="question")]
    ['VQA scanpaths']
    """
    for axis, tag in tags.items():
        if tag not in TAGS.get(axis, ()):
            there = "; ".join(f"{name} {', '.join(values)}" for name, values in TAGS.items())
            raise ValueError(f"there is no {axis}={tag!r}; there are {there}")
    if place and not any(system.place.startswith(place) for system in SYSTEMS):
        raise ValueError(f"place must begin as one of {', '.join(sorted({s.place for s in SYSTEMS}))}, got {place!r}")
    return [
        system
        for system in SYSTEMS
        if system.place.startswith(place) and all(getattr(system, axis) == tag for axis, tag in tags.items())
    ]


def overview(place: str = "", **tags: str) -> str:
    """`systems` as a table.

    Args:
        place, **tags: of `systems`.

    Raises:
        ValueError: as `systems`.
    """
    rows = [tuple("" if value is None else str(value) for value in system) for system in systems(place, **tags)]
    return table(System._fields, rows)
