"""TRL's SFTTrainer teaches a small random Llama to count, without our kernels and with them.

    python examples/trl_sft.py [--width 256 --layers 4 --vocab 32000 --length 512]

Each variant runs in a process of its own. Prints its last loss, the time of a step and the most
memory that the process held, and how far apart the losses of the two are: by rounding alone. The
first step of each is left out of the times. Needs `pip install 'trl>=1.16'`; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from instructcore.adapters import transformers as ours
from instructcore.adapters import trl as ours_in_trl

# What both variants of both examples tell TRL; the rest is its defaults, checkpointing among them.
SETTINGS = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
SETTINGS |= {"logging_steps": 1, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}


def arguments(given: Sequence[str] | None, **defaults: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    shared = {"width": 64, "layers": 2, "heads": 4, "vocab": 512, "batch": 4, "threads": 2}
    for name, value in {**shared, "rounds": 1, **defaults}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    parser.add_argument("--bf16", action="store_true", help="train in autocast to bfloat16")
    parser.add_argument("--variant", choices=["without", "with"], help="that one alone, as JSON")
    return parser.parse_args(given)


def llama(args: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    heads = {"num_attention_heads": args.heads, "num_key_value_heads": args.heads // 2}
    shape = {"hidden_size": args.width, "intermediate_size": 3 * args.width, **heads}
    tokens = {"vocab_size": args.vocab, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=args.layers, **shape, **tokens))


def numbers(vocab: int) -> PreTrainedTokenizerFast:
    """The words 0, 1, 2, ... and two special tokens."""
    known = {"<pad>": 0, "<eos>": 1, **{str(i): i + 2 for i in range(vocab - 2)}}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def count(start: int, length: int, vocab: int) -> str:
    return " ".join(str((start + i) % (vocab - 2)) for i in range(length))


class Clock(TrainerCallback):
    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, *_, **__):
        self.ends.append(time.perf_counter())


def train(args: argparse.Namespace, make: Callable, compared: Sequence[str]) -> dict:
    """One variant, in this process."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    disable_progress_bars()
    torch.set_num_threads(args.threads)
    model, clock, replaced = llama(args), Clock(), []
    if args.variant == "with":
        replaced = ours.use(model) + ours_in_trl.use()
    with tempfile.TemporaryDirectory() as out:
        trainer = make(args, model, output_dir=out, bf16=args.bf16, **SETTINGS)
        trainer.add_callback(clock)
        trainer.train()
    if args.variant == "with":
        ours.restore(model)
        ours_in_trl.restore()
    # Not getrusage's, which of a process just started may still be its parent's.
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return {
        "replaced": replaced,
        "seconds": (clock.ends[-1] - clock.ends[0]) / (len(clock.ends) - 1),
        "MiB": int(status["VmHWM"].split()[0]) / 1024,
        **{name: [x[name] for x in trainer.state.log_history if name in x] for name in compared},
    }


def compare(args: argparse.Namespace, make: Callable, compared: Sequence[str] = ("loss",)) -> dict:
    """Both variants by turns, `args.rounds` times: {variant: what `train` says, seconds being the
    median of the rounds}."""
    if args.variant:
        print(json.dumps(train(args, make, compared)))
        return {}
    found: dict[str, list[dict]] = {"without": [], "with": []}
    settings = [f"--{k}={v}" for k, v in vars(args).items() if k not in ("variant", "bf16")]
    settings += ["--bf16"] * args.bf16
    script = sys.modules[make.__module__].__file__
    for _ in range(args.rounds):
        for variant, rounds in found.items():
            command = [sys.executable, script, *settings, "--variant", variant]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rounds.append(json.loads(done.stdout.splitlines()[-1]))
    print(*found["with"][0]["replaced"], sep="\n")
    results = {}
    for variant, rounds in found.items():
        seconds = statistics.median(x["seconds"] for x in rounds)
        results[variant] = {**rounds[0], "seconds": seconds}
        shown = f"{seconds:.3f} s a step  {results[variant]['MiB']:.0f} MiB"
        print(f"{variant:8}last loss {rounds[0]['loss'][-1]:.6f}  {shown}")
    for name in compared:
        pairs = zip(*(results[variant][name] for variant in results), strict=True)
        apart = max(abs(a - b) for a, b in pairs)
        print(f"{name}: {apart:.1e} apart at most")
    return results


def sft(args: argparse.Namespace, model: LlamaForCausalLM, **settings) -> SFTTrainer:
    """Rows of half the length and more, padded to the longest of their batch."""
    generator = torch.Generator().manual_seed(0)
    rows = args.steps * args.batch
    starts = torch.randint(args.vocab, (rows,), generator=generator).tolist()
    lengths = torch.randint(args.length // 2, args.length, (rows,), generator=generator).tolist()
    texts = [count(*pair, args.vocab) for pair in zip(starts, lengths, strict=True)]
    return SFTTrainer(
        model,
        SFTConfig(
            max_steps=args.steps,
            max_length=args.length,
            per_device_train_batch_size=args.batch,
            **settings,
        ),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=numbers(args.vocab),
    )


def main(given: Sequence[str] | None = None) -> dict:
    return compare(arguments(given, length=64, steps=10), sft)


if __name__ == "__main__":
    main()
