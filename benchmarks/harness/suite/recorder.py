"""A pytest plugin, `-p harness.suite.recorder`, that writes each test's result as soon as it finishes.

With pytest-xdist, tests run in other processes. One that hangs, or whose GPU no longer answers after an illegal
access, ends; pytest-xdist records its test as failed and runs the others in a new process.
"""

import faulthandler
import os
import sys
from pathlib import Path

import pytest

from harness import compiling, jsonfile
from harness.errors import LOST, gpu_is_lost

WORST_LAST = ("passed", "skipped", "failed")


def pytest_addoption(parser):
    parser.addoption("--record", type=Path, required=True, metavar="FILE", help="JSON file to write")
    parser.addoption("--patience", type=int, default=600, metavar="SECONDS", help="a test's, in another process")


def pytest_configure(config):
    is_worker = hasattr(config, "workerinput")
    patience = config.option.patience
    config.pluginmanager.register(Worker(patience) if is_worker else Recorder(config.option.record, patience))
    if not getattr(config.option, "numprocesses", None):  # tests run in this process
        config.pluginmanager.register(Compilers())


class Worker:
    """Ends this process where the tests after this one could not run in it."""

    def __init__(self, patience: int):
        self.patience, self.has_failed = patience, False

    def pytest_runtest_logstart(self):
        faulthandler.dump_traceback_later(self.patience, exit=True, file=sys.__stderr__)

    def pytest_runtest_logreport(self, report):
        self.has_failed |= report.failed

    def pytest_runtest_logfinish(self):
        if self.has_failed and gpu_is_lost():
            os._exit(LOST)
        self.has_failed = False
        faulthandler.cancel_dump_traceback_later()


class Compilers:
    """Adds to each report what this process has compiled so far."""

    def __init__(self):
        self.watch = compiling.Watch()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        report.user_properties.append(("compiling", self.watch.result()))
        return report


class Recorder:
    """Keeps the file complete: numbers of passed, failed and skipped tests, failures, and checks.

    A test with the property `direction` is a check of the kernel that its properties name.
    """

    def __init__(self, path: Path, patience: int):
        self.path, self.outcomes, self.failures, self.checks = path, {}, [], []
        self.facts, self.compiling, self.patience = {}, {}, patience
        self.write()

    def pytest_collectreport(self, report):
        if report.failed:
            self._fail(report)
            self.write()

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report):
        test, facts = report.nodeid, dict(report.user_properties)
        self.compiling[getattr(report, "worker_id", None)] = facts.pop("compiling", {})
        facts = self.facts[test] = self.facts.get(test, {}) | facts
        is_first_failure = report.failed and self.outcomes.get(test) != "failed"
        if "direction" in facts and (is_first_failure or report.when == "call" and report.passed):
            self.checks.append(facts | {"is_right": report.passed, "why": self._why(report)})
        if is_first_failure:
            self._fail(report)
        self.outcomes[test] = max(self.outcomes.get(test, "passed"), report.outcome, key=WORST_LAST.index)
        if report.when not in ("setup", "call"):
            self.write()

    def _fail(self, report):
        self.outcomes[report.nodeid] = "failed"
        self.failures.append({"test": report.nodeid, "why": self._why(report)})

    def _why(self, report):
        """The first line of the exception; None if there was none."""
        if not report.failed:
            return None
        if getattr(report, "when", None) not in (None, "collect", "setup", "call", "teardown"):
            return f"its process ended, or it took more than {self.patience} s"
        crash = getattr(report.longrepr, "reprcrash", None)
        return (crash.message if crash else str(report.longrepr)).strip().splitlines()[0][:300]

    def write(self):
        counts = {outcome: list(self.outcomes.values()).count(outcome) for outcome in ("passed", "failed", "skipped")}
        compiled = compiling.total(self.compiling.values())
        found = counts | {"failures": self.failures, "checks": self.checks, "compiling": compiled}
        jsonfile.write(self.path, found)
