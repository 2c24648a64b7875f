"""The page of a comparison: what it says, that it stands alone, and that it fits a desk and a phone."""

import builtins
import html
import json
import math
import re
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
from browser import BROWSER
from PIL import Image
from scipy.stats import ttest_rel

from provq.errors import UserError
from provq.evaluation.exhibits import Exhibits
from provq.evaluation.report import LINES, ArmReport, write_report
from provq.modalities.image.images import Images
from provq.modalities.protein.proteins import Proteins

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
CODES = 512


def png(values: np.ndarray) -> bytes:
    stream = BytesIO()
    Image.fromarray((255 * values.clip(0, 1)).astype(np.uint8)).save(stream, "png")
    return stream.getvalue()


def gradient(index: int, levels: int | None = None, noise: float = 0.0) -> bytes:
    """A round light on a sloped ground; with `levels`, as a coarse codebook would give it back."""
    rows, columns = np.mgrid[0:32, 0:32] / 31
    light = np.exp(-(((rows - 0.3 - 0.1 * index) ** 2 + (columns - 0.7 + 0.12 * index) ** 2) / 0.05))
    picture = np.stack([light, 0.6 * columns + 0.3 * light, 0.8 * rows * (1 - light) + 0.15], axis=-1)
    if levels is not None:
        picture = picture.reshape(16, 2, 16, 2, 3).mean((1, 3)).repeat(2, 0).repeat(2, 1)
        picture = np.round(picture * levels) / levels
    return png(picture + noise * np.random.default_rng(index).normal(size=picture.shape))


def codebook(used: int) -> bytes:
    generator = np.random.default_rng(used)
    tiles = generator.uniform(0.1, 0.95, (CODES, 1, 1, 3)) * np.linspace(0.75, 1, 4)[None, :, None, None]
    tiles = np.where(np.arange(CODES)[:, None, None, None] < used, tiles, 0.5) * np.ones((CODES, 4, 4, 3))
    return png(tiles.reshape(16, 32, 4, 4, 3).transpose(0, 2, 1, 3, 4).reshape(64, 128, 3))


