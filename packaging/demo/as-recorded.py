#!/usr/bin/env python3
"""Whether a run of `make demo` is of the kind that the README has recorded: the same lines in the same order, but for what
differs from run to run (times, sizes, addresses, ids, Docker's version).

    as-recorded.py RUN

In the recorded run a line `…` stands for any lines, and `…` in a line for any text."""

import pathlib
import re
import sys

README = pathlib.Path(__file__).resolve().parent.parent.parent / "README.md"
# What differs, and what stands for it.
DIFFERS = [
    (r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME"),
    (r"\b\d+\.\d+\.\d+\.\d+\b", "ADDRESS"),
    (r"\([0-9a-f]{12}\)", "(ID)"),
    (r"\b\d{12,}\b", "NUMBER"),
    (r"\b\d+ (s|KiB|MiB)\b", r"N \1"),
    (r"process \d+", "process N"),
    (r"^ *\d+\.\d+\.\d+\S* \(", "VERSION ("),
    (r"/tmp/supernode-demo\.\w+", "FOLDER"),
]


def kinds(text):
    for old, new in DIFFERS:
        text = re.sub(old, new, text, flags=re.MULTILINE)
    return [line for line in (" ".join(line.split()) for line in text.splitlines()) if line]


def recorded():
    part = re.search(r"<!-- recorded: make demo -->\n(.*?)<!-- end -->", README.read_text(), re.S)
    return kinds(part[1])


def pattern(lines):
    """The recorded run as a pattern for a whole run."""
    parts = []
    for line in lines:
        if line == "…":
            parts.append(r"(?:.*\n)*?")
        else:
            parts.append(".*".join(map(re.escape, line.split("…"))) + r"\n")
    return parts


def first_that_differs(lines, run):
    """The first recorded line up to which the run is not as recorded; None where all of it is."""
    text = "".join(f"{line}\n" for line in run)
    parts = pattern(lines)
    if re.fullmatch("".join(parts), text):
        return None
    for count in range(1, len(parts) + 1):
        if not re.match("".join(parts[:count]), text):
            return lines[count - 1]
    return "the end"


if __name__ == "__main__":
    lines = recorded()
    run = kinds(pathlib.Path(sys.argv[1]).read_text())
    differs = first_that_differs(lines, run)
    if differs is not None:
        sys.exit(f"README.md has recorded a demo that is not like this run, from here on: {differs}")
    print(f"the run is of the kind that README.md has recorded ({len(lines)} lines)")
