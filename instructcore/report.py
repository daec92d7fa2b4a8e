"""Reports: one HTML file each, with figures, tables and samples inside, and nothing from elsewhere.

`write` is the quickstart's, `write_ppo` that of any run of `ppo`.
"""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from string import Template
from typing import Any

from .data import read_jsonl

STAGES = {"base": "pre-trained", "sft": "SFT", "ppo": "PPO"}
COLORS = {"base": "#9aa5b1", "sft": "#4c78a8", "ppo": "#e4572e"}

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; }
th, td { border-bottom: 1px solid var(--line); white-space: pre-wrap; overflow-wrap: anywhere; }
img { max-width: 100%; background: #fff; border-radius: 6px; }
.note { opacity: .75; } .wide { overflow-x: auto; }
"""

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>instructcore quickstart, seed $seed</title><style>$style</style></head><body>
<h1>instructcore quickstart</h1>
<p>A model of $parameters million parameters went from raw text to an assistant tuned by
human-feedback methods in $seconds seconds (seed $seed). <b>It is a toy on synthetic tasks</b>:
it shows that the recipe works, and is of no other use. A written rule, called gold below,
stands in for the human labellers: it ranked the samples that the reward model learned from, and
it grades this evaluation. PPO's reward was the learned reward model; the policy never saw the
gold rule, and no held-out prompt or its content is in any training file.</p>
<h2>Gold reward on $n_eval held-out prompts</h2>
<p class="note">From 0 to 1; mean with 95 % bootstrap interval over prompts; responses sampled at
temperature 1.</p>
$gold
$measures
$figures
<h2>Samples before and after each stage (greedy)</h2>
$samples
<h2>Best and worst of PPO's held-out samples</h2>
$extremes
<p class="note">$versions</p>
</body></html>
""")

PPO_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>instructcore ppo: $run</title><style>$style</style></head><body>
<h1>PPO: $run</h1>
<p>The final checkpoint is that of step $step. $alarms</p>
$figures
<h2>Samples as training goes (greedy; in brackets the reward)</h2>
$samples
<h2>Settings</h2>
$settings
</body></html>
""")
CURVES = {  # what a run of ppo shows over its steps, where it has it
    "objective/score": "score, the reward without KL",
    "objective/kl": "KL from SFT, nats per response",
    "rollout/length": "response length, tokens",
    "rollout/eos_rate": "share of responses that end",
    "ppo/entropy": "entropy, nats per token",
    "ppo/policy_loss": "policy loss",
    "ppo/value_loss": "value loss",
    "ppo/explained_variance": "explained variance of the returns",
    "ppo/clip_fraction": "share of clipped ratios",
    "ppo/approx_kl": "KL from the rollouts' policy, nats per token",
    "ptx/loss": "pre-training loss, nats per token",
    "guard/held_out": "second judge's held-out score",
}
COLUMNS = 5  # steps in the table of samples


def write(out: Path, summary: dict[str, Any], shown: dict[str, Any]) -> Path:
    """Writes out/report.html. It needs no other file and no network."""
    path = out / "report.html"
    path.write_text(_page(out, summary, shown), encoding="utf-8")
    return path


def write_ppo(run: Path) -> Path:
    """Writes run/report.html from metrics.jsonl, samples.jsonl and the final checkpoint."""
    metrics, samples = read_jsonl(run / "metrics.jsonl"), read_jsonl(run / "samples.jsonl")
    trainer = json.loads((run / "final" / "state" / "trainer.json").read_text("utf-8"))
    alarms = trainer["extra"]["guard"]["alarms"]
    settings = json.loads((run / "config.json").read_text("utf-8"))["settings"]
    figures = {
        "reward against KL": _frontier(metrics),
        "curves over training": _curves(metrics, alarms),
    }
    raised = ", ".join(f"{name} after step {step}" for name, step in alarms.items())
    page = PPO_PAGE.substitute(
        style=STYLE,
        run=html.escape(run.name),
        step=trainer["step"],
        alarms=html.escape(f"Alarms: {raised or 'none'}."),
        figures=_images(figures),
        samples=_samples_over_training(samples),
        settings=_table(["setting", "value"], [[k, str(v)] for k, v in settings.items()]),
    )
    path = run / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def print_summary(summary: dict[str, Any], shown: dict[str, Any], out: Path) -> None:
    """The outcome on the terminal: gold reward before and after each stage, and samples."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    gold, intervals = summary["gold_reward"], summary["gold_reward_ci"]
    table = Table(title=f"gold reward on {summary['n_eval']} held-out prompts, 0 to 1")
    table.add_column("")
    for name in STAGES.values():
        table.add_column(name, justify="right")
    table.add_row("all", *(f"{gold[n]:.3f}" for n in STAGES))
    table.add_row(
        "95 % interval", *(f"{intervals[n][0]:.3f}..{intervals[n][1]:.3f}" for n in STAGES)
    )
    for family, cells in summary["gold_by_task"].items():
        table.add_row(family, *(f"{cells[n]['mean']:.3f}" for n in STAGES))
    console.print(table)
    low, high = intervals["ppo_minus_sft"]
    console.print(
        f"PPO - SFT {low:+.3f}..{high:+.3f} (95 %), {100 * summary['gap_closed']:.0f} % of the way "
        f"to 1; PPO wins {100 * summary['win_rate_ppo_over_sft']:.0f} % against SFT, at KL "
        f"{summary['kl']:.2f} nats per response; best constant answer {gold['constant']:.3f}"
    )
    samples = Table(title="samples (greedy)", show_lines=True)
    for name in ("prompt", *STAGES.values()):
        samples.add_column(name, ratio=1, overflow="fold")
    for sample in shown["samples"][:5]:
        samples.add_row(*(Text(sample[key]) for key in ("prompt", *STAGES)))
    console.print(samples)
    console.print(
        f"{summary['seconds']:.0f} s in all. A toy of {summary['parameters'] / 1e6:.2f} M "
        "parameters on synthetic tasks: it shows that the recipe works."
    )
    console.print(
        f"report: {out / 'report.html'}   summary: {out / 'summary.json'}", soft_wrap=True
    )
    console.print(f"talk to it: instructcore chat {out}", soft_wrap=True)


