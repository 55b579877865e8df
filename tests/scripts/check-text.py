#!/usr/bin/env python3
"""Checks the language and the width of every text that git tracks.

    check-text.py [--count]

Three rules hold (CONTRIBUTING.md, "Language"):

- No word of the list below: each has a standard term of systemd, Docker, Kubernetes or NVIDIA.
  Identifiers count, split at underscores and capitals; phrases are found across line breaks.
- No line of code, comment or prose is wider than 100 columns. Tables, URLs and generated or
  recorded files are excepted.
- No test name is longer than 60 characters.

tests/scripts/check-text.allowed lists what is excepted, each with its reason: a quotation of
other people's text, or a term of theirs. --count prints the number of hits for each word.
"""

import re
import subprocess
import sys
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

MAX_WIDTH = 100
MAX_TEST_NAME = 60

# The word, as a regular expression, and the standard term for it.
WORDS = [
    (r"folders?", "directory"),
    (r"(?:to|not|could|can|cannot|may) be had", "unavailable; cannot pull, find or reach"),
    (r"anew", "again, from scratch, recreate"),
    (r"mend(?:s|ed|ing)?", "fix, repair"),
    (r"told", "reports, logs, warns, prints"),
    (r"tells?|telling", "reports, logs, warns, prints"),
    (r"says? so|said so", "reports, logs, warns, prints"),
    (r"whom|whoever|somebody|nobody", "the operator, the caller, another process, no process"),
    (r"own words?|last words|its word|a word of|good word", "message, log line, last status"),
    (r"the story|story of|stories", "startup, reload, shutdown"),
    (r"houses?|rooms?", "workspace, crate, module"),
    (r"floors?", "layer, baseline"),
    (r"lives|life|dies|dead", "runs, lifetime, exits, unresponsive"),
    (r"ill|ailing|ailments?|patients?", "unhealthy, degraded, monitored GPU"),
    (r"(?:is|are|was|were|gpu|found|finds it) well(?! (?:as|known|formed|below|above|within))",
     "healthy"),
    (r"look(?:s|ed|ing)? after", "supervises, monitors"),
    (r"(?:take|takes|took|taken|taking) (?:\w+ )?away", "removes"),
    (r"clears|discards", "removes"),
    (r"strays?", "orphans, orphan containers"),
    (r"hand(?:s|ed|ing)? (?:it|them|(?:the|a|its) \w+) over", "passes through, injects"),
    (r"hand(?:s|ed|ing)? over (?:the|a|its) (?:gpu|device|card)s?", "passes through, injects"),
    (r"(?:variable|setting|option|key)s? (?:that )?(?:is|are|stays?) idle", "has no effect"),
    (r"makes? (?:it )?idle", "has no effect"),
    (r"pauses?|pausing", "delay, backoff, interval"),
    (r"tries", "attempts, retries"),
    (r"(?:most|longest|largest)_[a-z]+", "MAX_"),
    (r"patience", "timeout"),
    (r"promis(?:e|es|ed|ing)", "assigned"),
    (r"the cloud", "OpenNebula, OneGate"),
    (r"(?:the )?way in(?! which)", "injection method"),
    (r"blanks?", "whitespace"),
    (r"stand-?in|stand-?ins", "simulator"),
]
PATTERNS = [
    (re.compile(rf"(?<![\w-])(?:{word})(?![\w-])", re.I), word, term) for word, term in WORDS
]

# Not text of ours: licence, lock files, inputs of fuzz targets, pictures, keys.
EXCLUDED = """
LICENSE *.lock tests/fuzz/corpus/* *.crt *.pem *.p7b *.csr *.key
""".split()
# The words themselves.
QUOTED = "tests/scripts/check-text.py tests/scripts/check-text.allowed".split()
# Formats whose lines are generated or cannot be broken.
WIDE = "*.json *.svg *.tmpl *.yaml *.catalog *.txt *.hcl".split()


def tracked():
    listed = subprocess.run(["git", "ls-files", "-z"], check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        path = Path(name)
        if path.is_symlink() or not path.is_file() or any(fnmatch(name, glob) for glob in EXCLUDED):
            continue
        try:
            yield name, path.read_text()
        except UnicodeDecodeError:
            continue


def read_allowed():
    """The exceptions: lines of `glob: regular expression`."""
    allowed = []
    for line in Path(__file__).with_suffix(".allowed").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            glob, _, expression = line.partition(": ")
            allowed.append((glob, re.compile(expression, re.I)))
    return allowed


def words_of(text):
    """The text as one line of words, and the line number of each character of it."""
    joined, numbers = [], []
    for number, line in enumerate(text.splitlines(), 1):
        line = re.sub(r"^\s*(?://[/!]?|#+!?|\*|>|;|\.\\\")?\s*", "", line)
        line = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", line)
        # MOST_X is a pattern of its own.
        line = re.sub(r"(?<!most)(?<!longest)(?<!largest)_", " ", line, flags=re.I)
        line = re.sub(r"\\$", "", line) + " "
        joined.append(line)
        numbers += [number] * len(line)
    return "".join(joined), numbers


def language(name, text, allowed, counts):
    if name in QUOTED:
        return
    joined, numbers = words_of(text)
    joined = re.sub(r"\s", " ", joined)
    excepted = [
        match.span()
        for glob, expression in allowed
        if fnmatch(name, glob)
        for match in expression.finditer(joined)
    ]
    for pattern, word, term in PATTERNS:
        for match in pattern.finditer(joined):
            if any(start <= match.start() and match.end() <= end for start, end in excepted):
                continue
            counts[word] += 1
            yield numbers[match.start()], f"'{match.group()}': say {term}"


def width(name, text):
    if any(fnmatch(name, glob) for glob in WIDE):
        return
    generated = False
    for number, line in enumerate(text.splitlines(), 1):
        # Parts that agent/tests/documents.rs writes stand between such comments.
        generated = re.match(r"\W*(?:generated )?from the table of variables", line) or (
            generated and not re.match(r"\W*end\b", line)
        )
        if generated:
            continue
        is_table = name.endswith(".md") and line.lstrip().startswith("|")
        if len(line) > MAX_WIDTH and not is_table and not re.search(r"https?://\S{40}", line):
            yield number, f"{len(line)} columns, more than {MAX_WIDTH}"


def test_names(name, text):
    if not name.endswith(".rs"):
        return
    attributes = r"#\[(?:tokio::)?test[^\]]*\]\s*(?:#\[[^\]]*\]\s*)*"
    for match in re.finditer(attributes + r"(?:async )?fn (\w+)", text):
        if len(match[1]) > MAX_TEST_NAME:
            line = text.count("\n", 0, match.start(1)) + 1
            yield line, f"test name of {len(match[1])} characters, more than {MAX_TEST_NAME}"


def main():
    allowed, counts, others = read_allowed(), Counter(), 0
    for name, text in tracked():
        problems = [
            *language(name, text, allowed, counts),
            *width(name, text),
            *test_names(name, text),
        ]
        for line, problem in sorted(problems):
            others += 1
            if "--count" not in sys.argv:
                print(f"{name}:{line}: {problem}")
    words = sum(counts.values())
    others -= words
    if "--count" in sys.argv:
        for word, count in counts.most_common():
            print(f"{count:5} {word}")
    print(f"check-text: {words} words of the list, {others} other findings")
    return 1 if words or others else 0


if __name__ == "__main__":
    sys.exit(main())
