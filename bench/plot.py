"""Tables and plots from bench/results: the newest measurement of every case.

    python bench/plot.py [--readme]         # print the table, or put it into the READMEs
    python bench/plot.py --plots DIR        # a bar plot per op: DIR/<op>.png

A rival counts only if it was measured in the same run as ours; the best one is the fastest. A
variant whose name begins with "floor" bounds what is possible, and is no rival.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
HEADERS = {
    "README.md": "op | case | dtype | pass | ours, p50 | best rival, p50 | ratio",
    "README.zh.md": "算子 | 规模 | dtype | pass | 本项目 p50 | 最快的对手 p50 | 倍数",
}
BEGIN, END = "<!-- bench:begin -->\n", "<!-- bench:end -->"


class Result(NamedTuple):
    """One case of an op on a device; `made` says with which torch, from which commit and when."""

    op: str
    case: str
    dtype: str
    run: str
    device: str
    made: str
    seconds: dict[str, float]  # p50 by variant, "ours" among them


def read() -> list[Result]:
    newest: dict[tuple, dict[str, dict]] = {}  # by case, then by variant
    for path in sorted((ROOT / "bench" / "results").glob("*.csv")):
        for row in csv.DictReader(path.read_text("utf-8").splitlines()):  # later lines are newer
            row["made"] = f"torch {row['torch']}, commit {row['commit']}, {row['date']}"
            key = tuple(row[name] for name in ("op", "case", "dtype", "pass", "device"))
            newest.setdefault(key, {})[row["variant"]] = row
    results = []
    for key, rows in newest.items():
        if made := rows.get("ours", {}).get("made"):
            p50 = {n: float(r["p50_us"]) * 1e-6 for n, r in rows.items() if r["made"] == made}
            results.append(Result(*key, made, p50))
    return sorted(results, key=lambda r: (r.device, r.op))


def table(results: list[Result], header: str) -> Iterator[str]:
    """Lines of Markdown: for each device a line that names it, and a table."""
    for device in dict.fromkeys(r.device for r in results):
        here = [r for r in results if r.device == device]
        yield f"\n`{device}`: {'; '.join(sorted({r.made for r in here}))}\n\n| {header} |"
        yield "|---|---|---|---|---:|---:|---:|"
        for r in here:
            rivals = [name for name in r.seconds if not name.startswith(("ours", "floor"))]
            cells = [f"`{r.op}`", r.case, r.dtype, r.run, duration(r.seconds["ours"])]
            if rivals:
                name = min(rivals, key=lambda name, r=r: r.seconds[name])
                cells.append(f"{name}, {duration(r.seconds[name])}")
                cells.append(f"{r.seconds[name] / r.seconds['ours']:.2f} ×")
            yield f"| {' | '.join(cells)} |"


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"


def plot(results: list[Result], path: Path) -> None:
    """One op's results: a group of bars per case, every variant's time relative to ours."""
    from matplotlib.figure import Figure

    variants = list(dict.fromkeys(name for r in results for name in r.seconds))
    figure = Figure((9, 1 + 0.2 * len(results) * len(variants)), layout="constrained")
    axis, size = figure.subplots(), 0.8 / len(variants)
    for i, name in enumerate(variants):
        ratios = [r.seconds.get(name, 0.0) / r.seconds["ours"] for r in results]
        places = [k - 0.4 + (i + 0.5) * size for k in range(len(results))]
        axis.barh(places, ratios, size, label=name)
    labels = [f"{r.case} {r.dtype} {r.run}\n{r.device}" for r in results]
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.set(title=results[0].op, xlabel="time relative to ours, p50", xscale="log")
    axis.invert_yaxis()
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readme", action="store_true", help="update the tables of the READMEs")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw a bar plot for each op")
    options = parser.parse_args()
    if not (results := read()):
        raise SystemExit("nothing in bench/results: run python bench/bench.py all --record first")
    for name, header in HEADERS.items() if options.readme else ():
        before, begin, rest = (ROOT / name).read_text("utf-8").partition(BEGIN)
        lines, (_, end, after) = "\n".join(table(results, header)), rest.partition(END)
        if not end:
            raise SystemExit(f"{name}: no {BEGIN.strip()} ... {END}")
        (ROOT / name).write_text(f"{before}{begin}{lines}\n\n{end}{after}", "utf-8")
    if not options.readme:
        print("\n".join(table(results, HEADERS["README.md"])))
    for op in dict.fromkeys(r.op for r in results) if options.plots else ():
        options.plots.mkdir(parents=True, exist_ok=True)
        plot([r for r in results if r.op == op], options.plots / f"{op}.png")


if __name__ == "__main__":
    main()
