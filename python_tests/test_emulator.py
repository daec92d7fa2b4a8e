"""The emulator itself: each known mistake is seen, and what is right is not accused."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

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


def run(case: str, variant: str, schedule: tuple, flavour: str) -> str:
    program = emulated.build_program(flavour, "emulator/bugs.cu")
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
@pytest.mark.parametrize("case", [*BUGS, "chain"])
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


class KernelBug(NamedTuple):
    """A mistake in an op's kernels, and the op's test that must see it."""

    op: str
    file: str
    there: str  # in the file; each occurrence is replaced
    instead: str
    flavour: str
    test: str  # as -k selects it
    says: str  # a regular expression


WRONG = r"AssertionError|assert False"
KERNEL_BUGS = {
    "flag_not_waited_for": KernelBug(
        *("gae", "gae_scan.cuh", "    wait_for_flag(&tile->ready, 1);\n", ""),
        *("fast", "test_long_rows", WRONG),
    ),
    "no_ticket": KernelBug(
        *("gae", "gae_tiles.cuh", "kChained ? draw_ticket(workspace.ticket) : blockIdx.x"),
        *("blockIdx.x", "fast", "test_long_rows", "deadlock: wait_for_flag"),
    ),
    "stage_read_too_early": KernelBug(
        *("gae", "gae_tiles.cuh", ": kGaeNoStep);\n  }\n  __syncwarp();\n"),
        *(": kGaeNoStep);\n  }\n", "check", "test_packed", "shared memory"),
    ),
    "past_the_last_position": KernelBug(
        *("gae", "gae_tiles.cuh", "    if (position >= count) continue;\n"),
        *("    if (position > count) continue;\n", "asan", "test_matches", "heap-buffer-overflow"),
    ),
    "true_class_written_too_early": KernelBug(
        *(
            "cross_entropy",
            "cross_entropy.cu",
            "  __syncthreads();\n  if (threadIdx.x == 0 && known)",
        ),
        *("  if (threadIdx.x == 0 && known)", "fast", "test_gradients", WRONG),
    ),
    "tail_not_cut": KernelBug(
        *("token_logprobs", "softmax_row.cuh", "if (i + v * step + kItems > n)"),
        *("if (i + v * step > n)", "fast", "test_matches", WRONG),
    ),
    "last_vector_not_searched": KernelBug(
        *("token_logprobs", "softmax_row.cuh", "v < kRowVectors; ++v) {\n      const int64_t i ="),
        *("v < kRowVectors - 1; ++v) {\n      const int64_t i =", "fast", "test_matches", WRONG),
    ),
    "score_paid_a_step_early": KernelBug(
        *("ppo_advantage", "ppo_advantage.cu", "(__ffs(static_cast<int>(unmasked)) - 1)"),
        *("__ffs(static_cast<int>(unmasked))", "fast", "test_matches", WRONG),
    ),
    "sums_read_too_early": KernelBug(
        *("ppo_loss", "ppo_loss.cu", "  __syncthreads();\n  if (threadIdx.x >= kPpoSums)"),
        *("  if (threadIdx.x >= kPpoSums)", "check", "test_packed", "shared memory"),
    ),
    "ties_read_too_early": KernelBug(
        *("sample", "sample.cu", "] = count;\n  __syncthreads();\n", "] = count;\n"),
        *("check", "test_truncations and ties", "shared memory"),
    ),
    "no_second_draw": KernelBug(
        *("sample", "sample.cu", "if (best > draw.bar || draw.bar == kMinusInf)\n", ""),
        *("fast", "test_noise_far_below", WRONG),
    ),
    "weights_passed_too_early": KernelBug(
        *("attention", "attention_bwd.cu", "    if constexpr (S::kLag == 0) __syncthreads();\n"),
        *("", "check", "test_gradients_in_16_bits and 256 and full", "shared memory"),
    ),
    "tile_of_the_wrong_head": KernelBug(
        *("attention", "attention_bwd.cu", "TileAt{head + 1, first}", "TileAt{head, first}"),
        *("fast", "test_gradients_in_16_bits and 80 and full", WRONG),
    ),
    "bracket_below_the_least": KernelBug(
        *("sample", "sample.cu", "below >= s.least && below < high", "below < high"),
        *("fast", "test_matches", WRONG),
    ),
    "new_keys_read_back": KernelBug(
        *("attention", "attention_paged.cu", "    if (key >= w_.held) return new_row("),
        *("    if (key > w_.held) return new_row(", "fast", "test_paged_equals", WRONG),
    ),
    "segments_joined_backwards": KernelBug(
        *("attention", "attention_paged.cu", "at = from + (segment + i) * step"),
        *("at = from + (slots.segments - 1 - segment - i) * step", "fast"),
        *("test_paged_equals_dense_across", WRONG),
    ),
    "hidden_row_times_0": KernelBug(
        *("attention", "attention_plain.cu", "if (!exact || seen[i].has("),
        *("if (exact || seen[i].has(", "fast", "test_hidden_values and nan and not 16_bits", WRONG),
    ),
    "unit_replaced_too_early": KernelBug(
        *("attention", "attention_paged.cu", "    __syncthreads();  // before the next unit"),
        *("    // before the next unit", "check", "test_paged_deterministic", "shared memory"),
    ),
}


def run_tests(modules: list[str], selection: str, flavour: str, *options: str):
    """The tests of some modules in a process of their own, on a flavour of the emulator."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-qsx", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, "-k", selection, f"--emulator={flavour}", *options]
        + [str(here / name) for name in modules],
        capture_output=True,
        text=True,
        env={**os.environ, **emulated.environment(flavour)},
        cwd=here.parent,
    )


