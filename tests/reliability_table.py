"""`pytest -m reliability`: the table of faults that were survived, one line per row, counted over all tests that record cases.

A test records cases with the fixture `reliability`, or says by `@pytest.mark.reliability("R5")` that it is one case of a row
itself: passed if the test passes. A test that fails counts as one failed case at least, in every row that it names or records.
The counts travel with the reports of the tests, so they also come from other processes (`pytest -n 2`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

ROWS = {
    "R1": "kill -9 of run, train, sweeps and bench, half while a checkpoint is written; then --resume: bitwise",
    "R2": "ENOSPC, EIO, EACCES, short write, failing fsync or rename, a full disk: one line, the last checkpoint whole",
    "R3": "SIGTERM and SIGINT: saved within one chunk, exit 143 or 130; Ctrl-C twice; resume bitwise",
    "R4": "oversized grids, step counts, samples and frames: refused before allocation, with the estimate",
    "R5": "resume exactness: solver × stepper × dtype, closures, adaptive dt, RNG, optimiser, data order",
    "R6": "damaged, swapped, older or foreign checkpoints, frames and weights: detected, falls back",
    "R7": "hostile files: no code executed, refused within 2 s and 200 MiB",
    "R8": "bad configurations: exit 2 within 2 s, key path, value, range; none accepted wrongly",
    "R9": "blow-ups: noticed within one chunk, last good state kept, exit 3; training goes back or stops",
    "R10": "random Riemann problems with random closures: no negative density or pressure",
    "R11": "two runs on one folder; a reader while a writer writes",
    "R12": "determinism: two processes, the same bits",
    "R13": "many steps: memory growth < 5 %, nothing compiled after the first chunk",
    "R14": "provenance in every output",
}
_CASES, _ROW = "reliability cases", "reliability row"


@pytest.fixture
def reliability(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Records cases of a row: `reliability("R7", ok=True, note="pickle as weights")`.

    `cases`: how many at once; `failed`: how many of them did not hold (default: none if `ok`, else one). Recording decides
    nothing: the test still asserts.
    """

    def record(row: str, ok: bool = True, note: str = "", *, cases: int = 1, failed: int | None = None) -> None:
        assert row in ROWS, f"there is no row {row!r}"
        wrong = int(failed if failed is not None else not ok)
        request.node.user_properties.append((_CASES, [row, int(cases), wrong, note]))

    return record


@dataclass
class _Count:
    cases: int = 0
    failed: int = 0
    notes: list[str] = field(default_factory=list)


class Table:
    """Collects what the reports of the tests carry, and prints it."""

    def __init__(self):
        self.rows: dict[str, _Count] = {}

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        for mark in item.iter_markers("reliability"):
            item.user_properties += [(_ROW, row) for row in mark.args]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped or not (report.when == "call" or report.failed):
            return
        named: dict[str, list[Any]] = {}
        for name, value in report.user_properties:
            if name == _ROW:
                named.setdefault(str(value), [])
            elif name == _CASES and isinstance(value, list | tuple):
                named.setdefault(value[0], []).append(value)
        for row, records in named.items():
            count = self.rows.setdefault(row, _Count())
            if report.when == "call":
                records = records or [[row, 1, 0, ""]]
                count.cases += sum(r[1] for r in records)
            wrong = sum(r[2] for r in records)
            if report.failed and not wrong:
                wrong = 1
                count.cases += not records
            count.failed += wrong
            if wrong:
                count.notes += [report.nodeid, *(r[3] for r in records if r[2] and r[3])]

    def lines(self) -> Iterator[str]:
        for row, title in ROWS.items():
            if (count := self.rows.get(row)) is not None:
                yield f"{row:<4} {count.cases - count.failed:>6}/{count.cases:<6} {title}"
                yield from (f"{'':<18} failed: {note}" for note in count.notes)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.rows:
            terminalreporter.section("reliability")
            for line in self.lines():
                terminalreporter.write_line(line)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cases", type=int, default=None, metavar="N", help="reliability: kills, signals and faults per command (default: all)"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.has_plugin("reliability table"):
        config.pluginmanager.register(Table(), "reliability table")
