"""Writes zoo/examples: a few held-out pictures and all their questions, `python -m zoo.examples`."""

from __future__ import annotations

import json
from pathlib import Path

from zoo.scenes import scene

FOLDER = Path(__file__).resolve().parent / "examples"
SEED = 7
NUMBERS = (0, 1, 2, 3, 4, 5, 6, 7)


def write(folder: Path = FOLDER) -> None:
    """PNG files, and questions.jsonl with an object a line: image, task, question, answer."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in NUMBERS:
        made = scene("heldout", SEED, number)
        name = f"{number}.png"
        made.image.save(folder / name, optimize=True)
        for task, question, answer in made.questions:
            lines.append(json.dumps({"image": name, "task": task, "question": question, "answer": answer}))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write()
