"""HTML: escaped, self-contained, whole."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

from spectra.comparison import Comparison
from spectra.report.page import summary_html, write_page
from spectra.report.plots import save_pictures


class Tags(HTMLParser):
    """Every tag and attribute, every open tag that was never closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_untrusted_names_make_no_tags(failing: Comparison) -> None:
    text = summary_html(failing)
    tags = Tags(text)
    assert not tags.open
    assert "script" not in tags.tags
    assert "b" not in tags.tags  # of the label [bold]t<b>
    assert set(tags.attributes) <= {"class", "title"}
    assert "&lt;script&gt;" in text
    assert "\x1b" not in text


def test_the_summary_is_light_and_fetches_nothing(real: Comparison) -> None:
    text = summary_html(real)
    assert len(text) < 40_000
    assert not re.search(r"https?://|src=|href=", text)
    assert "<details>" in text
    assert "bert.pooler.dense.weight" in text
    for finding in real.diagnosis():
        assert finding.text.split(",")[0].replace("'", "&#x27;") in text


def test_a_notebook_shows_it(two: Comparison) -> None:
    assert two._repr_html_() == summary_html(two)


def test_sparse_comparisons_have_a_page(odd: Comparison, tmp_path: Path) -> None:
    assert not Tags(summary_html(odd)).open
    assert not Tags(write_page(odd, tmp_path).read_text(encoding="utf-8")).open


def test_the_page_holds_its_pictures(single: Comparison, tmp_path: Path) -> None:
    pictures = save_pictures(single, tmp_path)
    page = write_page(single, tmp_path, pictures)
    assert page == tmp_path / "report.html"
    text = page.read_text(encoding="utf-8")
    assert not Tags(text).open
    embedded = [base64.b64decode(each) for each in re.findall(r'src="data:image/png;base64,([^"]+)"', text)]
    assert embedded == [path.read_bytes() for path in pictures]
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert (
        write_page(single, tmp_path / "alone").read_text(encoding="utf-8") == text
    )  # drawn again where none are given
