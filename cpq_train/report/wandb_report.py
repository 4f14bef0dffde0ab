"""The report in W&B: a run of job type `compare` in the group of the arms, with the tables and the files."""

from __future__ import annotations

import os
from pathlib import Path

from cpq_train.evaluation.metrics_file import Document
from cpq_train.report.sections import sections

JOB_TYPE = "compare"


def log_report(output: Path, report: Document, project: str) -> None:
    """Log a written report.

    The group is the folder that holds the run directories, as for the runs themselves. With
    `WANDB_MODE=offline` nothing leaves the machine until `wandb sync`.

    Args:
        output: folder of the report.
        report: contents of `report.json`.
        project: W&B project.
    """
    import wandb

    group = _group([run["folder"] for run in report["runs"]])
    with wandb.init(project=project, group=group, job_type=JOB_TYPE, name=f"{group}-{JOB_TYPE}") as run:
        tables = {
            f"{section.name}/{table.title}": wandb.Table(list(table.header), list(table.rows))
            for section in sections(report)
            for table in section.tables
        }
        run.log({**tables, "report": wandb.Html(str(output / "report.html"), inject=False)})
        artifact = wandb.Artifact(f"{group}-report", type="report")
        for path in sorted(output.glob("report.*")) + sorted(output.glob("*.csv")):
            artifact.add_file(str(path))
        run.log_artifact(artifact)


def _group(folders: list[str]) -> str:
    """Name of the folder that all run directories lie in."""
    parents = [str(Path(folder).resolve().parent) for folder in folders]
    return Path(os.path.commonpath(parents)).name
