"""A report as text and as a page: everything is there, nothing is trusted, nothing moves."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from sparsecc.report.html import Markup, esc, tag
from sparsecc.report.model import GraphReport, Report, Verdict
from sparsecc.report.text import WIDTH, to_text
from sparsecc.report.words import in_bytes, in_seconds, plural, scaled, short_where


def test_text_fits_its_width_and_one_screen(report: Report) -> None:
    lines = to_text(report).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert len(lines) < 50
    assert all(line == line.rstrip() for line in lines)


def test_text_says_everything(report: Report) -> None:
    text = to_text(report)
    flat = " ".join(text.split())  # what does not fit a line is wrapped
    assert "4 rewrites applied, 6 refused" in text
    assert re.search(r"to-rms +exact +4 +6 +12\.0 ms +1\.2 MFLOP, 3 launches", text)
    assert "(1 left for want of fuel)" in flat
    assert "no match: drop-identities" in text
    assert "stream-exit ×5" in text
    assert "+2 more" in text
    assert "%q_0  blocks.0.q  model/modeling.py:90, in forward" in text
    assert "because of %add_0 (modeling.py:200)" in flat
    assert "5 opaque nodes: higher-order operator (cond_0, cond_1, cond_2, +2 more)" in text
    assert "left to Inductor untouched: capture: a tensor subclass" in text
    assert "model.py:3, in forward: Tensor.item()" in text
    assert "worst error 9.00× eager's own" in text
    assert "reproduce: sparsecc verify toy:make --seed 0" in text
    assert "not checked: it draws random numbers" in text
    assert "FAILED verification at final" in text
    assert "250.0 ms (capture 200.0 ms, passes 50.0 ms)" in flat


def test_text_does_not_depend_on_the_terminal(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = to_text(report)
    for name, value in {"COLUMNS": "40", "FORCE_COLOR": "1", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    assert to_text(report) == plain == str(report)
    assert "\x1b" not in plain


def test_an_empty_report_is_a_report() -> None:
    assert "0 rewrites applied" in to_text(Report())
    assert "Compile report" in Report().to_html()


def test_page_is_self_contained_and_escaped(report: Report) -> None:
    from html.parser import HTMLParser

    page = report.to_html()
    assert "<script" not in page
    assert "<make>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page

    class Links(HTMLParser):
        found: list[str]

        def handle_starttag(self, _: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [v or "" for k, v in attrs if k in ("href", "src")]

    parser = Links()
    parser.found = []
    parser.feed(page)
    assert parser.found
    assert all(link.startswith("#") for link in parser.found)
    assert "url(" not in page
    assert "@import" not in page


def test_page_tags_balance(report: Report) -> None:
    here = Path(__file__).with_name("test_formats.py")
    spec = importlib.util.spec_from_file_location("formats_for_pages", here)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    for page in (report.to_html(), Report().to_html()):
        module.Balanced(page)


def test_page_says_everything(report: Report) -> None:
    page = report.to_html()
    assert "LN(x) = RMS(Πx) &lt;if&gt; mean &amp; all" in page
    for words in ("stream-exit", "5 places", "9.00×", "left to Inductor untouched", "2.13.0"):
        assert words in page
    assert "prefers-color-scheme: dark" in page


def test_page_is_the_same_twice_and_can_be_written(report: Report, tmp_path: Path) -> None:
    page = report.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page == report.to_html()


def test_a_failure_without_a_failed_output_still_shows() -> None:
    report = Report(graphs=[GraphReport(0, verdicts=[Verdict("p", False, algebra=1.0)])])
    assert "FAILED" in report.to_html()
    assert "✗ p" in to_text(report)


def test_only_markup_is_trusted() -> None:
    assert esc('<a href="x">') == "&lt;a href=&quot;x&quot;&gt;"
    assert tag("p", Markup("<b>"), "<i>", class_='"') == '<p class="&quot;"><b>&lt;i&gt;</p>'


def test_words() -> None:
    assert [in_bytes(n) for n in (0, 1023, 1024, -3 << 20)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "-3.0 MiB",
    ]
    assert [in_seconds(s) for s in (2e-6, 0.0123, 1.5)] == ["2 µs", "12.3 ms", "1.50 s"]
    assert scaled(1_234_567, "FLOP") == "1.2 MFLOP"
    assert [plural(1, "launch"), plural(2, "launch"), plural(1234, "graph")] == [
        "1 launch",
        "2 launches",
        "1,234 graphs",
    ]
    assert short_where("/a/b/c.py:3, in f") == "b/c.py:3, in f"
    assert short_where("C:\\a\\b\\c.py:3, in f") == "b/c.py:3, in f"
    assert short_where("") == ""