def arm(name: str, description: str, *, psnr: float, used: int, ramp: tuple[int, int] | None, seeds: int = 3):
    """An arm with plausible numbers; `ramp` is when hardness starts and ends to rise, none for never."""
    generator = np.random.default_rng([used, len(name)])
    discrete = ramp is not None
    evaluations, curves = [], []
    for seed in range(seeds):
        lucky = generator.normal()
        usage = min(1.0, used / CODES + 0.01 * lucky)
        tokens = {
            "usage": usage,
            "perplexity": 0.72 * usage * CODES,
            "dead_codes": round((1 - usage) * CODES),
            "relative_error": 0.31 - 0.2 * usage + 0.004 * lucky,
            "coverage": usage,
            "continuity_gap": 2.4 - 1.3 * usage,
            "bits_per_item": 576.0,
        }
        common = {
            "psnr": psnr + 0.12 * lucky,
            "ssim": psnr / 32 + 0.002 * lucky,
            "effective_dim": 4 + 9 * usage,
        }
        budget = {"seed": float(seed), "steps": 4000.0, "seconds": 61.0 + lucky, "count": 512.0}
        evaluations.append(budget | common | {k: v if discrete else math.nan for k, v in tokens.items()})
        records = []
        for step in range(0, 4001, 100):
            start, end = ramp or (10**9, 10**9 + 1)
            hardness = min(1.0, max(0.0, (step - start) / max(1, end - start))) if step else float(end == 0)
            floor = 10 ** (-psnr / 10) * (1 + 0.04 * generator.normal())
            current = floor + 0.2 * math.exp(-step / 350) * (1 + 0.1 * lucky)
            grown = 1 - math.exp(-step / 500)
            records.append(
                {
                    "step": float(step),
                    "hardness": hardness,
                    "loss_current": current,
                    "loss_hard": current * (1 + 2.5 * (1 - hardness)) if discrete else math.nan,
                    "usage": usage * max(0.1, grown) if discrete else math.nan,
                    "perplexity": 0.72 * usage * CODES * grown if discrete else math.nan,
                    "effective_dim": 2 + (2 + 9 * usage) * grown,
                    "latent_cka": grown if step else math.nan,
                    "assignment_churn": 1 - grown if step and discrete else math.nan,
                }
            )
        curves.append(records)
    levels = max(2, used // 40) if discrete else None
    pictures = [gradient(index, levels, 0.015) for index in range(4)]
    exhibits = Exhibits([gradient(index) for index in range(4)], pictures)
    return ArmReport(name, description, evaluations, curves, exhibits, codebook(used) if discrete else None)


def five_arms(seeds: int = 3) -> list[ArmReport]:
    table = [
        ("hard", "Discrete from the first step.", 24.6, 118, (0, 0)),
        ("hard-revival", "As hard, and dead codes are put where data is.", 25.1, 371, (0, 0)),
        ("deferred", "Continuous for half of the budget, then discrete at once.", 25.4, 402, (2000, 2001)),
        ("cosine", "Hardness rises from 0 to 1 along half a cosine.", 26.2, 489, (400, 3000)),
        ("continuous", "The same network without tokens.", 27.3, 512, None),
    ]
    return [
        arm(name, description, psnr=psnr, used=used, ramp=ramp, seeds=seeds)
        for name, description, psnr, used, ramp in table
    ]


def written(path: Path, arms: list[ArmReport], **changes) -> str:
    arguments = {
        "title": "Progressive quantization on 32 × 32 pictures",
        "summary": "Five arms, one network, 4,000 steps each, measured on 512 pictures that none has seen.",
        "quality": Images().quality,
        "arms": arms,
        "baseline": "hard",
        "commands": [f"provq compare pictures.yaml --arms {','.join(each.name for each in arms)} --seeds 3"],
        "recipe": "quantizer:\n  codes: 512\n  dim: 16\ntraining:\n  steps: 4000\n  batch_size: 64\n",
        "environment": {"provq": "0.1.0", "torch": "2.13.0", "Python": "3.12.3", "Device": "CPU"},
    }  # fmt: skip
    write_report(path, **(arguments | changes))
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Every element with its attributes and its own text, and the verdict and table as text."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.open, self.rows, self.verdict = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "tr" and "results" in self.classes():
            self.rows.append([])
        if tag in ("td", "th") and "results" in self.classes():
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append((tag, dict(attributes).get("class") or ""))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if "verdict" in self.classes():
            self.verdict += data
        if any(tag in ("td", "th") for tag, _ in self.open) and "results" in self.classes():
            self.rows[-1][-1] += data + "|"

    def classes(self) -> set[str]:
        return {name for _, names in self.open for name in names.split()}

    def cell(self, row: str, column: str) -> list[str]:
        place = next(i for i, head in enumerate(self.rows[0]) if head.startswith(column))
        cells = next(cells for cells in self.rows[1:] if cells[0].strip().startswith(row + "|"))
        return [part.strip() for part in cells[place].split("|") if part.strip()]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return written(tmp_path_factory.mktemp("page") / "report.html", five_arms())


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def minus(number: str) -> str:
    return number.replace("-", "−")


def test_refers_to_nothing_outside_itself(page, text):
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert attributes.get(name, "#").startswith(("data:image/png;base64,", "#"))
    assert not re.search(r"@import|url\((?!#)", text)
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


def test_can_be_read_without_seeing_it(page, text):
    assert ("html", {"lang": "en"}) in page.elements
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(images) == 4 * 6 + 4
    assert all(attributes["alt"] for attributes in images)
    assert len({attributes["alt"] for attributes in images}) == len(images)
    assert all("scope" in attributes for tag, attributes in page.elements if tag == "th")
    charts = [attributes for _, attributes in page.elements if attributes.get("role") == "img"]
    assert len(charts) == text.count("<svg") == 5
    assert "cosine 1." not in charts[0]["aria-label"] and "cosine" in charts[0]["aria-label"]
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))


