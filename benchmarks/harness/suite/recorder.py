"""A pytest plugin, `-p harness.suite.recorder`, that writes each test's result as soon as it finishes.

With pytest-xdist, tests run in other processes. One that hangs, or whose GPU no longer answers after an illegal
access, ends; pytest-xdist records its test as failed and runs the others in a new process. A kernel that has ended
several is given up: its other tests are skipped.
"""

import faulthandler
import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from harness import compiling, jsonfile
from harness.errors import LOST, gpu_is_lost

WORST_LAST = ("passed", "skipped", "failed")
WHEN = ("setup", "call", "teardown", "collect")  # anything else: the test's process has ended
MOST_ENDINGS = 3  # of processes by one kernel


def pytest_addoption(parser):
    parser.addoption("--record", type=Path, required=True, metavar="FILE", help="JSON file to write")
    parser.addoption("--patience", type=int, default=600, metavar="SECONDS", help="a test's, in another process")


def pytest_configure(config):
    is_worker = hasattr(config, "workerinput")
    register = Worker if is_worker else Recorder
    config.pluginmanager.register(register(config.option.record, config.option.patience))
    if not getattr(config.option, "numprocesses", None):  # tests run in this process
        config.pluginmanager.register(Compilers())


class Worker:
    """Ends this process where the tests after this one could not run in it."""

    def __init__(self, record: Path, patience: int):
        self.given_up, self.patience, self.has_failed = _given_up(record), patience, False

    def pytest_runtest_logstart(self):
        faulthandler.dump_traceback_later(self.patience, exit=True, file=sys.__stderr__)

    def pytest_runtest_setup(self, item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        kernel = [params.get("name"), params.get("backend", params.get("kernel"))]
        item.user_properties.append(("kernel", kernel))  # reported before the test runs
        if self.given_up.exists() and kernel in json.loads(self.given_up.read_text()):
            pytest.skip(f"this kernel has ended {MOST_ENDINGS} processes")

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
        self.given_up, self.kernels, self.endings = _given_up(path), {}, Counter()
        self.write()

    def pytest_collectreport(self, report):
        if report.failed:
            self._fail(report)
            self.write()

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report):
        test, facts = report.nodeid, dict(report.user_properties)
        self.compiling[getattr(report, "worker_id", None)] = facts.pop("compiling", {})
        self.kernels[test] = facts.pop("kernel", self.kernels.get(test))
        facts = self.facts[test] = self.facts.get(test, {}) | facts
        is_first_failure = report.failed and self.outcomes.get(test) != "failed"
        if "direction" in facts and (is_first_failure or report.when == "call" and report.passed):
            self.checks.append(facts | {"is_right": report.passed, "why": self._why(report)})
        if is_first_failure:
            self._fail(report)
        self.outcomes[test] = max(self.outcomes.get(test, "passed"), report.outcome, key=WORST_LAST.index)
        if report.when not in ("setup", "call"):
            self.write()
        if report.when not in WHEN and self.kernels[test]:
            self.endings[tuple(self.kernels[test])] += 1
            often = [kernel for kernel, times in self.endings.items() if None not in kernel and times >= MOST_ENDINGS]
            jsonfile.write(self.given_up, often)

    def _fail(self, report):
        self.outcomes[report.nodeid] = "failed"
        self.failures.append({"test": report.nodeid, "why": self._why(report)})

    def _why(self, report):
        """The first line of the exception; None if there was none."""
        if not report.failed:
            return None
        if getattr(report, "when", WHEN[0]) not in WHEN:
            return f"its process ended, or it took more than {self.patience} s"
        crash = getattr(report.longrepr, "reprcrash", None)
        return (crash.message if crash else str(report.longrepr)).strip().splitlines()[0][:300]

    def write(self):
        counts = {outcome: list(self.outcomes.values()).count(outcome) for outcome in ("passed", "failed", "skipped")}
        compiled = compiling.total(self.compiling.values())
        found = counts | {"failures": self.failures, "checks": self.checks, "compiling": compiled}
        jsonfile.write(self.path, found)


def _given_up(record: Path) -> Path:
    """The file that lists [operation, backend] of kernels to skip."""
    return record.with_name(f"{record.name}.given-up")
