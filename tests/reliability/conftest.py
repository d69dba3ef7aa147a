"""`pytest -m reliability`: every row of the table of faults, quick cases and full ones; the table stands at the end.

The quick cases belong to the default tests and take two to three minutes on one core. The full ones are marked slow as well and
take two and a half hours on one core: the calls of the writer refused in turn three quarters, 200 kills and 50 signals half an
hour each, sweeps and benchmarks as long together, the matrix of resumed solvers a quarter. `--cases N` bounds each campaign: with
20 the whole takes less than an hour. What is drawn is drawn from fixed seeds.
"""

from collections.abc import Callable, Iterator
from functools import cache

import pytest
from commands import Command, make_command
from forked import Forked


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "reliability":
            item.add_marker(pytest.mark.reliability)


@pytest.fixture(scope="session")
def server() -> Iterator[Forked]:
    """Commands in forked processes."""
    found = Forked()
    yield found
    found.close()


@pytest.fixture(scope="session")
def command(server: Forked, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Command]:
    """`command("run")` or `command("train")`, with its uninterrupted result."""
    place = tmp_path_factory.mktemp("uninterrupted")
    return cache(lambda name: make_command(name, server, place / name))


@pytest.fixture
def how_many(request: pytest.FixtureRequest):
    """`how_many(n)`: the number of cases of a campaign, `--cases` if that is given."""
    given = request.config.getoption("--cases", None)
    return lambda full: full if given is None else given
