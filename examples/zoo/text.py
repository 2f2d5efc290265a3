"""Wikipedia text (101 articles, CC BY-SA) extracted from the dump that gensim ships."""

from __future__ import annotations

import bz2
import re
from functools import cache
from pathlib import Path

from ._carriers import cached, package_file, package_version

_DUMP = "test/test_data/enwiki-latest-pages-articles1*.bz2"
_MIN_PARAGRAPH_CHARS = 120


@cache
def wikipedia() -> str:
    """The articles' running text, 2.56 million characters; extracted once, then cached."""
    folder = cached(f"wikipedia-gensim-{package_version('gensim')}", _extract)
    return (folder / "wikipedia.txt").read_text(encoding="utf-8")


def _extract(folder: Path) -> None:
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    articles = []
    with bz2.BZ2File(package_file("gensim", _DUMP)) as dump:
        for title, markup, _ in extract_pages(dump, filter_namespaces=("0",)):
            if markup.lstrip().lower().startswith("#redirect"):
                continue
            plain = re.sub(r"'{2,}", "", filter_wiki(markup))
            plain = re.sub(r"={2,}\s*(.*?)\s*={2,}", r"\1", plain)
            paragraphs = [p for line in plain.split("\n") if _is_prose(p := line.strip())]
            if paragraphs:
                articles.append("\n\n".join([title, *paragraphs]))
    (folder / "wikipedia.txt").write_text("\n\n".join(articles), encoding="utf-8")


def _is_prose(line: str) -> bool:
    """True for a paragraph; headings, list items and what is left of tables are dropped."""
    return len(line) > _MIN_PARAGRAPH_CHARS and line[0] not in "*|!{"


if __name__ == "__main__":
    print(f"Wikipedia text: {len(wikipedia())} characters")
