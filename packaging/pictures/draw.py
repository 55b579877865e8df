#!/usr/bin/env python3
"""`make pictures`: the README's two pictures. The way of the data is drawn from a table that is checked against the code, the
boot from boot.json, which a real boot left (it says how), and from the orderings in systemd/*.service."""

import json
import pathlib
import re
from html import escape

HERE = pathlib.Path(__file__).resolve().parent
TREE = HERE.parent.parent

# Dark on a ground of their own, so that they can be read on a white and on a black page.
GROUND, INK, FAINT, LINE = "#ffffff", "#1f2328", "#59636e", "#8c959f"
EDGE, PURE, DONE, WARNING, BAR = "#f1f3f5", "#ddf4ff", "#1a7f37", "#bc4c00", "#54aeff"

# What is read, and the values on the way: column, row, name, file. The name of a value is a type of that file.
READ = [
    (0, 0, "context.sh", "one-context/src/source.rs"),
    (0, 1, "sysfs", "agent/src/gpu/pci.rs"),
    (0, 2, "NVML, in a child", "agent/src/gpu/probe.rs"),
    (0, 3, "OneGate", "one-context/src/onegate/mod.rs"),
]
VALUES = [
    (1, 0, "Context", "one-context/src/context.rs"),
    (1, 1, "PciFacts", "agent/src/gpu/pci.rs"),
    (1, 2, "ProbeOutcome", "agent/src/gpu/probe.rs"),
    (1, 3, "Service", "one-context/src/onegate/mod.rs"),
    (2, 0, "Config", "agent/src/config/mod.rs"),
    (2, 1.5, "Verdict", "agent/src/gpu/verdict.rs"),
    (2, 3, "SuperLink", "agent/src/opennebula/superlink.rs"),
    (3, 1.5, "ContainerSpec", "agent/src/container/plan.rs"),
    (4, 1.5, "Engine", "agent/src/docker/client.rs"),
    (5, 1.5, "Node", "agent/src/supervisor/mod.rs"),
    (5, 3, "Report", "agent/src/report/mod.rs"),
]
ARROWS = [
    ("context.sh", "Context"), ("Context", "Config"), ("Config", "Verdict"), ("Config", "ContainerSpec"),
    ("sysfs", "PciFacts"), ("PciFacts", "Verdict"), ("NVML, in a child", "ProbeOutcome"), ("ProbeOutcome", "Verdict"),
    ("OneGate", "Service"), ("Service", "SuperLink"), ("SuperLink", "ContainerSpec"), ("Verdict", "ContainerSpec"),
    ("ContainerSpec", "Engine"), ("Engine", "Node"), ("Node", "Report"),
]  # fmt: skip
IS_PURE = {"Config", "Verdict", "ContainerSpec"}


def text(x, y, words, size=13, colour=INK, anchor="start", weight="normal"):
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"'
        f' font-weight="{weight}">{escape(words)}</text>'
    )


def picture(width, height, title, parts):
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'font-family="system-ui, sans-serif">\n<title>{escape(title)}</title>\n'
        f'<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{LINE}"/></marker></defs>\n'
        f'<rect width="{width}" height="{height}" rx="8" fill="{GROUND}"/>\n'
    )
    return head + "\n".join(parts) + "\n</svg>\n"


