"""The table of torch versions: counts, names of failures, resumption, removal."""

import subprocess
import sys

import matrix
import pytest

REPORT = """<testsuites><testsuite tests="4" failures="1" errors="0" skipped="1" time="2.5">
<testcase classname="tests.test_a" name="test_one"/><testcase classname="tests.test_a" name="test_two"><failure/></testcase>
<testcase classname="tests.test_a" name="test_three"><skipped/></testcase><testcase classname="tests.test_a" name="test_four"/>
</testsuite></testsuites>"""


@pytest.fixture
def pytest_runs(monkeypatch, tmp_path):
    """The commands that would run pytest; each writes a report, if the version is not one that crashes."""
    commands = []

    def environment(version):
        folder = tmp_path / f"torch-{version}"
        if version == "2.13.0":
            raise subprocess.CalledProcessError(1, "pip")
        folder.mkdir(exist_ok=True)
        return folder

    def run(command, **_):
        commands.append([str(argument) for argument in command])
        (report,) = (argument for argument in command if str(argument).startswith("--junitxml="))
        if "2.12.1" not in report:
            matrix.Path(report.partition("=")[2]).write_text(REPORT)

    monkeypatch.setattr(matrix, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(matrix, "environment", environment)
    monkeypatch.setattr(matrix.subprocess, "run", run)
    return commands


def table(monkeypatch, capsys, *arguments):
    """Rows and failures that are printed, and the exit status."""
    monkeypatch.setattr(sys, "argv", ["matrix.py", *arguments])
    status = matrix.main()
    out, err = capsys.readouterr()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()[2:]]
    return rows, err.split("\n"), status


def test_counts_and_failures(pytest_runs, monkeypatch, capsys):
    rows, failures, status = table(monkeypatch, capsys, "--torch", "2.11.0", "--", "-n", "2")
    assert rows == [["2.11.0", "3.6.0", "4", "2", "2", "5"]]
    assert failures[0] == "2.11.0-tests: tests.test_a::test_two"
    assert status == 1
    assert pytest_runs[0][-2:] == ["-n", "2"]
    assert pytest_runs[1][-1] == "tests/lowering"


def test_a_run_without_a_report_and_a_version_that_does_not_install_have_failed(pytest_runs, monkeypatch, capsys):
    rows, failures, status = table(monkeypatch, capsys, "--torch", "2.12.1", "2.13.0")
    assert [row[:4] for row in rows] == [["2.12.1", "3.7.1", "0", "2"], ["2.13.0", "3.7.1", "0", "1"]]
    assert "pytest wrote no report" in failures[0]
    assert "not installed" in failures[2]
    assert status == 1


def test_what_has_a_report_is_not_run_again(pytest_runs, monkeypatch, capsys):
    first = table(monkeypatch, capsys, "--torch", "2.11.0")
    (matrix.ENVIRONMENTS / "2.11.0-lowering.xml").unlink()
    assert table(monkeypatch, capsys, "--torch", "2.11.0", "--resume") == first
    assert len(pytest_runs) == 3
    assert pytest_runs[2][-1] == "tests/lowering"


def test_environments_are_removed(pytest_runs, monkeypatch, capsys):
    table(monkeypatch, capsys, "--torch", "2.11.0", "--remove")
    assert sorted(path.name for path in matrix.ENVIRONMENTS.iterdir() if path.suffix == ".xml") == [
        "2.11.0-lowering.xml",
        "2.11.0-tests.xml",
    ]
    assert not (matrix.ENVIRONMENTS / "torch-2.11.0").exists()
