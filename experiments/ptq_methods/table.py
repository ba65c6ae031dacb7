"""The tables of README.md from the records of bench.py: chosen on the first half of the text, reported on the second."""

import argparse
import json
import pathlib

import numpy as np

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
    peak = (record["peak_bytes"] - record["peak_bytes_before"]) / 1e6
    worse = " (worse)" if "to rounding" in row and row["to rounding"][1] > 1 else ""
    seconds = f"{record['seconds'] - record['compile_seconds']:.1f} + {record['compile_seconds']:.1f}"
    return (f"| {record['method']}{worse} | {row['chosen on']:.3f} | {row['perplexity']:.3f} | {to_rounding} | {closed} "
            f"| {record['kl']:.5f} | {kl_closed} | {record['bits_per_weight']:.3f} | {seconds} | {peak:.0f} |")  # fmt: skip


HEAD = ("| | first half | perplexity | ratio to rounding | of its gap closed | KL | of it closed | bits | s, + to compile | MB |\n"
        "|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip


def significant(a, b):
    """-1 where the windows' means of `a` are below those of `b` beyond doubt (95 % of a paired bootstrap), 1 where above, else 0."""
    found = paired_bootstrap(b, a)
    return int(found.low > 0) - int(found.high < 0)


MEASURES = {"perplexity": lambda record: halves(record)[1], "divergence": lambda record: np.asarray(record["kls"])}


def print_reversals(records, first, second):
    """Pairs of methods whose order on one model is beyond doubt, and what becomes of them on the other, in each measure."""
    (_, ours), (_, theirs) = cells(records, first), cells(records, second)
    print(f"\n## Pairs whose order is beyond doubt on {first}, and what becomes of them on {second}\n")
    print("| | measure | pairs | the same | undecided | the other way round |\n|---|---|---|---|---|---|")
    total = {name: [0, 0, 0, 0] for name in MEASURES}
    for cell in (cell for cell in ours if cell in theirs):
        for name, of in MEASURES.items():
            mine, others = ({r["method"]: of(r) for r in group[cell] if name == "perplexity" or "kls" in r} for group in (ours, theirs))
            shared = [m for m in mine if m in others]
            pairs = [(a, b) for a in shared for b in shared if significant(mine[a], mine[b]) < 0]
            ways = [significant(others[a], others[b]) for a, b in pairs]
            turned = "; ".join(f"{a} < {b}" for (a, b), way in zip(pairs, ways, strict=True) if way > 0)
            counts = len(pairs), ways.count(-1), ways.count(0), ways.count(1)
            total[name] = [sum(x) for x in zip(total[name], counts, strict=True)]
            print(f"| {cell[0]} bit, {cell[1]} | {name} | {' | '.join(map(str, counts))}{f': {turned}' if turned else ''} |")
    for name, counts in total.items():
        print(f"| all | {name} | {' | '.join(map(str, counts))} |")


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
    options = parser.parse_args()
    records = json.loads(pathlib.Path(options.json).read_text())
    models = options.model or list(dict.fromkeys(r["model"] for r in records))
    show = print_matrix if options.brief else print_tables
    for model in models:
        show(records, model)
    if len(models) == 2:
        print_reversals(records, *models)


if __name__ == "__main__":
    main()
