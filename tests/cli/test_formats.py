"""Every format is well formed, escaped and deterministic; a folder of dumps protects its reader."""

from __future__ import annotations

import ast
import json
import re
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import fx

from sparsecc.dump import formats, html
from sparsecc.dump.dot import write as write_dot
from sparsecc.dump.folder import MARKER, write_folder
from sparsecc.dump.stages import GraphStages, Stage, choose
from sparsecc.errors import OptionsError
from sparsecc.program import Program, Role, Slot
from sparsecc.report.model import Report

VOID = {"meta", "input", "col", "br", "link"}
SVG = "{http://www.w3.org/2000/svg}"


class Balanced(HTMLParser):
    """Fails on a tag that closes nothing, and collects what could load something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"


@pytest.mark.parametrize("name", formats.FORMATS)
def test_two_writings_are_the_same_bytes(
    name: str, make_stages: Callable[[], list[GraphStages]]
) -> None:
    first, second = (
        [formats.get(name).write(stage.program, "t") for stage in make_stages()[0].stages]
        for _ in range(2)
    )
    assert first == second
    assert all(first)


def test_text_names_weights_and_passes(stages: list[GraphStages]) -> None:
    text = formats.text(stages[0].stages[2].program, "t")
    assert 'parameter layers.0.<"fc" & co>.weight' in text
    assert re.search(r"aten\.rms_norm\.default\(.*# to-rms", text)


def test_python_parses_and_names_the_operators(program: Program) -> None:
    tree = ast.parse(formats.python(program, 'a "title" \\ of mine'))
    calls = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    assert {"torch.ops.aten.layer_norm.default", "torch.ops.aten.linear.default"} <= calls


def test_json_has_every_fact(stages: list[GraphStages]) -> None:
    data = json.loads(formats.to_json(stages[0].stages[0].program, "captured"))
    nodes = {node["name"]: node for node in data["nodes"]}
    assert data["opaque"] == {"split_tensor": "a <reason>"}
    assert nodes["w"]["fqn"] == 'layers.0.<"fc" & co>.weight'
    assert nodes["w"]["kind"] == "weight"
    norm = nodes["layer_norm_default"]
    assert norm["args"] == [{"node": "x"}, [8], None, None, 1e-05]
    assert norm["value"] == {"shape": [2, 8], "dtype": "float32"}
    assert norm["module"] == "layers.0.norm"
    assert norm["source"] == "/home/me/a<b>&c.py:7, in forward"
    assert len(nodes["split_tensor"]["value"]) == 2
    after = json.loads(formats.to_json(stages[0].stages[2].program, "to-rms"))
    kinds = {n["name"]: (n["kind"], n["pass"]) for n in after["nodes"]}
    assert kinds["rms_norm_default"] == ("call", "to-rms")
    assert kinds["mul_scalar"] == ("folded", "to-rms")


def test_json_has_no_numbers_that_json_lacks(program: Program) -> None:
    (linear,) = program.calls(torch.ops.aten.linear.default)
    linear.kwargs = {"limit": float("-inf"), "span": slice(None, 3, None), "dtype": torch.float16}
    text = formats.to_json(program, "t")
    data = json.loads(text, parse_constant=pytest.fail)
    (node,) = [n for n in data["nodes"] if n["name"] == linear.name]
    assert node["kwargs"] == {
        "limit": "-inf",
        "span": {"slice": [None, 3, None]},
        "dtype": "torch.float16",
    }


@pytest.mark.parametrize("clusters", [False, True])
def test_dot_quotes_everything_and_draws_every_use(program: Program, clusters: bool) -> None:
    text = write_dot(program, 'a "title"', clusters)
    # With quoted strings taken out, only dot's own words and braces may be left.
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "S", text)
    assert set(re.findall(r'["<>&]', bare.replace("->", ""))) == set()
    assert bare.count("{") == bare.count("}") == (2 if clusters else 1)
    edges = sum(len(node.all_input_nodes) for node in program.graph.nodes)
    assert bare.count("S -> S;") == edges
    assert "\x00" not in text


def test_svg_is_xml_with_a_row_for_every_node(stages: list[GraphStages]) -> None:
    program = stages[0].stages[2].program
    root = ET.fromstring(formats.get("svg").write(program, "<t> & u"))
    rows = root.findall(f"{SVG}g")
    assert len(rows) == len(program.graph.nodes)
    edges = sum(len(node.all_input_nodes) for node in program.graph.nodes)
    assert len(root.findall(f"{SVG}path")) == edges
    words = {text.text for text in root.iter(f"{SVG}text")}
    assert {"<t> & u", 'layers.0.<"fc" & co>.weight', "to-rms"} <= words
    written = [row for row in rows if row.find(f"{SVG}rect[@class='by']") is not None]
    assert len(written) == 2
    assert any("weight" in (row.get("class") or "") for row in rows)


def test_svg_rows_are_topological(stages: list[GraphStages]) -> None:
    program = stages[0].stages[2].program
    root = ET.fromstring(formats.get("svg").write(program, "t"))
    names = [
        text.text
        for row in root.findall(f"{SVG}g")
        for text in row.findall(f"{SVG}text[@class='n']")
    ]
    order = {name: i for i, name in enumerate(names)}
    for node in program.graph.nodes:
        assert all(order[source.name] < order[node.name] for source in node.all_input_nodes)


def long_program(count: int) -> Program:
    """A chain of ``count`` multiplications by weights of their own."""
    mode, graph = torch._subclasses.FakeTensorMode(), fx.Graph()
    with mode:
        value = torch.empty(4)
    last = graph.placeholder("x")
    last.meta["val"], slots = value, {"x": Slot("x", Role.INPUT, "x")}
    weights = [graph.placeholder(f"w{i}") for i in range(count)]
    for i, weight in enumerate(weights):
        weight.meta["val"] = value
        slots[weight.name] = Slot(weight.name, Role.PARAMETER, f"layers.{i}.weight")
        last = graph.call_function(torch.ops.aten.mul.Tensor, (last, weight))
        last.meta["val"] = value
    graph.output((last,))
    return Program(fx.GraphModule(torch.nn.Module(), graph), slots, mode)


@pytest.mark.parametrize("name", formats.FORMATS)
def test_two_thousand_nodes_are_no_burden(name: str) -> None:
    program = long_program(1000)
    started = time.process_time()
    text = formats.get(name).write(program, "long")
    assert time.process_time() - started < 5
    assert len(text) < 4_000_000


def test_html_shows_only_what_changed(stages: list[GraphStages]) -> None:
    page = html.render(stages, "toy:<make>")
    parsed = Balanced(page)
    assert all(link.startswith("#") for link in parsed.links)
    assert page.count("unchanged") == 1
    assert page.count("Full text") == 2
    assert "<mark>" in page
    assert "<make>" not in page
    assert '<"fc" & co>' not in page


def test_html_of_one_program(program: Program) -> None:
    Balanced(formats.get("html").write(program, "one"))


def test_search_script_reads_what_the_page_has(stages: list[GraphStages]) -> None:
    page = html.render(stages, "t")
    for wanted in ('id="query"', 'id="hits"', 'class="full"', "data-stage="):
        assert wanted in page


def test_changes_counts_lines() -> None:
    assert html.changes("a\nb\nc\n", "a\nB\nC\nc\n") == (1, 2)
    assert html.changes("a\n", "a\n") == (0, 0)


def test_choose_names_what_there_is(stages: list[GraphStages]) -> None:
    assert [s.name for s in choose(stages, "to-rms")[0].stages] == ["to-rms"]
    assert choose(stages, "all", 0) == stages
    with pytest.raises(OptionsError, match="Did you mean 'captured'"):
        choose(stages, "capturd")
    with pytest.raises(OptionsError, match=r"no graph 4.*There are: 0"):
        choose(stages, "all", 4)


def test_unknown_format_names_the_nearest() -> None:
    with pytest.raises(OptionsError, match="Did you mean 'svg'"):
        formats.get("svgg")
    with pytest.raises(OptionsError, match="exported program"):
        formats.get("mlir")


# ---- folders -------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_folder_has_an_index_and_ordered_names(
    stages: list[GraphStages], report: Report, tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "dump"
    written = write_folder(stages, report, folder, ["text", "svg", "html"])
    names = {path.relative_to(folder).as_posix() for path in written}
    assert names == {
        "index.md",
        "report.json",
        "report.html",
        "graph0/stages.html",
        *(
            f"graph0/{stem}.{suffix}"
            for stem in ("000_captured", "001_canonical", "002_to-rms")
            for suffix in ("txt", "svg")
        ),
    }
    index = (folder / "index.md").read_text()
    assert "| 001 canonical | 8 | unchanged |" in index
    for target in re.findall(r"\]\(([^)]+)\)", index):
        assert (folder / target).is_file()


def test_folder_is_the_same_twice_and_leaves_nothing_stale(
    make_stages: Callable[[], list[GraphStages]], report: Report, tmp_path: Path
) -> None:
    write_folder(make_stages(), report, tmp_path / "a", ["text", "json"])
    first = content(tmp_path / "a")
    more = make_stages()
    more[0].stages.append(Stage("lowered", more[0].stages[-1].program))
    write_folder(more, report, tmp_path / "a", ["dot"])
    assert "graph0/003_lowered.dot" in content(tmp_path / "a")
    write_folder(make_stages(), report, tmp_path / "a", ["text", "json"])
    assert content(tmp_path / "a") == first


def test_graphs_can_come_one_by_one(
    make_stages: Callable[[], list[GraphStages]], report: Report, tmp_path: Path
) -> None:
    both = [make_stages()[0], GraphStages(1, make_stages()[0].stages[:1])]
    write_folder(both, report, tmp_path / "together")
    for graph in both:
        write_folder([graph], report, tmp_path / "single")
    together, single = content(tmp_path / "together"), content(tmp_path / "single")
    assert together == single
    assert "graph1/000_captured.txt" in single


@pytest.mark.parametrize("dumped_before", [False, True])
def test_folder_refuses_foreign_files(
    stages: list[GraphStages], tmp_path: Path, dumped_before: bool
) -> None:
    if dumped_before:
        write_folder(stages, None, tmp_path)
    (tmp_path / "thesis.tex").write_text("years of work")
    before = content(tmp_path)
    with pytest.raises(OptionsError, match=r"did not write \(thesis\.tex\).*empty or a new"):
        write_folder(stages, None, tmp_path)
    assert content(tmp_path) == before


def test_a_damaged_marker_is_no_permission(stages: list[GraphStages], tmp_path: Path) -> None:
    write_folder(stages, None, tmp_path)
    (tmp_path / MARKER).write_text("{")
    before = content(tmp_path)
    with pytest.raises(OptionsError, match="did not write"):
        write_folder(stages, None, tmp_path)
    assert content(tmp_path) == before


def test_a_marker_cannot_name_files_elsewhere(stages: list[GraphStages], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    write_folder(stages, None, tmp_path / "dump")
    marker = tmp_path / "dump" / MARKER
    data = json.loads(marker.read_text())
    marker.write_text(json.dumps({**data, "files": [*data["files"], "../mine.txt"]}))
    write_folder(stages, None, tmp_path / "dump")
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_a_file_is_not_a_folder(stages: list[GraphStages], tmp_path: Path) -> None:
    (tmp_path / "dump").write_text("mine")
    with pytest.raises(OptionsError, match="it is a file"):
        write_folder(stages, None, tmp_path / "dump")


def test_unknown_format_leaves_the_folder_alone(stages: list[GraphStages], tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="unknown format"):
        write_folder(stages, None, tmp_path / "dump", ["pdf"])
    assert not (tmp_path / "dump").exists()


# ---- MLIR ----------------------------------------------------------------------------------------


class Norms(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.rms = torch.nn.LayerNorm(16), torch.nn.RMSNorm(16, eps=1e-6)
        self.linear = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.linear(self.rms(self.norm(x)))
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)


@pytest.mark.parametrize("weights", [False, True])
def test_mlir_keeps_operators_whole_and_parses_again(weights: bool) -> None:
    pytest.importorskip("torch_mlir")
    from torch_mlir import ir
    from torch_mlir.dialects import torch as dialect

    from sparsecc.dump.mlir import to_mlir

    exported = torch.export.export(Norms().eval(), (torch.randn(2, 3, 16),))
    text = to_mlir(exported, weights=weights)
    for operator in ("layer_norm", "rms_norm", "linear", "scaled_dot_product_attention"):
        assert f"torch.aten.{operator} " in text
    assert ('"0x' in text) == weights
    assert text == to_mlir(exported, weights=weights)
    with ir.Context() as context:
        dialect.register_dialect(context)
        assert ir.Module.parse(text).operation.verify()


def test_mlir_without_torch_mlir_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from sparsecc.dump.mlir import to_mlir
    from sparsecc.errors import ModelError

    monkeypatch.setitem(sys.modules, "torch_mlir.fx", None)
    exported = torch.export.export(Norms().eval(), (torch.randn(2, 3, 16),))
    with pytest.raises(ModelError, match=r"pip install sparsecc\[mlir\]"):
        to_mlir(exported)
