"""The report over arms in the console and as Markdown."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote

from rich.table import Table as RichTable

from cpq_train.common.console import print_plain
from cpq_train.common.files import write_whole
from cpq_train.common.text import in_markdown, in_markdown_code
from cpq_train.evaluation.metrics_file import Document
from cpq_train.report.sections import Section, sections, subtitle
from cpq_train.report.tables import CODE, Table


def print_report(report: Document) -> None:
    """Print the headline tables."""
    for section in sections(report):
        if section.is_headline:
            for table in section.tables:
                print_plain(as_rich(table))
            for note in section.notes:
                print_plain(f"  {note}")


def as_rich(table: Table) -> RichTable:
    """A table for the console."""
    rich_table = RichTable(title=table.title, title_justify="left")
    for column, name in enumerate(table.header):
        rich_table.add_column(
            name, justify="left" if column == 0 else "right", no_wrap=column == 0, overflow="fold"
        )
    for row in table.rows:
        rich_table.add_row(*row)
    return rich_table


def write_markdown(path: Path, report: Document) -> None:
    """Write the whole report; the file appears only when it is whole."""
    parts = ["# Comparison of arms", _inline(subtitle(report)), *map(_section, sections(report))]
    write_whole(path, "\n\n".join(parts) + "\n")


def _section(section: Section) -> str:
    parts = [
        f"## {section.title}",
        _inline(section.text),
        *(_picture(*picture) for picture in section.pictures),
        *(_markdown(table, with_title=table.title != section.title) for table in section.tables),
        "\n".join(f"- {_inline(note)}" for note in section.notes),
    ]
    return "\n\n".join(part for part in parts if part)


def _markdown(table: Table, with_title: bool) -> str:
    header, *rows = ([_inline(cell) for cell in line] for line in (table.header, *table.rows))
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    title = [f"### {_inline(table.title)}", ""] if with_title else []
    return "\n".join([*title, *(f"| {' | '.join(line)} |" for line in lines)])


def _picture(file: str, caption: str) -> str:
    text = _inline(caption)
    inside = text.replace("[", "&#91;").replace("]", "&#93;")
    return f"![{inside}]({quote(file, errors='surrogateescape')})\n\n{text}"


def _inline(text: str) -> str:
    """Escaped, with what stands in backticks as code."""
    texts, codes = re.split(CODE, text)[::2], re.split(CODE, text)[1::2]
    ends = (*map(in_markdown_code, codes), "")
    return "".join(in_markdown(part) + end for part, end in zip(texts, ends, strict=True))
