"""What the folders promise: small files, imports that point one way, private PyTorch names listed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from sparsecc.passes import registry

ROOT = Path(__file__).resolve().parents[1]
# Folder in the repository -> package in the installation.
FOLDERS = {
    "sparsecc": "sparsecc",
    "passes": "sparsecc.passes",
    "codegen": "sparsecc.codegen",
    "runtime": "sparsecc.runtime",
}
SOURCES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
LONGEST = 500  # lines

# Folder -> what of sparsecc its files may import. The driver may import everything.
GROUND_FLOOR = ("sparsecc.program", "sparsecc.errors", "sparsecc.recipe")
ALLOWED = {
    "passes": (*GROUND_FLOOR, "sparsecc.passes", "sparsecc.runtime.ops"),
    "runtime": (*GROUND_FLOOR, "sparsecc._torch", "sparsecc.runtime"),
    "codegen": (*GROUND_FLOOR, "sparsecc._torch", "sparsecc.codegen", "sparsecc.runtime"),
}

SHIM = "sparsecc/_torch.py"
OPERATORS = ("aten", "torch.ops")
# Private names of PyTorch outside the shim, each with the reason why it is there.
PRIVATE_MODULES = {
    "torch._C.DispatchKey.CompositeImplicitAutograd": "alias analysis asks which operators are composite",
    "torch._C._functorch": "compared as the name of a module, not imported",
    "torch._C._set_grad_enabled": "the node by which Dynamo switches gradients",
    "torch._dynamo.backends.registry.lookup_backend": "doctor checks the entry point as Dynamo does",
    "torch._functorch.predispatch": "compared as the name of a module, not imported",
    "torch._inductor.config": "doctor names the compilers that Inductor tries",
    "torch._inductor.cpp_builder": "doctor asks Inductor for its compiler",
    "torch._inductor.runtime.cache_dir_utils.cache_dir": "doctor checks Inductor's cache folder",
    "torch._logging._internal.trace_structured": "artifacts for tlparse; no public name",
    "torch._ops.HigherOrderOperator": "the class of opaque nodes; no public name",
    "torch._ops.OpOverload": "the class of every ATen node's target; no public name",
    "torch._subclasses.fake_tensor.FakeTensor": "what make_fx must not bake in",
    "torch._subclasses.fake_tensor.FakeTensorMode": "fake values of new nodes; no public name",
    "torch.amp.autocast_mode._enter_autocast": "the node by which Dynamo enters autocast",
    "torch.amp.autocast_mode._exit_autocast": "the node by which Dynamo leaves autocast",
    "torch.utils._pytree.tree_leaves": "trees of values, as torch.fx has them",
    "torch.utils._pytree.tree_map": "trees of values, as torch.fx has them",
}
PRIVATE_ATTRIBUTES = {
    "_cdata": "whether two tensors share one storage",
    "_codegen": "the calling convention of a copied graph",
    "_dynamo_source": "where an input comes from; AOTAutograd asks for it",
    "_graph_module_flat_inputs": "the inputs of an exported program, in order",
    "_param_name_to_source": "what marks a graph module as Dynamo's",
    "_rename": "a placeholder's name, which slots are keyed by",
    "_schema": "aliasing, mutation and arguments of an operator",
    "_version": "a tensor's version counter",
}


def path(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=path(file))


# ---- size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", SOURCES, ids=path)
def test_no_file_is_too_long(file: Path) -> None:
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{path(file)} has {lines} lines: look for the room in it"


# ---- arrows --------------------------------------------------------------------------------------


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Every module that a file imports anywhere in it, with the line."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path(file)}:{node.lineno}: relative import"
            for alias in node.names:  # `from package import module` imports the module
                yield node.lineno, f"{node.module}.{alias.name}"


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def wrong_arrows(file: Path, allowed: tuple[str, ...]) -> list[str]:
    return [
        f"{path(file)}:{line} imports {name}"
        for line, name in imports(file)
        if within(name, ("sparsecc",)) and not within(name, allowed)
    ]


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_point_one_way(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert [found for file in files for found in wrong_arrows(file, ALLOWED[folder])] == []


@pytest.mark.parametrize("module", GROUND_FLOOR)
def test_the_ground_floor_rests_on_nothing(module: str) -> None:
    file = ROOT / (module.replace(".", "/") + ".py")
    assert wrong_arrows(file, (*GROUND_FLOOR, "sparsecc._torch")) == []
    assert wrong_arrows(ROOT / SHIM, ()) == []


def test_a_wrong_arrow_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    file = tmp_path / "wrong.py"
    file.write_text("def f():\n    from sparsecc import driver, errors\n")
    assert wrong_arrows(file, ALLOWED["passes"]) == ["wrong.py:2 imports sparsecc.driver"]


# ---- private PyTorch -----------------------------------------------------------------------------


def is_private(dotted: str) -> bool:
    return any(re.match(r"_[^_]", part) for part in dotted.split("."))


def dotted_name(node: ast.expr) -> str:
    """``torch._ops.OpOverload`` of an attribute chain that starts at a name; otherwise empty."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def private_modules(file: Path) -> set[str]:
    """Private names under torch: imported, reached through ``torch.``, or spelled in a string."""
    found = {name for _, name in imports(file) if within(name, ("torch",))}
    inner: set[ast.expr] = set()
    for node in ast.walk(tree(file)):  # outer attributes come before the inner ones of a chain
        if isinstance(node, ast.Attribute) and node not in inner:
            found.add(dotted_name(node))
            value = node.value
            while isinstance(value, ast.Attribute):
                inner.add(value)
                value = value.value
        elif isinstance(node, ast.Constant) and re.fullmatch(r"torch(\.\w+)+", str(node.value)):
            found.add(str(node.value))
    # Operators such as aten._to_copy are the IR itself, whatever their first letter.
    torch = {name for name in found if within(name, ("torch",)) and not within(name, OPERATORS)}
    return {name for name in torch if is_private(name)}


