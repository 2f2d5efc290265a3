"""``sparsecc doctor``: whether this machine can compile, and what is missing if not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json as jsonlib
import os
import pathlib
import platform
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from sparsecc.cli import common

SUPPORTED = ((2, 11), (2, 15))  # torch: from, to (excluded); pyproject.toml says the same
OPTIONAL = {
    "triton": "GPU kernels",
    "torch_mlir": "dump --format mlir",
    "transformers": "hf:… models",
    "timm": "timm:… models",
}


@dataclass
class Check:
    """One finding. ``status`` is "ok", "warning" (something is slower or missing) or "failed"."""

    name: str
    status: str
    found: str
    advice: str = ""


Quick = Annotated[bool, typer.Option("--quick", help="Leave out the trial compile.")]


def command(
    quick: Quick = False,
    json: common.Json = False,
    verbose: common.Verbose = False,
    debug: common.Debug = False,
) -> None:
    """Check this installation; exit code 1 when it cannot work."""
    checks = [_guarded(name, check) for name, check in CHECKS.items()]
    checks += [_package(name, purpose) for name, purpose in OPTIONAL.items()]
    if not quick:
        compiler = next(c for c in checks if c.name == "C++ compiler")
        lower = "inductor" if compiler.status == "ok" else "aot_eager"
        checks.append(_guarded("trial compile", lambda: _trial(lower)))
    failed = [check.name for check in checks if check.status == "failed"]
    if json:
        data = {"ok": not failed, "checks": [asdict(check) for check in checks]}
        common.emit(jsonlib.dumps(data, indent=2, ensure_ascii=False) + "\n")
    else:
        _print(checks)
    if failed:
        typer.echo(f"error: {', '.join(failed)} failed.", err=True)
        raise typer.Exit(1)


command.__name__ = "doctor"


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:
        message = str(error).strip().splitlines() or [""]
        return Check(name, "failed", f"{type(error).__name__}: {message[0]}")


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()}, {platform.platform()}")


def _torch() -> Check:
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    low, high = SUPPORTED
    words = f"{low[0]}.{low[1]} <= torch < {high[0]}.{high[1]}"
    if low <= version < high:
        return Check("torch", "ok", torch.__version__)
    return Check("torch", "failed", torch.__version__, f"Install a supported release: {words}.")


def _device() -> Check:
    import torch

    if not torch.cuda.is_available():
        return Check("device", "ok", f"CPU, {torch.get_num_threads()} threads")
    return Check("device", "ok", torch.cuda.get_device_name())


def _backend() -> Check:
    from torch._dynamo.backends.registry import lookup_backend

    advice = "Reinstall sparsecc in this environment: its entry point is not registered."
    try:
        found = lookup_backend("sparsecc")
    except Exception as error:
        return Check("backend", "failed", f"{type(error).__name__}: {error}", advice)
    return Check("backend", "ok", f"{found.__module__}, found by torch.compile")


def _compiler() -> Check:
    advice = (
        "Inductor needs a C++ compiler on CPU (Debian, Ubuntu: apt install g++ python3-dev). "
        'Until then use options={"lower": "aot_eager"}: rewrites without generated code.'
    )
    from torch._inductor import config, cpp_builder

    try:
        compiler = cpp_builder.get_cpp_compiler()
    except Exception as error:
        tried = str(error).strip().splitlines()
        found = tried[0] if tried else f"none of {config.cpp.cxx}"
        return Check("C++ compiler", "warning", found, advice)
    header = pathlib.Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        return Check("C++ compiler", "warning", f"{compiler}, but no {header}", advice)
    return Check("C++ compiler", "ok", compiler)


def _cache() -> Check:
    problem = common.cache_problem()
    if problem:
        return Check("cache folder", "failed", problem)
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = cache_dir()
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        advice = "Set TORCHINDUCTOR_CACHE_DIR to a folder that you can write."
        return Check("cache folder", "failed", f"{folder}: {error.strerror}", advice)
    return Check("cache folder", "ok", folder)


CHECKS: dict[str, Callable[[], Check]] = {
    "python": _python,
    "torch": _torch,
    "device": _device,
    "backend": _backend,
    "C++ compiler": _compiler,
    "cache folder": _cache,
}


def _package(name: str, purpose: str) -> Check:
    if importlib.util.find_spec(name) is None:
        return Check(name, "ok", f"not installed (optional: {purpose})")
    try:
        version = importlib.metadata.version(name.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        version = "installed"
    return Check(name, "ok", version)


def _trial(lower: str) -> Check:
    """Compile a small pre-LayerNorm MLP and compare it with eager PyTorch."""
    import torch

    from sparsecc.report.model import Report

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(16)
            self.up, self.down = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.nn.functional.gelu(self.up(self.norm(x)))
            result: torch.Tensor = x + self.down(hidden)
            return result

    torch.manual_seed(0)
    ends = (torch.nn.Linear(16, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4))
    model = torch.nn.Sequential(ends[0], Block(), Block(), *ends[1:]).eval()
    x, report = torch.randn(4, 16), Report()
    with torch.no_grad():
        expected = model(x)
        options: Any = {"report": report, "lower": lower}  # torch's types know Inductor's only
        fast = torch.compile(model, backend="sparsecc", options=options)
        got = fast(x)
    error = (got - expected).abs().max().item()
    counts = {record.name: record.applied for record in report if record.applied}
    words = ", ".join(f"{name} ×{count}" for name, count in counts.items()) or "no rewrites"
    found = f"{words}; {error:.0e} from eager, through {lower}"
    if report.fallbacks:
        return Check("trial compile", "failed", "; ".join(report.fallbacks))
    if not counts or not torch.allclose(got, expected, rtol=1e-4, atol=1e-5):
        return Check("trial compile", "failed", found, "Please report this with the output above.")
    return Check("trial compile", "ok", found)


def _print(checks: list[Check]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    signs = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failed": ("✗", "bold red")}
    table = Table(box=box.SIMPLE_HEAD, show_header=False, show_edge=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for check in checks:
        sign, style = signs[check.status]
        words = Text(check.found)
        if check.advice:
            words.append(f"\n{check.advice}", style=style)
        table.add_row(Text(sign, style=style), check.name, words)
    common.show(table)
