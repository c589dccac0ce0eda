"""What tells one reward function from another: its code, and all that it reads.

A run is named after its reward. If a changed function had an old one's name, its run would be
loaded or continued as if nothing had changed; what cannot be told apart is therefore refused.
"""

import dis
import functools
import logging
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiment_runs.errors import UserError
from experiment_runs.files import fingerprint
from experiment_runs.run import Run

INSTALLED = ("site-packages", "dist-packages")
NAMED_FIELD = type(NamedTuple("Field", [("one", int)]).one)  # of the classes of named tuples


def function_fingerprint(function: Callable[..., Any]) -> str:
    """Tells functions apart by their code and by what it reads: defaults, arguments of a partial,
    variables around it, the object of a method, global values, functions and modules of one's own.

    Installed libraries count by name and version. Files, servers and the time are not seen.

    Raises:
      UserError: the function reads something that cannot be told from another of its kind.
    """
    return fingerprint(described(function, "itself", []))


def described(value: Any, name: str, above: list[Any]) -> Any:
    """A value in a form that JSON can hold and that is another for another value.

    Args:
      value: what a function reads.
      name: under which it reads it, for messages.
      above: the values that hold this one, so that a circle ends.
    """
    if any(value is one for one in above):
        return ["again", [value is one for one in above].index(True)]
    inner = functools.partial(described, above=[*above, value])
    match value:
        case None | bool() | int() | float() | complex() | str() | Path():
            return [type(value).__name__, str(value)]
        case bytes():
            return ["bytes", fingerprint(value)]
        case np.ndarray() | np.generic() | jax.Array():
            return ["array", fingerprint(np.asarray(value))]
        case Mapping():
            pairs = [[inner(k, name), inner(v, f"{name}[{k!r}]")] for k, v in value.items()]
            return ["mapping", pairs, *of_ones_own(value, name, inner)]
        case Set():
            items = sorted(fingerprint(inner(item, name)) for item in value)
            return ["set", items, *of_ones_own(value, name, inner)]
        case Sequence():
            items = [inner(item, name) for item in value]
            return [type(value).__name__, items, *of_ones_own(value, name, inner)]
        case re.Pattern():
            return ["pattern", value.pattern, value.flags]
        case functools.partial():
            return [
                "partial",
                inner(value.func, name),
                inner(value.args, name),
                inner(value.keywords, name),
            ]
        case types.MethodType():
            return ["method", inner(value.__func__, name), inner(value.__self__, name)]
        case types.ModuleType():
            return module(value, inner)
        case types.CodeType():
            return [
                "code",
                value.co_code.hex(),
                *(inner(c, name) for c in value.co_consts),
                value.co_names,
                value.co_varnames,
            ]
        case types.BuiltinFunctionType():
            return ["builtin", value.__module__, value.__qualname__]
        case property():
            return ["property", *(inner(x, name) for x in (value.fget, value.fset, value.fdel))]
        case functools.cached_property():
            return ["cached property", inner(value.func, name)]
        case types.MemberDescriptorType():  # a slot
            return ["member", value.__name__]
        case logging.Logger():
            return ["logger", value.name]
        case types.FunctionType() if not installed(value.__module__):
            return ["function", *(inner(part, what) for what, part in parts(value))]
        case type() if not installed(value.__module__):
            members = {
                k: v
                for k, v in vars(value).items()
                if not k.startswith(("__", "_abc_")) or callable(v)
            }
            return [
                "class",
                value.__qualname__,
                [inner(base, name) for base in value.__bases__],
                inner(members, name),
            ]
        case types.FunctionType() | type():
            told = ["installed", value.__module__, value.__qualname__, version(value.__module__)]
            made_inside = "<locals>" in value.__qualname__ and isinstance(value, types.FunctionType)
            given = surroundings(value) if made_inside else ()
            return [*told, *(inner(part, what) for what, part in given)]
        case _ if isinstance(value, NAMED_FIELD):
            return ["field", value.__reduce__()[1][0]]
    if isinstance(run := getattr(value, "run", None), Run):  # a model that was trained here
        return ["run", run.identity]
    has_attributes = hasattr(value, "__dict__") or hasattr(type(value), "__slots__")
    if has_attributes and (told := of_ones_own(value, name, inner)):
        return ["object", *told]
    if callable(getattr(value, "__wrapped__", None)):  # a cache, a compiled function
        return ["wrapped", inner(value.__wrapped__, name)]
    raise UserError(
        f"the reward function reads {name}, {value!r:.60} of type {type(value).__qualname__}, "
        "which cannot be told from another one, so that the run of a changed reward would count as "
        "this one's; give reward_name='...', another one for every reward that differs"
    )


def of_ones_own(value: Any, name: str, inner: Callable[[Any, str], list]) -> list[Any]:
    """The class and the attributes of an object whose class is of one's own; [] of others."""
    if installed(type(value).__module__):
        return []
    return [inner(type(value), name), inner(object.__getstate__(value), name)]


def parts(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The code of a function and what it reads, with the names."""
    yield "itself", function.__code__
    yield from surroundings(function)
    for name in sorted({*global_names(function.__code__)} & function.__globals__.keys()):
        yield name, function.__globals__[name]


def surroundings(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function was given where it was made: defaults, and variables around it."""
    yield "a default", function.__defaults__
    yield "a default", function.__kwdefaults__
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield name, cell.cell_contents


def global_names(code: types.CodeType) -> Iterator[str]:
    """Names that code, and the code inside it, looks up outside of any function."""
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield step.argval
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from global_names(inner)


def module(value: types.ModuleType, inner: Callable[[Any, str], list]) -> list[Any]:
    """A module of one's own by its source, all of a package's, and by those of one's own that it
    takes names from; an installed one by its version."""
    if installed(value.__name__) or not getattr(value, "__file__", None):
        return ["module", value.__name__, version(value.__name__)]
    path = Path(value.__file__)
    files = sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    named = [
        x.__name__ if isinstance(x, types.ModuleType) else getattr(x, "__module__", None)
        for x in vars(value).values()
    ]
    others = sorted(
        {x for x in named if isinstance(x, str)} & sys.modules.keys() - {value.__name__}
    )
    read = [inner(sys.modules[name], name) for name in others if not installed(name)]
    return ["module", value.__name__, [fingerprint(file) for file in files], read]


def installed(name: str | None) -> bool:
    """Whether a module comes with Python or from a package, so that its version tells its code."""
    top = (name or "").partition(".")[0]
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    return (
        top in sys.stdlib_module_names - {"__main__"}
        or any(folder in Path(file).parts for folder in INSTALLED)
        or top == __name__.partition(".")[0]
    )


def version(name: str) -> str:
    return str(getattr(sys.modules.get(name.partition(".")[0]), "__version__", ""))
