"""The files and tables of a sensitivity analysis."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from cpq_train.common.console import print_plain
from cpq_train.common.files import write_whole
from cpq_train.common.picture import picture
from cpq_train.common.text import visible

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
    write_whole(folder / "sensitivity.json", json.dumps(result, indent=1))
    draw(folder / "sensitivity.png", result)
    print_plain(units_table(result), networks_table(result))
    print_plain(f"Report: {folder / 'sensitivity.json'}, {folder / 'sensitivity.png'}")
    if result["budget"] is not None:
        print_plain(f"Scheme: {folder / 'scheme.yaml'}")


def ranked(result: Result) -> list[str]:
    """Units, the most sensitive first: by NDS where it was measured, else by loss, at the fewest bits."""
    alone, option = _by_mode(result, "alone"), min(result["networks"], key=lambda row: row["mib"])["name"]
    score, sign = ("NDS", 1) if _has_nds(result) else ("loss", -1)
    return sorted(result["units"], key=lambda unit: float(sign * alone[option, unit][score]))


def units_table(result: Result) -> Table:
    """A row for each unit: its size and, for each option, its loss alone and what leaving it out brings."""
    title = (
        "Units: loss quantized alone, and NDS"
        if _has_nds(result)
        else "Units: loss quantized alone, and the share of the whole loss won back by leaving the unit out"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("unit", no_wrap=True)
    assigned = result.get("assignment")
    for header in ("weights", "MACs", *result["options"], *(["assigned"] if assigned else [])):
        table.add_column(header, justify="right", no_wrap=True)
    for unit in ranked(result):
        costs = [result["costs"][layer] for layer in result["units"][unit]]
        size = (
            f"{sum(c['num_weights'] for c in costs):,}",
            f"{sum(c['num_macs'] for c in costs) / 1e6:,.0f} M",
        )
        table.add_row(unit, *size, *_cells(result, unit), *([assigned[unit]] if assigned else []))
    return table


def _cells(result: Result, unit: str) -> list[str]:
    alone, won = _by_mode(result, "alone"), _won_back(result)
    records = {option: alone[option, unit] for option in result["options"]}
    beside = {
        o: f"{r['NDS']:.3f}" if _has_nds(result) else f"{won[o, unit]:+4.0%}" for o, r in records.items()
    }
    return [f"{record['loss']:.1e} {beside[option]}" for option, record in records.items()]


def _has_nds(result: Result) -> bool:
    return bool(result["metric"] == "nds")


def networks_table(result: Result) -> Table:
    """A row for each whole network: its size, the sum of its units' losses and what was measured."""
    scores = ("loss", "sqnr_db") + (("mAP", "NDS") if _has_nds(result) else ())
    table = Table(title="Whole networks", title_justify="left")
    table.add_column("scheme")
    for header in ("MiB", "bit-MACs", "summed loss", *scores):
        table.add_column(header, justify="right")
    for row in (*result["networks"], *([result["mixed"]] if "mixed" in result else [])):
        size = (f"{row['mib']:.5f}", f"{100 * row['bit_macs']:.3f} %", f"{row['predicted_loss']:.4g}")
        table.add_row(row["name"], *size, *(f"{row[score]:.4g}" for score in scores))
    return table


def draw(path: Path, result: Result) -> None:
    """Two panels over the ranked units: loss alone, and the share of the loss won back by leaving it out.

    Args:
        path: The PNG to write.
        result: See `write_report`; assigned options are ringed.
    """
    units, options = ranked(result)[::-1], result["options"]
    alone = {key: record["loss"] for key, record in _by_mode(result, "alone").items()}
    with picture(path, 14, 2 + 0.3 * len(units)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        _draw_panel(left, units, options, alone)
        left.set(title="quantized alone", xscale="log", xlabel="loss (nats)")
        _ring(left, units, result.get("assignment", {}), alone)
        _draw_panel(right, units, options, {key: 100 * share for key, share in _won_back(result).items()})
        right.set(title="left out, all others quantized", xlabel="share of the loss won back (%)")
        right.axvline(0, color="black", linewidth=1)
        left.set_yticks(range(len(units)), list(map(visible, units)))
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=13)


def _draw_panel(
    axes: Axes, units: list[str], options: list[str], values: Mapping[tuple[str, str], float]
) -> None:
    rows = range(len(units))
    for option, marker, colour in zip(options, cycle(MARKERS), cycle(COLOURS), strict=False):
        of_units, label = [values[option, u] for u in units], visible(option)
        axes.plot(of_units, rows, marker, color=colour, markersize=8, label=label)
    axes.grid(color="#D0D0D0", linewidth=0.6)
    axes.tick_params(labelsize=11)
    for text in (axes.title, axes.xaxis.label):
        text.set_fontsize(13)


def _ring(
    axes: Axes, units: list[str], assignment: Mapping[str, str], losses: Mapping[tuple[str, str], float]
) -> None:
    ringed = {row: (assignment[u], u) for row, u in enumerate(units) if (assignment.get(u), u) in losses}
    if ringed:
        label = "assigned (without a ring: float)"
        ring: dict[str, Any] = {"fillstyle": "none", "markersize": 15, "color": "black", "label": label}
        axes.plot([losses[key] for key in ringed.values()], list(ringed), "o", **ring)


def _by_mode(result: Result, mode: str) -> Records:
    return {(r["option"], r["unit"]): r for r in result["measurements"] if r["mode"] == mode}


def _won_back(result: Result) -> dict[tuple[str, str], float]:
    """Share of the whole network's loss that is gone when the unit is left out; negative where it grows."""
    whole = {row["name"]: row["loss"] for row in result["networks"]}
    return {key: 1 - r["loss"] / whole[key[0]] for key, r in _by_mode(result, "left_out").items()}
