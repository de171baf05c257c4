"""Runs a plan, such as that of docs/evidence.md, one run at a time, and writes its page.

    python -m benchmarks.evidence benchmarks/evidence/plan.toml

What has a record is not run again: stop it and start it as often as you like. A run that was cut
off starts over. The page is written anew, from the records, after every run; delete a record to
have its run repeated.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.evidence.page import write_page
from benchmarks.evidence.plan import Job, Plan, load_plan
from hsd.report.runs import read_run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.evidence", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("plan", type=Path)
    parser.add_argument("--page-only", action="store_true", help="run nothing")
    arguments = parser.parse_args(argv)
    plan = load_plan(arguments.plan)
    plan.folder.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    with locked(plan.folder / "lock"):
        write_page(plan, arguments.plan)
        for job, seed in [] if arguments.page_only else plan.order():
            if job.complete(plan.records, seed):
                continue
            print(f"{time.strftime('%H:%M')} {job.folder_name(seed)} ...", flush=True)
            if not run(plan, job, seed):
                failed.append(job.folder_name(seed))
                print(f"  failed: {log_path(plan, job, seed)}", flush=True)
            write_page(plan, arguments.plan)
    print(f"page: {plan.page}")
    return 1 if failed else 0


def run(plan: Plan, job: Job, seed: int) -> bool:
    """The job's commands, one after another; whether all went well."""
    folder = plan.folder / job.folder_name(seed)
    if folder.exists():  # of a run that was cut off
        shutil.rmtree(folder)
    started = time.monotonic()
    with log_path(plan, job, seed).open("w", encoding="utf-8") as log:
        for command, output in job.commands(plan.folder, seed):
            if output.exists():
                shutil.rmtree(output)
            done = subprocess.run(
                [sys.executable, "-m", "hsd", *command], stdout=log, stderr=subprocess.STDOUT
            )
            if done.returncode != 0:
                return False
    if job.kind == "train" and not read_run(folder).finished:  # it was told to stop
        return False
    record_minutes(plan, job.folder_name(seed), (time.monotonic() - started) / 60)
    keep(folder, plan.records / job.folder_name(seed))
    return True


def keep(run: Path, record: Path) -> None:
    """What the page reads of a complete run, whole or not at all."""
    new = record.with_name(record.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    if (run / "summary.json").is_file():
        shutil.copyfile(run / "summary.json", new / "summary.json")
        shutil.copyfile(run / "figures" / "profile.png", new / "profile.png")
    else:
        shutil.copyfile(run / "config.json", new / "config.json")
        shutil.copyfile(run / "metrics.jsonl", new / "metrics.jsonl")
    new.rename(record)


def log_path(plan: Plan, job: Job, seed: int) -> Path:
    return plan.folder / f"{job.folder_name(seed)}.log"


def record_minutes(plan: Plan, name: str, minutes: float) -> None:
    plan.records.mkdir(parents=True, exist_ok=True)
    path = plan.records / "minutes.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known[name] = round(minutes, 1)
    path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; another one is refused.

    Raises:
        SystemExit: the plan is being run.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"{path}: found the plan being run by another process") from None
        yield


if __name__ == "__main__":
    sys.exit(main())
