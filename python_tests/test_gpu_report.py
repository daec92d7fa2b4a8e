from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).resolve().parents[1] / "bench" / "gpu_report.py"


def run(*words: str) -> subprocess.CompletedProcess:
    # As this process finds the package; without a GPU, wherever it runs.
    paths = os.pathsep.join(str(Path(entry or ".").resolve()) for entry in sys.path)
    env = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, PROGRAM, *words]
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("gpu_report", PROGRAM)
    module = sys.modules["gpu_report"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu():
    done = run()
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"gpu_report: torch {torch.__version__} finds no CUDA device\n"


def test_training_step_against_itself():
    done = run("step", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("gradient off by 0.")


def part(report, code, **more):
    return report.Part("some part", [sys.executable, "-c", code], **more)


def test_parts(report, tmp_path):
    def result(code, seconds=60, **more):
        return report.run_part(part(report, code, **more), seconds, tmp_path)

    good = result("print('one'); print('two')")
    assert (good.verdict, good.lines) == ("pass", ["two"])
    assert result("print('one'); print('two')", shows="n|w").lines == ["one", "two"]
    assert result("raise SystemExit('why')").verdict == "FAIL"
    assert result("raise SystemExit('why')").lines == [f"why ({tmp_path / 'some_part.log'})"]
    # What a part has started goes with it.
    begin = time.monotonic()
    late = result("import os, time; os.fork(); time.sleep(60)", seconds=1)
    assert late.verdict == "TIMEOUT" and time.monotonic() - begin < 20
    assert result("", seconds=-1).verdict == "NO TIME"


def test_a_failing_part_does_not_stop_the_others(report, tmp_path, monkeypatch, capsys):
    def parts(logs):
        for code in ("raise SystemExit('why')", "print('fine')"):
            yield report.run_part(part(report, code), 60, tmp_path)

    monkeypatch.setattr(report, "report", parts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some device")
    assert report.main([]) == 1
    said = capsys.readouterr().out
    assert "FAIL" in said and "fine" in said and "not passed: some part" in said
