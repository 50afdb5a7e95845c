"""Write docs/onnx.md: every part exported, run by onnxruntime and compared; a few minutes."""

from __future__ import annotations

from pathlib import Path

from saccade import catalogue
from saccade.report import exports


def main() -> None:
    done = []
    for part in catalogue.parts():
        done.append(exports.export(part.slug))
        print(done[-1], flush=True)
    (Path(__file__).parent.parent / "docs" / exports.PAGE).write_text(exports.page(done), encoding="utf-8")


if __name__ == "__main__":
    main()
