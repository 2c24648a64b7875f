"""The page of a leaderboard, as the page of a comparison is tested: what it says, and what a browser makes of it."""

import html
import math
import re
import sys
from pathlib import Path
from statistics import fmean, stdev

import pytest
from browser import OpenPage
from test_report import FRAME, Page, measures, needs_browser

from provq.errors import UserError
from provq.evaluation.leaderboard import Board, Entry, write_leaderboard
from provq.evaluation.report import Column

COLUMNS = (
    Column("a/auroc", "Sites, AUROC", 1, True, "On sites.", "%", 100.0),
    Column("a/rmsd", "RMSD", 2, False, "Of backbones.", "Å"),
)
OURS = Entry("ours", "512 codes · seeds 0, 1", [{"a/auroc": 0.71, "a/rmsd": 2.5}, {"a/auroc": 0.74, "a/rmsd": 2.7}])
OTHER = Entry("other", "20 codes · seed 0", [{"a/auroc": 0.6, "a/rmsd": 1.25}])
THEIRS = Entry("theirs", "a table, second-hand", [{"a/auroc": 0.95, "a/rmsd": None}], is_published=True)
RIVAL = Entry("rival", "a table, second-hand", [{"a/auroc": 0.5, "a/rmsd": math.nan}], is_published=True)
NOTHING = Entry("nothing", "was measured elsewhere", [{"b/auroc": 0.5}])


def written(path: Path, boards=None, **changes) -> str:
    arguments = {
        "title": "provq benchmark structtoken",
        "verdict": "What tokens are worth: ours, other.",
        "summary": "Heads of 1,000 steps.",
        "boards": boards or [Board("Sites", "Where they are.", COLUMNS, [THEIRS, OURS, OTHER, RIVAL, NOTHING])],
        "commands": ["provq benchmark structtoken runs/p --data DATA", "provq benchmark structtoken 3di --data DATA"],
        "environment": {"provq": "0.1.0", "date": "2031-01-01"},
        "made_by": "provq benchmark structtoken",
    }
    write_leaderboard(path, **(arguments | changes))
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "made" / "leaderboard.html"
    written(path)
    return path


@pytest.fixture(scope="module")
def text(path):
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_what_was_measured_is_given_over_seeds(page):
    values = [100 * each["a/auroc"] for each in OURS.evaluations]
    assert page.cell("ours", "Sites, AUROC") == [f"{fmean(values):.1f}", f"± {stdev(values):.1f}"]
    assert page.cell("ours", "RMSD") == ["2.60", "± 0.14"]
    assert page.cell("other", "RMSD") == ["1.25"]


def test_what_is_published_is_marked_keeps_its_source_and_its_place(page):
    rows = [[part.strip() for part in cells[0].split("|") if part.strip()] for cells in page.rows[1:]]
    assert rows == [
        ["theirs", "published, not measured here", "a table, second-hand"],
        ["ours", "512 codes · seeds 0, 1"],
        ["other", "20 codes · seed 0"],
        ["rival", "published, not measured here", "a table, second-hand"],
    ]
    assert page.cell("theirs", "RMSD") == page.cell("rival", "RMSD") == ["–"]
    assert page.cell("theirs", "Sites, AUROC") == ["95.0"]


def test_the_best_of_what_was_measured_is_in_bold_and_nothing_else(text):
    assert re.findall(r"<strong>(.*?)</strong>", text) == ["72.5", "1.25"]


def test_columns_without_numbers_are_left_out(tmp_path):
    page = Page(written(tmp_path / "page.html", [Board("Sites", "Where.", COLUMNS, [THEIRS, RIVAL])]))
    assert [head.partition("|")[0] for head in page.rows[0]] == ["Name", "Sites, AUROC"]


def test_boards_without_numbers_are_left_out(tmp_path, text):
    full, empty = Board("Sites", "Where.", COLUMNS, [OURS]), Board("Folds", "Which.", COLUMNS, [NOTHING])
    page = written(tmp_path / "page.html", [empty, full])
    assert "Folds" not in page and 'id="board-1">Sites<' in page and "board-2" not in page


def test_it_refers_to_nothing_outside_itself_and_runs_nothing(page, text):
    tags = {tag for tag, _ in page.elements}
    assert not {"script", "link", "iframe", "object", "base", "img", "a"} & tags
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert all("scope" in attributes for tag, attributes in page.elements if tag == "th")
    assert "Made by <code>provq benchmark structtoken</code>" in text
    for command in ("runs/p", "3di"):
        assert f"provq benchmark structtoken {command} --data DATA" in text


def test_hostile_words_stay_words(tmp_path):
    evil = """</style></pre><script>alert(1)</script>"><img src=x onerror=alert(2)>{{ 7 * 7 }}'"""
    column = Column("a/auroc", evil, 1, True, evil, evil)
    board = Board(
        evil, evil, [column], [Entry(evil, evil, OURS.evaluations), Entry(evil, evil, [{"a/auroc": 1}], True)]
    )
    words = {"title": evil, "verdict": evil, "summary": evil, "commands": [evil], "environment": {evil: evil}}
    text = written(tmp_path / "page.html", [board], **words, made_by=evil)
    page = Page(text)
    assert not {"script", "img"} & {tag for tag, _ in page.elements} and "<script" not in text and "49" not in text
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.verdict == evil and page.rows[1][0].count(evil) == 2


def test_same_input_gives_the_same_bytes_and_no_crumbs(path, tmp_path):
    assert written(tmp_path / "again.html") == path.read_text(encoding="utf-8")
    assert [each.name for each in path.parent.iterdir()] == ["leaderboard.html"]


def test_missing_extra_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match=r"pip install 'provq\[report\]'"):
        written(tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_a_desk_and_a_phone(tmp_path, text, width):
    wide = Board("Many", "x" * 300, [*COLUMNS] * 12, [Entry("y" * 90, "z" * 90, OURS.evaluations)])
    for name, shown in (("plain", text), ("wide", written(tmp_path / "wide.html", [wide]))):
        frame = tmp_path / f"{name}-frame.html"
        frame.write_text(FRAME.format(width=width, page=html.escape(shown)), encoding="utf-8")
        found = measures(tmp_path, frame)
        assert found["seen"] == found["needed"] == width


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_has_nothing_to_say_and_nothing_to_fetch(tmp_path, path, dark):
    with OpenPage(tmp_path / "profile", path, width=1280, height=900, dark=dark) as page:
        shown = page.evaluated("[...document.querySelectorAll('tbody tr')].map(row => row.innerText)")
        assert len(shown) == 4 and "published, not measured here" in shown[0] and "72.5" in shown[1]
        assert page.told == [] and page.fetched == [path.as_uri()]
