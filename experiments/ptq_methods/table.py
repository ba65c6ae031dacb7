"""The tables of README.md from the records of bench.py: chosen on the first half of the text, reported on the second."""

import argparse
import json
import pathlib

import numpy as np

RESAMPLES = 10_000


def halves(record):
    losses = np.asarray(record["losses"])
    return losses[: len(losses) // 2], losses[len(losses) // 2 :]


def perplexity(losses):
    return float(np.exp(np.mean(losses)))


def gap_closed(base, rounded, other):
    """Share of rounding's gap of perplexity that a method closes, with 95 % of a bootstrap over the same windows of all three."""
    rows = np.random.default_rng(0).integers(0, len(base), size=(RESAMPLES, len(base)))

    def share(pick):
        a, b, c = (np.exp(pick(x)) for x in (base, rounded, other))
        return (b - c) / (b - a)

    drawn = share(lambda x: x[rows].mean(axis=1))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(share(lambda x: x.mean())), float(low), float(high)


def ratio(a, b):
    """exp of the mean difference of losses and 95 % of its paired bootstrap: above 1, b is worse than a."""
    rows = np.random.default_rng(0).integers(0, len(a), size=(RESAMPLES, len(a)))
    low, high = np.quantile((b - a)[rows].mean(axis=1), [0.025, 0.975])
    return float(np.exp((b - a).mean())), float(np.exp(low)), float(np.exp(high))


def cells(records, model):
    """The float record, and the records of each cell (bits, size) in the order of the file."""
    mine = [r for r in records if r["model"] == model and "error" not in r]
    base = next(r for r in mine if r["key"] == "float")
    groups = {}
    for record in mine:
        if record["key"] != "float":
            groups.setdefault((record["bits"], record["size"]), []).append(record)
    return base, groups


def analysed(base, group, reference=None):
    """Rows of one cell, best on the first half first; `reference` is rounding, of another cell where this one has none."""
    rounded = next((r for r in group if r["method"] == "rounding"), reference)
    float_half, rows = halves(base)[1], []
    for record in group:
        first, second = halves(record)
        row = {
            "record": record,
            "chosen on": perplexity(first),
            "perplexity": perplexity(second),
            "to float": ratio(float_half, second),
        }
        if rounded is not None and rounded is not record:
            row["to rounding"] = ratio(halves(rounded)[1], second)
            row["closed"] = gap_closed(float_half, halves(rounded)[1], second)
        rows.append(row)
    return sorted(rows, key=lambda row: row["chosen on"])


def line(row):
    record = row["record"]
    _, low, high = row.get("to rounding", (0, 0, 0))
    to_rounding = f"{low:.4f} .. {high:.4f}" if high else ""
    closed = "{:.0%} ({:.0%} .. {:.0%})".format(*row["closed"]) if "closed" in row else ""
    peak = (record["peak_bytes"] - record["peak_bytes_before"]) / 1e6
    worse = " (worse)" if "to rounding" in row and row["to rounding"][1] > 1 else ""
    seconds = f"{record['seconds'] - record['compile_seconds']:.1f} + {record['compile_seconds']:.1f}"
    return (f"| {record['method']}{worse} | {row['chosen on']:.3f} | {row['perplexity']:.3f} | {to_rounding} | {closed} "
            f"| {record['kl']:.5f} | {record['bits_per_weight']:.3f} | {seconds} | {peak:.0f} |")  # fmt: skip


HEAD = ("| | first half | perplexity | ratio to rounding | of its gap closed | KL | bits | s, + to compile | MB |\n"
        "|---|---|---|---|---|---|---|---|---|")  # fmt: skip


def print_tables(records, model):
    base, groups = cells(records, model)
    print(f"\n## {model}: float {perplexity(halves(base)[1]):.3f} on the second half, {perplexity(halves(base)[0]):.3f} on the first")
    for (bits, size), group in groups.items():
        print(f"\n### {bits} bit, {size}\n\n{HEAD}")
        for row in analysed(base, group):
            print(line(row))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", default=str(pathlib.Path(__file__).parent / "results.json"))
    parser.add_argument("--model", nargs="*", default=None)
    options = parser.parse_args()
    records = json.loads(pathlib.Path(options.json).read_text())
    for model in options.model or dict.fromkeys(r["model"] for r in records):
        print_tables(records, model)


if __name__ == "__main__":
    main()
