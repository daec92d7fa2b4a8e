"""`test_serve_clients.py` with the real clients, and a harness: `python python_tests/clients.py`.

Each version of the client gets a virtual environment of its own under build/clients; all ask the
servers in this process. lm-eval's `local-completions` must find the log-likelihoods that `score`
computes here, bit for bit. The outcome is written to bench/results/clients.md.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import re
import subprocess
import sys
import time
import venv
from pathlib import Path

from serving import TOKENIZER, make_model, servers_for_clients

from instructcore.generate import score

ROOT = Path(__file__).parents[1]
WHERE = ROOT / "build" / "clients"
VERSIONS = ("0.28.1", "1.55.3", "2.54.0", "3.54.0")
LM_EVAL = "0.4.13"
# Of what lm-eval depends on, what its client of a server imports; the rest is large.
LM_EVAL_NEEDS = "transformers jinja2 aiohttp requests tenacity tqdm numpy".split()
KEY = "sesame"

TEXTS = [
    ("The cat", " sat on the mat."),
    ("Question: 2 + 2 =\nAnswer:", " 4"),
    ("天地玄黄，", "宇宙洪荒。"),
    ("héllo 🙂", " wörld 🙂🙂"),
    ("a", "b" * 500),
]
HARNESS = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

address, tokenizer, texts = sys.argv[1:]
model = LocalCompletionsAPI(
    base_url=address + "/v1/completions", model="toy", tokenizer=tokenizer,
    tokenizer_backend="huggingface", max_length=1024, batch_size=3,
)
asked = [Instance("loglikelihood", {}, tuple(pair), i) for i, pair in enumerate(json.loads(texts))]
print(json.dumps(model.loglikelihood(asked)))
"""


def environment(name: str, *packages: str, without: str = "") -> Path:
    """The Python of a virtual environment with these packages, and one without what it needs."""
    python = WHERE / name / "bin" / "python"
    if not python.exists():
        venv.create(WHERE / name, with_pip=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *packages], check=True)
    if without:
        subprocess.run([*install, "--no-deps", without], check=True)
    return python


def run_suite(version: str, addresses: dict[str, str]) -> str:
    """How the suite ended with this version."""
    python = environment(version, f"openai=={version}", "pytest")
    command = [python, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    command += [ROOT / "python_tests" / "test_serve_clients.py"]
    env = os.environ | {"INSTRUCTCORE_SERVERS": json.dumps(addresses), "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=WHERE, env=env, capture_output=True, text=True)
    print(done.stdout if done.returncode else done.stdout.splitlines()[-1], flush=True)
    return re.sub(r" in .*", "", done.stdout.splitlines()[-1])


def run_harness(address: str) -> str:
    """Whether lm-eval's log-likelihoods are those computed here."""
    checkpoint = WHERE / "checkpoint"
    model = make_model(context=1024)
    model.save(checkpoint, TOKENIZER)
    python = environment("lm-eval", *LM_EVAL_NEEDS, without=f"lm-eval=={LM_EVAL}")
    env = os.environ | {"OPENAI_API_KEY": KEY, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [python, "-c", HARNESS, address, checkpoint, json.dumps(TEXTS)]
    done = subprocess.run(
        command, cwd=WHERE, env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    theirs = [loglikelihood for loglikelihood, _ in json.loads(done.stdout.splitlines()[-1])]
    ids = [TOKENIZER.encode(context + rest) for context, rest in TEXTS]
    rows = zip(score(model, ids), TEXTS, strict=True)
    own = [sum(row.tolist()[len(TOKENIZER.encode(text)) - 1 :]) for row, (text, _) in rows]
    print(f"lm-eval {theirs}\nhere    {own}", flush=True)
    equal = sum(a == b for a, b in zip(theirs, own, strict=True))
    return f"{equal} of {len(own)} log-likelihoods equal to the last bit"


def main() -> None:
    begin = time.monotonic()
    logging.disable(logging.CRITICAL)  # some servers are to fail
    with servers_for_clients(KEY) as addresses:
        rows = [(f"openai {version}", run_suite(version, addresses)) for version in VERSIONS]
        rows.append((f"lm-eval {LM_EVAL}, local-completions", run_harness(addresses["main"])))
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    today = f"{datetime.date.today()}, commit {commit}, Python {sys.version.split()[0]}"
    table = "".join(f"| {name} | {outcome} |\n" for name, outcome in rows)
    report = f"# The server and its clients\n\n`make clients`, {today}.\n\n"
    report += f"| client | outcome |\n|---|---|\n{table}"
    (ROOT / "bench" / "results" / "clients.md").write_text(report, encoding="utf-8")
    print(f"{report}\n{time.monotonic() - begin:.0f} s")
    whole = f"{len(TEXTS)} of {len(TEXTS)} "
    if any("failed" in outcome or "error" in outcome for _, outcome in rows[:-1]) or (
        not rows[-1][1].startswith(whole)
    ):
        sys.exit("a client failed")


if __name__ == "__main__":
    main()
