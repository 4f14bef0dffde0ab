"""Numbers that have to be equal: the tests, the integer reference, the codes of the CPU."""

from __future__ import annotations

import copy
import json
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from results import Row

from cpq_train.common.kernels import as_on_gpu
from cpq_train.models.decode import PostProcessing
from cpq_train.quantization.verification.codes_read import codes_read, steps_apart
from cpq_train.quantization.verification.end_to_end import Flips
from cpq_train.verbs.findings import Findings
from cpq_train.verbs.verification import verify_sample
from gpu_checking.guard import Found
from gpu_checking.setting import Setting

MAX_FLIPPED_SHARE = 1e-4
"""As `verify` has it."""

Inputs = tuple[torch.Tensor, torch.Tensor, int]


def cuda_tests(setting: Setting) -> Found:
    """Every test that is marked cuda; on the CPU those of one file, which skip."""
    report = setting.folder / "tests.xml"
    where = "tests/models/test_nms.py" if setting.is_small else "tests"
    failure = ""
    try:
        setting.process("pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", f"--junitxml={report}", where)
    except RuntimeError as error:
        if not report.exists():
            raise
        failure = str(error)
    cases = list(ET.parse(report).iter("testcase"))
    ended = Counter(next((one.tag for one in case), "passed") for case in cases)
    broken = [c.attrib["name"] for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = {one.attrib.get("message", "") for one in ET.parse(report).iter("skipped")}
    row: Row = {
        "tests": len(cases),
        "passed": ended["passed"],
        "skipped": ended["skipped"],
        "failed": len(broken),
        "why skipped": "; ".join(sorted(skipped)),
    }
    return Found([row], broken or ([failure] if failure else []))


def verify_quickstart(setting: Setting) -> Found:
    """The verb, on the calibrated quickstart checkpoint."""
    output, failure = setting.folder / "verify.json", ""
    try:
        given = ("--root", setting.data, "--device", setting.device, "--output", output)
        setting.verb("verify", setting.ptq, *given)
    except RuntimeError as error:  # it writes what it found before it ends with 2
        if not output.exists():
            raise
        failure = str(error)
    document = json.loads(output.read_text())
    return Found([_verified("quickstart", document)], document["failures"] or ([failure] if failure else []))


def verify_full(setting: Setting) -> Found:
    """What the verb does, on the full network with drawn weights."""
    findings = Findings()
    network = setting.work.networks["qat"]
    post = PostProcessing().reaching(setting.config.point_cloud_range)
    verify_sample(network, inputs_of(setting.work.batch), post, findings)
    return Found([_verified("full", findings.document())], findings.failures(MAX_FLIPPED_SHARE))


def inputs_of(batch: Mapping[str, Any]) -> Inputs:
    """Arguments of a network's forward pass."""
    return batch["voxel_features"], batch["voxel_coords"], batch["batch_size"]


def _verified(network: str, document: Mapping[str, Any]) -> Row:
    layers: Sequence[Mapping[str, Any]] = document["layers"]
    flips = document["end_to_end"]
    wrong = ("mismatched_codes", "mismatched_sums", "mismatched_outputs")
    return {
        "network": network,
        "layers": len(layers),
        "not covered": sum(bool(layer["not_covered"]) for layer in layers),
        "codes": sum(layer["num_codes"] for layer in layers),
        "sums": sum(layer["num_sums"] for layer in layers),
        "differing": sum(layer[name] for layer in layers for name in wrong),
        "codes end to end": flips["num_codes"],
        "one step apart": flips["num_flipped"],
        "further apart": flips["num_further"],
        "detections": document["num_detections"],
        "other detections": document["num_other_detections"],
    }


def codes_of_both(setting: Setting) -> Found:
    """Codes that every layer of the full network reads here and on the CPU, and the raw outputs."""
    network = setting.work.networks["qat"]
    on_cpu = copy.deepcopy(network).cpu()
    inputs = inputs_of(setting.work.batch)
    outputs, read = codes_read(on_cpu, (inputs[0].cpu(), inputs[1].cpu(), inputs[2]))
    if setting.device == "cpu":
        with as_on_gpu():
            others, other_read = codes_read(network, inputs)
    else:
        others, other_read = codes_read(network, inputs)
    flips = Flips()
    by_layer = {}
    for name, here in read.items():
        flips_of_layer = Flips()
        there = other_read[name]
        for codes, other_codes in zip(here.codes, there.codes, strict=True):
            steps = steps_apart(codes, here, other_codes, there.positions)
            flips_of_layer.count_codes(name, steps)
            flips.count_codes(name, steps)
        by_layer[name] = flips_of_layer
    rows = [_codes_row(f"all {len(by_layer)} layers", flips)]
    rows += [_codes_row(name, found) for name, found in by_layer.items() if found.by_layer]
    return Found([*rows, *_raw_outputs(outputs, others)], _too_far(flips))


def _codes_row(layer: str, flips: Flips) -> Row:
    differing = flips.num_flipped + flips.num_further
    return {"of": layer, "compared": flips.num_codes, "differing": differing, "largest difference": None}


def _raw_outputs(ours: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> list[Row]:
    """A row a branch, over all heads."""
    rows: list[Row] = []
    for branch in ours[0]:
        flips = Flips()
        for head, other in zip(ours, others, strict=True):
            flips.count_outputs(head[branch].cpu(), other[branch].cpu())
        rows.append(
            {
                "of": f"raw outputs {branch}",
                "compared": flips.num_outputs,
                "differing": flips.mismatched_outputs,
                "largest difference": flips.largest_difference,
            }
        )
    return rows


def _too_far(flips: Flips) -> list[str]:
    differing = flips.num_flipped + flips.num_further
    if differing <= MAX_FLIPPED_SHARE * flips.num_codes and not flips.num_further:
        return []
    first, count = next(iter(flips.by_layer.items()))
    return [
        f"of {flips.num_codes} codes {differing} differ, {flips.num_further} by more than one step, first at "
        f"{first} ({count}); accepted: a share of {MAX_FLIPPED_SHARE}, one step each"
    ]
