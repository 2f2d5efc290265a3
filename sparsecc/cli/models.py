"""Models by name: ``module:factory``, ``timm:NAME``, ``hf:DIRECTORY``, ``file.pt2``."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import pathlib
import sys
import traceback
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsecc.errors import ModelError

FORMS = "Give module:factory, timm:NAME, hf:DIRECTORY (with a config.json) or a .pt2 file."
_OTHER_FILES = {
    ".pt": "a checkpoint holds no program",
    ".pth": "a checkpoint holds no program",
    ".safetensors": "it holds weights and no program",
    ".onnx": "ONNX files are not read",
}


@dataclass
class LoadedModel:
    """A model with example inputs; ``notes`` are worth telling the user."""

    model: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def load(spec: str, seed: int = 0) -> LoadedModel:
    """The model that ``spec`` names; random weights and inputs depend on ``seed`` only.

    Raises:
        ModelError: nothing there, or nothing that can be used; says what to do next.
    """
    scheme, colon, rest = spec.partition(":")
    path = pathlib.Path(spec)
    if scheme in ("timm", "hf") and colon:
        from sparsecc.cli import carriers

        made = carriers.from_timm if scheme == "timm" else carriers.from_hf
        loaded = made(rest, seed)
    elif path.suffix == ".pt2":
        loaded = _from_export(path)
    elif path.suffix in _OTHER_FILES:
        raise ModelError(f"{spec!r} cannot be loaded: {_OTHER_FILES[path.suffix]}. {FORMS}")
    elif not colon or not scheme or not rest:
        hint = f" Did you mean 'hf:{spec}'?" if path.is_dir() else ""
        raise ModelError(f"{spec!r} is not a model.{hint} {FORMS}")
    else:
        loaded = _from_factory(scheme, rest, seed)
    _check_inputs(spec, loaded)
    return loaded


# ---- module:factory ------------------------------------------------------------------------------


def load_data(spec: str, seed: int = 0) -> Any:
    """What ``module:function`` returns, or the iterable that it names.

    Raises:
        ModelError: nothing there, or it is no iterable.
    """
    module_name, colon, attribute = spec.partition(":")
    if not colon or not module_name or not attribute:
        raise ModelError(f"{spec!r} is no data. Give module:function, which returns batches.")
    target = _named(module_name, attribute, seed)
    if callable(target):
        target = _called(spec, target, seed)
    if not isinstance(target, Iterable):
        raise ModelError(f"{spec} gives {type(target).__name__}, which is no iterable of batches.")
    return target


def _named(module_name: str, attribute: str, seed: int) -> Any:
    import torch

    torch.manual_seed(seed)  # for what the module makes as it is imported
    target: Any = _import(module_name)
    for part in attribute.split("."):
        if not hasattr(target, part):
            raise ModelError(_absent(module_name, part, target))
        target = getattr(target, part)
    return target


def _called(spec: str, target: Any, seed: int) -> Any:
    import torch

    torch.manual_seed(seed)  # the import may have drawn numbers, and happens once only
    try:
        return target()
    except Exception as error:
        raise ModelError(f"{spec}() failed: {_words(error)}") from error


def _from_factory(module_name: str, attribute: str, seed: int) -> LoadedModel:
    target = _named(module_name, attribute, seed)
    spec = f"{module_name}:{attribute}"
    if _is_model(target):
        return _notes(LoadedModel(target))
    if not callable(target):
        raise ModelError(
            f"{spec} is of type {type(target).__name__}, which cannot be called. "
            "Name a function that returns a model, or (model, args), or (model, args, kwargs)."
        )
    return _notes(_unpack(spec, _called(spec, target, seed)))


def _import(name: str) -> Any:
    if name.endswith(".py") or "/" in name:
        dotted = name.removesuffix(".py").strip("./").replace("/", ".")
        raise ModelError(f"{name!r} is a path; write the module's name, as in {dotted!r}:factory.")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(missing + "."):
            local = [p.stem for p in pathlib.Path(here).glob("*.py")]
            raise ModelError(
                f"there is no module {missing!r}.{_near(missing, local)} Modules are looked for in "
                f"{here} and in this Python's packages."
            ) from error
        raise ModelError(f"importing {name!r} failed: {_words(error)}") from error
    except Exception as error:
        raise ModelError(f"importing {name!r} failed: {_words(error)}") from error


def _absent(module_name: str, part: str, owner: Any) -> str:
    names = [n for n, v in vars(owner).items() if callable(v) and not n.startswith("_")]
    own = [n for n in names if getattr(vars(owner)[n], "__module__", "") == module_name]
    listed = f" It has: {', '.join(sorted(own)[:8])}." if own else ""
    return f"module {module_name!r} has no {part!r}.{_near(part, names)}{listed}"


def _unpack(spec: str, made: Any) -> LoadedModel:
    parts = made if isinstance(made, (tuple, list)) else (made,)
    if not 1 <= len(parts) <= 3 or not (_is_model(parts[0]) or inspect.isroutine(parts[0])):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise ModelError(
            f"{spec}() returned ({kinds}). It must return a model (a module, a function or an "
            "ExportedProgram), or (model, args), or (model, args, kwargs)."
        )
    inputs: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    for given in parts[1:]:
        if isinstance(given, Mapping):
            kwargs.update(given)
        else:
            inputs = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    return LoadedModel(parts[0], inputs, kwargs)


def _is_model(value: Any) -> bool:
    import torch

    return isinstance(value, (torch.nn.Module, torch.export.ExportedProgram))


def _notes(loaded: LoadedModel) -> LoadedModel:
    if getattr(loaded.model, "training", False):
        loaded.notes.append(
            "the model is in training mode; call .eval() in the factory to look at inference."
        )
    return loaded


# ---- .pt2 ----------------------------------------------------------------------------------------


def _from_export(path: pathlib.Path) -> LoadedModel:
    import torch

    if not path.is_file():
        near = _near(path.name, [p.name for p in path.parent.glob("*.pt2")])
        raise ModelError(f"there is no file {str(path)!r}.{near}")
    if not zipfile.is_zipfile(path):  # torch.export would log a long traceback of its own
        raise ModelError(f"{str(path)!r} is not a file that torch.export.save wrote.")
    try:
        program = torch.export.load(path)
    except Exception as error:
        raise ModelError(
            f"{str(path)!r} is not a program that torch.export.save wrote with a compatible "
            f"PyTorch: {_words(error)}"
        ) from error
    args, kwargs = program.example_inputs or ((), {})
    return LoadedModel(program, tuple(args), dict(kwargs))


# ---- shared --------------------------------------------------------------------------------------


def _check_inputs(spec: str, loaded: LoadedModel) -> None:
    """A model that needs inputs and has none would fail later, with a worse message."""
    forward = getattr(loaded.model, "forward", loaded.model)
    if loaded.args or loaded.kwargs or not inspect.isroutine(forward):
        return
    needed = [
        p.name
        for p in inspect.signature(forward).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed:
        raise ModelError(
            f"{spec} gives no inputs, but the model's forward needs {', '.join(needed)}. "
            "Return (model, args) or (model, args, kwargs) from the factory."
        )


def _near(name: str, valid: list[str]) -> str:
    found = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""


def _words(error: BaseException) -> str:
    """An exception in one line, with the place where it arose."""
    text = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "importlib" not in f.filename]
    place = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    return f"{text}{place}\nRun with --debug for the traceback."