def _page(out: Path, summary: dict[str, Any], shown: dict[str, Any]) -> str:
    gold, intervals = summary["gold_reward"], summary["gold_reward_ci"]
    low, high = intervals["ppo_minus_sft"]
    rows = [["all", *(_interval(gold[n], *intervals[n]) for n in STAGES)]]
    for family, cells in summary["gold_by_task"].items():
        rows.append([family, *(_interval(*cells[n].values()) for n in STAGES)])
    seconds = ", ".join(f"{name} {s:.0f}" for name, s in summary["seconds_by_stage"].items())
    measures = {
        "PPO − SFT, paired, 95 % interval": f"{low:+.3f} .. {high:+.3f}",
        "share of the gap from SFT to 1 that PPO closes": f"{100 * summary['gap_closed']:.0f} %",
        "win rate of PPO over SFT, ties half": f"{100 * summary['win_rate_ppo_over_sft']:.1f} %",
        "KL of PPO from SFT, nats per response": f"{summary['kl']:.2f}",
        "best constant answer to all prompts": f"{gold['constant']:.3f}: {shown['constant']}",
        "pre-training loss, held out, nats per token": f"{summary['pretrain_loss']:.3f}",
        "SFT loss, held out, nats per token": f"{summary['sft_loss']:.3f}",
        "reward model: held-out pairs ordered rightly": f"{100 * summary['reward_accuracy']:.1f} %",
        "the same where gold differs by 0.5 or more": (
            f"{100 * summary['reward_accuracy_clear']:.1f} %"
        ),
        "seconds by stage": seconds,
    }
    samples = [
        [s["prompt"] + ("" if s["held_out"] else "\n(seen in training)"), *(s[n] for n in STAGES)]
        for s in shown["samples"]
    ]
    extremes = [
        [e["prompt"], e["sft"], f"{e['gold'][0]:.2f}", e["ppo"], f"{e['gold'][1]:.2f}"]
        for e in shown["extremes"]
    ]
    figures = _images(_figures(out, summary, shown))
    return PAGE.substitute(
        style=STYLE,
        seed=summary["seed"],
        seconds=f"{summary['seconds']:.0f}",
        parameters=f"{summary['parameters'] / 1e6:.2f}",
        n_eval=summary["n_eval"],
        gold=_table(["", *STAGES.values()], rows),
        measures=_table(["measure", "value"], [list(row) for row in measures.items()]),
        figures=figures,
        samples=_table(["prompt", *STAGES.values()], samples),
        extremes=_table(["prompt", "SFT", "gold", "PPO", "gold"], extremes),
        versions=html.escape(json.dumps(summary["versions"])),
    )


