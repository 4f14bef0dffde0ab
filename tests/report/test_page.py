"""The report in a real browser: it renders, needs nothing from elsewhere, and fits its window."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from browser import NAMES, Page, find_chromium, open_browser
from test_compare import NOISE_M, PNG, write_arm, write_bev

from cpq_train.evaluation import bootstrap
from cpq_train.report.compare import compare
from cpq_train.report.svg import nice_ticks, style

DRIFT = "".join(
    f"{step},layers.{layer}._input_quantizer,{1 + 0.01 * step * layer},1,0.001,30\n"
    for layer in range(5)
    for step in range(60)
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    draw = bootstrap.scene_weights
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "scene_weights", lambda num_scenes: draw(num_scenes, num_resamples=50))
        for arm, noise_m in NOISE_M.items():
            write_arm(root / arm, arm, noise_m)
            write_bev(root / arm)
        (root / "qat/sensitivity.png").write_bytes(PNG)
        (root / "qat/amax_drift.csv").write_text(
            f"step,quantizer,amax,start_amax,clipped_share,sqnr_db\n{DRIFT}"
        )
        (root / "qat/layer_latency.csv").write_text(
            f"step,stage,layer,kind,ms\n10,train,backbone_3d.{'conv.' * 20}0:rulebook,rulebook,1.5\n"
        )
        compare([root / arm for arm in NOISE_M], root / "report")
    return root / "report/report.html"


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    chromium = find_chromium()
    if chromium is None:
        pytest.skip(f"no browser on PATH: none of {', '.join(NAMES)}; Debian's package is chromium")
    with open_browser(chromium) as page:
        yield page


def test_renders_without_complaint_or_request(report: Path, page: Page) -> None:
    page.open(report, width=1280)
    assert page.of("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown") == []
    requested = [event["request"]["url"] for event in page.of("Network.requestWillBeSent")]
    assert requested[0] == report.resolve().as_uri()
    assert all(url.startswith("data:") for url in requested[1:])


def test_headings_and_tables_are_there(report: Path, page: Page) -> None:
    page.open(report, width=1280)
    headings = page.evaluate("[...document.querySelectorAll('h2')].map(e => e.textContent)")
    for heading in (
        "Scores",
        "Against float",
        "From above",
        "Objects lost and won",
        "Quantizers",
        "What training cost by layer",
    ):
        assert heading in headings
    sizes = page.evaluate(
        "[...document.querySelectorAll('table')].map(t => [t.rows.length, t.offsetWidth, t.offsetHeight])"
    )
    assert len(sizes) > 15
    assert all(num_rows > 1 and width > 100 and height > 30 for num_rows, width, height in sizes)
    links = "[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash) !== null)"
    assert page.evaluate(links)
    assert page.evaluate("document.querySelectorAll('script').length") == 0


def test_every_picture_is_decoded_and_has_a_size(report: Path, page: Page) -> None:
    page.open(report, width=1280)
    images = page.evaluate(
        "Promise.all([...document.images].map(i => i.decode()"
        ".then(() => [i.naturalWidth, i.naturalHeight, i.offsetWidth, i.offsetHeight])))"
    )
    assert [image[:2] for image in images] == [[1600, 1600], [1, 1]]
    assert all(size > 0 for image in images for size in image)
    charts = page.evaluate(
        "[...document.querySelectorAll('figure svg')]"
        ".map(s => [s.clientWidth, s.clientHeight, s.childElementCount])"
    )
    assert len(charts) == 6
    assert all(width > 800 and height > 100 and num_marks > 10 for width, height, num_marks in charts)


@pytest.mark.parametrize("width", [1280, 800])
def test_fits_its_window(width: int, report: Path, page: Page) -> None:
    page.open(report, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_texts_of_charts_stay_inside(report: Path, page: Page) -> None:
    page.open(report, width=1280)
    outside = page.evaluate(
        "[...document.querySelectorAll('figure svg')].flatMap(s => { const box = s.getBoundingClientRect();"
        " return [...s.querySelectorAll('text')].filter(t => { const r = t.getBoundingClientRect();"
        " return r.left < box.left || r.right > box.right || r.top < box.top || r.bottom > box.bottom + 1; })"
        ".map(t => t.textContent); })"
    )
    assert outside == []


def test_themes_differ_and_both_are_legible(report: Path, page: Page) -> None:
    """Text and background of either theme contrast by 7 to 1, after WCAG's relative luminance."""
    pairs = []
    for dark in (False, True):
        page.open(report, width=1280, dark=dark)
        colours = [
            page.evaluate(f"getComputedStyle(document.querySelector('{element}')).{name}")
            for element, name in (("section", "color"), ("section", "backgroundColor"))
        ]
        pairs.append([_luminance(colour) for colour in colours])
    assert pairs[0][0] < pairs[0][1]
    assert pairs[1][0] > pairs[1][1]
    for pair in pairs:
        assert (max(pair) + 0.05) / (min(pair) + 0.05) > 7


def _luminance(colour: str) -> float:
    channels = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_many_runs_are_told_apart() -> None:
    assert len({style(number) for number in range(42)}) == 42


@pytest.mark.parametrize(
    ("low", "high"), [(0.2421, 0.5932), (0.4, 0.4), (-0.003, 0.0002), (0, 12_345), (0.55, 0.56)]
)
def test_ticks_are_round_and_enclose(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 7
    assert len({round(b - a, 9) for a, b in pairwise(ticks)}) <= 1
