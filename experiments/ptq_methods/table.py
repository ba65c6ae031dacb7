"""The tables of README.md from the records of bench.py: chosen on the first half of the text, reported on the second."""

import argparse
import itertools
import json
import pathlib

import numpy as np
from scipy import stats

from qjax.evaluation import paired_bootstrap

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
    found = paired_bootstrap(a, b)
    return tuple(float(np.exp(x)) for x in (found.difference, found.low, found.high))


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
            row["kl closed"] = 1 - record["kl"] / rounded["kl"]
        rows.append(row)
    return sorted(rows, key=lambda row: row["chosen on"])


def line(row):
    record = row["record"]
    _, low, high = row.get("to rounding", (0, 0, 0))
    to_rounding = f"{low:.4f} .. {high:.4f}" if high else ""
    closed = "{:.0%} ({:.0%} .. {:.0%})".format(*row["closed"]) if "closed" in row else ""
    kl_closed = f"{row['kl closed']:.0%}" if "kl closed" in row else ""
    peak = f"{(record['peak_bytes'] - record['peak_bytes_before']) / 1e6:.0f}" if "peak_bytes" in record else ""
    worse = " (worse)" if "to rounding" in row and row["to rounding"][1] > 1 else ""
    seconds = f"{record['seconds'] - record['compile_seconds']:.1f} + {record['compile_seconds']:.1f}" if "seconds" in record else ""
    return (f"| {record['method']}{worse} | {row['chosen on']:.3f} | {row['perplexity']:.3f} | {to_rounding} | {closed} "
            f"| {record['kl']:.5f} | {kl_closed} | {record['bits_per_weight']:.3f} | {seconds} | {peak} |")  # fmt: skip


