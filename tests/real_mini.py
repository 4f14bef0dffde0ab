"""The real mini_val as far as its clouds reach: a root of the two samples whose key frames are on disk."""

import json
from pathlib import Path
from typing import Any

VERSION = "v1.0-mini"
TOKENS = ("3e8750f331d7499e9b5123e9eb70f2e2", "fdc39b23ab4242eda6ec5e1e6574fe33")


def two_samples(realdata: Path, root: Path) -> Path:
    """Tables of two samples, and links to the clouds; sweeps before them repeat the key frame."""
    source = realdata / "nuscenes_mini_val"
    tables = {path.stem: json.loads(path.read_text()) for path in (source / VERSION).glob("*.json")}
    tables["sample"] = [r | {"prev": "", "next": ""} for r in tables["sample"] if r["token"] in TOKENS]
    scenes = {sample["scene_token"] for sample in tables["sample"]}
    tables["scene"] = [scene for scene in tables["scene"] if scene["token"] in scenes]
    frames = [r for r in tables["sample_data"] if r["sample_token"] in TOKENS and r["is_key_frame"]]
    tables["sample_data"] = [r | {"prev": "", "next": ""} for r in frames if "LIDAR_TOP" in r["filename"]]
    tables["sample_annotation"] = [
        _alone(r) for r in tables["sample_annotation"] if r["sample_token"] in TOKENS
    ]
    (root / VERSION).mkdir(parents=True)
    for name, records in tables.items():
        (root / VERSION / f"{name}.json").write_text(json.dumps(records))
    (root / "samples").symlink_to(source / "samples")
    return root


def _alone(record: dict[str, Any]) -> dict[str, Any]:
    """An annotation without those of other samples: its object has no velocity then."""
    return record | {"prev": "", "next": ""}