def test_charts_show_the_whole_training(text):
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    for chart in charts:
        assert re.findall(r">(\dk?)</text>", chart)[:5] == ["0", "1k", "2k", "3k", "4k"]
    loss, _, usage, _, stability = charts
    assert ">0.5</text>" in loss and ">0.002</text>" in loss and ">100 %</text>" in usage
    assert ">1</text>" in stability


def test_sections_come_in_order(text):
    order = ["verdict", "results", "curves", "reconstructions", "codebooks", "making", "environment"]
    places = [text.index('<p class="verdict"'), *(text.index(f'id="{name}"') for name in order[1:])]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("column", "key", "digits", "scale"),
    [("PSNR", "psnr", 2, 1), ("Usage", "usage", 1, 100), ("Relative error", "relative_error", 3, 1)],
)
def test_table_gives_mean_spread_and_difference(page, column, key, digits, scale):
    values = {each.name: [scale * e[key] for e in each.evaluations] for each in five_arms()}
    for name in ("hard", "hard-revival", "deferred", "cosine"):
        level = [f"{fmean(values[name]):.{digits}f}", f"± {stdev(values[name]):.{digits}f}"]
        difference = fmean(values[name]) - fmean(values["hard"])
        p = ttest_rel(values[name], values["hard"]).pvalue
        beyond = [] if name == "hard" else [minus(f"{difference:+.{digits}f}") + f" (p\u00a0{p:.2g})"]
        assert page.cell(name, column) == level + beyond


def test_best_discrete_arm_is_in_bold(text):
    bold = re.findall(r"<strong>(.*?)</strong>", text)
    assert f"{fmean(e['psnr'] for e in five_arms()[3].evaluations):.2f}" in bold
    assert not [value for value in bold if value.startswith("27.")]


def test_undefined_numbers_are_dashes(tmp_path, page):
    assert page.cell("continuous", "Usage") == page.cell("continuous", "Continuity gap") == ["–"]
    odd = ArmReport("odd", "", [{"seed": 0, "psnr": 20.0, "ssim": None, "usage": math.inf}], [], Exhibits(), None)
    bare = Page(written(tmp_path / "report.html", [odd], baseline=None))
    assert bare.cell("odd", "PSNR") == ["20.00"]
    assert [bare.cell("odd", name) for name in ("SSIM", "Usage", "Perplexity")] == [["–"]] * 3
    assert not [tag for tag, _ in bare.elements if tag in ("img", "svg")]


def test_warnings_stand_with_their_arm_and_nowhere_else(tmp_path, text):
    assert 'id="warnings"' not in text
    first, second, *others = five_arms()
    warned = [first, replace(second, warnings=["Codes are dead.", "Too < soft."]), *others]
    page = written(tmp_path / "report.html", warned)
    (section,) = re.findall(r'<section aria-labelledby="warnings">.*?</section>', page, re.DOTALL)
    assert re.findall(r"<span>(.*?)</span></dt>", section) == [second.name]
    assert re.findall(r"<dd><p>(.*?)</p><p>(.*?)</p></dd>", section) == [("Codes are dead.", "Too &lt; soft.")]


def measured(name: str, *psnr: float, perplexity: float | None = None) -> ArmReport:
    evaluations = [{"seed": seed, "psnr": value, "perplexity": perplexity} for seed, value in enumerate(psnr)]
    return ArmReport(name, "", evaluations, [], Exhibits(), None)


def test_where_less_is_better_the_least_leads(tmp_path):
    def folded(name: str, *rmsd: float) -> ArmReport:
        evaluations = [{"seed": seed, "rmsd": value, "tm": 0.5} for seed, value in enumerate(rmsd)]
        return ArmReport(name, "", evaluations, [], Exhibits(), None)

    arms = [folded("hard", 5.0, 5.5), folded("simvq", 7.0, 7.5), folded("cosine", 3.0, 4.0)]
    page = html.unescape(written(tmp_path / "report.html", arms, quality=Proteins().quality))
    assert "“cosine” reconstructs 1.75 Å better than the baseline “hard” (3.50 against 5.25 Å of mean RMSD)" in page
    assert "-1.75 Å" in page or "−1.75 Å" in page
    assert "ahead in each of 2 seeds" in page
    assert "PSNR" not in page


