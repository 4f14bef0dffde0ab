"""`convert`: another project's float checkpoint as one of ours, and ours in OpenPCDet's layout.

Starts without torch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from cpq_train.common.collection import importing_for_good
from cpq_train.common.errors import UserError
from cpq_train.common.files import check_output, check_regular
from cpq_train.interop.conventions import Source, Weights
from cpq_train.interop.sparse_layouts import SparseLayout


def convert(
    input: Path,
    output: Path,
    source: Source | None = None,
    target: Literal["openpcdet"] | None = None,
    mmdet3d_version: Literal[0, 1] | None = None,
    sparse_layout: SparseLayout | None = None,
    weights: Weights | None = None,
    config: Path | None = None,
) -> None:
    """Turn a float checkpoint of another project into one for `model.weights`, or ours into OpenPCDet's.

    Nothing in the file is executed. Every tensor is accounted for, and what was written is read back and run.

    Args:
        input: The checkpoint to convert.
        output: Where to.
        source: The project that wrote `input`; tianweiy is tianweiy/CenterPoint, which NVIDIA uses too.
        target: Instead of `source`: write a float checkpoint of ours in this project's file layout.
        mmdet3d_version: Major version that trained a checkpoint of mmdet3d; 1.0 changed what its boxes mean.
        sparse_layout: Axes of the sparse weights (out k, kernel r s t, in c), where shapes do not tell them:
            krsc (spconv 2), rsck (spconv 1), rskc (Native of spconv 2.0 and 2.1).
        weights: Which to take of a file that holds two sets: raw, as trained, or ema, their moving average.
        config: YAML file whose `model.network` has the sizes of the network; default: nuScenes.

    Raises:
        UserError: The file is unreadable, holds code, is of another project or network, or an option is
            missing or contradicts it.
    """
    _check_options(input, output, source, target, mmdet3d_version)
    if target is not None and (sparse_layout is not None or weights is not None):
        raise UserError(
            f"sparse_layout {sparse_layout!r}, weights {weights!r}: both say how to read a file of another "
            "project; target needs neither"
        )
    if config is not None:
        check_regular(config, "config")
    check_regular(input, "checkpoint")
    with importing_for_good():
        from cpq_train.verbs.conversion import convert_foreign, write_openpcdet

    if source is None:
        write_openpcdet(input, output)
    else:
        convert_foreign(input, output, source, mmdet3d_version, sparse_layout, weights, config)


def _check_options(
    input: Path,
    output: Path,
    source: Source | None,
    target: str | None,
    mmdet3d_version: int | None,
) -> None:
    if (source is None) == (target is None):
        raise UserError(f"source is {source}, target is {target}: expected one of the two")
    if (source == "mmdet3d") != (mmdet3d_version is not None):
        raise UserError(
            f"mmdet3d_version is {mmdet3d_version} with source {source}: expected 0 or 1 with source mmdet3d "
            "(1.0 changed what its boxes mean), and none with another"
        )
    check_output(output)
    if os.path.realpath(input) == os.path.realpath(output):
        raise UserError(f"output {str(output)!r} is the input: expected another file")
