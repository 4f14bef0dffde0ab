"""The report over arms in the console and as Markdown."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table as RichTable

from cpq_train.common.console import table_console
from cpq_train.common.files import write_whole
from cpq_train.evaluation.metrics_file import Document
from cpq_train.report.sections import Section, sections, subtitle
from cpq_train.report.tables import Table


def print_report(report: Document) -> None:
    """Print the headline tables."""
    console = table_console()
    for section in sections(report):
        if section.is_headline:
            for table in section.tables:
                console.print(_rich(table))
            for note in section.notes:
                console.print(f"  {note}")


def _rich(table: Table) -> RichTable:
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
    parts = ["# Comparison of arms", subtitle(report), *map(_section, sections(report))]
    write_whole(path, "\n\n".join(parts) + "\n")


def _section(section: Section) -> str:
    parts = [
        f"## {section.title}",
        section.text,
        *(f"![{caption}]({file})\n\n{caption}" for file, caption in section.pictures),
        *(_markdown(table, with_title=table.title != section.title) for table in section.tables),
        "\n".join(f"- {note}" for note in section.notes),
    ]
    return "\n\n".join(part for part in parts if part)


def _markdown(table: Table, with_title: bool) -> str:
    lines = [table.header, ["---", *["--:"] * (len(table.header) - 1)], *table.rows]
    title = [f"### {table.title}", ""] if with_title else []
    return "\n".join([*title, *(f"| {' | '.join(line)} |" for line in lines)])