@pytest.mark.parametrize(
    ("arms", "baseline", "verdict"),
    [
        (
            [
                measured("hard", 20, 21, perplexity=100),
                measured("cosine", 22, 23.5, perplexity=250),
                measured("continuous", 30, 30),
            ],
            "hard",
            # With one degree of freedom t is a Cauchy variable: p = 1 - 2/pi atan(2.25 / 0.25).
            "“cosine” reconstructs 2.25 dB better than the baseline “hard” (22.75 against 20.50 dB of mean "
            "PSNR) at 2.50 times its perplexity, ahead in each of 2 seeds (paired t-test: p = 0.07).",
        ),
        (
            [measured("hard", 20, 23), measured("cosine", 22, 22.5)],
            "hard",
            "“cosine” reconstructs 0.75 dB better than the baseline “hard” (22.25 against 21.50 dB of mean "
            "PSNR), but is ahead in only 1 of 2 seeds, so it may be chance.",
        ),
        (
            [measured("hard", 20, perplexity=0.0), measured("cosine", 21, perplexity=9)],
            "hard",
            "“cosine” reconstructs 1.00 dB better than the baseline “hard” (21.00 against 20.00 dB of mean "
            "PSNR); one seed only, so chance is not ruled out.",
        ),
        (
            [measured("hard", 20, 20), measured("cosine", 19.5, 19.5), measured("continuous", 30, 30)],
            "hard",
            "No gain: no arm reconstructs better than the baseline “hard” (20.00 dB of mean PSNR); "
            "the nearest, “cosine”, is 0.50 dB behind over 2 seeds.",
        ),
        (
            [measured("hard", 20), measured("cosine", 20.004)],
            "hard",
            "No gain: no arm reconstructs better than the baseline “hard” (20.00 dB of mean PSNR); "
            "the nearest, “cosine”, is level with it; one seed only, so chance is not ruled out.",
        ),
        (
            [measured("hard", 20), measured("continuous", 30)],
            "hard",
            "Nothing to compare: the PSNR of the baseline “hard” alone is known, 20.00 dB.",
        ),
        (
            [measured("hard", 20), measured("cosine", 21)],
            None,
            "“cosine” reconstructs best, with a mean PSNR of 21.00 dB; no baseline was named to compare it with.",
        ),
        (
            [measured("hard", math.nan), measured("cosine", 21)],
            "hard",
            "“cosine” reconstructs best, with a mean PSNR of 21.00 dB; the baseline “hard” has no PSNR to "
            "compare it with.",
        ),
        ([measured("continuous", 30)], None, "The PSNR of no discrete arm is known, so there is nothing to compare."),
        ([], None, "The PSNR of no discrete arm is known, so there is nothing to compare."),
    ],
    ids=[
        "gain",
        "chance",
        "one seed",
        "loss",
        "level",
        "alone",
        "no baseline",
        "unmeasured",
        "bound",
        "none",
    ],
)
def test_verdict_claims_no_more_than_the_data(tmp_path, arms, baseline, verdict):
    assert Page(written(tmp_path / "report.html", arms, baseline=baseline)).verdict == verdict


def test_hostile_words_stay_words(tmp_path):
    evil = """</style></pre><script>alert(1)</script>"><img src=x onerror=alert(2)>{{ 7 * 7 }}$\\frac$'"""
    hostile = replace(arm(evil, evil, psnr=26, used=300, ramp=(0, 9)), warnings=[evil])
    text = written(
        tmp_path / "report.html", [*five_arms(), hostile],
        title=evil, summary=evil, baseline=evil, commands=[evil], recipe=evil, environment={evil: evil},
    )  # fmt: skip
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.elements}
    assert not [a for t, a in page.elements if t == "img" and not a["src"].startswith("data:image/png;base64,")]
    assert "<script" not in text and "49$" not in text
    assert evil in page.verdict


def test_same_input_gives_the_same_bytes_and_no_crumbs(tmp_path, text):
    path = tmp_path / "made" / "on the way" / "report.html"
    assert written(path, five_arms()) == text
    assert [each.name for each in path.parent.iterdir()] == ["report.html"]


