"""Tables of runs in bench/results/runs: one row for each key, the newest."""

from __future__ import annotations

import csv
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "runs"


def read(name: str) -> list[dict[str, str]]:
    """The rows of bench/results/runs/<name>.csv, none if there is no such file."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def put(name: str, row: dict, key: tuple[str, ...]) -> None:
    """Writes the row into the table, in place of an older one of its key; sorted by key."""
    row = {column: str(value) for column, value in row.items()}
    rows = [r for r in read(name) if any(r[k] != row[k] for k in key)] + [row]
    rows.sort(key=lambda r: [int(r[k]) if r[k].isdigit() else r[k] for k in key])
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
