"""Draws the table of results: what each method costs in perplexity against true bits, and what of rounding's loss it wins back.

    python figure.py results.json --folder .

Reads the records of bench.py: a list with `model`, `method` ("float", or the key "float", for the model as it is), `bits`, `size`
("channel", "g128"), `bits_per_weight`, and `losses` (a mean for each held-out window; the second half is shown) or `perplexity` in their
place. What has no `bits_per_weight` is left out. Others are compared with the method called "rounding". Needs matplotlib.
"""

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

FLOAT, BASE = "float", "rounding"
# The first that a method's name holds gives its colour: few families, and every line is named where it ends.
FAMILIES = (
    ("rotation", "#8a3ea8"), ("autoround", "#c0392b"), ("awq", "#d1860a"), ("gptaq", "#1f5fbf"), ("gptq", "#1f5fbf"), ("hqq", "#0f8a5f"),
    ("k-means", "#00818a"), ("nf4", "#00818a"), ("fp4", "#00818a"), ("low-rank", "#a0306a"), ("rounding", "#333333"), ("", "#666666"),
)  # fmt: skip
GROUPS = ((0, "o", "per channel"), (128, "s", "128"), (64, "D", "64"), (32, "^", "32"), (16, "v", "16"))
FLOOR = 0.02  # percent; nothing below it can be told from nothing
TARGETS = {4: 65, 3: 65, 2: 55}  # percent of the gap that the best is to win back, at groups of 128, 128 and 64


def colour(method):
    return next(c for part, c in FAMILIES if part in method.lower())


def group_of(record):
    """The group's size, 0 for a scale per channel."""
    digits = "".join(c for c in str(record.get("size", "")) if c.isdigit())
    return int(digits or 0)


def marker(record):
    return next((m for size, m, _ in GROUPS if size == group_of(record)), "o")


def shown(record):
    """Whether a record is of weights alone, and no error."""
    return "error" not in record and record.get("size") != "activations"


def read(path):
    """Returns (records with a `perplexity`, that of the float model by model)."""
    records = [r | {"perplexity": perplexity_of(r)} for r in json.loads(pathlib.Path(path).read_text()) if shown(r)]
    floats = {r["model"]: r["perplexity"] for r in records if FLOAT in (r.get("method"), r.get("key"))}
    rows = [r for r in records if FLOAT not in (r.get("method"), r.get("key")) and r.get("bits_per_weight") is not None]
    missing = sorted({r["model"] for r in rows} - set(floats))
    if missing or not rows:
        raise ValueError(f"`path` {path} has no record of the float model for {', '.join(missing) or 'any model'}: run bench.py for it")
    return rows, floats


