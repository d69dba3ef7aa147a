"""The speed script against jax-cfd: both sides of a pair do the same work, and its rows say so."""

import json

import pytest

from hybridsim.experiments import paired_step

pytestmark = pytest.mark.filterwarnings("ignore:::jax_cfd", "ignore:::tree_math", "ignore::DeprecationWarning")


def test_pairs_agree(tmp_path, capsys):
    paired_step.main(["--size", "128", "--steps", "2", "--rounds", "1", "--out", str(tmp_path / "rows.json")])
    rows = {row["case"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert len(rows) == 3
    # The central scheme and the spectral one are the same on both sides; the limited ones differ in second order.
    assert rows["finite volume central Euler 128²"]["difference"] < 1e-5
    assert rows["spectral CN-RK4 128²"]["difference"] < 2e-3
    assert 1e-6 < rows["finite volume van Leer Euler 128²"]["difference"] < 0.1
    assert all(row["ratio"][0] > 0 for row in rows.values())
    assert "ratio" in capsys.readouterr().out
