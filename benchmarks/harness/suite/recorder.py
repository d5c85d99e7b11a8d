"""A pytest plugin, `-p harness.suite.recorder`, that writes each test's result as soon as it finishes."""

from pathlib import Path

import pytest

from harness import compiling, jsonfile

WORST_LAST = ("passed", "skipped", "failed")


def pytest_addoption(parser):
    parser.addoption("--record", type=Path, required=True, metavar="FILE", help="JSON file to write")


def pytest_configure(config):
    config.pluginmanager.register(Recorder(config.option.record))


class Recorder:
    """Keeps the file complete: numbers of passed, failed and skipped tests, failures, and checks.

    A test with the property `direction` is a check of the kernel that its properties name.
    """

    def __init__(self, path: Path):
        self.path, self.outcomes, self.failures, self.checks = path, {}, [], []
        self.compiling = compiling.Watch()
        self.write()

    def pytest_collectreport(self, report):
        if report.failed:
            self._fail(report)
            self.write()

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report):
        worse = max(self.outcomes.get(report.nodeid, "passed"), report.outcome, key=WORST_LAST.index)
        self.outcomes[report.nodeid] = worse
        if report.failed:
            self._fail(report)
        facts = dict(report.user_properties)
        if report.when == "call" and "direction" in facts and not report.skipped:
            self.checks.append(facts | {"is_right": report.passed, "why": _why(report)})
        if report.when == "teardown":
            self.write()

    def _fail(self, report):
        self.outcomes[report.nodeid] = "failed"
        self.failures.append({"test": report.nodeid, "why": _why(report)})

    def write(self):
        counts = {outcome: list(self.outcomes.values()).count(outcome) for outcome in ("passed", "failed", "skipped")}
        found = counts | {"failures": self.failures, "checks": self.checks, "compiling": self.compiling.result()}
        jsonfile.write(self.path, found)


def _why(report):
    """The first line of the exception; None if there was none."""
    if not report.failed:
        return None
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr)).strip().splitlines()[0][:300]
