"""Small faults planted in a module, one at a time: do its tests notice?

python bench/mutation.py                      every module below; goes on where it was stopped
python bench/mutation.py --only apply --again the survivors of one module, after new tests

pytest collects the tests once. Then every fault gets a process of its own, forked from there: it
executes the faulty module, puts its names in place of the old ones wherever they were imported,
and runs the tests that pass over the faulty lines, quick ones first, up to the first failure.
"""

from __future__ import annotations

import argparse
import ast
import gc
import hashlib
import importlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from coverage import Coverage
from faults import faults

ROOT = Path(__file__).parent.parent
HOSTILE = "tests/test_hostile.py::test_"
MODULES = {
    "methods/elr": ["tests/methods/test_elr.py", "tests/methods/test_single.py"],
    "methods/record": ["tests/methods/test_record.py", "tests/methods/test_table.py"],
    "methods/table": ["tests/methods/test_table.py", "tests/methods/test_elr.py"],
    "audit/apply": [
        "tests/audit/test_apply.py",
        f"{HOSTILE}names_that_windows_gives_a_meaning_are_no_folders_there",
        f"{HOSTILE}other_names_are_folders_everywhere",
        f"{HOSTILE}names_that_lead_elsewhere_are_no_folders_anywhere",
        f"{HOSTILE}classes_that_may_be_one_folder_are_refused",
    ],
    "audit/decisions": [
        "tests/audit/test_apply.py",
        f"{HOSTILE}any_decisions_are_read_or_refused",
        f"{HOSTILE}probabilities_beyond_one_are_not_believed",
        f"{HOSTILE}a_column_that_is_there_twice_is_refused",
    ],
    "data/manifest": ["tests/data/test_manifest.py"],
    "data/csv_files": ["tests/data/test_csv_files.py", "tests/data/test_bad_csv.py"],
    "data/rows": ["tests/data/test_csv_files.py", "tests/data/test_bad_csv.py"],
    "data/folders": ["tests/data/test_folders.py"],
}
WAIT = 300  # seconds for one fault, most of them perhaps spent on other programs
MEMORY = 4 * 1024**3  # bytes beyond what a process starts with
OPTIONS = ["-s", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=0"]


class Study:
    """A pytest plugin: plants faults instead of running the tests."""

    def __init__(self, names: list[str], arguments: argparse.Namespace) -> None:
        self._names = names
        self._arguments = arguments
        self._failure = ""
        self._coverage: Any = None  # while the tests are traced

    def pytest_sessionstart(self) -> None:
        """Let hypothesis look for a failure only, not for the smallest one."""
        from hypothesis import Phase, settings  # pytest wants to import it first

        phases = (Phase.explicit, Phase.generate)
        settings.register_profile("mutation", database=None, deadline=None, phases=phases)
        settings.load_profile("mutation")

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Study one module after the other."""
        self._items = {item.nodeid: item for item in session.items}
        gc.freeze()  # or every process copies the memory to look through it
        print(f"{'module':<18}{'faults':>8}{'tried':>8}{'found':>8}{'share':>8}", flush=True)
        for name in self._names:
            figures = self._study(name)
            outcomes = list(figures["outcomes"].values())
            found, tried = len(outcomes) - outcomes.count("survived"), len(outcomes)
            print(f"{name:<18}{figures['faults']:>8}{tried:>8}{found:>8}{found / tried:>8.1%}")
        return True

    def _study(self, name: str) -> dict[str, Any]:
        """Go on with one module."""
        file = ROOT / "elrcli" / f"{name}.py"
        source = file.read_text()
        planted = faults(ast.parse(source))
        result = self._arguments.out / f"{name.replace('/', '_')}.json"
        figures = read_figures(result, source, self._arguments.seed)
        figures |= {"faults": len(planted), "tests": MODULES[name]}
        outcomes: dict[str, str] = figures["outcomes"]
        order = list(range(len(planted)))
        random.Random(self._arguments.seed).shuffle(order)
        tests_of, seconds = self._trace(name, file, source)
        for number in order[: self._arguments.most]:
            fault = planted[number]
            key = f"{number}/{fault.name}"
            if key in outcomes and not (self._arguments.again and outcomes[key] == "survived"):
                continue
            tests = {test for line in fault.lines for test in tests_of.get(line, ())}
            wanted = sorted(seconds if "" in tests else tests, key=seconds.__getitem__)

            def work(number: int = number, wanted: list[str] = wanted) -> bool:
                tree = ast.parse(source)
                faults(tree)[number].plant()
                plant(name, file, tree)
                return self._passes(wanted)

            code = in_child(work, 10 + 4 * sum(seconds[test] for test in wanted))
            hung = code in (-signal.SIGALRM, -signal.SIGXCPU)
            outcomes[key] = "hung" if hung else "killed" if code else "survived"
            if code == 0:
                print(f"{name}:{fault.name}  ({len(wanted)} tests)", flush=True)
            in_order = sorted(outcomes.items(), key=lambda item: int(item[0].partition("/")[0]))
            figures["outcomes"] = outcomes = dict(in_order)
            result.parent.mkdir(parents=True, exist_ok=True)
            result.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
        return figures

    def _passes(self, tests: list[str]) -> bool:
        """Run tests up to the first failure."""
        items = [self._items[test] for test in tests]
        for item, after in zip(items, [*items[1:], None], strict=True):
            if self._coverage:
                self._coverage.switch_context(item.nodeid)
            item.ihook.pytest_runtest_protocol(item=item, nextitem=after)
            if self._failure:
                print(self._failure)
                return False
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember a failure."""
        if report.failed:
            self._failure = report.longreprtext

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Any:
        """Trace what several tests share as no test's own."""
        shared = self._coverage and fixturedef.scope != "function"
        if shared:
            self._coverage.switch_context("")
        try:
            return (yield)
        finally:
            if shared:
                self._coverage.switch_context(request._pyfuncitem.nodeid)

    def _trace(self, name: str, file: Path, source: str) -> tuple[dict[int, list[str]], Any]:
        """Run the tests without a fault: who passes over which line ("" for all), and how long."""
        tests = [test for test in self._items if test.startswith(tuple(MODULES[name]))]
        found = Path(tempfile.gettempdir()) / "lines.json"
        seconds = {}

        def work() -> bool:
            self._coverage = Coverage(data_file=None, config_file=False, include=[str(file)])
            self._coverage.start()
            plant(name, file, ast.parse(source))
            for test in tests:
                started = time.process_time()
                if not self._passes([test]):
                    return False
                seconds[test] = time.process_time() - started
            self._coverage.stop()
            lines = self._coverage.get_data().contexts_by_lineno(str(file))
            found.write_text(json.dumps([lines, seconds]))
            return True

        log = found.with_name("log")
        if in_child(work, 1000, log) != 0:
            raise SystemExit(f"{log.read_text()}\nThe tests of {name} fail without any fault.")
        lines, seconds = json.loads(found.read_text())
        return {int(line): names for line, names in lines.items()}, seconds


def plant(name: str, file: Path, tree: ast.Module) -> None:
    """Execute another version of a module, also for those who have imported from it."""
    module = importlib.import_module(f"elrcli.{name.replace('/', '.')}")
    old = dict(vars(module))
    exec(compile(ast.fix_missing_locations(tree), str(file), "exec"), vars(module))
    for other_name, other in list(sys.modules.items()):
        if other_name.partition(".")[0] in ("elrcli", "tests") and other is not module:
            for key, value in list(vars(other).items()):
                if key in old and value is old[key] and not key.startswith("__"):
                    setattr(other, key, getattr(module, key))
    for key, value in old.items():
        if isinstance(value, type) and value.__module__ == module.__name__:
            child: type
            for child in value.__subclasses__():  # of other modules: those here are new
                new = getattr(module, key)
                child.__bases__ = tuple(new if base is value else base for base in child.__bases__)


def in_child(work: Callable[[], bool], seconds: float, log: Path = Path(os.devnull)) -> int:
    """Do the work in a forked process: 0 if it gives True; minus the signal that killed it."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        memory = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
        signal.alarm(max(WAIT, int(seconds)))
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = 1
        try:
            code = 0 if work() else 1
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def read_figures(result: Path, source: str, seed: int) -> dict[str, Any]:
    """Return what is known about this version of a module."""
    digest = hashlib.sha256(source.encode()).hexdigest()
    figures: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {}
    if (figures.get("sha256"), figures.get("seed")) == (digest, seed):
        return figures
    return {"sha256": digest, "seed": seed, "outcomes": {}}


def main() -> None:
    """Plant the faults and print how many were found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=[name.rpartition("/")[2] for name in MODULES])
    parser.add_argument("--most", type=int, default=1000, help="faults a module, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="try survivors once more")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/mutation")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ |= {"OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
    names = [n for n in MODULES if arguments.only in (None, n.rpartition("/")[2])]
    tests = dict.fromkeys(test for name in names for test in MODULES[name])
    with tempfile.TemporaryDirectory(prefix="elr-mutation-") as temporary:
        tempfile.tempdir = temporary
        basetemp = f"--basetemp={temporary}/tests"
        raise SystemExit(pytest.main([*OPTIONS, basetemp, *tests], [Study(names, arguments)]))


if __name__ == "__main__":
    main()