def _interval(mean: float, low: float, high: float) -> str:
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def _table(head: list[str], rows: list[list[str]]) -> str:
    def cells(row: list[str], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{cells(head, "th")}</tr>{body}</table></div>'


def _images(figures: dict[str, str]) -> str:
    """Title -> PNG in base64, as HTML."""
    return "".join(
        f'<p><img alt="{html.escape(title)}" src="data:image/png;base64,{data}"></p>'
        for title, data in figures.items()
    )


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


def _panels(count: int, columns: int) -> tuple[Any, list]:
    """A figure and its `count` axes."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    rows = -(-count // columns)
    figure = Figure(figsize=(4.4 * columns, 3.2 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes[:count]


def _curve(axis: Any, metrics: list[dict[str, Any]], metric: str, title: str, color: str) -> None:
    points = [(m["step"], m[metric]) for m in metrics if m.get(metric) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), color=color, linewidth=1.4)
    axis.set(title=title, xlabel="step")


def root_kl_points(metrics: list[dict[str, Any]], metric: str) -> list[tuple[float, float]]:
    """(√KL, metric) of every logged step that has both; a KL estimated below 0 counts as 0."""
    found = [(m.get("objective/kl"), m.get(metric)) for m in metrics]
    return [(max(kl, 0.0) ** 0.5, y) for kl, y in found if kl is not None and y is not None]


def _frontier(metrics: list[dict[str, Any]]) -> str:
    """The reward against √KL (Gao et al. 2022), and the second judge's score where there is one."""
    shown = {"objective/score": COLORS["ppo"], "guard/held_out": "#b8860b"}
    points = {name: found for name in shown if (found := root_kl_points(metrics, name))}
    figure, axes = _panels(max(1, len(points)), max(1, len(points)))
    for axis, name in zip(axes, points, strict=False):
        axis.plot(*zip(*points[name], strict=True), "o-", color=shown[name], ms=3, alpha=0.7)
        axis.set(title=f"{CURVES[name]}, against √KL", xlabel="√KL (KL in nats per response)")
    return _png(figure)


def _curves(metrics: list[dict[str, Any]], alarms: dict[str, int]) -> str:
    """A panel a metric; a dashed line where an alarm was raised."""
    present = [name for name in CURVES if any(m.get(name) is not None for m in metrics)]
    figure, axes = _panels(max(1, len(present)), 3)
    for axis, name in zip(axes, present, strict=False):
        _curve(axis, metrics, name, CURVES[name], COLORS["ppo"])
        for step in set(alarms.values()):
            axis.axvline(step, color="#888", linestyle="--", linewidth=1)
    return _png(figure)


def _samples_over_training(samples: list[dict[str, Any]]) -> str:
    """A row a prompt, a column a step: the first, the last and some between."""
    steps = sorted({sample["step"] for sample in samples})
    last = len(steps) - 1
    chosen = [steps[i] for i in sorted({round(last * k / (COLUMNS - 1)) for k in range(COLUMNS)})]
    rows: dict[str, dict[int, str]] = {}
    for sample in samples:
        end = "" if sample["ended"] else " …"
        text = f"{sample['response']}{end}\n[{sample['score']:.3g}]"
        name = sample["prompt"] + ("" if sample["held_out"] else "\n(trained on)")
        rows.setdefault(name, {})[sample["step"]] = text
    head = ["prompt", *(f"step {step}" for step in chosen)]
    cells = [[name, *(row.get(step, "") for step in chosen)] for name, row in rows.items()]
    return _table(head, cells)


def _figures(out: Path, summary: dict[str, Any], shown: dict[str, Any]) -> dict[str, str]:
    """Title -> PNG in base64."""

    def curve(axis: Any, run: str, metric: str, title: str, color: str) -> None:
        _curve(axis, read_jsonl(out / run / "metrics.jsonl"), metric, title, color)

    losses, axes = _panels(3, 3)
    curve(axes[0], "pretrain", "loss", "pre-training: loss, nats per token", COLORS["base"])
    curve(axes[1], "sft", "loss", "SFT: loss, nats per token", COLORS["sft"])
    curve(axes[2], "reward", "loss", "reward model: ranking loss", "#54a24b")

    training, axes = _panels(3, 3)
    curve(axes[0], "ppo", "objective/score", "PPO: reward model's score", COLORS["ppo"])
    curve(axes[1], "ppo", "objective/kl", "PPO: KL from SFT, nats per response", COLORS["ppo"])
    curve(axes[2], "ppo", "rollout/length", "PPO: response length, tokens", COLORS["ppo"])

    frontier, (left, right) = _panels(2, 2)
    points = sorted(shown["curve"], key=lambda p: p["kl"])
    root_kl = [max(p["kl"], 0.0) ** 0.5 for p in points]
    left.plot(root_kl, [p["gold"] for p in points], "o-", color="#b8860b", label="gold")
    left.set(title="gold reward and score against √KL", xlabel="√KL", ylabel="gold")
    score = left.twinx()
    score.plot(root_kl, [p["score"] for p in points], "s--", color=COLORS["ppo"], alpha=0.7)
    score.set_ylabel("reward model's score (dashed)")
    families = list(summary["gold_by_task"])
    for k, (name, label) in enumerate(STAGES.items()):
        cells = [summary["gold_by_task"][family][name] for family in families]
        means = [cell["mean"] for cell in cells]
        spread = [
            [m - cell["low"] for m, cell in zip(means, cells, strict=True)],
            [cell["high"] - m for m, cell in zip(means, cells, strict=True)],
        ]
        places = [i + 0.27 * (k - 1) for i in range(len(families))]
        right.bar(places, means, 0.25, yerr=spread, color=COLORS[name], label=label)
    right.set(title="gold reward by family", ylim=(0, 1))
    right.set_xticks(range(len(families)), families)
    right.legend(frameon=False)
    return {
        "losses of the stages": _png(losses),
        "PPO over training": _png(training),
        "reward against KL, and gold by family": _png(frontier),
    }
