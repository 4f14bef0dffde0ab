"""What slurm_check.sh does on the SLURM that it has set up: jobs of slurm_fit.sbatch, which it disturbs.

Two ranks of a tiny model on simulated data, two loading processes each. Each part prints what was done to a
job and what became of it, and the weights at the end are compared with those of a job that was left alone.
Ends with 1 at the first part that does not come out as it should.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faults import compare, float_command, options, say, simulate_data, stamp, start

NUM_EPOCHS = 4
TIMEOUT_S = 300.0


class WrongError(Exception):
    """A part came out other than it should."""


@dataclass
class Job:
    """A submitted job.

    Args:
        number: As SLURM has it.
        run: Its run folder.
        log: What it prints.
    """

    number: str
    run: Path
    log: Path

    def shown(self) -> dict[str, str]:
        """What SLURM says of it."""
        text = command_output("scontrol", "--oneliner", "show", "job", self.number).splitlines()[0]
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_for_state(self, *states: str) -> None:
        """Until it is in one of these states."""
        wait(lambda: self.shown()["JobState"] in states, f"job {self.number} is {' or '.join(states)}")

    def wait_for_steps(self) -> None:
        """Until the present start has saved at a step of its own."""
        earlier = stamp(self.run / "checkpoints")
        wait(lambda: stamp(self.run / "checkpoints") > earlier, f"job {self.number} trains")
        time.sleep(1.0)

    def processes(self, rank: int) -> list[int]:
        """Of a rank, the first one before those that it started."""
        return sorted(
            pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._has(pid, rank)
        )

    def _has(self, pid: int, rank: int) -> bool:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return False
        mine = {f"SLURM_JOB_ID={self.number}".encode(), f"SLURM_PROCID={rank}".encode()}
        return b"cpq_train\0fit" in words and b"srun" not in words and mine <= set(variables)

    def wait_for_imports(self) -> None:
        """Until its ranks have begun to import."""
        wait(lambda: bool(self.processes(0) and self.processes(1)), f"job {self.number} has processes")
        time.sleep(0.7)

    def start_again(self) -> None:
        """A requeued job waits two minutes by itself; at once slurmd may still revoke its credential."""
        self.wait_for_state("PENDING")
        time.sleep(5.0)
        command_output("scontrol", "update", f"JobId={self.number}", "StartTime=now")
        self.wait_for_state("RUNNING", "COMPLETED")

    def told(self) -> str:
        """What SLURM says of it, for the log."""
        shown = self.shown()
        return f"{shown['JobState']}, exit code {shown['ExitCode']}, restarts {shown['Restarts']}"

    def expect(self, state: str, exit_code: str | None = None, restarts: int | None = None) -> None:
        """Wait for its end, which is to be this one."""
        self.wait_for_state(state)
        shown = self.shown()
        if exit_code not in (None, shown["ExitCode"].split(":")[0]):
            raise WrongError(f"job {self.number}: {self.told()}, expected exit code {exit_code}")
        if restarts not in (None, int(shown["Restarts"])):
            raise WrongError(f"job {self.number}: {self.told()}, expected {restarts} restarts")

    def said(self, pattern: str) -> str:
        """The line of its log that matches."""
        found = re.search(f"^.*{pattern}.*$", self.log.read_text(errors="replace"), re.M)
        if found is None:
            raise WrongError(f"job {self.number} did not say {pattern!r}, see {self.log}")
        return found[0].strip().replace(f"{self.run.parent}/", "")

    def never_said(self, *patterns: str) -> None:
        """See that none of these stands in its log."""
        text = self.log.read_text(errors="replace")
        for pattern in patterns:
            if pattern in text:
                raise WrongError(f"job {self.number} said {pattern!r}, see {self.log}")


class Check:
    """The parts, on one data set.

    Args:
        output: Folder of data, runs and logs.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.root = output, output / "data"

    def prepare(self, seed: int) -> None:
        """Data and float weights."""
        self.output.mkdir(parents=True)
        simulate_data(self.root, seed)
        if start(float_command(self.root, self.output / "float"), self.output / "float.log").wait():
            raise WrongError(f"no float weights, see {self.output / 'float.log'}")

    def submit(self, name: str, *more: str, run: str | None = None) -> Job:
        """A job of two ranks; `more` are options of sbatch."""
        words = ["sbatch", "--parsable", "--gres=none", "--ntasks-per-node=2", "--cpus-per-task=1"]
        log = self.output / f"{name}.log"
        fit = options(self.root, self.output, run or name, NUM_EPOCHS)
        sent = command_output(*words, f"--output={log}", *more, "scripts/slurm_fit.sbatch", *fit)
        job = Job(sent.strip(), self.output / (run or name), log)
        job.wait_for_state("RUNNING", "PENDING")
        return job

    def ends_as_undisturbed(self, job: Job) -> None:
        """Wait for the end of a job, and compare its weights."""
        job.expect("COMPLETED")
        is_equal, said = compare(self.output / "whole", job.run)
        say(f"    {job.told()}; {said}")
        if not is_equal:
            raise WrongError(f"job {job.number} ended with other weights")

    def undisturbed(self) -> None:
        """Left alone."""
        job = self.submit("whole")
        job.expect("COMPLETED", restarts=0)
        say(f"    {job.told()}")

    def importing_usr1(self) -> None:
        """SIGUSR1 while importing."""
        job = self.submit("importing")
        job.wait_for_imports()
        command_output("scancel", "--signal=USR1", job.number)
        job.start_again()
        say(f"    {job.said('SIGUSR1: ended before it was done')}; {job.said('is requeued')}")
        self.ends_as_undisturbed(job)

    def importing_term(self) -> None:
        """SIGTERM (scancel) while importing."""
        job = self.submit("cancelled_early")
        job.wait_for_imports()
        command_output("scancel", "--signal=TERM", job.number)
        job.expect("FAILED", exit_code="143")
        say(f"    {job.told()}; {job.said('SIGTERM: ended before it was done')}")

    def training_term(self) -> None:
        """Scancel in training, and the same command again."""
        job = self.submit("cancelled")
        job.wait_for_steps()
        command_output("scancel", job.number)
        job.expect("CANCELLED")
        wait(lambda: not job.processes(0) and not job.processes(1), "all processes have ended")
        job.never_said("Traceback", "memory", "loads data died")
        say(f"    {job.told()}; {job.said('SIGTERM: saved at step')}")
        self.ends_as_undisturbed(self.submit("cancelled_again", run="cancelled"))

    def training_usr1(self) -> None:
        """SIGUSR1 in training, twice."""
        job = self.submit("requeued")
        for restarts in (1, 2):
            job.wait_for_steps()
            command_output("scancel", "--signal=USR1", job.number)
            job.start_again()
            job.expect("RUNNING", restarts=restarts)
        say(f"    {job.said('SIGUSR1: saved at step')}; {job.said('is requeued')}")
        job.never_said("Traceback")
        self.ends_as_undisturbed(job)

    def killed_rank(self) -> None:
        """Kill -9 of rank 1, then scontrol requeue."""
        job = self.submit("killed")
        job.wait_for_steps()
        os.kill(job.processes(1)[0], 9)
        job.expect("FAILED", exit_code="137")
        job.never_said("memory", "loads data died")
        say(f"    {job.told()}")
        command_output("scontrol", "requeue", job.number)
        job.start_again()
        self.ends_as_undisturbed(job)

    def drained(self) -> None:
        """The node is drained under one job, another waits, the node resumes."""
        host = command_output("hostname", "-s").strip()
        first = self.submit("drained")
        first.wait_for_steps()
        command_output("scontrol", "update", f"NodeName={host}", "State=DRAIN", "Reason=check")
        second = self.submit("waiting")
        self.ends_as_undisturbed(first)
        second.expect("PENDING")
        say(f"    the other: {second.told()}, {second.shown()['Reason']}")
        command_output("scontrol", "update", f"NodeName={host}", "State=RESUME")
        self.ends_as_undisturbed(second)

    def array(self) -> None:
        """An array of two tasks, a folder each."""
        place = "array{SLURM_ARRAY_TASK_ID}"
        log = self.output / "array%a.log"
        both = self.submit("array", "--array=0-1", f"--output={log}", run=place)
        for task in (0, 1):
            name = f"array{task}"
            job = Job(f"{both.number}_{task}", self.output / name, self.output / f"{name}.log")
            self.ends_as_undisturbed(job)

    def one_folder(self) -> None:
        """Two jobs with one folder, of which the first one still runs elsewhere."""
        run = self.output / "shared"
        run.mkdir()
        (run / "claim.json").write_text(
            '{"host": "node7", "pid_namespace": "", "pid": 1, "started": "1", "job": "1"}'
        )
        job = self.submit("shared")
        job.expect("FAILED")  # with the code of the other rank, which srun kills
        say(f"    {job.told()}; {job.said('is in use by a fit')}")


def command_output(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise WrongError(f"{' '.join(words[:3])} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def wait(event: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + TIMEOUT_S
    while not event():
        if time.monotonic() > end_s:
            raise WrongError(f"waited {TIMEOUT_S:g} s in vain until {what}")
        time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs; must not exist")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    check = Check(args.output)
    say(f"{command_output('sinfo', '--version').strip()}, two ranks, {NUM_EPOCHS} epochs, seed {args.seed}")
    parts = (
        *(check.undisturbed, check.importing_usr1, check.importing_term, check.training_term),
        *(check.training_usr1, check.killed_rank, check.drained, check.array, check.one_folder),
    )
    try:
        check.prepare(args.seed)
        for part in parts:
            say(str(part.__doc__))
            part()
    except WrongError as error:
        say(f"wrong: {error}")
        return 1
    say("all as it should be")
    return 0


if __name__ == "__main__":
    sys.exit(main())
