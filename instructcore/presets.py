"""What the presets and algorithms of `instructcore ppo` set: each value with its source.

A source is a section of the paper, or the code that its authors published. OUR_CHOICE marks what
they leave open; so is every setting at its default that a table does not name.

instructgpt: Ouyang et al. 2022 (arXiv:2203.02155); "C.4" and so on are its appendices.
nplus_tldr: Huang et al. 2024 (arXiv:2403.17031), TL;DR; github.com/vwxyzjn/
    summarize_from_feedback_details, ppo.py.
lm_human_preferences: Ziegler et al. 2019 (arXiv:1909.08593), the sentiment and descriptiveness
    tasks; github.com/openai/lm-human-preferences, launch.py and train_policy.py.
grpo: Shao et al. 2024 (arXiv:2402.03300). dr_grpo: Liu et al. 2025 (arXiv:2503.20783). rloo:
    Ahmadian et al. 2024 (arXiv:2402.14740).
"""

from __future__ import annotations

from typing import Any

OUR_CHOICE = "our choice"

_AS_STIENNON = f"{OUR_CHOICE}, as in Stiennon et al. and N+"
_NPLUS = "N+ code, ppo.py"
_LAUNCH, _TRAIN = "launch.py", "train_policy.py"

Table = dict[str, tuple[Any, str]]  # setting: its value and the source

