"""The command line: flags from dataclasses, exit codes, help, the report for bugs."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

import instructcore
from instructcore import cli
from instructcore.__main__ import report
from instructcore.config import (
    OptimConfig,
    RunConfig,
    check_divides,
    check_options,
    flatten,
    group,
    option,
    options,
    unflatten,
)
from instructcore.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Shape:
    """The shape of something."""

    size: int = option(4, "how large", unit="metres", paper="175", range="[1, inf)")
    half: int = option(0, "half of size, 0 = work it out")

    def __post_init__(self):
        check_options(self)
        object.__setattr__(self, "half", self.half or self.size // 2)


@dataclass(frozen=True)
class ToyConfig:
    """Settings of a toy."""

    checkpoint: str = option("", "where it is", required=True, positional=True)
    data: tuple[str, ...] = option((), "files", required=True, metavar="FILE")
    lambda_: float = option(0.95, "a name that Python keeps for itself")
    limit: float | None = option(None, "may be missing")
    loud: bool = option(False, "100 % noise")
    kind: str = option("a", "which", choices=("a", "b"))
    shape: Shape = group(Shape, size=6)
    optim: OptimConfig = group(OptimConfig, hide=("schedule",), lr=0.5, paper={"lr": "7"})
    run: RunConfig = group(RunConfig)


@pytest.fixture
def toy(monkeypatch):
    """A command `toy` that keeps the settings it was called with, or raises what it is told to."""
    calls = []

    def run(config):
        calls.append(config)
        if config.kind == "b":
            raise KeyboardInterrupt("stopped after step 3")
        if config.lambda_ < 0:
            raise RuntimeError("a bug")
        if config.limit == 1:
            open("/proc/nowhere/file", "w")
        if config.limit == 2:
            raise OSError("no number: a library's own")

    module = types.SimpleNamespace(ToyConfig=ToyConfig, run=run)
    monkeypatch.setitem(sys.modules, "instructcore.toy", module)
    monkeypatch.setitem(cli.COMMANDS, "toy", cli.Command("toy", "ToyConfig", "run", "plays"))
    return calls


REQUIRED = ["CKPT", "--data", "x", "y", "--out", "o"]


def test_import_from_the_root_of_a_clone():
    """The sources there have no compiled module; the installed one serves them."""
    code = "import instructcore.ops, instructcore; instructcore.pretrain, instructcore.load"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_flags_become_settings(toy):
    arguments = "--lambda 0.5 --loud --size 8 --lr 2 --limit 3 --resume --kind a".split()
    assert cli.main(["toy", *REQUIRED, *arguments]) == 0
    (config,) = toy
    assert (config.checkpoint, config.data, config.run.out) == ("CKPT", ("x", "y"), "o")
    assert (config.lambda_, config.loud, config.limit) == (0.5, True, 3.0)
    assert config.shape == Shape(size=8) and config.shape.half == 4
    assert config.optim.lr == 2.0 and config.run.resume


def test_defaults_are_those_of_the_dataclass(toy):
    assert cli.main(["toy", *REQUIRED, "--no-loud"]) == 0
    expected = ToyConfig("CKPT", ("x", "y"), run=RunConfig(out="o"))
    assert toy == [expected] and expected.shape.half == 3 and expected.optim.lr == 0.5


def test_flatten_and_back():
    config = ToyConfig("c", ("x",), shape=Shape(10), run=RunConfig(out="o", seed=3))
    flat = flatten(config)
    assert (flat["size"], flat["half"], flat["seed"], flat["lr"]) == (10, 5, 3, 0.5)
    assert flat["data"] == ["x"] and "schedule" not in flat
    assert unflatten(ToyConfig, flat) == config


def test_help_tells_default_unit_and_paper(toy, capsys):
    assert cli.main(["toy", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "how large (metres; default 6; paper 175)" in text
    assert "--loud, --no-loud 100 % noise (default no)" in text
    assert "highest learning rate (default 0.5; paper 7)" in text
    assert "may be missing (default none)" in text
    assert "--lambda X" in text and "--data FILE [FILE ...]" in text and "--kind a|b" in text
    assert "The shape of something" in text and "--schedule" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toi"], "no command 'toi'; there are pretrain, sft"),
        (["toy"], "the following arguments are required: checkpoint, --data, --out"),
        (["toy", *REQUIRED, "--sizes", "3"], "unrecognized arguments: --sizes 3"),
        (["toy", *REQUIRED, "--siz", "3"], "unrecognized arguments: --siz 3"),
        (["toy", *REQUIRED, "--size", "x"], "argument --size: invalid int value: 'x'"),
        (["toy", *REQUIRED, "--size", "0"], "--size must be in [1, inf), got 0"),
        (["toy", *REQUIRED, "--kind", "c"], "argument --kind: invalid choice: 'c'"),
        (["toy", *REQUIRED, "--lr", "0"], "--lr must be in (0, inf), got 0.0"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(toy, capsys, arguments, message):
    assert cli.main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert output.err.startswith("instructcore: error: ") and message in output.err
    assert not toy


def test_interrupt_is_130_and_a_bug_is_a_traceback(toy, capsys):
    assert cli.main(["toy", *REQUIRED, "--kind", "b"]) == 130
    assert capsys.readouterr().err == "instructcore: stopped after step 3\n"
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["toy", *REQUIRED, "--lambda", "-1"])


def test_what_the_system_refuses_is_one_line_and_exit_2(toy, capsys):
    assert cli.main(["toy", *REQUIRED, "--limit", "1"]) == 2
    expected = "instructcore: error: /proc/nowhere/file: No such file or directory\n"
    assert capsys.readouterr().err == expected
    with pytest.raises(OSError, match="no number"):
        cli.main(["toy", *REQUIRED, "--limit", "2"])


def test_given_holds_the_names_that_the_command_line_sets():
    @dataclass(frozen=True)
    class Config:
        size: int = option(4, "how large")
        shape: Shape = group(Shape)
        given: tuple[str, ...] = ()

    config = unflatten(Config, {"half": 0})
    assert config.given == ("half",) and Config().given == ()
    assert "given" not in flatten(config)
    assert [item.name for item in options(Config)] == ["size", "size", "half"]


def test_a_command_that_is_not_there_is_named(monkeypatch, capsys):
    gone = cli.Command("not_there", "X", "run", "is not there")
    monkeypatch.setitem(cli.COMMANDS, "gone", gone)
    assert cli.main(["gone", "--help"]) == 2
    assert "has no `gone` command" in capsys.readouterr().err
    assert cli.main(["--help"]) == 0
    assert "quickstart" in capsys.readouterr().out
    assert cli.main([]) == 0


def test_an_import_that_fails_inside_a_command_is_a_bug(monkeypatch, tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.setattr(instructcore, "__path__", [*instructcore.__path__, str(tmp_path)])
    monkeypatch.setitem(cli.COMMANDS, "broken", cli.Command("broken", "X", "run", "fails"))
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        cli.main(["broken"])


def test_version_and_report(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"instructcore {instructcore.__version__}\n"
    lines = dict(line.split(None, 1) for line in report().splitlines())
    assert lines["instructcore"] == instructcore.__version__
    assert "safetensors " in lines["packages"]
    assert {"python", "torch", "back", "CPU"} <= lines.keys()


def test_python_m_and_exit_code():
    """Real processes: the report; a mistake exits with 2, without importing torch for it."""
    run = [sys.executable, "-m", "instructcore"]
    done = subprocess.run(run, capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.startswith("instructcore") and "CPU ISA" in done.stdout
    code = (
        "import sys; from instructcore.cli import main; code = main(['nonsense']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_flag_of_every_command_has_help(name):
    pytest.importorskip(f"instructcore.{cli.COMMANDS[name].module}")
    command = cli.COMMANDS[name]
    config_class = getattr(sys.modules[f"instructcore.{command.module}"], command.config)
    items = list(options(config_class))
    assert len({item.name for item in items}) == len(items)
    assert len({item.flag for item in items}) == len(items)
    for item in items:
        assert item.metadata.get("help"), item.name
        expected = tuple if item.many else (int, float) if item.type is float else item.type
        assert item.default is None or isinstance(item.default, expected), item.name
    cli.make_parser(name, command.help, config_class).format_help()


def test_help_has_the_papers_values_of_each_stage():
    values = {}
    for name in ("pretrain", "sft", "reward", "ppo"):
        command = cli.COMMANDS[name]
        module = importlib.import_module(f"instructcore.{command.module}")
        items = options(getattr(module, command.config))
        values[name] = {item.name: item.metadata.get("paper") for item in items}
    wanted = {"lr": ("9.65e-6 for 1.3B", "9e-6", "2.55e-6 to 2.55e-5")}
    wanted["schedule"] = ("cosine", "cosine", "constant")
    wanted["warmup"] = ("none", "none", "10 iterations")
    wanted["warmup_from"] = (None, None, "0.1")
    wanted["min_lr_ratio"] = ("0.1", "0.1", None)
    for name, expected in wanted.items():
        assert tuple(values[stage][name] for stage in ("sft", "reward", "ppo")) == expected
        assert values["pretrain"][name] is None


def test_options_refuses_unknown_words():
    with pytest.raises(TypeError, match="unknown"):
        option(1, "x", units="metres")
    with pytest.raises(UserError, match="--micro-batch must divide --batch, got 3 and 8"):
        check_divides(3, 8, ("micro-batch", "batch"))