def test_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("provq.files.os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        written(path, [measured("hard", 20)])
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]


def test_unknown_baseline_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match="did you mean 'hard'"):
        written(tmp_path / "report.html", five_arms(1), baseline="hrad")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_missing_extra_says_what_to_install(tmp_path, monkeypatch, missing):
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=rf"{missing}.*pip install 'provq\[report\]'"):
        write_report(
            tmp_path / "report.html", title="", summary="", quality=Images().quality, arms=[],
            baseline=None, commands=[], recipe="", environment={},
        )  # fmt: skip


def test_drawing_leaves_the_settings_of_matplotlib_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    written(tmp_path / "report.html", five_arms(1))
    assert dict(matplotlib.rcParams) == before


def luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_stand_out_on_light_and_dark(text):
    for theme, block in enumerate(re.findall(r":root \{(.*?)\}", text, re.DOTALL)):
        colours = dict(re.findall(r"--([\w-]+): (#\w{6})", block))
        for name in ("ink", "ink-soft", "accent", "better", "worse"):
            assert min(contrast(colours[name], colours[ground]) for ground in ("page", "card")) >= 4.5
        for line in LINES:
            assert contrast(line[theme], colours["card"]) >= 3
            assert line[theme] in block


FRAME = """<!DOCTYPE html><html><head><meta charset="utf-8"><style>body {{ margin: 0 }}</style></head>
<body><iframe id="frame" style="width: {width}px; height: 800px; border: 0; display: block"
srcdoc="{page}"></iframe>
<script>
frame.onload = () => {{
  const page = frame.contentDocument, root = page.documentElement;
  frame.style.height = root.scrollHeight + "px";
  document.body.dataset.measures = JSON.stringify({{
    seen: root.clientWidth, needed: root.scrollWidth, height: root.scrollHeight,
    broken: [...page.images].filter(image => !image.naturalWidth).length,
    spilt: [...page.querySelectorAll("svg text")].filter(each => {{
      const card = each.closest("figure").getBoundingClientRect(), box = each.getBoundingClientRect();
      return box.left < card.left || box.right > card.right;
    }}).length,
    unpainted: [...page.querySelectorAll("svg path[style*='--line-']")].filter(
      each => !getComputedStyle(each).stroke.startsWith("rgb")).length,
  }});
}};
</script></body></html>"""


def browse(tmp_path: Path, address: Path, *flags: str) -> str:
    """What the browser says about a page; a fresh profile each time."""
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", *flags, address.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def measures(tmp_path: Path, frame: Path) -> dict[str, int]:
    found = re.search(r'data-measures="([^"]*)"', browse(tmp_path, frame, "--dump-dom", "--window-size=1280,900"))
    return json.loads(html.unescape(found[1]))


needs_browser = pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is installed")


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_fits_a_desk_and_a_phone(tmp_path, text, width):
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width, page=html.escape(text)), encoding="utf-8")
    found = measures(tmp_path, frame)
    assert found["seen"] == found["needed"] == width
    assert found["broken"] == found["spilt"] == found["unpainted"] == 0
    shot = tmp_path / f"{width}.png"
    browse(tmp_path, frame, f"--screenshot={shot}", f"--window-size={max(width, 500)},{found['height']}")
    colours = np.asarray(Image.open(shot).convert("RGB").crop((0, 0, width, found["height"])))
    assert len(np.unique(colours.reshape(-1, 3), axis=0)) > 1000


@needs_browser
def test_long_words_do_not_widen_the_page(tmp_path):
    long = "incomprehensibilities" * 8
    arms = [*five_arms(1), arm(long, long, psnr=26.5, used=300, ramp=(0, 9), seeds=1)]
    words = {"title": long, "summary": long, "commands": [long], "recipe": long, "environment": {long: long}}
    text = written(tmp_path / "report.html", arms, **words)
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=390, page=html.escape(text)), encoding="utf-8")
    assert measures(tmp_path, frame)["needed"] == 390
