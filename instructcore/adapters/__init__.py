"""Our kernels under other libraries' names and signatures, a module for each library.

Functions can be imported from here in place of theirs. A module's `use()` puts ours where the
library keeps its own, `restore()` puts those back, and `report()` says what is replaced. What an
argument asks for and no kernel does is an error that names it: nothing falls back in silence.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from instructcore.ops._common import autocast_dtype

replaced: dict[Hashable, tuple[list[str], Callable[[], object]]] = {}  # lines, and what undoes it


def report() -> list[str]:
    """A line for each thing that is replaced: what, by what, and where."""
    return [line for lines, _ in replaced.values() for line in lines]


def once(key: Hashable, change: Callable[[], tuple[list[str], Callable]]) -> list[str]:
    """Calls `change`, which gives an entry of `replaced`, unless there is one; its lines."""
    if key not in replaced:
        replaced[key] = change()
    return replaced[key][0]


def undo(key: Hashable) -> None:
    if key not in replaced:
        raise ValueError(f"restore: use() must come first, got nothing replaced in {key}")
    replaced.pop(key)[1]()


def replacing(homes: dict[str, tuple[Callable, ...]]) -> tuple[Callable, Callable]:
    """(use, restore) of an adapter: for each module of theirs, ours for its functions of the same
    names. Other versions of the library may lack all modules but the first."""
    library = next(iter(homes)).partition(".")[0]

    def change():
        first = next(iter(homes))
        modules = {h: importlib.import_module(h) for h in homes if h == first or _exists(h)}
        pairs = [(getattr(modules[h], f.__name__), f) for h in modules for f in homes[h]]
        lines = [f"{_swap(library, *pair)} -> {pair[1].__module__}" for pair in pairs]
        return lines, lambda: [_swap(library, ours, theirs) for theirs, ours in pairs]

    def use() -> list[str]:
        """Ours in every loaded module of the library that holds theirs; the lines of `report`.
        Called again, it changes nothing."""
        return once(library, change)

    def restore() -> None:
        """Theirs again. ValueError without `use` before."""
        undo(library)

    return use, restore


def _exists(module: str) -> bool:
    try:
        return module in sys.modules or importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor does what it lies in
        return False


def _swap(library: str, old: object, new: object) -> str:
    """Where modules of the library held `old`: there is `new` now."""
    modules = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] == library]
    places = [(m, name) for m in modules for name, value in list(vars(m).items()) if value is old]
    for module, name in places:
        setattr(module, name, new)
    return ", ".join(f"{module.__name__}.{name}" for module, name in places)


def head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A head's arguments as our ops take them: under autocast all in its type, and elsewhere the
    weight, unless it is float32, in that of `hidden`."""
    if dtype := autocast_dtype(hidden):
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return hidden, weight if weight.dtype == torch.float32 else weight.to(hidden.dtype), bias


def refuse(function: str, **arguments: tuple[object, str]) -> None:
    """NotImplementedError for (value, what must hold) unless the value is None, False or 0."""
    for name, (value, must) in arguments.items():
        if value is not None and (not isinstance(value, bool | int | float) or value):
            raise NotImplementedError(f"{function}: {name} must be {must}, got {value}")
