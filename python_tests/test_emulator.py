"""The emulator itself: each known mistake is seen, and what is right is not accused."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch

SCHEDULES = [("first", "late", 0), ("last", "early", 0), ("random", "random", 1)]

# The mistake: (the flavour that must see it whatever the schedule, and what it must say).
BUGS = {
    "missing_barrier": ("check", r"(race in|uninitialised) shared memory.*bugs.cu"),
    "missing_trailing_barrier": ("check", r"race in shared memory.*bugs.cu:\d+.*bugs.cu:\d+"),
    "shuffle_is_no_barrier": ("check", r"race in shared memory"),
    "divergent_barrier": ("fast", r"barrier divergence.*bugs.cu:\d+\) while others wait at"),
    "barrier_after_the_end": ("fast", r"barrier divergence"),
    "absent_lane": ("fast", r"lane \d+ reads lane 20, which takes no part"),
    "wrong_mask": ("fast", r"warp divergence|deadlock: .* at a shuffle"),
    "uninitialised": ("check", r"uninitialised shared memory"),
    "past_shared": ("check", r"write outside every shared array"),
    "past_global": ("asan", r"heap-buffer-overflow"),
    "early_wait": ("check", r"into which a copy is in flight"),
    "copy_without_barrier": ("check", r"(race in|uninitialised) shared memory"),
    "never_waited": ("fast", r"cp_async_wait<0>\(\) is missing"),
    "misaligned_rows": ("fast", r"not a multiple of 16"),
}


@pytest.fixture(scope="module", autouse=True)
def compiler():
    if reason := emulated.missing():
        if os.environ.get("INSTRUCTCORE_REQUIRE_EMULATOR"):
            pytest.fail(reason)
        pytest.skip(reason)


def run(case: str, variant: str, schedule: tuple, flavour: str, csrc: Path = emulated.CSRC) -> str:
    program = emulated.build_program(flavour, "emulator/bugs.cu", csrc, kernels=("gae.cu",))
    done = subprocess.run(
        [program, case, variant, *map(str, schedule)],
        capture_output=True,
        text=True,
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
    )
    said = done.stdout.strip() + done.stderr
    assert (done.returncode == 0) == (said == "ok"), said
    return said


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("case", BUGS)
def test_sees_the_mistake(case, schedule):
    flavour, message = BUGS[case]
    said = run(case, "broken", schedule, flavour)
    assert re.search(message, said, re.DOTALL), said


@pytest.mark.parametrize("flavour", emulated.FLAVOURS)
@pytest.mark.parametrize("case", [*BUGS, "chain", "gae"])
def test_accuses_nothing_right(case, flavour):
    for schedule in SCHEDULES:
        assert run(case, "fixed", schedule, flavour) == "ok"


def test_late_arrival_shows_a_wait_off_by_one_in_the_values():
    assert run("early_wait", "broken", ("first", "late", 0), "fast") == "wrong values"
    assert run("early_wait", "broken", ("first", "early", 0), "fast") == "ok"


def test_waiting_for_a_block_that_may_not_have_started():
    assert run("chain", "broken", ("first", "late", 0), "fast") == "ok"  # as luck has it
    assert "deadlock: wait_for_flag" in run("chain", "broken", ("last", "late", 0), "fast")


@pytest.mark.parametrize("flavour", emulated.FLAVOURS)
def test_primitives_keep_their_promises_emulated(flavour):
    program = emulated.build_program(flavour, "emulator/conformance.cu")
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stdout + done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_primitives_keep_their_promises_cuda(tmp_path):
    program = tmp_path / "conformance"
    source = emulated.CSRC / "emulator" / "conformance.cu"
    subprocess.run(
        ["nvcc", "-std=c++17", "-arch=native", f"-I{emulated.CSRC}", source, "-o", program],
        check=True,
    )
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stdout + done.stderr


# A mistake in gae: (file, what is there, what is put in its place, the flavour and what it says).
GAE_BUGS = {
    "flag_not_waited_for": (
        "gae_scan.cuh",
        "    wait_for_flag(&tile->ready, 1);\n",
        "",
        "fast",
        "wrong values",
    ),
    "no_ticket": (
        "gae_tiles.cuh",
        "kChained ? draw_ticket(workspace.ticket) : blockIdx.x",
        "blockIdx.x",
        "fast",
        "deadlock: wait_for_flag",
    ),
    "stage_read_too_early": (
        "gae_tiles.cuh",
        ": kGaeNoStep);\n  }\n  __syncwarp();\n",
        ": kGaeNoStep);\n  }\n",
        "check",
        "shared memory",
    ),
    "past_the_last_position": (
        "gae_tiles.cuh",
        "    if (position >= count) continue;\n",
        "    if (position > count) continue;\n",
        "asan",
        "heap-buffer-overflow",
    ),
}


@pytest.mark.parametrize("bug", GAE_BUGS)
def test_sees_a_mistake_in_gae(bug, tmp_path):
    file, there, instead, flavour, message = GAE_BUGS[bug]
    csrc = tmp_path / "csrc"
    shutil.copytree(emulated.CSRC, csrc)
    text = (csrc / file).read_text()
    assert text.count(there) >= 1, f"{file} has changed: choose another place to break"
    (csrc / file).write_text(text.replace(there, instead))
    said = [run("gae", "fixed", schedule, flavour, csrc) for schedule in SCHEDULES]
    assert any(message in each for each in said), said


@pytest.mark.parametrize("flavour", ["check", "asan"])
def test_kernels_are_clean(flavour):
    """The ops' own tests, on the builds that look at memory."""
    modules = [f"test_{op}.py" for op in emulated.load().build_info()["cuda_ops"]]
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    selection = ["-k", "emulated and not opcheck", f"--emulator={flavour}"]
    done = subprocess.run(
        [*command, *selection, *(str(here / name) for name in modules)],
        capture_output=True,
        text=True,
        env={**os.environ, **emulated.environment(flavour)},
        cwd=here.parent,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
