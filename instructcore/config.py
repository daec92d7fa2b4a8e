"""Settings: frozen dataclasses whose fields are the command line's flags.

A field made by `option` carries its help, unit and the paper's value. `group` puts one dataclass
into another; its fields are flattened, so `PretrainConfig.optim.lr` is `lr` in config.json and
`--lr` on the command line. Any other field is for programs alone; but one named `given` gets the
names that the command line set, for what a flag means beside another. This module imports nothing
slow: `--help` needs it.
"""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .errors import UserError


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A setting: its default and what it means. The rest is how it is shown and checked.

    unit: of its value. paper: InstructGPT's value. choices: the strings allowed. range: the
    numbers allowed, as "[0, 1)" or "(0, inf)". required: the command line must give it, the default
    is a mere place holder. positional: takes no flag. flag: another name on the command line.
    metavar: what stands for the value in the help.
    """
    known = {"unit", "paper", "choices", "range", "required", "positional", "flag", "metavar"}
    if not metadata.keys() <= known:
        raise TypeError(f"option: unknown {sorted(metadata.keys() - known)}")
    return field(default=default, metadata={"help": help, **metadata})


def group(
    cls: type, *, hide: tuple[str, ...] = (), paper: Mapping[str, str] = {}, **defaults: Any
) -> Any:
    """Another dataclass, whose settings are flattened into this one's.

    `hide` names those that the stage works out itself; they are no flags. `paper` has InstructGPT's
    values for this stage, by setting; `defaults` are this stage's own.
    """
    metadata = {"group": cls, "hide": hide, "paper": paper, "defaults": defaults}
    return field(default=cls(**defaults), metadata=metadata)


class Option(NamedTuple):
    """One flattened setting of a dataclass."""

    name: str  # as in config.json
    flag: str  # "--weight-decay", or the bare name of a positional
    type: Any  # int | float | str | bool; of the items where `many`
    many: bool
    default: Any
    metadata: Mapping[str, Any]
    group: str  # the first line about the dataclass it belongs to


def options(cls: type, **defaults: Any) -> Iterator[Option]:
    """All settings of a dataclass, those of its groups included, in the order of their fields."""
    hints = typing.get_type_hints(cls)
    title = (cls.__doc__ or "").partition("\n")[0].rstrip(".")
    for f in dataclasses.fields(cls):
        if inner := f.metadata.get("group"):
            for item in options(inner, **f.metadata["defaults"]):
                if item.name not in f.metadata["hide"]:
                    paper = f.metadata["paper"].get(item.name, item.metadata.get("paper"))
                    yield item._replace(metadata={**item.metadata, "paper": paper})
        elif "help" in f.metadata:
            kind, many = _value_type(hints[f.name])
            default = defaults.get(f.name, f.default)
            yield Option(f.name, _flag(f), kind, many, default, f.metadata, title)


def flatten(config: Any) -> dict[str, Any]:
    """The settings as one flat JSON-ready dictionary."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.metadata.get("group"):
            hide = f.metadata["hide"]
            flat |= {k: v for k, v in flatten(value).items() if k not in hide}
        elif "help" in f.metadata:
            flat[f.name] = list(value) if isinstance(value, tuple) else value
    return flat


def unflatten(cls: type, values: dict[str, Any], **defaults: Any) -> Any:
    """The dataclass whose flattened settings are `values`; those not named keep their defaults."""
    arguments = dict(defaults)
    for f in dataclasses.fields(cls):
        if inner := f.metadata.get("group"):
            arguments[f.name] = unflatten(inner, values, **f.metadata["defaults"])
        elif f.name == "given":
            arguments[f.name] = tuple(values)
        elif f.name in values:
            value = values[f.name]
            arguments[f.name] = tuple(value) if isinstance(value, list) else value
    return cls(**arguments)


