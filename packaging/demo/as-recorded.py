#!/usr/bin/env python3
"""Compares a run of `make demo` with the recording in packaging/docs/demo.md: the same lines in
the same order, except for what differs from run to run (times, sizes, addresses, ids, Docker's
version).

    as-recorded.py RUN

In the recording a line `…` matches any lines, and `…` in a line matches any text."""

import pathlib
import re
import sys

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "demo.md"
# Patterns whose matches differ from run to run, and their placeholders.
VARYING = [
    (r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME"),
    (r"\b\d+\.\d+\.\d+\.\d+\b", "ADDRESS"),
    (r"\([0-9a-f]{12}\)", "(ID)"),
    (r"\b\d{12,}\b", "NUMBER"),
    (r"\b\d+ (s|KiB|MiB)\b", r"N \1"),
    (r"process \d+", "process N"),
    (r"^ *\d+\.\d+\.\d+\S* \(", "VERSION ("),
    (r"/tmp/supernode-demo\.\w+", "DIRECTORY"),
]


def normalize(text):
    for pattern, placeholder in VARYING:
        text = re.sub(pattern, placeholder, text, flags=re.MULTILINE)
    return [line for line in (" ".join(line.split()) for line in text.splitlines()) if line]


def recording():
    part = re.search(r"<!-- recorded: make demo -->\n(.*?)<!-- end -->", PAGE.read_text(), re.S)
    return normalize(part[1])


def line_patterns(lines):
    """A regular expression for each recorded line."""
    patterns = []
    for line in lines:
        if line == "…":
            patterns.append(r"(?:.*\n)*?")
        else:
            patterns.append(".*".join(map(re.escape, line.split("…"))) + r"\n")
    return patterns


def first_difference(lines, run):
    """The first recorded line that the run does not match; None if it matches all."""
    text = "".join(f"{line}\n" for line in run)
    patterns = line_patterns(lines)
    if re.fullmatch("".join(patterns), text):
        return None
    for count in range(1, len(patterns) + 1):
        if not re.match("".join(patterns[:count]), text):
            return lines[count - 1]
    return "the end"


if __name__ == "__main__":
    lines = recording()
    run = normalize(pathlib.Path(sys.argv[1]).read_text())
    difference = first_difference(lines, run)
    if difference is not None:
        sys.exit(f"{PAGE} differs from this run, from this line on: {difference}")
    print(f"the run matches {PAGE} ({len(lines)} lines)")
