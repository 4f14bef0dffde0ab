"""The files and tables of a sensitivity analysis."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Result = Mapping[str, Any]
Records = dict[tuple[str, str], dict[str, Any]]
"""(option, unit) -> measurement."""

MARKERS = ("o", "s", "^", "D", "v", "P")
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
"""Okabe and Ito, "Color Universal Design" (https://jfly.uni-koeln.de/color/); told apart by marker too."""


def write_report(folder: Path, result: Result) -> None:
    """Write `sensitivity.json` and `sensitivity.png`, and print the tables.

    Args:
        folder: Where to; it exists.
        result: What `sensitivity.json` holds.
    """
    (folder / "sensitivity.json").write_text(json.dumps(result, indent=1))
    draw(folder / "sensitivity.png", result)
    console = Console()
    console.print(units_table(result))
    console.print(networks_table(result))
    console.print(f"Report: {folder / 'sensitivity.json'}, {folder / 'sensitivity.png'}")
    if result["budget"] is not None:
        console.print(f"Scheme: {folder / 'scheme.yaml'}")


def ranked(result: Result) -> list[str]:
    """Units, the most sensitive first: by NDS where it was measured, else by loss, at the fewest bits."""
    alone, option = _by_mode(result, "alone"), result["options"][-1]
    score = "NDS" if result["metric"] == "nds" else "loss"
    sign = -1 if score == "loss" else 1
    return sorted(result["units"], key=lambda unit: sign * alone[option, unit][score])


def units_table(result: Result) -> Table:
    """A row for each unit: its size and what each option costs it, alone and in what leaving it out wins."""
    table = Table(title="Loss of a unit alone / won back by leaving it out", title_justify="left")
    table.add_column("unit", no_wrap=True)
    for header in ("layers", "weights", "MACs", *result["options"]):
        table.add_column(header, justify="right")
    assignment = result.get("assignment")
    if assignment:
        table.add_column("assigned")
    alone, won = _by_mode(result, "alone"), _won_back(result)
    for unit, layers in ((unit, result["units"][unit]) for unit in ranked(result)):
        size = [sum(result["costs"][layer][key] for layer in layers) for key in ("num_weights", "num_macs")]
        cells = [f"{_value(result, alone[o, unit])} / {won[o, unit]:.2g}" for o in result["options"]]
        chosen = [assignment[unit]] if assignment else []
        table.add_row(unit, str(len(layers)), f"{size[0]:,}", f"{size[1] / 1e6:,.1f} M", *cells, *chosen)
    return table


def _value(result: Result, record: Mapping[str, Any]) -> str:
    nds = f", NDS {record['NDS']:.3f}" if result["metric"] == "nds" else ""
    return f"{record['loss']:.2g} ({record['sqnr_db']:.0f} dB{nds})"


def networks_table(result: Result) -> Table:
    """A row for each whole network: its size, the sum of its units' losses and what was measured."""
    scores = ("loss", "sqnr_db") + (("mAP", "NDS") if result["metric"] == "nds" else ())
    table = Table(title="Whole networks", title_justify="left")
    table.add_column("scheme")
    for header in ("MiB", "bit-MACs", "summed loss", *scores):
        table.add_column(header, justify="right")
    for row in (*result["networks"], *([result["mixed"]] if "mixed" in result else [])):
        size = (f"{row['mib']:.5f}", f"{100 * row['bit_macs']:.3f} %", f"{row['predicted_loss']:.4g}")
        table.add_row(row["name"], *size, *(f"{row[score]:.4g}" for score in scores))
    return table


def draw(path: Path, result: Result) -> None:
    """Two panels over the ranked units: loss alone, and loss won back by leaving the unit out.

    Args:
        path: The PNG to write.
        result: See `write_report`; assigned options are ringed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    units = ranked(result)[::-1]
    figure = Figure(figsize=(14, 2 + 0.3 * len(units)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    alone = {key: record["loss"] for key, record in _by_mode(result, "alone").items()}
    titles = ("quantized alone: loss", "left out: loss won back")
    for axes, title, values in zip(panels, titles, (alone, _won_back(result)), strict=True):
        _draw_panel(axes, units, result["options"], values)
        axes.set_title(title, fontsize=14)
    _ring(panels[0], units, result.get("assignment", {}), alone)
    panels[0].set_yticks(range(len(units)), units, fontsize=11)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=13)
    figure.savefig(path)


def _draw_panel(
    axes: Axes, units: list[str], options: list[str], values: Mapping[tuple[str, str], float]
) -> None:
    smallest = min((value for value in values.values() if value > 0), default=1e-9)
    for option, marker, colour in zip(options, MARKERS, COLOURS, strict=False):
        axes.plot(
            [values[option, unit] for unit in units],
            range(len(units)),
            marker,
            color=colour,
            markersize=8,
            label=option,
        )
    axes.set_xscale("symlog", linthresh=smallest)  # leaving a unit out may also make the loss larger
    axes.grid(axis="both", color="#D0D0D0", linewidth=0.6)
    axes.set_xlabel("loss (nats)", fontsize=13)
    axes.tick_params(labelsize=11)


def _ring(
    axes: Axes, units: list[str], assignment: Mapping[str, str], values: Mapping[tuple[str, str], float]
) -> None:
    points = [(values.get((assignment[u], u), 0.0), row) for row, u in enumerate(units) if u in assignment]
    if points:
        axes.plot(
            *zip(*points, strict=True),
            linestyle="none",
            marker="o",
            markersize=14,
            markerfacecolor="none",
            color="black",
            label="assigned (float: loss 0)",
        )


def _by_mode(result: Result, mode: str) -> Records:
    return {(r["option"], r["unit"]): r for r in result["measurements"] if r["mode"] == mode}


def _won_back(result: Result) -> dict[tuple[str, str], float]:
    whole = {row["name"]: row["loss"] for row in result["networks"]}
    return {key: whole[key[0]] - record["loss"] for key, record in _by_mode(result, "left_out").items()}