def private_attributes(file: Path) -> set[str]:
    """Private attributes of objects that are not ours: no file of ours defines such a name."""
    found = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Attribute):
            if not within(dotted_name(node), ("torch", *OPERATORS)):
                found.add(node.attr)
        elif isinstance(node, ast.Call) and dotted_name(node.func) in (
            "getattr",
            "hasattr",
            "setattr",
            "attrgetter",
        ):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return {n for n in found if isinstance(n, str) and is_private(n) and n not in own_names()}


@cache
def own_names() -> frozenset[str]:
    """Attributes that our own classes define: in their bodies, or on ``self``."""
    found: set[str] = set()
    for file in SOURCES:
        for owner in ast.walk(tree(file)):
            if not isinstance(owner, ast.ClassDef):
                continue
            found |= {n.name for n in owner.body if isinstance(n, ast.FunctionDef)}
            for node in ast.walk(owner):
                if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
                    name = dotted_name(node)
                    found.add(name.removeprefix("self.").removeprefix("cls."))
    return frozenset(found)


OUTSIDE = [file for file in SOURCES if path(file) != SHIM]


@pytest.mark.parametrize("file", OUTSIDE, ids=path)
def test_private_names_are_in_the_shim_or_listed(file: Path) -> None:
    unlisted = sorted(private_modules(file) - set(PRIVATE_MODULES))
    unlisted += sorted(private_attributes(file) - set(PRIVATE_ATTRIBUTES))
    assert unlisted == [], f"move these to {SHIM}, or list them here with a reason"


def test_the_list_of_private_names_has_no_dead_entry() -> None:
    modules = {name for file in OUTSIDE for name in private_modules(file)}
    attributes = {name for file in OUTSIDE for name in private_attributes(file)}
    assert sorted(set(PRIVATE_MODULES) - modules) == []
    assert sorted(set(PRIVATE_ATTRIBUTES) - attributes) == []


def test_a_private_name_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    file = tmp_path / "private.py"
    file.write_text(
        "import torch\n"
        "from torch._dynamo import config\n"
        "def f(node):\n"
        "    return torch._C._do(node.meta), node._erased, torch.__version__\n"
    )
    assert private_modules(file) == {"torch._dynamo.config", "torch._C._do"}
    assert private_attributes(file) == {"_erased"}


# ---- tests of passes -----------------------------------------------------------------------------


def pass_files() -> set[str]:
    """Every file under passes/ that belongs to a pass: not the analyses, not what passes share."""
    return {
        path(file)
        for file in (ROOT / "passes").glob("*/*.py")
        if not file.name.startswith("_") and file.parent.name != "analysis"
    }


def registered() -> dict[str, str]:
    found = {}
    for name, where in {**registry.CANONICAL, **registry.REWRITES}.items():
        module = where.partition(":")[0].removeprefix("sparsecc.")
        found[name] = module.replace(".", "/") + ".py"
    return found


def test_every_pass_file_is_registered() -> None:
    files = registered()
    assert set(files.values()) == pass_files()
    assert len(set(files.values())) == len(files), "one pass, one file"


@pytest.mark.parametrize("file", sorted(pass_files()))
def test_every_pass_has_a_test_file(file: str) -> None:
    source = Path(file)
    twin = ROOT / "tests" / source.parent / f"test_{source.stem}.py"
    assert twin.exists(), f"{file} has no {path(twin)}"
