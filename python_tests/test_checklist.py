"""What a reproduction of RLHF must get right, line by line, and which tests show it.

A test says `@pytest.mark.checklist(8, 21)`, or `@pytest.mark.bug("verl#1758")` of a mistake that
others shipped; `pytest -m checklist` runs them. Sources: Ouyang et al. 2022 (arXiv:2203.02155);
Huang et al. 2024 (arXiv:2403.17031); and the code of TRL, OpenRLHF and verl.
"""

from __future__ import annotations

import ast
from pathlib import Path

CHECKLIST = {
    1: "padding is not the end-of-text token",
    2: "prompts of unequal length: each result is that of the prompt alone",
    3: "position p predicts token p + 1; a value is of the state before its token",
    4: "old, new and reference log-probabilities at one temperature",
    5: "rollouts from the whole distribution: top_p 1, top_k 0",
    6: "a response without an end: score := −penalty, or score −= penalty",
    7: "the reward model scores a response up to its first end",
    8: "the score at the last token, or at the state after the end",
    9: "k1 in the reward, k2 for statistics, k3 in the loss if asked",
    10: "the KL coefficient fixed, or adaptive",
    11: "rewards clipped",
    12: "rewards whitened, their mean kept",
    13: "values after the end count nowhere",
    14: "GAE with γ = 1, λ = 0.95, V = 0 after the last token",
    15: "observed tokens between turns carry V and A through",
    16: "a truncated response: bootstrap, 0, or dropped",
    17: "advantages whitened over the mask, over all ranks",
    18: "returns from advantages that are not whitened",
    19: "log-ratios clamped to ±20; a step without finite gradient skipped and counted",
    20: "clipped policy loss, dual clip, asymmetric clip",
    21: "value loss: half the worse of clipped and not, times its coefficient",
    22: "the normaliser is the whole minibatch's, over micro-batches and ranks",
    23: "means over tokens, over sequences, or by a constant",
    24: "dropout off in all four models",
    25: "Adam's eps 1e-5",
    26: "learning rate schedules",
    27: "a new scalar head from N(0, 1/√(d + 1))",
    28: "the reward model centred on demonstrations",
    29: "K-wise batches of the reward model, ties dropped",
    30: "the critic begins as the reward model, with its own rate",
    31: "batch algebra is exact; a fresh permutation for each inner epoch",
    32: "old log-probabilities from the generator, or again; importance correction, truncated",
    33: "statistics over the mask",
    34: "step 0: KL 0, ratio 1, nothing clipped",
    35: "the reference is frozen",
    36: "the pre-training mix is a backward of its own",
    37: "averaged weights for evaluation and export",
    38: "evaluation is greedy",
    39: "one seed decides: the shuffling, and each stream on its own",
    40: "resume restores all",
    41: "gradients clipped",
    42: "what the papers leave open is named as our choice",
}

BUGS = {
    "verl#6957": "the critic's gradient scaled by the number of micro-batches",
    "verl#1758": "the critic's mask off by one",
    "ROLL#447": "a masked value leaks into advantages",
    "TRL 1.14": "a fused loss that each rank normalises on its own",
    "NeMo-RL#3171": "Adam's state lost on resume",
    "TRL#1623": "the end never learned, because padding is the same token",
    "TRL#417": "negative KL from two temperatures",
    "slime#1951": "all logits at once for log-probabilities",
    "safe-rlhf#71": "responses drift longer unseen",
}


def marks(name: str) -> set:
    """The arguments of all `@pytest.mark.<name>(...)` in the tests' source."""
    found = set()
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
                for mark in function.decorator_list:
                    if ast.unparse(mark).startswith(f"pytest.mark.{name}("):
                        found |= {ast.literal_eval(argument) for argument in mark.args}
    return found


def test_checklist_is_complete():
    assert sorted(CHECKLIST) == list(range(1, 43)) and marks("checklist") == CHECKLIST.keys()


def test_every_known_bug_has_its_test():
    assert marks("bug") == BUGS.keys()
