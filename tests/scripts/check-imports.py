#!/usr/bin/env python3
"""Checks that imports between the modules of agent/src point one way, without a cycle.

    check-imports.py [--list] [SOURCE_DIRECTORY]

A module is a file. Imports are read from its `use` lines and from `crate::` paths in its code;
test modules, comments and strings do not count. Two rules hold:

- A module imports only from its own directory or from a layer further down in LAYERS.
- No chain of imports leads back to where it began.

--list prints each import between two layers and how many modules share it.
"""

import re
import sys
from collections import Counter
from pathlib import Path

# Top to bottom. agent/src/lib.rs declares the layers and imports nothing.
LAYERS = (
    "main cli daemon supervisor check container report opennebula flower docker gpu config"
    " values system logging backoff"
).split()


def code_of(text):
    """The code without comments, string contents and the test modules at its end."""
    text = re.sub(r"(?ms)^#\[cfg\(test\)\]\s*(?:pub(?:\(crate\))? )?mod \w+ \{.*?^\}\n?", "", text)
    text = re.sub(r"(?m)^#\[cfg\(test\)\]\n.*;\n", "", text)
    text = re.sub(r'(?s)"(?:\\.|[^"\\])*"', '""', text)
    return re.sub(r"(?m)//.*$", "", text)


def expand(tree):
    """The paths of a use tree: `a::{b, c::{d, self}}` becomes a::b, a::c::d and a::c."""
    tree = tree.strip()
    opening = tree.find("{")
    if opening < 0:
        yield re.split(r"\s+as\s+", tree)[0].strip()
        return
    prefix, depth, part = tree[:opening], 0, ""
    for char in tree[opening + 1 : tree.rindex("}")] + ",":
        depth += {"{": 1, "}": -1}.get(char, 0)
        if char == "," and depth == 0:
            for path in expand(part) if part.strip() else ():
                yield (prefix + path).removesuffix("::self")
            part = ""
        else:
            part += char


def paths_in(code):
    """Every path of the code that may name a module of this crate."""
    for tree in re.findall(r"(?s)\buse\s+([^;]+);", code):
        yield from expand(re.sub(r"\s+", " ", tree))
    yield from re.findall(r"\b(?:crate|super)(?:::\w+)+", re.sub(r"(?s)\buse\s[^;]+;", "", code))


def read_modules(source):
    """Module path to its code, for every file below `source` that is not a test's."""
    modules = {}
    for file in sorted(source.rglob("*.rs")):
        parts = list(file.relative_to(source).with_suffix("").parts)
        if parts[-1] == "tests" or parts == ["lib"]:
            continue
        if parts[-1] == "mod":
            parts.pop()
        modules[tuple(parts)] = code_of(file.read_text())
    return modules


def imports_of(module, code, modules, directories):
    """The modules that `module` imports from."""
    here = module if module in directories else module[:-1]
    for path in paths_in(code):
        parts = path.split("::")
        if parts[0] in ("crate", "supernode_agent"):
            target = parts[1:]
        elif parts[0] == "super":
            ups = 1
            while parts[ups : ups + 1] == ["super"]:
                ups += 1
            target = list(module[: len(module) - ups]) + parts[ups:]
        elif parts[0] == "self" or here + (parts[0],) in modules:
            target = list(here) + [part for part in parts if part != "self"]
        else:
            continue
        while target and tuple(target) not in modules:
            target.pop()
        if target and tuple(target) != module:
            yield tuple(target)


def cycles_of(graph):
    """The strongly connected components with more than one module (Tarjan's algorithm)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph[node]:
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            component = []
            while not component or component[-1] != node:
                component.append(stack.pop())
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def main():
    arguments = [argument for argument in sys.argv[1:] if argument != "--list"]
    source = Path(arguments[0] if arguments else "agent/src")
    modules = read_modules(source)
    directories = {module[:-1] for module in modules if len(module) > 1}
    graph = {
        module: sorted(set(imports_of(module, code, modules, directories)))
        for module, code in modules.items()
    }
    name = "::".join
    between = Counter(
        (module[0], target[0])
        for module, targets in graph.items()
        for target in targets
        if module[0] != target[0]
    )
    if "--list" in sys.argv:
        for (layer, target), count in sorted(between.items()):
            print(f"{layer} -> {target}: {count}")
    problems = [
        f"{name(module)} is in no layer: add it to LAYERS"
        for module in graph
        if module[0] not in LAYERS
    ]
    rank = {layer: number for number, layer in enumerate(LAYERS)}
    upward = [
        f"{name(module)} imports {name(target)}, which is in a higher layer"
        for module, targets in graph.items()
        for target in targets
        if rank.get(target[0], 0) < rank.get(module[0], 0)
    ]
    cycles = [f"cycle: {', '.join(map(name, cycle))}" for cycle in cycles_of(graph)]
    print(
        f"{len({module[0] for module in graph})} layers, {len(between)} imports between them;"
        f" {len(graph)} modules, {sum(map(len, graph.values()))} imports,"
        f" {len(upward)} upward, {len(cycles)} cycles"
    )
    problems += upward + cycles
    for problem in problems:
        print(f"check-imports: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
