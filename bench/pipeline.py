"""Whole stages beside what users would pick instead: each in a process of its own, in turns.

    python bench/pipeline.py pretrain --text tinyshakespeare.txt --nanogpt CHECKOUT
    python bench/pipeline.py sft --pairs gsm8k_train.jsonl --trl PYTHON
    python bench/pipeline.py ppo --pairs gsm8k_train.jsonl --trl PYTHON

pretrain: nanoGPT's setting for a CPU (bytes, 4 layers, 4 heads, 128 wide, 64 tokens, batch 12) by
its own train.py and by `instructcore pretrain`: seconds of the whole process, data, evaluation and
checkpoint included, and the held-out loss. Its 90 % / 10 % split is ours too. After as many steps
our loss is the lower; --fewer 800 shows the time that it takes to get below nanoGPT's.

sft: a 6.7 M parameter Llama shape on prompt-completion pairs, batches of 16, by TRL's SFTTrainer
and by `instructcore sft`: training tokens a second after the first five steps, padding not counted.
PYTHON is one that has TRL; the same tokenizer and initial weights go to both.

ppo: iterations of PPO on that shape for the policy, the reference, the reward model and the critic:
32 prompts of 32 tokens, 64 new ones each, four epochs of one minibatch; by TRL's PPOTrainer, which
TRL 0.24 still has (with transformers 4.57), and by `instructcore ppo`. Seconds per iteration after
the first two.

--record appends rows to bench/results/<device>.csv: times are per process, per 1000 tokens, or per
iteration.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench
import numpy as np
import torch

HERE = Path(__file__).resolve()
DTYPES = ("float32", "bfloat16")  # of ours


def command(*words: object, cwd: Path | None = None) -> str:
    """What a process prints; its whole output if it fails."""
    done = subprocess.run([str(w) for w in words], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}\n{done.stdout}{done.stderr}")
    return done.stdout


def last_line(printed: str) -> Any:
    """The JSON in the last line that a process printed."""
    return json.loads(printed.strip().splitlines()[-1])


def timed(run: Callable[[], float]) -> tuple[float, float]:
    """(seconds, what `run` gives)."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ---- pretrain: each variant gives (seconds, held-out loss)

SHAPE = {"layers": 4, "heads": 4, "width": 128, "context": 64, "batch": 12}


def pretrain_ours(text: Path, steps: int, dtype: str, out: Path) -> float:
    options = [x for name, value in SHAPE.items() for x in (f"--{name}", value)]
    options += ["--tokenizer", "bytes", "--steps", steps, "--dtype", dtype]
    options += ["--save-every", 0, "--out", out]
    command(sys.executable, "-m", "instructcore", "pretrain", "--data", text, *options)
    return [m["val_loss"] for m in metrics(out) if "val_loss" in m][-1]