def perplexity_of(record):
    losses = record.get("losses")
    return record["perplexity"] if losses is None else float(np.exp(np.mean(losses[len(losses) // 2 :])))


def excess(record, floats):
    """What is lost, in percent of the float perplexity, at least `FLOOR`."""
    return max(100 * (record["perplexity"] / floats[record["model"]] - 1), FLOOR)


def gap_closed(records, floats):
    """Percent of rounding's loss at the same bits and group that each record wins back: (record, percent)."""
    base = {(r["model"], r["bits"], group_of(r)): r["perplexity"] for r in records if r["method"] == BASE}
    found = []
    for r in records:
        rounded = base.get((r["model"], r["bits"], group_of(r)))
        if rounded is not None and r["method"] != BASE:
            found.append((r, 100 * (rounded - r["perplexity"]) / (rounded - floats[r["model"]])))
    return found


def spread(places, distance):
    """Moves numbers as little as it takes (least squares) for neighbours to be `distance` apart, in their order."""
    order = np.argsort(places, kind="stable")
    shifted = np.asarray(places, float)[order] - distance * np.arange(len(places))
    blocks = []  # (sum, count); neighbours that are out of order are pooled
    for value in shifted:
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            last, before = blocks.pop(), blocks.pop()
            blocks.append((last[0] + before[0], last[1] + before[1]))
    level = np.concatenate([np.full(count, total / count) for total, count in blocks])
    out = np.empty(len(places))
    out[order] = level + distance * np.arange(len(places))
    return out


def draw_bits(records, floats):
    """One panel for each model and number of bits: a line for each method through its group sizes, named at its end."""
    models, bits = list(dict.fromkeys(r["model"] for r in records)), sorted({r["bits"] for r in records}, reverse=True)
    most = max(len({r["method"] for r in records if r["model"] == m and r["bits"] == b}) for m in models for b in bits)
    height = max(2.6, 0.62 + 0.135 * most)
    figure, axes = plt.subplots(len(models), len(bits), figsize=(4.3 * len(bits), height * len(models)), squeeze=False)
    for row, model in zip(axes, models, strict=True):
        for panel, width in zip(row, bits, strict=True):
            here = [r for r in records if r["model"] == model and r["bits"] == width]
            if not here:
                panel.set_axis_off()
                continue
            lines = {}
            for r in sorted(here, key=lambda r: r["bits_per_weight"]):
                lines.setdefault(r["method"], []).append(r)
            draw_lines(panel, lines, floats, height)
            panel.set_title(f"{model}, {width} bit", fontsize=9, loc="left")
    for panel in axes[-1]:
        panel.set_xlabel("bits a weight, scales included", fontsize=8)
    for panel in axes[:, 0]:
        panel.set_ylabel("perplexity above float, %", fontsize=8)
    key_of_groups(figure, {group_of(r) for r in records})
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.22 / figure.get_figheight()))
    return figure


def draw_lines(panel, lines, floats, height):
    """The lines of one panel, their names on the right beside them, with a thin line to each."""
    for name, points in lines.items():
        x, y = [p["bits_per_weight"] for p in points], [excess(p, floats) for p in points]
        panel.plot(x, y, color=colour(name), lw=2 if name == BASE else 1, zorder=3 if name == BASE else 2, alpha=0.9)
        for p, a, b in zip(points, x, y, strict=True):
            panel.plot(a, b, marker(p), color=colour(name), ms=3.2, mew=0, zorder=3)
    values = [excess(p, floats) for points in lines.values() for p in points]
    low, high = min(values) / 1.15, max(values) * 1.15
    panel.set_yscale("log")
    panel.set_ylim(low, high)
    ticks = [t for t in (a * 10.0**e for e in range(-2, 5) for a in (1, 2, 5)) if low <= t <= high]
    panel.yaxis.set_major_locator(FixedLocator(ticks))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    left, right = panel.get_xlim()
    edge = right + 0.02 * (right - left)
    panel.set_xlim(left, right + 0.6 * (right - left))
    ends = [points[-1] for points in lines.values()]
    heights = [np.log(excess(p, floats) / low) / np.log(high / low) for p in ends]
    distance = 0.118 / (height - 0.62)
    places = spread(heights, distance)
    places += min(0, 0.98 - places.max()) + max(0, 0.02 - places.min())
    for p, place in zip(ends, places, strict=True):
        at = low * (high / low) ** place
        panel.plot(
            [p["bits_per_weight"], edge], [excess(p, floats), at], color=colour(p["method"]), lw=0.4, alpha=0.6, zorder=1, clip_on=False
        )
        panel.text(
            edge,
            at,
            f" {p['method']}",
            fontsize=6.8,
            va="center",
            color=colour(p["method"]),
            weight="bold" if p["method"] == BASE else "normal",
        )
    panel.tick_params(labelsize=7)
    panel.set_xticks([t for t in panel.get_xticks() if left <= t <= right])
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", lw=0.3, color="#dddddd")


def draw_gap(records, floats):
    """One row for each method, best first: the percent of rounding's loss that it wins back, a mark for each group size."""
    found = gap_closed(records, floats)
    models, bits = list(dict.fromkeys(r["model"] for r in records)), sorted({r["bits"] for r, _ in found}, reverse=True)
    names = {r["method"] for r, _ in found}
    order = sorted(names, key=lambda name: np.mean([share for r, share in found if r["method"] == name]))
    figure, axes = plt.subplots(1, len(bits), figsize=(2.9 * len(bits) + 1.3, 0.9 + 0.19 * len(order)), sharey=True, squeeze=False)
    colours = dict(zip(models, ("#1f5fbf", "#d1860a", "#0f8a5f", "#8a3ea8"), strict=False))
    for panel, width in zip(axes[0], bits, strict=True):
        for r, share in found:
            if r["bits"] == width:
                shift = 0.32 * ((models.index(r["model"]) + 0.5) / len(models) - 0.5)
                panel.plot(max(share, -40), order.index(r["method"]) - shift, marker(r), color=colours[r["model"]], ms=4, mew=0, alpha=0.85)
        panel.axvline(0, color="#333333", lw=0.8)
        if width in TARGETS:
            panel.axvline(TARGETS[width], color="#c0392b", lw=0.7, ls=(0, (4, 3)))
        panel.set_xlim(-43, 103)
        panel.set_ylim(-0.7, len(order) - 0.3)
        panel.set_yticks(range(len(order)), order)
        panel.tick_params(labelsize=7, length=2)
        panel.grid(axis="y", lw=0.3, color="#dddddd")
        panel.set_title(f"{width} bit", fontsize=9, loc="left")
        panel.set_xlabel("rounding's loss won back, %", fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    key_of_groups(figure, {group_of(r) for r, _ in found}, colours)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.22 / figure.get_figheight()))
    return figure


def key_of_groups(figure, sizes, colours=None):
    """What the marks, and the colours of models, stand for, in one line above the panels."""
    marks = []
    for size, mark, label in GROUPS:
        if size in sizes:
            name = label if size == 0 else f"group {label}"
            marks.append(plt.Line2D([], [], color="#555555", marker=mark, ls="", ms=4, label=name))
    marks += [plt.Line2D([], [], color=c, marker="s", ls="", ms=5, label=name) for name, c in (colours or {}).items()]
    figure.legend(
        handles=marks,
        loc="upper left",
        ncols=len(marks),
        fontsize=7,
        frameon=False,
        handletextpad=0.2,
        columnspacing=1.2,
        borderaxespad=0.2,
    )


def save(figure, path):
    """Writes the same bytes for the same figure."""
    with plt.rc_context({"svg.hashsalt": "qjax", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=pathlib.Path)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("."))
    parser.add_argument("--format", choices=["svg", "png"], default="svg")
    options = parser.parse_args()
    records, floats = read(options.results)
    for name, draw in (("perplexity", draw_bits), ("gap", draw_gap)):
        path = options.folder / f"{name}.{options.format}"
        save(draw(records, floats), path)
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
