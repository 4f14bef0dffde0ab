"""Damages files of every kind, has every reader read them, and counts how the readers end.

    python scripts/fuzz.py --seed 1 --num 500 --output /tmp/fuzz

Each case is a copy of a workspace (simulated data and its caches, checkpoints, run folders, an engine file, a
foreign checkpoint) with one file changed at random, read by one command in a process of its own with bounds
on memory and time, which is watched: it may import nothing that a file names, start nothing, connect to
nothing, and write to its own folder only. Prints a table of file kinds and endings, and every case that
should not be:

    executed    code of a file ran, or a process or a connection was started
    outside     something was written elsewhere, or a file of the case that belongs to no reader has changed
    traceback   a person would see one, or a code that is none of ours
    hang        no end within a minute
    changed     other numbers than from the whole file, and code 0
    unescaped   markup or a control character of the file reached a page or the terminal as it was

Ends with 1 if there is one of these. The others are: `refused` (code 2 and a line), `same` (the same result,
as where a cache is built anew or the byte does not count).
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fuzzing.mutations import CANARY, HOSTILE_TEXTS
from fuzzing.running import STARTS, Ending, run
from fuzzing.subjects import SUBJECTS, Reader, Subject
from fuzzing.workspace import build, copy, outside

import cpq_train.verbs.lightning_cli  # noqa: F401 - here, and not in every process

BAD = ("executed", "outside", "traceback", "hang", "changed", "unescaped")
CLASSES = ("refused", "same", *BAD)

_MARKUP = [text for text in HOSTILE_TEXTS if text.startswith("<")]


class Case(NamedTuple):
    """One file, what was done to it, and how its reader ended, after how long."""

    kind: str
    mutation: str
    reader: str
    file: str
    done: str
    ending: str
    log: Path
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--num", type=int, required=True, help="cases")
    parser.add_argument("--output", type=Path, required=True, help="folder of the logs; must not exist")
    parser.add_argument("--kind", choices=list(SUBJECTS), help="only files of this kind")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True)
    workspace = args.output.resolve() / "workspace"
    build(workspace)
    cases = fuzz(workspace, args.output.resolve() / "cases", args.seed, args.num, args.kind)
    print(table(cases))
    bad = [case for case in cases if case.ending in BAD]
    for case in bad:
        print(f"{case.ending}: {case.kind}, {case.file}, {case.done}, {case.reader}: {case.log}")
    return 1 if bad else 0


def fuzz(workspace: Path, output: Path, seed: int, num: int, kind: str | None = None) -> list[Case]:
    """Run cases, in turn over the kinds of file, their readers and mutations.

    Args:
        workspace: Of `fuzzing.workspace.build`.
        output: Folder of the logs.
        seed: Of what is drawn.
        num: Cases.
        kind: Only files of this kind.
    """
    output.mkdir(parents=True)
    expected: dict[str, Any] = {}
    cases = []
    for number in range(num):
        rng = random.Random(f"{seed} {number}")
        name = kind or list(SUBJECTS)[number % len(SUBJECTS)]
        cases.append(_one(workspace, output / f"{number:04d}", name, rng, expected))
        print(*cases[-1], sep="; ", flush=True)
    return cases


def _one(workspace: Path, place: Path, name: str, rng: random.Random, expected: dict[str, Any]) -> Case:
    subject = SUBJECTS[name]
    reader = rng.choice(subject.readers)
    words = " ".join(reader.arguments)
    if words not in expected:
        expected[words] = _expected(workspace, place.with_name(f"whole-{len(expected)}"), reader, subject)
    _copy(workspace, place, subject)
    files = sorted(file for pattern in subject.files for file in place.glob(pattern))
    file = rng.choice(files)
    mutation = rng.choice(sorted(subject.mutations))
    done = subject.mutations[mutation](file, rng)
    log, before = place.with_suffix(".log"), outside(place)
    ended = run(reader.arguments, place, log)
    ending = class_of(ended, reader, place, expected[words])
    if outside(place) != before and ending != "executed":
        ending = "outside"
    shutil.rmtree(place)
    relative = str(file.relative_to(place))
    return Case(name, mutation, words.partition(" ")[0], relative, done, ending, log, ended.seconds)


def _copy(workspace: Path, place: Path, subject: Subject) -> None:
    copy(workspace, place, subject.has_own_tables)
    for file in (file for pattern in subject.absent for file in place.glob(pattern)):
        file.unlink()


def _expected(workspace: Path, place: Path, reader: Reader, subject: Subject) -> Any:
    """What a reader finds in whole files."""
    _copy(workspace, place, subject)
    log = place.with_suffix(".log")
    ending = run(reader.arguments, place, log)
    if ending.code != 0 or "VIOLATION" in ending.said:
        raise RuntimeError(f"{' '.join(reader.arguments)} ended with {ending.code} on whole files, see {log}")
    found = reader.result(place, ending.said)
    shutil.rmtree(place)
    return found


def class_of(ending: Ending, reader: Reader, place: Path, expected: Any) -> str:
    """How a reader ended, in a word.

    Args:
        ending: Of its process.
        reader: The reader.
        place: Its folder.
        expected: What it finds in whole files.
    """
    said = ending.said
    if re.search(rf"^VIOLATION ({'|'.join(STARTS)})", said, re.MULTILINE) or any(place.rglob(CANARY)):
        return "executed"
    if "\nVIOLATION" in said:
        return "outside"
    if ending.code is None:
        return "hang"
    if ending.code not in (0, 2) or "Traceback (most recent call last)" in said:
        return "traceback"
    if _is_unescaped(place, said):
        return "unescaped"
    if ending.code == 2:
        return "refused" if "error: " in said else "traceback"
    return "same" if reader.result(place, said) == expected else "changed"


def _is_unescaped(place: Path, said: str) -> bool:
    """Whether markup of a stranger stands in a page, or a control character of theirs in the output."""
    pages = [*place.glob("comparison/*.html"), *place.glob("comparison/*.md")]
    texts = [page.read_text(errors="replace") for page in pages]
    return any(markup in text for markup in _MARKUP for text in texts) or "\x1b]0;" in said


def table(cases: Sequence[Case]) -> str:
    """A line of Markdown for each kind of file: how often its readers ended how."""
    counts = Counter((case.kind, case.ending) for case in cases)
    lines = [["file", "cases", *CLASSES]]
    for kind in [*dict.fromkeys(case.kind for case in cases)]:
        row = [counts[kind, ending] for ending in CLASSES]
        lines.append([kind, str(sum(row)), *map(str, row)])
    totals = [sum(counts[kind, ending] for kind, _ in {(k, 0) for k, _ in counts}) for ending in CLASSES]
    lines.append(["all", str(len(cases)), *map(str, totals)])
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|---" * len(lines[0]) + "|", *rows[1:]])


if __name__ == "__main__":
    sys.exit(main())
