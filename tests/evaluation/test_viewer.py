"""Traces on the page of a comparison: that they are drawn and turned, by what the package brings along and offline."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
from browser import BROWSER, OpenPage
from PIL import Image

from provq.errors import UserError
from provq.evaluation.exhibits import Exhibits, Overlay
from provq.evaluation.report import LINES, ArmReport, require_extra, write_report
from provq.modalities.protein.proteins import Proteins

ARMS = ("hard", "cosine", "continuous")
ITEMS = ("1ubq", "7rsa")


def helix(turns: float, wobble: float = 0.0) -> list[list[float]]:
    angles = np.linspace(0, 2 * np.pi * turns, 80)
    places = np.stack([60 * angles / angles[-1] - 30, 12 * np.cos(angles), 12 * np.sin(angles)], axis=-1)
    return (places + wobble * np.sin(7 * angles)[:, None]).round(2).tolist()


def overlays(wobble: float) -> list[Overlay]:
    """Two items, the second of which has a gap after its thirtieth place."""
    one, other = helix(4), helix(2)
    made, other_made = helix(4, wobble), helix(2, wobble)
    return [
        Overlay(ITEMS[0], [one], [made], 1.25 * wobble),
        Overlay(ITEMS[1], [other[:30], other[30:]], [other_made[:30], other_made[30:]], 2.5 * wobble),
    ]


def reports() -> list[ArmReport]:
    return [
        ArmReport(name, "", [{"seed": 0, "rmsd": wobble}], [], Exhibits(overlays=overlays(wobble)), None)
        for name, wobble in zip(ARMS, (6.0, 3.0, 1.0), strict=True)
    ]


def written(path, arms):
    write_report(
        path, title="Chains", summary="", quality=Proteins().quality, arms=arms, baseline="hard",
        commands=["provq compare"], recipe="", environment={},
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return written(tmp_path_factory.mktemp("page") / "report.html", reports())


@pytest.fixture(scope="module")
def text(path):
    return path.read_text(encoding="utf-8")


class Scripts(HTMLParser):
    """The policy of a page, and the text of each of its scripts by its type, as a browser reads them."""

    def __init__(self, text):
        super().__init__()
        self.policy, self.scripts, self._type = "", {}, None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]
        if tag == "script":
            assert set(attributes) <= {"type", "id"}
            self._type = attributes.get("type", "text/javascript")
            self.scripts[self._type] = ""

    def handle_endtag(self, tag):
        self._type = None

    def handle_data(self, data):
        if self._type is not None:
            self.scripts[self._type] += data


def test_one_script_may_run_and_nothing_may_be_fetched(text):
    page = Scripts(text)
    script = page.scripts["text/javascript"]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert page.policy.split("; ") == [
        "default-src 'none'", "style-src 'unsafe-inline'", "img-src data:", f"script-src 'sha256-{allowed}'"
    ]  # fmt: skip
    assert "BEER-WARE" in script, "the notice stays with the viewer"
    assert not re.search(r"\beval\(|new Function|\bfetch\(|XMLHttpRequest|WebSocket|\bimport\(", script)


def test_the_data_are_those_that_were_given(text):
    data = json.loads(Scripts(text).scripts["application/json"])
    assert [arm["name"] for arm in data] == list(ARMS)
    for arm, report in zip(data, reports(), strict=True):
        for chain, given in zip(arm["chains"], report.exhibits.overlays, strict=True):
            assert (chain["original"], chain["reconstruction"]) == (given.original, given.reconstruction)


def test_each_distance_stands_below(text):
    (body,) = re.findall(r'aria-label="Distances".*?<tbody>(.*?)</tbody>', text, re.DOTALL)
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in body.strip().splitlines()]
    assert rows == [["1ubq", "7.50", "3.75", "1.25"], ["7rsa", "15.00", "7.50", "2.50"]]


def test_same_input_gives_the_same_bytes(path, tmp_path):
    assert written(tmp_path / "again.html", reports()).read_bytes() == path.read_bytes()


def test_hostile_names_stay_names(tmp_path):
    evil = "</script><script>alert(1)</script>\"><img src=x onerror=alert(2)>{{ 7 * 7 }}'"
    hard, *others = reports()
    named = replace(hard, exhibits=Exhibits(overlays=[replace(each, name=evil) for each in hard.exhibits.overlays]))
    page = Scripts(written(tmp_path / "report.html", [named, *others]).read_text(encoding="utf-8"))
    assert json.loads(page.scripts["application/json"])[0]["chains"][0]["name"] == evil
    assert "alert" not in page.scripts["text/javascript"].partition("overlays-data")[2]


def test_missing_viewer_says_what_to_install(monkeypatch, tmp_path):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("provq.evaluation.viewer.distribution", missing)
    require_extra()
    for asked in (lambda: require_extra(in_space=True), lambda: written(tmp_path / "report.html", reports())):
        with pytest.raises(UserError, match=r"py2Dmol.*pip install 'provq\[protein\]'"):
            asked()
    assert not list(tmp_path.iterdir())


needs_browser = pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is installed")


@pytest.fixture(params=[(1280, 900, False), (390, 844, True)], ids=["desk", "dark phone"])
def page(request, path, tmp_path):
    width, height, dark = request.param
    with OpenPage(tmp_path / "profile", path, width=width, height=height, dark=dark) as page:
        page.evaluated("document.getElementById('viewer').scrollIntoView()")
        yield page
        # Whatever a test did, nothing went wrong and nothing but the page was asked for.
        assert page.told == []
        assert page.fetched == [path.as_uri()]


def is_shade(pixels, colour: str):
    """Where a colour is drawn: light and shadow change how bright and how pale it is, and leave its hue."""
    hue, saturation, _ = np.moveaxis(np.asarray(Image.fromarray(pixels[..., :3]).convert("HSV")).astype(int), -1, 0)
    wanted_hue, wanted_saturation, _ = Image.new("RGB", (1, 1), colour).convert("HSV").getpixel((0, 0))
    off = (hue - wanted_hue + 128) % 256 - 128
    return (pixels[..., 3] == 255) & (np.abs(off) < 12) & ((saturation > 70) == (wanted_saturation > 70))


def choose(page, menu, number):
    """As one does without a mouse."""
    page.evaluated(f"document.getElementById({menu!r}).focus()")
    for _ in range(number):
        page.press("ArrowDown", 40)


@needs_browser
def test_both_traces_are_drawn_in_their_colours(page):
    dark = page.evaluated("matchMedia('(prefers-color-scheme: dark)').matches")
    pixels = page.drawn("canvas")
    original = page.evaluated("getComputedStyle(document.documentElement).getPropertyValue('--original')")
    assert is_shade(pixels, original).sum() > 1000
    assert is_shade(pixels, LINES[0][dark]).sum() > 1000
    assert 0.01 < (pixels[..., 3] > 0).mean() < 0.5
    seen = page.evaluated("document.documentElement.clientWidth")
    assert page.evaluated("document.documentElement.scrollWidth") == seen
    assert pixels.shape[1] < seen


@needs_browser
@pytest.mark.parametrize("hand", ["mouse", "finger"])
def test_it_is_turned_by_hand(page, hand):
    left, top, width, height = page.evaluated(
        "(({x, y, width, height}) => [x, y, width, height])(document.getElementById('canvas').getBoundingClientRect())"
    )
    x, y = left + width / 2, top + height / 2
    before = page.drawn("canvas")
    drag = page.drag_mouse if hand == "mouse" else page.drag_finger
    drag([(x, y), (x + 15, y + 10), (x + 40, y + 30)])
    after = page.drawn("canvas")
    assert ((before != after).any(-1)).sum() > 2000
    # It was turned, not moved or scaled away: as much of it is seen, around the same middle.
    shown = [np.argwhere(pixels[..., 3] > 0) for pixels in (before, after)]
    assert len(shown[1]) > len(shown[0]) / 3
    assert np.abs(shown[0].mean(0) - shown[1].mean(0)).max() < 0.1 * min(width, height)


@needs_browser
def test_menus_choose_what_is_drawn(page):
    dark = page.evaluated("matchMedia('(prefers-color-scheme: dark)').matches")
    said = "document.getElementById('distance').textContent"
    assert page.evaluated(said) == "1ubq by hard: RMSD 7.50 Å"
    first = page.drawn("canvas")
    choose(page, "arm-menu", 1)
    second = page.drawn("canvas")
    assert page.evaluated(said) == "1ubq by cosine: RMSD 3.75 Å"
    assert is_shade(second, LINES[1][dark]).sum() > 1000
    assert is_shade(second, LINES[0][dark]).sum() < 100 < is_shade(first, LINES[0][dark]).sum()
    choose(page, "chain-menu", 1)
    assert page.evaluated(said) == "7rsa by cosine: RMSD 7.50 Å"
    assert (page.drawn("canvas") != second).any()


@needs_browser
def test_a_gap_is_not_bridged(page):
    choose(page, "chain-menu", 1)
    joined = page.evaluated("py2dmol_viewers.overlays.renderer.segmentIndices.length")
    assert joined == 2 * (79 - 1)


@needs_browser
def test_without_a_mouse_it_turns_by_itself(page):
    still = page.drawn("canvas")
    assert (page.drawn("canvas") == still).all()
    page.evaluated("document.getElementById('rotationCheckbox').focus()")
    page.press(" ", 32)
    assert (page.drawn("canvas") != still).any()