def arrow(path):
    return f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.5" marker-end="url(#tip)"/>'


def draw_data():
    for _, _, name, file in VALUES:
        if not re.search(rf"\bpub (struct|enum) {name}\b", (TREE / file).read_text()):
            raise SystemExit(f"{file} has no {name}: correct the table in {__file__}")
    width, height, gap, top, step = 138, 46, 34, 24, 72
    place = {}
    parts = []
    for column, row, name, file in READ + VALUES:
        x, y = 20 + column * (width + gap), top + row * step
        place[name] = (x, y)
        fill = PURE if name in IS_PURE else EDGE
        dashes = ' stroke-dasharray="4 3"' if column == 0 else ""
        parts.append(
            f'<rect x="{x}" y="{y:g}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{LINE}"{dashes}/>'
        )
        parts.append(text(x + width / 2, y + 20, name, anchor="middle", weight="600"))
        short = file.removeprefix("agent/src/").replace("one-context/src/", "one-context: ").removesuffix("/mod.rs")
        parts.append(text(x + width / 2, y + 36, short, 10, FAINT, "middle"))
    for start, end in ARROWS:
        (x1, y1), (x2, y2) = place[start], place[end]
        if x1 == x2:
            parts.append(arrow(f"M{x1 + width / 2:g} {y1 + height:g}V{y2 - 1:g}"))
        else:
            x1, y1, y2 = x1 + width, y1 + height / 2, y2 + height / 2
            middle = (x1 + x2) / 2
            parts.append(arrow(f"M{x1} {y1:g}C{middle:g} {y1:g} {middle:g} {y2:g} {x2 - 1} {y2:g}"))
    parts.append(text(20, 326, "dashed: what is read · blue: pure, values in and values out · below each name its file", 12, FAINT))
    parts.append(text(1016, 326, "supernode-agent plan prints all up to ContainerSpec", 12, FAINT, "end"))
    return picture(1036, 342, "The way of the data", parts)


def orderings(units):
    """(first, second) where a unit file of ours says so, for units of the picture."""
    pairs = set()
    guest = TREE / "tests/machines/guest/etc/systemd/system"
    for file in [*(TREE / "systemd").glob("*.service"), *guest.glob("*.service")]:
        for key, others in re.findall(r"^(After|Before)=(.*)$", file.read_text(), re.M):
            for other in others.split():
                pairs.add((other, file.name) if key == "After" else (file.name, other))
    return sorted(pair for pair in pairs if pair[0] in units and pair[1] in units)


def draw_boot():
    data = json.loads((HERE / "boot.json").read_text())
    moments = {moment["what"]: moment["at"] for moment in data["moments"]}
    units = sorted(data["units"], key=lambda unit: (unit["starting"], unit["started"]))
    bars = [("kernel, initrd, systemd", 0, units[0]["starting"])]
    bars += [(unit["unit"].removesuffix(".service"), unit["starting"], unit["started"]) for unit in units]
    left, right, top, step, high = 262, 1016, 44, 34, 18
    end = max([stop for _, _, stop in bars] + list(moments.values()))
    second = (right - left) / end

    def at(seconds):
        return round(left + seconds * second, 1)

    bottom = top + len(bars) * step
    grid = next(width for width in (1, 2, 5, 10, 20, 50, 100) if end / width <= 12)
    parts = []
    for tick in range(0, int(end) + 1, grid):
        parts.append(f'<path d="M{at(tick):g} {top - 8}V{bottom}" stroke="{EDGE}"/>')
        parts.append(text(at(tick), top - 14, f"{tick} s", 11, FAINT, "middle"))
    middle = {}
    for row, (name, start, stop) in enumerate(bars):
        y = top + row * step
        middle[f"{name}.service"] = (start, stop, y)
        parts.append(text(left - 62, y + 14, name, 12, anchor="end", weight="600" if "flower" in name else "normal"))
        parts.append(text(left - 12, y + 14, f"{stop - start:.1f} s", 11, FAINT, "end"))
        wide = max(round((stop - start) * second, 1), 2)
        fill = BAR if "flower" in name else LINE
        parts.append(f'<rect x="{at(start):g}" y="{y}" width="{wide:g}" height="{high}" rx="2" fill="{fill}"/>')
    for first, second_unit in orderings(middle):
        (_, stop, y1), (start, _, y2) = middle[first], middle[second_unit]
        if y1 < y2:
            parts.append(arrow(f"M{at(stop):g} {y1 + high}V{y2 + high / 2:g}H{at(start):g}"))
    for what, colour, words, row in (
        ("WARNING", WARNING, f"the WARNING, at {moments['WARNING']:.1f} s", 0),
        ("container", DONE, f"the container runs, at {moments['container']:.1f} s", 1),
    ):
        x, y = at(moments[what]), bottom + 16 + row * 20
        parts.append(f'<path d="M{x:g} {top - 8}V{y - 10}" stroke="{colour}" stroke-width="1.5" stroke-dasharray="5 3"/>')
        parts.append(text(min(x + 4, right), y, words, 12, colour, "end" if x > left + 500 else "start", "600"))
    parts.append(text(20, bottom + 66, data["taken"].split(": ", 1)[1] + "; arrows: waits for; harness-image: in the place of a pull", 11, FAINT))
    return picture(1036, bottom + 80, "A measured boot", parts)


PICTURES = {"data.svg": draw_data, "boot.svg": draw_boot}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (HERE / name).write_text(draw())
