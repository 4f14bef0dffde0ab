"""The report as one HTML page with everything inside: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import base64
import re
from pathlib import Path

from cpq_train.common.files import write_whole
from cpq_train.common.text import in_markup
from cpq_train.evaluation.metrics_file import Document
from cpq_train.report.sections import Section, sections, subtitle
from cpq_train.report.tables import CODE, Table

_TITLE = "Comparison of arms"

# Text and background contrast by 7 to 1 or more in both themes (WCAG 2.1, AAA).
_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --page: #f6f8fa; --text: #1b1f24; --muted: #4f5862;
  --grid: #d8dee4; --link: #0550ae; --stripe: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --paper: #161b22; --page: #0d1117; --text: #e6edf3;
  --muted: #a5b0bc; --grid: #30363d; --link: #79b8ff; --stripe: #1c222a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, -apple-system,
  "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 48px; }
h1 { font-size: 28px; margin: 0 0 4px; }
h2 { font-size: 20px; margin: 0 0 8px; }
p { margin: 0 0 12px; max-width: 90ch; }
.muted, figcaption { color: var(--muted); }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 12px 0 20px; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
section { background: var(--paper); border: 1px solid var(--grid); border-radius: 8px; padding: 20px;
  margin-bottom: 20px; }
figure { margin: 8px 0 20px; }
figure svg, figure img { display: block; max-width: 100%; height: auto; }
figure img { background: #ffffff; border-radius: 4px; }
figcaption { font-size: 13px; margin-top: 6px; }
.tables { display: flex; flex-wrap: wrap; gap: 0 40px; align-items: flex-start; }
.scroll { overflow-x: auto; max-width: 100%; margin: 0 0 18px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
caption { text-align: left; font-weight: 600; padding: 0 0 6px; }
th, td { padding: 5px 12px; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
thead th { color: var(--muted); font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; }
tbody th { font-weight: 500; }
tbody tr:nth-child(even) { background: var(--stripe); }
td.text { white-space: normal; overflow-wrap: anywhere; text-align: left; }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media print { body { background: #ffffff; font-size: 12px; } nav { display: none; }
  main { padding: 0; max-width: none; } section { border: none; padding: 0 0 12px; }
  figure, tr { break-inside: avoid; } .scroll { overflow: visible; }
  table { font-size: 11px; } th, td { padding: 3px 6px; } }
"""


def write_page(path: Path, report: Document) -> None:
    """Write the page; the file appears only when it is whole.

    Args:
        path: the HTML file, beside the folder of the pictures that `report` names.
        report: contents of `report.json`.
    """
    parts = sections(report)
    links = "".join(f'<a href="#{part.name}">{in_markup(part.title)}</a>' for part in parts)
    body = "\n".join(_section(part, path.parent) for part in parts)
    html = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{_TITLE}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{_TITLE}</h1>
<p class="muted">{in_markup(subtitle(report))}</p>
<nav>{links}</nav>
{body}
</main>
</body>
</html>
"""
    write_whole(path, html)


def _section(section: Section, folder: Path) -> str:
    text = f"<p>{_inline(section.text)}</p>" if section.text else ""
    pictures = "\n".join(_figure(folder / file, caption) for file, caption in section.pictures)
    tables = "\n".join(_table(table, section) for table in section.tables)
    notes = "".join(f"<li>{_inline(note)}</li>" for note in section.notes)
    notes = f"<ul>{notes}</ul>" if notes else ""
    heading, listed = f"<h2>{in_markup(section.title)}</h2>", f'<div class="tables">{tables}</div>'
    return f'<section id="{section.name}">{heading}{text}{pictures}{listed}{notes}</section>'


def _figure(path: Path, caption: str) -> str:
    said = in_markup(caption)
    if path.suffix == ".svg":
        picture = path.read_text(encoding="utf-8").replace("<svg ", f'<svg aria-label="{said}" ', 1)
    else:
        data = base64.b64encode(path.read_bytes()).decode()
        picture = f'<img alt="{said}" src="data:image/png;base64,{data}">'
    return f"<figure>{picture}<figcaption>{said}</figcaption></figure>"


def _table(table: Table, section: Section) -> str:
    title = f"<caption>{in_markup(table.title)}</caption>" if table.title != section.title else ""
    header = "".join(f'<th scope="col">{_inline(name)}</th>' for name in table.header)
    rows = "\n".join(f"<tr>{''.join(_cells(row))}</tr>" for row in table.rows)
    head, body = f"<thead><tr>{header}</tr></thead>", f"<tbody>{rows}</tbody>"
    return f'<div class="scroll"><table>{title}{head}{body}</table></div>'


def _cells(row: list[str]) -> list[str]:
    head = f'<th scope="row">{_inline(row[0])}</th>'
    return [head, *(f"<td{' class=text' if '`' in cell else ''}>{_inline(cell)}</td>" for cell in row[1:])]


def _inline(text: str) -> str:
    """Escaped, with what stands in backticks as code."""
    return re.sub(CODE, r"<code>\1</code>", in_markup(text))