def prepare_nanogpt(checkout: Path, text: Path, where: Path) -> Path:
    """A copy whose data are the text's characters: 90 % to train on."""
    shutil.copytree(checkout, where, ignore=shutil.ignore_patterns(".git"))
    characters = text.read_text(encoding="utf-8")
    letters = sorted(set(characters))
    ids = np.array([letters.index(c) for c in characters], dtype=np.uint16)
    data = where / "data" / "shakespeare_char"
    ids[: len(ids) * 9 // 10].tofile(data / "train.bin")
    ids[len(ids) * 9 // 10 :].tofile(data / "val.bin")
    with (data / "meta.pkl").open("wb") as file:
        pickle.dump({"vocab_size": len(letters)}, file)
    return where


def pretrain_nanogpt(checkout: Path, steps: int, compiled: bool) -> float:
    """Its README's command for a CPU."""
    options = "--device=cpu --eval_iters=20 --log_interval=100 --dropout=0.0 --n_layer=4".split()
    options += "--block_size=64 --batch_size=12 --n_head=4 --n_embd=128".split()
    options += [f"--compile={compiled}", f"--max_iters={steps}", f"--lr_decay_iters={steps}"]
    printed = command(
        sys.executable, "train.py", "config/train_shakespeare_char.py", *options, cwd=checkout
    )
    return float(re.findall(r"val loss ([\d.]+)", printed)[-1])


def pretrain(options: argparse.Namespace, scratch: Path) -> list[dict]:
    checkout = prepare_nanogpt(options.nanogpt, options.text, scratch / "nanogpt")
    runs = iter(range(1_000_000))
    variants: dict[str, Callable[[], float]] = {}
    for dtype in DTYPES:
        variants[f"ours, {dtype}"] = lambda dtype=dtype: pretrain_ours(
            options.text.resolve(), options.steps, dtype, scratch / f"run{next(runs)}"
        )
    if options.fewer:
        variants[f"ours, bfloat16, {options.fewer} steps"] = lambda: pretrain_ours(
            options.text.resolve(), options.fewer, "bfloat16", scratch / f"run{next(runs)}"
        )
    variants["nanoGPT"] = lambda: pretrain_nanogpt(checkout, options.steps, False)
    if options.compiled:
        variants["nanoGPT, compiled"] = lambda: pretrain_nanogpt(checkout, options.steps, True)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.rounds):
        for name, run in variants.items():
            took, loss = timed(run)
            seconds[name].append(took)
            print(f"{name:<20} {took:7.1f} s  held-out loss {loss:.3f}", flush=True)
    case = f"tiny Shakespeare, {options.steps} steps"
    return table("pretrain", case, seconds)


# ---- sft: each variant gives tokens a second


def sft_checkpoint(pairs: Path, where: Path) -> tuple[Path, Path]:
    """A random model with a tokenizer of its own, and the pairs as prompt and completion."""
    from instructcore.model import GPT, ModelConfig
    from instructcore.tokenizer import Tokenizer

    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    rows = [
        (r.get("prompt", r.get("question")), r.get("completion", r.get("answer"))) for r in rows
    ]
    tokenizer = Tokenizer.train((a + b for a, b in rows), 8192)
    tokenizer.add_specials()
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size, layers=6, heads=4, width=256, mlp_width=768, context=512
    )
    GPT(shape).save(where / "init", tokenizer)
    data = where / "pairs.jsonl"
    data.write_text("".join(json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in rows))
    return where / "init", data


def sft_ours(init: Path, data: Path, steps: int, dtype: str, out: Path) -> float:
    subset = out.with_suffix(".jsonl")
    lines = data.read_text().splitlines(keepends=True)[: 16 * steps]
    subset.write_text("".join(lines))
    options = ["--epochs", 1, "--batch", 16, "--val-fraction", 0, "--dtype", dtype]
    options += ["--log-every", 1, "--save-every", 0, "--out", out]
    command(sys.executable, "-m", "instructcore", "sft", "--init", init, "--data", subset, *options)
    return statistics.harmonic_mean([m["tokens_per_second"] for m in metrics(out)][5:])


def sft_trl(python: str, init: Path, data: Path, steps: int, kind: str) -> float:
    printed = command(python, HERE, "trl-sft", init, data, steps, kind)
    found = last_line(printed)[5:]
    return sum(n for n, _ in found) / sum(s for _, s in found)


