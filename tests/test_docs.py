"""The documentation is true: its code runs, its lists are complete, the generated page is up to date."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsecc.options import Options
from sparsecc.passes import registry

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = "# not run"


def blocks(page: Path) -> list[tuple[int, str]]:
    """The Python blocks of a page that are to be run, each with the number of its first line."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, fence.start(2)), fence[2])
        for fence in FENCE.finditer(text)
        if fence[1] == "python" and not fence[2].startswith(NOT_RUN)
    ]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page are one module, run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "REWRITES", dict(registry.REWRITES))
    module = types.ModuleType("documentation_" + re.sub(r"\W", "_", page.stem))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for line, source in blocks(page):
        torch._dynamo.reset()  # a page compiles one model more often than Dynamo's limit allows
        # Padded, so that an error names the line of the page.
        code = compile("\n" * line + source, str(page), "exec", dont_inherit=True)
        exec(code, module.__dict__)


def test_there_is_code_to_run() -> None:
    assert sum(len(blocks(page)) for page in PAGES) > 20


def test_the_list_of_passes_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "tools" / "passes_page.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Options)])
def test_every_option_is_described(name: str) -> None:
    text = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert f"\n## {name}\n" in text
    assert f"](#{name}) |" in text


@pytest.mark.parametrize("name", registry.all_passes())
def test_every_refusal_and_option_of_a_pass_is_described(name: str) -> None:
    cls = registry.load(name)
    text = (ROOT / "docs" / "passes.md").read_text(encoding="utf-8")
    _, start, rest = text.partition(f"\n### {name}\n")
    assert start
    section = re.split(r"\n##+ ", rest)[0]
    for word in (*cls.refusals, *cls.option_names()):
        assert f"| `{word}` |" in section


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        if anchor:
            assert anchor in headings(there), target


def headings(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_results_have_their_place() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.index("<!-- results:begin -->\n") < text.index("<!-- results:end -->\n")


def test_quickstart_runs() -> None:
    command: list[Any] = [sys.executable, ROOT / "examples" / "quickstart.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "verified against fp64" in done.stdout
