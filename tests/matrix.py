"""Run the tests with every supported version of torch, and print a table of their outcome.

    python tests/matrix.py                                          # every version, every test
    python tests/matrix.py --torch 2.11.0 2.15.0 -- tests/modes     # what follows -- goes to pytest
    python tests/matrix.py --remove -- -n 4                         # one environment on the disk at a time, four processes
    python tests/matrix.py --resume                                 # only what an earlier call has not finished

Each version gets an environment under build/matrix, with the Triton that it asks for. PyPI's wheels are those for CUDA,
which import, and compile for CPUs, on machines without a GPU. What pytest printed and its reports are beside the environments.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import venv
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / "build" / "matrix"
# The last release of each minor version, and the Triton that its CUDA build asks for; CPU builds ask for none.
VERSIONS = {"2.11.0": "3.6.0", "2.12.1": "3.7.1", "2.13.0": "3.7.1", "2.14.1": "3.8.0", "2.15.0": "3.9.0"}
# Lowering is tested without the interpreter, everything else in it.
SUITES = {"tests": "1", "lowering": "0"}


@dataclass
class Outcome:
    """How many tests passed, failed and were skipped, in how many seconds."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    def add(self, report: Path) -> None:
        """Add what a JUnit report of pytest says; a run that wrote none has failed."""
        if not report.exists():
            self.failed += 1
            self.failures.append(f"{report.stem}: pytest wrote no report, see {report.with_suffix('.log')}")
            return
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
            failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            self.passed += total - skipped - failed
            self.failed += failed
            self.skipped += skipped
            self.seconds += float(suite.get("time", 0))
            for case in suite.iter("testcase"):
                if case.find("failure") is not None or case.find("error") is not None:
                    self.failures.append(f"{report.stem}: {case.get('classname')}::{case.get('name')}")


def environment(version: str) -> Path:
    """The folder of the environment with that torch, installed if it is not there."""
    folder = ENVIRONMENTS / f"torch-{version}"
    if not (folder / ".ready").exists():
        venv.create(folder, clear=True, with_pip=True)
        install = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q"]
        pinned = [f"torch=={version}", f"triton=={VERSIONS[version]}"]
        subprocess.run([*install, *pinned, "-e", f"{ROOT}[dev]"], check=True)
        (folder / ".ready").touch()
    return folder


def run(version: str, arguments: list[str], resume: bool) -> Outcome:
    """The outcome of the tests with one torch; with ``resume``, a suite that has a report is not run again.

    pytest writes its report when it ends, so that a suite that was interrupted has none.
    """
    outcome = Outcome()
    for suite, interpreted in SUITES.items():
        report = ENVIRONMENTS / f"{version}-{suite}.xml"
        if not (resume and report.exists()):
            report.unlink(missing_ok=True)
            chosen = ["tests/lowering"] if suite == "lowering" else arguments
            variables = {
                **os.environ,
                "TRITON_INTERPRET": interpreted,
                "TORCHINDUCTOR_CACHE_DIR": str(cache(version)),
            }
            command = [environment(version) / "bin" / "python", "-m", "pytest", f"--junitxml={report}"]
            with report.with_suffix(".log").open("w") as log:
                subprocess.run(
                    [*command, "-p", "no:cacheprovider", *chosen], cwd=ROOT, env=variables, stdout=log, stderr=log
                )
        outcome.add(report)
    return outcome


def cache(version: str) -> Path:
    """Where Inductor stores what it compiles with that torch."""
    return ENVIRONMENTS / f"cache-{version}"


def remove(version: str) -> None:
    """Take the environment with that torch, and what was compiled in it, off the disk; reports stay."""
    for folder in (ENVIRONMENTS / f"torch-{version}", cache(version)):
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", nargs="+", default=VERSIONS, choices=VERSIONS, metavar="VERSION")
    parser.add_argument("--resume", action="store_true", help="run only what has no report from an earlier call")
    parser.add_argument("--remove", action="store_true", help="remove each environment after its run")
    parser.add_argument("pytest", nargs="*", default=[], help="arguments for pytest, after --")
    options = parser.parse_args()
    print("| torch  | Triton | passed | failed | skipped | seconds |")
    print("|--------|--------|--------|--------|---------|---------|", flush=True)
    failures: list[str] = []
    for version in options.torch:
        try:
            outcome = run(version, options.pytest, options.resume)
        except subprocess.CalledProcessError as error:
            outcome = Outcome(failed=1, failures=[f"{version}: not installed: {error}"])
        failures += outcome.failures
        counts = f"{outcome.passed:6} | {outcome.failed:6} | {outcome.skipped:7} | {outcome.seconds:7.0f}"
        print(f"| {version} | {VERSIONS[version]:6} | {counts} |", flush=True)
        if options.remove:
            remove(version)
    print(*failures, sep="\n", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
