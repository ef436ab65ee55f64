"""Run the tests with every supported version of torch, and print a table of their outcome.

    python tests/matrix.py                                          # every version, every test
    python tests/matrix.py --torch 2.11.0 2.15.0 -- tests/modes     # what follows -- goes to pytest

Each version gets an environment under build/matrix, with the Triton that it asks for. PyPI's wheels are those for CUDA,
which import, and compile for CPUs, on machines without a GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
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

    def add(self, report: Path) -> None:
        """Add what a JUnit report of pytest says; a run that wrote none has failed."""
        if not report.exists():
            self.failed += 1
            return
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
            failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            self.passed += total - skipped - failed
            self.failed += failed
            self.skipped += skipped
            self.seconds += float(suite.get("time", 0))


def environment(version: str) -> Path:
    """The Python of the environment with that torch, made if it is not there."""
    folder = ENVIRONMENTS / f"torch-{version}"
    python, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.exists():
        venv.create(folder, clear=True, with_pip=True)
        install = [str(python), "-m", "pip", "install", "-q"]
        pinned = [f"torch=={version}", f"triton=={VERSIONS[version]}"]
        subprocess.run([*install, *pinned, "-e", f"{ROOT}[test,models]"], check=True)
        ready.touch()
    return python


def run(version: str, arguments: list[str]) -> Outcome:
    """The outcome of the tests in one environment, what they print in build/matrix/VERSION-SUITE.log."""
    python = environment(version)
    outcome = Outcome()
    for suite, interpreted in SUITES.items():
        report, log = (ENVIRONMENTS / f"{version}-{suite}.{kind}" for kind in ("xml", "log"))
        report.unlink(missing_ok=True)
        chosen = ["tests/lowering"] if suite == "lowering" else arguments
        variables = {
            **os.environ,
            "TRITON_INTERPRET": interpreted,
            "TORCHINDUCTOR_CACHE_DIR": str(ENVIRONMENTS / f"cache-{version}"),
        }
        with log.open("w") as output:
            command = [str(python), "-m", "pytest", f"--junitxml={report}", "-p", "no:cacheprovider", *chosen]
            subprocess.run(command, cwd=ROOT, env=variables, stdout=output, stderr=output, check=False)
        outcome.add(report)
    return outcome


def triton(version: str) -> str:
    """The version of Triton that is installed in an environment."""
    ask = "import importlib.metadata as m; print(m.version('triton'))"
    asked = subprocess.run([str(environment(version)), "-c", ask], capture_output=True, text=True, check=True)
    return asked.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", nargs="+", default=VERSIONS, choices=VERSIONS, metavar="VERSION")
    parser.add_argument("pytest", nargs="*", default=[], help="arguments for pytest, after --")
    options = parser.parse_args()
    print("| torch | Triton | passed | failed | skipped | seconds |\n|---|---|---|---|---|---|", flush=True)
    failures = 0
    for version in options.torch:
        outcome = run(version, options.pytest)
        failures += outcome.failed
        counts = (outcome.passed, outcome.failed, outcome.skipped, round(outcome.seconds))
        print(f"| {version} | {triton(version)} | {' | '.join(map(str, counts))} |", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