def run_with(bug: KernelBug, folder: Path):
    """The test that must see it, on kernels with the mistake."""
    csrc = folder / "csrc"
    shutil.copytree(emulated.CSRC, csrc)
    text = (csrc / bug.file).read_text()
    assert bug.there in text, f"{bug.file} has changed: choose another place to break"
    (csrc / bug.file).write_text(text.replace(bug.there, bug.instead))
    selection = f"emulated and {bug.test}"
    return run_tests([f"test_{bug.op}.py"], selection, bug.flavour, f"--broken={bug.op}:{csrc}")


# The builds that look at memory: which cases of the ops' own tests they run, in one of how many
# sets of parameters. A race detector takes its time over float32 attention.
CLEAN = {
    "check": ("not across_blocks and not 300 and not same_bits and not identities", 8),
    "asan": ("not across_blocks", 12),
}


def run_clean(flavour: str):
    modules = [f"test_{op}.py" for op in emulated.load().build_info()["cuda_ops"]]
    cases, thin = CLEAN[flavour]
    selection = f"emulated and not opcheck and not compile and {cases}"
    return run_tests(modules, selection, flavour, f"--thin={thin}")


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """What the tests below ask for, each in a process of its own, side by side."""
    wanted = [
        (item.originalname, item.callspec.params["name"])
        for item in request.session.items
        if item.originalname in ("test_kernels_are_clean", "test_sees_a_mistake_in_a_kernel")
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            name: pool.submit(run_clean, name)
            if test == "test_kernels_are_clean"
            else pool.submit(run_with, KERNEL_BUGS[name], tmp_path_factory.mktemp(name))
            for test, name in sorted(wanted)  # the longest first
        }


@pytest.mark.parametrize("name", CLEAN)
def test_kernels_are_clean(name, runs):
    done = runs[name].result()
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.parametrize("name", KERNEL_BUGS)
def test_sees_a_mistake_in_a_kernel(name, runs):
    done = runs[name].result()
    said = done.stdout + done.stderr
    assert done.returncode != 0 and re.search(KERNEL_BUGS[name].says, said), said[-4000:]
