"""What `describe` prints of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from cpq_train.arms.description import Description
from cpq_train.arms.state import not_finite
from cpq_train.common.checkpoint import network_state, read_checkpoint
from cpq_train.common.console import print_plain
from cpq_train.common.files import sha256_of
from cpq_train.data.settings import DataSettings


def print_description(checkpoint: Path) -> None:
    """Print tables of a checkpoint; see `describe`."""
    content = read_checkpoint(checkpoint)
    print_plain(_summary(checkpoint, content))
    layers = content["quantization"]["layers"]
    if layers:
        print_plain(_layers(layers))


def _summary(path: Path, content: dict[str, Any]) -> Table:
    table = Table(show_header=False, title=str(path), title_justify="left")
    said, data = Description.of(content, path), DataSettings.of(content, path)
    unfolded = {} if said.wiring is None else said.wiring.unfolded
    rows = {
        "network": said.network_class or "CenterPoint",
        "arm": said.arm,
        "scheme": said.scheme.name if said.scheme else "none",
        "batchnorm": said.batchnorm,
        **({"not folded": "; ".join(f"{norm}: {why}" for norm, why in unfolded.items())} if unfolded else {}),
        "ranges": said.amax if said.scheme else "none",
        "data": data.to_dict() if data else "not stated",
        "not finite": ", ".join(not_finite(network_state(content))) or "none",
        "numbers": f"{sum(t.numel() for t in network_state(content).values()):,}",
        "epoch, step": f"{content['epoch']}, {content['global_step']}",
        "calibration": said.calibration or "none",
        "parents": said.parents or "none",
        **({"trained on": ", ".join(said.trained_on.values())} if said.trained_on else {}),
        "sha256": sha256_of(path),
    }
    for key, value in rows.items():
        table.add_row(key, str(value))
    return table


def _layers(layers: dict[str, Any]) -> Table:
    table = Table(title="Layers", title_justify="left")
    for header in ("layer", "kind", "arithmetic", "weight", "input", "bias", "shares its input with"):
        table.add_column(header, overflow="fold")
    for name, layer in layers.items():
        weight, input_ = _quantizer(layer["weight"]), _quantizer(layer["input"])
        shared = layer["shares_input_with"] or ""
        bias = "" if layer["kind"] == "ResidualAdd" else layer.get("bias", "float")  # absent in old files
        table.add_row(name, layer["kind"], _arithmetic(layer), weight, input_, bias, shared)
    return table


def _arithmetic(layer: dict[str, Any]) -> str:
    why = layer.get("why_float") or layer.get("why_simulated")  # files of the first release lack both
    return f"{layer['arithmetic']}: {why}" if why else str(layer["arithmetic"])


def _quantizer(q: dict[str, Any]) -> str:
    if q["mode"] == "off":
        return "float"
    axis = "per tensor" if q["axis"] is None else f"axis {q['axis']}"
    numbers = "FP8 E4M3" if q["format"] == "fp8_e4m3" else f"{q['bits']} bit"
    unsigned, narrow = ("" if q["signed"] else " unsigned"), (" narrow" if q["narrow_range"] else "")
    how = f"{q['method']}, static" if q["mode"] == "static" else q["mode"]
    return f"{numbers}{unsigned}{narrow}, {axis}, {how}"
