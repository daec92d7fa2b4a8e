"""Tables and plots from bench/results: the newest measurement of every case.

    python bench/plot.py [--readme]         # print the table, or put it into the READMEs
    python bench/plot.py --plots DIR        # a bar plot per op: DIR/<op>.png

A rival counts only if it was measured in the same run as ours; the best one is the fastest. A
variant whose name begins with "floor" bounds what is possible, and is no rival.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
HEADERS = {
    "README.md": "op | case | dtype | pass | ours, p50 | best rival, p50 | ratio",
    "README.zh.md": "算子 | 规模 | dtype | pass | 本项目 p50 | 最快的对手 p50 | 倍数",
}
SUMMARY_HEADERS = {
    "README.md": "op | dtype | pass | cases | best rival's time ÷ ours: median (least to most)",
    "README.zh.md": "算子 | dtype | pass | 规模数 | 最快对手的时间 ÷ 本项目：中位数（最小到最大）",
}


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


def best_rival(result: Result) -> tuple[str, float] | None:
    """The fastest one and its seconds."""
    rivals = [name for name in result.seconds if not name.startswith(("ours", "floor"))]
    name = min(rivals, key=result.seconds.__getitem__, default=None)
    return (name, result.seconds[name]) if name else None


def summary(results: list[Result], header: str) -> Iterator[str]:
    """Lines of Markdown: a table of ratios, of the device that was measured last."""
    device = max(results, key=lambda r: r.made.rpartition(" ")[2]).device
    groups: dict[tuple, list[float]] = {}
    for r in results:
        if r.device == device and (found := best_rival(r)):
            ratio = found[1] / r.seconds["ours"]
            groups.setdefault((kind_of(r), r.dtype, r.run), []).append(ratio)
    yield f"\n`{device}`\n\n| {header} |"
    yield "|---|---|---|---:|---:|"
    for (kind, dtype, run), ratios in groups.items():
        span = f"{statistics.median(ratios):.2f} × ({min(ratios):.2f} to {max(ratios):.2f})"
        yield f"| {kind} | {dtype} | {run} | {len(ratios)} | {span} |"


def kind_of(result: Result) -> str:
    """The op; `attention` is measured in three forms, `generate` in two, `activation` names two."""
    if result.op == "activation":
        return f"`{result.case.split()[0]}`"
    if result.op == "generate" and result.case.startswith("decode"):
        return "`generate`, decoding"
    if result.op != "attention":
        return f"`{result.op}`"
    if result.case.startswith("decode"):
        return "`attention_paged_`, decoding"
    return "`attention_varlen`" if "lengths" in result.case else "`attention`"


def table(results: list[Result], header: str) -> Iterator[str]:
    """Lines of Markdown: for each device a line that names it, and a table."""
    for device in dict.fromkeys(r.device for r in results):
        here = [r for r in results if r.device == device]
        yield f"\n`{device}`: {'; '.join(sorted({r.made for r in here}))}\n\n| {header} |"
        yield "|---|---|---|---|---:|---:|---:|"
        for r in here:
            cells = [f"`{r.op}`", r.case, r.dtype, r.run, duration(r.seconds["ours"])]
            if found := best_rival(r):
                cells.append(f"{found[0]}, {duration(found[1])}")
                cells.append(f"{found[1] / r.seconds['ours']:.2f} ×")
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


def replace_block(path: Path, name: str, lines: Iterator[str]) -> None:
    """Puts lines between <!-- name:begin --> and <!-- name:end -->."""
    first, last = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    before, begin, rest = path.read_text("utf-8").partition(first)
    _, end, after = rest.partition(last)
    if not end:
        raise SystemExit(f"{path}: no {first.strip()} ... {last}")
    text = "\n".join(lines)
    path.write_text(f"{before}{begin}{text}\n\n{end}{after}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readme", action="store_true", help="update the tables of the READMEs")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw a bar plot for each op")
    options = parser.parse_args()
    if not (results := read()):
        raise SystemExit("nothing in bench/results: run python bench/bench.py all --record first")
    for name in HEADERS if options.readme else ():
        replace_block(ROOT / name, "bench", table(results, HEADERS[name]))
        replace_block(ROOT / name, "bench-summary", summary(results, SUMMARY_HEADERS[name]))
    if not options.readme:
        print("\n".join(table(results, HEADERS["README.md"])))
    for op in dict.fromkeys(r.op for r in results) if options.plots else ():
        options.plots.mkdir(parents=True, exist_ok=True)
        plot([r for r in results if r.op == op], options.plots / f"{op}.png")


if __name__ == "__main__":
    main()