def run_trl_sft(init: str, data: str, steps: str, kind: str) -> None:
    """Run by the Python that has TRL: prints the steps' (tokens, seconds) as JSON."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line) for line in open(data, encoding="utf-8")][: 16 * int(steps)]
    tokenizer = AutoTokenizer.from_pretrained(init)
    model = AutoModelForCausalLM.from_pretrained(init, dtype=torch.float32)
    found: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            found.append((counted[0], time.perf_counter() - self.start))

    counted = [0.0]

    class Counting(SFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            mask = inputs.get("attention_mask")
            counted[0] = float(inputs["input_ids"].numel() if mask is None else mask.sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

    config = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=2 if kind == "packed" else 16,
        max_length=1024 if kind == "packed" else 512,
        packing=kind == "packed",
        bf16=kind == "bfloat16",
        gradient_checkpointing=False,
        max_steps=int(steps),
        learning_rate=1e-4,
        use_cpu=True,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Counting(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    print(json.dumps(found))


def sft(options: argparse.Namespace, scratch: Path) -> list[dict]:
    init, data = sft_checkpoint(options.pairs, scratch)
    runs = iter(range(1_000_000))
    variants: dict[str, Callable[[], float]] = {}
    for dtype in DTYPES:
        variants[f"ours, {dtype}"] = lambda dtype=dtype: sft_ours(
            init, data, options.steps, dtype, scratch / f"run{next(runs)}"
        )
    for kind in ("float32", "bfloat16", "packed"):
        variants[f"TRL, {kind}"] = lambda kind=kind: sft_trl(
            options.trl, init, data, max(8, options.steps // 5), kind
        )
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.rounds):
        for name, run in variants.items():
            tokens = run()
            seconds[name].append(1000 / tokens)
            print(f"{name:<20} {tokens:10.0f} tokens/s", flush=True)
    return table("sft", f"6.7M Llama, {options.pairs.stem}, per 1000 tokens", seconds)


# ---- ppo: each variant gives seconds per iteration

PPO = {"prompts": 32, "prompt_tokens": 32, "new_tokens": 64, "epochs": 4}


def ppo_checkpoints(pairs: Path, where: Path) -> tuple[Path, Path, Path]:
    """A policy and a reward model with random weights, and prompts of one length."""
    from instructcore.model import load
    from instructcore.tokenizer import Tokenizer

    init, data = sft_checkpoint(pairs, where)
    tokenizer = Tokenizer.load(init)
    load(init).to_scalar_head().save(where / "reward", tokenizer)
    texts = []
    for line in data.read_text().splitlines():
        ids = tokenizer.encode(json.loads(line)["prompt"])[: PPO["prompt_tokens"] - 1]
        text = tokenizer.decode(ids)
        if len(tokenizer.prompt_ids(text)) == PPO["prompt_tokens"]:
            texts.append(json.dumps({"prompt": text}) + "\n")
    prompts = where / "prompts.jsonl"
    prompts.write_text("".join(texts[:512]))
    return init, where / "reward", prompts


def ppo_ours(init: Path, reward: Path, prompts: Path, steps: int, dtype: str, out: Path) -> float:
    options = ["--init", init, "--reward", reward, "--prompts", prompts, "--out", out]
    options += ["--steps", steps, "--batch", PPO["prompts"], "--minibatch", PPO["prompts"]]
    options += ["--inner-epochs", PPO["epochs"], "--max-tokens", PPO["new_tokens"]]
    options += ["--dtype", dtype, "--log-every", 1, "--save-every", 0]
    command(sys.executable, "-m", "instructcore", "ppo", *options)
    seconds = [m["seconds"] for m in metrics(out)]
    return statistics.median(b - a for a, b in zip(seconds[1:], seconds[2:], strict=False))


def ppo_trl(python: str, init: Path, reward: Path, prompts: Path, steps: int, kind: str) -> float:
    printed = command(python, HERE, "trl-ppo", init, reward, prompts, steps, kind)
    return statistics.median(last_line(printed)[2:])


def run_trl_ppo(init: str, reward: str, prompts: str, steps: str, kind: str) -> None:
    """Run by the Python that has TRL: prints the iterations' seconds as JSON."""
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(init, padding_side="left")
    texts = [json.loads(line)["prompt"] for line in open(prompts, encoding="utf-8")]
    marker = tokenizer.convert_tokens_to_ids("<|assistant|>")
    rows = [{"input_ids": [*tokenizer(text)["input_ids"], marker]} for text in texts]
    times = [time.perf_counter()]

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            times.append(time.perf_counter())

    def scalar() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(
            reward, num_labels=1, dtype=torch.float32
        )

    config = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=PPO["prompts"],
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=PPO["epochs"],
        total_episodes=PPO["prompts"] * int(steps),
        response_length=PPO["new_tokens"],
        num_sample_generations=0,
        bf16=kind == "bfloat16",
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    data = Dataset.from_list(rows)
    PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(init, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(init, dtype=torch.float32),
        reward_model=scalar(),
        value_model=scalar(),
        train_dataset=data,
        eval_dataset=data.select(range(PPO["prompts"])),
        callbacks=[Clock()],
    ).train()
    print(json.dumps([b - a for a, b in zip(times, times[1:], strict=False)]))