HEAD = ("| | first half | perplexity | ratio to rounding | of its gap closed | KL | of it closed | bits | s, + to compile | MB |\n"
        "|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip


def student(a, b, scatter=0.0):
    """Student's t of the mean of `a - b` over the same windows, and its one-sided p: of a true mean on the other side of zero.

    `scatter` is the standard deviation that the difference has beside the windows', from run to run.
    """
    difference = a - b
    error = np.hypot(difference.std(ddof=1) / np.sqrt(len(difference)), scatter)
    t = float(difference.mean() / error) if error > 0 else 0.0
    return t, float(stats.t.sf(abs(t), len(difference) - 1))


def reversal(ours, theirs):
    """p that a pair is in truth not ordered in opposite ways on two models, of their (t, p) each.

    Gail and Simon 1985 for two groups: the larger of the two one-sided p where the signs differ, else 1.
    """
    return max(ours[1], theirs[1]) if ours[0] * theirs[0] < 0 else 1.0


def holm(p):
    """Adjusted p: those below alpha hold together with an error of alpha in all (Holm 1979)."""
    order = np.argsort(p)
    stepped = np.maximum.accumulate(np.asarray(p)[order] * np.arange(len(p), 0, -1))
    return np.minimum(stepped, 1.0)[np.argsort(order)]


def benjamini_hochberg(p):
    """Adjusted p: of those below alpha, alpha are expected to be wrong (Benjamini and Hochberg 1995)."""
    order = np.argsort(p)[::-1]
    stepped = np.minimum.accumulate(np.asarray(p)[order] * len(p) / np.arange(len(p), 0, -1))
    return np.minimum(stepped, 1.0)[np.argsort(order)]


MEASURES = {"perplexity": lambda record: halves(record)[1], "divergence": lambda record: np.asarray(record["kls"])}
MEANS = {"perplexity": lambda record: np.mean(halves(record)[1]), "divergence": lambda record: record["kl"]}
ALPHA = 0.05
ENOUGH = 10


def scatters(records, again):
    """By (measure, bits): the root mean square difference of two runs of a cell, which two methods differ by from run to run, and the
    number of cells; only where `ENOUGH` were run twice.
    """
    first, found = {(r["model"], r["key"]): r for r in records if r.get("bits")}, {}
    for record in again:
        other = first.get((record["model"], record["key"]))
        for name, mean in MEANS.items() if other is not None and other.get("seconds") != record.get("seconds") else ():
            found.setdefault((name, record["bits"]), []).append(mean(record) - mean(other))
    return {what: (float(np.sqrt(np.mean(np.square(moved)))), len(moved)) for what, moved in found.items() if len(moved) >= ENOUGH}


def compared(records, first, second, name, scatter):
    """All pairs of methods of each cell of both models: (cell, a, b, (t, p) on the first, on the second), a the better on the first."""
    (_, ours), (_, theirs) = cells(records, first), cells(records, second)
    for cell in (cell for cell in ours if cell in theirs):
        of, beside = MEASURES[name], scatter.get((name, cell[0]), (0.0, 0))[0]
        mine, others = ({r["method"]: of(r) for r in group[cell] if name == "perplexity" or "kls" in r} for group in (ours, theirs))
        for a, b in itertools.combinations([m for m in mine if m in others], 2):
            here, there = (student(x[a], x[b], beside) for x in (mine, others))
            yield (cell, a, b, here, there) if here[0] < 0 else (cell, b, a, (-here[0], here[1]), (-there[0], there[1]))


def print_reversals(records, first, second, scatter):
    """Pairs of methods in each measure: ordered on one model, on the other, and turned round when it is counted how many were tested."""
    print(f"\n## The order on {first} and on {second}\n")
    if scatter:
        said = ", ".join(f"{name} at {bits} bit {rms:.5f} ({count} cells)" for (name, bits), (rms, count) in sorted(scatter.items()))
        print(f"With the scatter of two runs of a cell beside that of the windows: {said}.\n")
    print("| | measure | pairs | ordered beyond doubt on the first | the same on the second | undecided | turned round | of all pairs, "
          "at a false discovery rate of 5 % | with 5 % for one error in all |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    survive = []
    for name in MEASURES:
        pairs = list(compared(records, first, second, name, scatter))
        p = [reversal(here, there) for *_, here, there in pairs]
        rate, family = benjamini_hochberg(p) <= ALPHA, holm(p) <= ALPHA
        survive += [(name, value, pair, held) for value, pair, low, held in zip(p, pairs, rate, family, strict=True) if low]
        where = [pair[0] for pair in pairs]
        for cell in [*dict.fromkeys(where), None]:
            mine = [i for i, at in enumerate(where) if cell in (at, None)]
            ordered = [i for i in mine if pairs[i][3][1] < ALPHA / 2]
            ways = [np.sign(pairs[i][4][0]) * (pairs[i][4][1] < ALPHA / 2) for i in ordered]
            counts = (len(mine), len(ordered), *map(ways.count, (-1, 0, 1)), int(rate[mine].sum()), int(family[mine].sum()))
            print(f"| {f'{cell[0]} bit, {cell[1]}' if cell else 'all'} | {name} | {' | '.join(map(str, counts))} |")
    print("\n### Turned round when all pairs are counted\n")
    print(f"| | measure | better on {first} | better on {second} | t, t | p | one error in all |\n|---|---|---|---|---|---|---|")
    for name, value, (cell, a, b, here, there), held in sorted(survive, key=lambda row: (row[0] != "perplexity", row[1])):
        shown = f"{here[0]:.1f}, {there[0]:.1f} | {value:.0e} | {'yes' if held else 'no'}"
        print(f"| {cell[0]} bit, {cell[1]} | {name} | {a} | {b} | {shown} |")


SIZES = ("channel", "g128", "g64", "g32")


def print_matrix(records, model):
    """For each width a table of methods against granularities: perplexity of the second half, and what is closed of rounding's gap."""
    base, groups = cells(records, model)
    for bits in sorted({bits for bits, size in groups if size in SIZES}, reverse=True):
        columns = {size: {row["record"]["method"]: row for row in analysed(base, groups[bits, size])}
                   for size in SIZES if (bits, size) in groups}  # fmt: skip
        names = sorted({name for column in columns.values() for name in column}, key=lambda name: mean_kl(columns, name))
        print(f"\n### {bits} bit\n\n| | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|")
        for name in names:
            print(f"| {name} | {' | '.join(brief(column.get(name)) for column in columns.values())} |")


def mean_kl(columns, name):
    """What the rows of a matrix are ordered by: the mean of log KL over the granularities, those a method lacks counting as rounding's."""
    return np.mean([np.log(column.get(name, column["rounding"])["record"]["kl"]) for column in columns.values()])


def brief(row):
    """Perplexity, shares closed of perplexity's gap and of the divergence."""
    if row is None:
        return ""
    closed = f" · {row['closed'][0]:.0%} · {row['kl closed']:.0%}" if "closed" in row else ""
    worse = " (worse)" if "to rounding" in row and row["to rounding"][1] > 1 else ""
    return f"{row['perplexity']:.3f}{closed}{worse}"


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
    parser.add_argument("--brief", action="store_true", help="methods against granularities in place of all figures of each cell")
    parser.add_argument("--again", default=None, help="records of the same cells from other runs: tells how far they scatter")
    options = parser.parse_args()
    records = json.loads(pathlib.Path(options.json).read_text())
    models = options.model or list(dict.fromkeys(r["model"] for r in records))
    show = print_matrix if options.brief else print_tables
    for model in models:
        show(records, model)
    if len(models) == 2:
        again = json.loads(pathlib.Path(options.again).read_text()) if options.again else []
        print_reversals(records, *models, scatters(records, again))


if __name__ == "__main__":
    main()