PRESETS: dict[str, Table] = {
    "small": {},
    "instructgpt": {
        "steps": (500, "C.4: 256k episodes of 512"),
        "batch": (512, "C.4"),
        "minibatch": (64, "C.4"),
        "inner_epochs": (1, "C.4"),
        "max_tokens": (1024, "C: responses of up to 1k tokens"),
        "temperature": (1.0, "C.4"),
        "kl_coef": (0.02, "C.4"),
        "kl_target": (0.0, "C.4: a fixed coefficient"),
        "kl_in": ("reward", "eq. 2"),
        "score_at": ("last", "3.5: the reward ends the episode"),
        "gamma": (1.0, "C.4: no discount"),
        "lambda_": (0.95, _AS_STIENNON),
        "clip_range": (0.2, "C.4"),
        "value_clip_range": (0.2, _AS_STIENNON),
        "value_coef": (0.1, _AS_STIENNON),
        "ptx_coef": (27.8, "C.4"),
        "ptx_batch": (512, "C.4: 8 times the episodes"),
        "ptx_context": (2048, "C: the context"),
        "critic_lr": (9e-6, "C.4, the critic of the 1.3B and 6B policies"),
        "lr": (8e-6, f"{OUR_CHOICE}: E.8 scans 2.55e-6 to 2.55e-5"),
        "schedule": ("constant", "C.4"),
        "warmup": (10, "C.4: 10 iterations"),
        "warmup_from": (0.1, "C.4"),
        "beta1": (0.9, "C"),
        "beta2": (0.95, "C"),
        "ema": (0.992, "C.4"),
        "export_ema": (True, "C.4"),
    },
    "nplus_tldr": {
        "steps": (1953, f"{_NPLUS}: a million episodes of 512"),
        "batch": (512, _NPLUS),
        "minibatch": (512, f"{_NPLUS}: one minibatch"),
        "inner_epochs": (4, _NPLUS),
        "max_tokens": (53, _NPLUS),
        "temperature": (0.7, _NPLUS),
        "kl_coef": (0.05, _NPLUS),
        "kl_target": (0.0, f"{_NPLUS}: a fixed coefficient"),
        "kl_in": ("reward", _NPLUS),
        "missing_eos": ("replace", _NPLUS),
        "missing_eos_penalty": (1.0, f"{_NPLUS}: the score becomes -1"),
        "score_at": ("after_end", f"{_NPLUS}: padding_mask_p1"),
        "truncated": ("zero", _NPLUS),
        "reward_clip": (0.0, f"{_NPLUS}: none"),
        "whiten_rewards": (False, _NPLUS),
        "gamma": (1.0, _NPLUS),
        "lambda_": (0.95, _NPLUS),
        "clip_range": (0.2, _NPLUS),
        "value_clip_range": (0.2, _NPLUS),
        "value_coef": (0.1, _NPLUS),
        "aggregate": ("token", f"{_NPLUS}: masked means"),
        "ema": (0.0, f"{_NPLUS}: none"),
        "critic_lr": (3e-6, f"{_NPLUS}: one optimiser for both"),
        "lr": (3e-6, _NPLUS),
        "schedule": ("linear", _NPLUS),
        "min_lr_ratio": (0.0, f"{_NPLUS}: to 0"),
        "warmup": (0.0, _NPLUS),
        "beta1": (0.9, f"{_NPLUS}: AdamW's default"),
        "beta2": (0.999, f"{_NPLUS}: AdamW's default"),
        "eps": (1e-5, _NPLUS),
        "weight_decay": (0.01, f"{_NPLUS}: AdamW's default; of matrices only is {OUR_CHOICE}"),
    },
    "lm_human_preferences": {
        "steps": (1954, f"{_LAUNCH}: a million episodes of 512"),
        "batch": (512, _LAUNCH),
        "minibatch": (512, f"{_TRAIN}: one minibatch"),
        "inner_epochs": (4, _TRAIN),
        "max_tokens": (24, _LAUNCH),
        "temperature": (0.7, _LAUNCH),
        "kl_coef": (0.15, _LAUNCH),
        "kl_target": (6.0, _LAUNCH),
        "kl_horizon": (1e4, _TRAIN),
        "kl_in": ("reward", _TRAIN),
        "missing_eos": ("replace", f"{_TRAIN}: penalize, for a response without its full stop"),
        "missing_eos_penalty": (1.0, "lm_tasks.py: penalty_reward_value"),
        "score_at": ("last", _TRAIN),
        "truncated": ("zero", _TRAIN),
        "reward_clip": (0.0, f"{_TRAIN}: none"),
        "whiten_rewards": (True, _TRAIN),
        "gamma": (1.0, _TRAIN),
        "lambda_": (0.95, _TRAIN),
        "clip_range": (0.2, _TRAIN),
        "value_clip_range": (0.2, _TRAIN),
        "value_coef": (0.1, _TRAIN),
        "aggregate": ("token", _TRAIN),
        "ema": (0.0, f"{_TRAIN}: none"),
        "critic_lr": (1e-5, f"{_LAUNCH}; a critic of its own is {OUR_CHOICE}"),
        "lr": (1e-5, _LAUNCH),
        "schedule": ("linear", _TRAIN),
        "min_lr_ratio": (0.0, f"{_TRAIN}: to 0"),
        "warmup": (0.0, _TRAIN),
        "beta1": (0.9, "core.py: Adam's default"),
        "beta2": (0.999, "core.py: Adam's default"),
        "eps": (1e-5, "core.py"),
        "weight_decay": (0.0, "core.py: plain Adam"),
        "grad_clip": (0.0, "core.py: none"),
    },
}

ALGORITHMS: dict[str, Table] = {
    "ppo": {},
    "grpo": {
        "group_size": (8, f"{OUR_CHOICE}; Shao et al. draw 64"),
        "kl_in": ("loss", "Shao et al., eq. 3 and 4"),
        "aggregate": ("sequence", "Shao et al., eq. 3"),
    },
    "dr_grpo": {
        "group_size": (8, OUR_CHOICE),
        "kl_in": ("loss", f"{OUR_CHOICE}, as in GRPO; Liu et al. leave the KL term out"),
        "aggregate": ("constant", "Liu et al.: a constant for the length"),
    },
    "rloo": {
        "group_size": (4, "Ahmadian et al.: k = 2 and 4"),
        "kl_in": ("reward", "Ahmadian et al."),
        "aggregate": ("constant", f"a sum over tokens; its scale, 1/max_tokens, is {OUR_CHOICE}"),
    },
}
