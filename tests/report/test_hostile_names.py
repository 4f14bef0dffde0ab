"""A report over runs whose names would be code, markup, formulas or commands elsewhere."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
from scored_runs import write_arm

from cpq_train.evaluation.matches import read_matches
from cpq_train.report.bev import BevSample, busiest_sample, write_bev_sample
from cpq_train.report.compare import compare

FOLDER = "=cmd|<img src=x onerror=alert(1)>`$\\bad$[red][link=http:]\x1b[31m\u202e\n"
PATH = "[/x]<script>alert(1)</script>|x`[y](javascript:alert(1))\x1b]0;t\x07$\\bad$.ckpt"
DRIFT = "step,quantizer,amax,start_amax,clipped_share,sqnr_db\n"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    for name, arm, noise_m in (("float", "float", 0.2), (FOLDER, "qat", 0.6)):
        write_arm(root / name, arm, noise_m, {"float": "float"})
        metrics = json.loads((root / name / "metrics.json").read_text())
        del metrics["crc32"]
        metrics["checkpoint"]["path"] = PATH
        metrics["dataset"] |= {"root_name": PATH, "split": PATH}
        metrics["coverage"] = {PATH: [1, 2]}
        (root / name / "metrics.json").write_text(json.dumps(metrics))
        _write_sample(root / name)
    quoted = '"' + PATH.replace('"', '""') + '"'
    (root / FOLDER / "amax_drift.csv").write_text(
        f"{DRIFT}0,{quoted},1.0,1.0,0.0,30.0\n100,{quoted},2.0,1.0,0.0,30.0\n"
    )
    compare([root / "float", root / FOLDER], root / "out")
    return root / "out"


def _write_sample(folder: Path) -> None:
    matches = read_matches(folder / "matches.npz")
    token = busiest_sample(matches)
    tokens = matches.gt_token[matches.sample_token[matches.gt_sample] == token]
    boxes = np.tile([5.0, 5.0, 0.0, 4.0, 2.0, 1.5, 0.0, 0.0, 0.0], (len(tokens), 1))
    labels, scores = np.zeros(len(tokens), np.int64), np.full(len(tokens), 0.9)
    sample = BevSample(token, np.zeros((3, 3)), boxes, labels, boxes, scores, labels, tokens)
    write_bev_sample(folder / "bev_sample.npz", sample)


def test_markdown(report: Path) -> None:
    text = (report / "report.md").read_text()
    assert not re.search(r"<\s*/?\w", text)
    assert "](javascript" not in text
    assert "\x1b" not in text
    for lines in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in lines.splitlines()}) == 1


def test_page(report: Path) -> None:
    text = (report / "report.html").read_text()

    class Finder(HTMLParser):
        tags: set[str] = set()
        attributes: set[str] = set()

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.tags.add(tag)
            self.attributes |= {name for name, _ in attrs}

    finder = Finder()
    finder.feed(text)
    assert "script" not in finder.tags
    assert not any(name.startswith("on") for name in finder.attributes)
    assert "\x1b" not in text
    assert "alert(1)" in text


def test_charts_are_well_formed(report: Path) -> None:
    charts = sorted((report / "pictures").glob("*.svg"))
    assert len(charts) >= 5
    for chart in charts:
        ElementTree.parse(chart)


def test_pictures_from_above_are_drawn(report: Path) -> None:
    drawn = {path.suffix for path in (report / "pictures").glob("*bev_*")}
    assert drawn == {".png"}


def test_table_of_lost_objects(report: Path) -> None:
    with (report / "lost_objects.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[1][0] == f"'{FOLDER}"
    assert not any(cell[:1] in ("=", "+", "@") for row in rows for cell in row)


def test_console(report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare([report.parent / "float", report.parent / FOLDER], report)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "[red]" in printed
    assert "[/x]" in printed


def test_a_long_name_leaves_room_for_its_chart(tmp_path: Path) -> None:
    write_arm(tmp_path / ("long" * 50), "float", 0.2)
    compare([tmp_path / ("long" * 50)], tmp_path / "out")
    chart = (tmp_path / "out/pictures/scores.svg").read_text()
    assert all(float(x) >= 0 for x in re.findall(r' (?:x|cx|width)="([^"%]+)"', chart))


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    write_arm(tmp_path / "float", "float", 0.2)
    write_arm(tmp_path / "\udcff", "qat", 0.6)
    (tmp_path / "\udcff/amax_drift.csv").write_text(DRIFT + "0,a,1.0,1.0,0.0,30.0\n")
    compare([tmp_path / "float", tmp_path / "\udcff"], tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    assert "&#92;udcff" in text
    linked = [unquote(link, errors="surrogateescape") for link in re.findall(r"\]\((.+?)\)", text)]
    assert any("amax_drift" in link for link in linked)
    assert all((tmp_path / "out" / link).is_file() for link in linked)