def check(condition: bool, message: str) -> None:
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def check_new_file(out: str) -> None:
    """--out, where given, must name a file that is not there yet, in a directory that is."""
    if out:
        path = Path(out).absolute()
        check(not path.exists(), f"--out {out} exists already: name another file")
        check(path.parent.is_dir(), f"--out {out}: there is no such directory")
        check_writable(out)


def check_writable(out: str) -> None:
    """--out must be where something can be made: below a directory that may be written."""
    above = next(p for p in (Path(out), *Path(out).absolute().parents) if p.exists())
    check(above.is_dir(), f"--out {out}: {above} is not a directory")
    check(os.access(above, os.W_OK | os.X_OK), f"--out {out}: {above} may not be written")


def check_options(config: Any) -> None:
    """Holds every setting to its `choices` and `range`; what is no flag must be there. For a
    dataclass's __post_init__."""
    for f in dataclasses.fields(config):
        value, name = getattr(config, f.name), _flag(f)
        choices, bounds = f.metadata.get("choices"), f.metadata.get("range")
        if f.metadata.get("positional"):
            command = type(config).__name__.removesuffix("Config").lower()
            check(bool(value), f"{command} needs a {name.rstrip('s')}")
        if choices and value not in choices:
            raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if bounds and value is not None:
            low, high = (float(bound) for bound in bounds[1:-1].split(","))
            above = value >= low if bounds[0] == "[" else value > low
            below = value <= high if bounds[-1] == "]" else value < high
            check(above and below, f"{name} must be in {bounds}, got {value}")


def check_divides(part: int, whole: int, names: tuple[str, str]) -> None:
    """`part` must be positive and divide `whole`; names are the flags without dashes."""
    check(
        part > 0 and whole > 0 and whole % part == 0,
        f"--{names[0]} must divide --{names[1]}, got {part} and {whole}",
    )


def _flag(f: dataclasses.Field) -> str:
    if f.metadata.get("positional"):
        return f.name
    return f.metadata.get("flag") or "--" + f.name.rstrip("_").replace("_", "-")


def _value_type(hint: Any) -> tuple[Any, bool]:
    """(type of one value, whether there are several): of `float | None`, (float, False)."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its learning rate over the run, and the gradient clip."""

    lr: float = option(1e-3, "highest learning rate", range="(0, inf)")
    min_lr_ratio: float = option(
        0.1, "where the schedule ends, unless constant", unit="share of lr", range="[0, 1]"
    )
    warmup: float = option(
        0.0, "linear warm-up", unit="steps; below 1: share of all", range="[0, inf)"
    )
    warmup_from: float = option(0.1, "where the warm-up begins", unit="share of lr", range="[0, 1]")
    schedule: str = option(
        "cosine", "course after the warm-up", choices=("cosine", "linear", "constant")
    )
    beta1: float = option(0.9, "Adam's decay of the mean gradient", paper="0.9", range="[0, 1)")
    beta2: float = option(0.95, "Adam's decay of its square", paper="0.95", range="[0, 1)")
    eps: float = option(1e-8, "Adam's epsilon", range="(0, inf)")
    weight_decay: float = option(0.1, "decoupled decay, of matrices only", range="[0, inf)")
    grad_clip: float = option(1.0, "largest norm of the gradient, 0 = off", range="[0, inf)")

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class RunConfig:
    """Where a run goes, what it runs on, and how often it writes."""

    out: str = option(
        "", "directory of the run; must not hold one already", required=True, metavar="DIR"
    )
    seed: int = option(0, "seed of all randomness of the run", range="[0, inf)")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto",
        "compute dtype; auto: bfloat16 where that is fast",
        choices=("auto", "float32", "bfloat16"),
    )
    save_every: int = option(
        500, "time between checkpoints, 0 = none", unit="steps", range="[0, inf)"
    )
    keep: int = option(
        2, "how many to keep beside the final one", unit="checkpoints", range="[1, inf)"
    )
    log_every: int = option(10, "time between lines of metrics", unit="steps", range="[1, inf)")
    resume: bool = option(False, "go on from the newest checkpoint in the directory")

    def __post_init__(self) -> None:
        check_options(self)