def ppo(options: argparse.Namespace, scratch: Path) -> list[dict]:
    files = ppo_checkpoints(options.pairs, scratch)
    runs = iter(range(1_000_000))
    variants: dict[str, Callable[[], float]] = {}
    for dtype in DTYPES:
        variants[f"ours, {dtype}"] = lambda dtype=dtype: ppo_ours(
            *files, options.steps, dtype, scratch / f"run{next(runs)}"
        )
        variants[f"TRL, {dtype}"] = lambda dtype=dtype: ppo_trl(
            options.trl, *files, max(5, options.steps // 3), dtype
        )
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.rounds):
        for name, run in variants.items():
            seconds[name].append(run())
            print(f"{name:<20} {seconds[name][-1]:10.3f} s an iteration", flush=True)
    case = f"6.7M Llama x 4, {PPO['prompts']} x ({PPO['prompt_tokens']} + {PPO['new_tokens']})"
    return table("ppo", f"{case}, an iteration", seconds)


FOREIGN = {"trl-sft": run_trl_sft, "trl-ppo": run_trl_ppo}  # run by another Python

# ---- results


def table(stage: str, case: str, seconds: dict[str, list[float]]) -> list[dict]:
    """Rows of the results: each variant of ours, as a dtype and a case, beside all rivals."""
    rows = []
    rivals = {name: times for name, times in seconds.items() if not name.startswith("ours")}
    for ours in (name for name in seconds if name not in rivals):
        _, dtype, *fewer = ours.split(", ")
        for name, times in {"ours": seconds[ours], **rivals}.items():
            ratios = [t / o for t, o in zip(times, seconds[ours], strict=True)]
            low, mid, high = (bench.quantile(ratios, q) for q in (0.25, 0.5, 0.75))
            p50 = statistics.median(times)
            ratio = f"{ours} is {mid:.2f} x faster ({low:.2f}-{high:.2f})" if name in rivals else ""
            print(f"{stage} {ours if name == 'ours' else name:<28} p50 {p50:8.3f} s  {ratio}")
            rows.append(
                {
                    "op": stage,
                    "variant": name,
                    "pass": "stage",
                    "dtype": dtype,
                    "case": ", ".join([case, *(f"ours {steps}" for steps in fewer)]),
                    "p20_us": f"{bench.quantile(times, 0.2) * 1e6:.0f}",
                    "p50_us": f"{p50 * 1e6:.0f}",
                    "p80_us": f"{bench.quantile(times, 0.8) * 1e6:.0f}",
                    "bytes": "0",
                    "flops": "0",
                    "pct_roofline": "nan",
                    "device": bench.device_name("cpu"),
                    "torch": torch.__version__,
                    "commit": bench.commit(),
                    "date": datetime.date.today().isoformat(),
                    "command": f"python bench/pipeline.py {stage}",
                }
            )
    return rows


def main() -> int:
    if len(sys.argv) > 1 and sys.argv[1] in FOREIGN:
        FOREIGN[sys.argv[1]](*sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["pretrain", "sft", "ppo"])
    parser.add_argument("--text", type=Path, help="tiny Shakespeare")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--fewer", type=int, default=0, help="steps of one more run of ours")
    parser.add_argument("--compiled", action="store_true", help="nanoGPT with torch.compile too")
    parser.add_argument(
        "--pairs", type=Path, help="JSONL: prompt and completion, or question, answer"
    )
    parser.add_argument("--trl", help="a Python that has TRL")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default 7)")
    parser.add_argument("--steps", type=int, default=0, help="default 2000, 60 for sft, 18 for ppo")
    parser.add_argument("--record", action="store_true", help="append to bench/results")
    options = parser.parse_args()
    options.steps = options.steps or {"pretrain": 2000, "sft": 60, "ppo": 18}[options.stage]
    with tempfile.TemporaryDirectory() as scratch:
        rows = {"pretrain": pretrain, "sft": sft, "ppo": ppo}[options.stage](options, Path(scratch))
    if options.record:
        print(f"recorded in {bench.record(rows, 'cpu')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
