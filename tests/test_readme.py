"""Every snippet of the README runs, in order, in one empty folder; the two set-up commands by `.ci/run` and a slow test."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
SET_UP = "python3 -m venv"


def snippets() -> list[tuple[str, str]]:
    return FENCE.findall((ROOT / "README.md").read_text(encoding="utf-8"))


def test_every_snippet_is_of_a_kind_that_is_run():
    kinds = [kind for kind, _ in snippets()]
    assert set(kinds) <= {"python", "yaml", "sh"}
    assert kinds.count("sh") >= 3
    assert kinds.count("python") >= 2


def test_snippets_run(tmp_path, monkeypatch):
    command = shutil.which("hybridsim", path=str(Path(sys.executable).parent)) or shutil.which("hybridsim")
    assert command is not None, "install the package first"
    monkeypatch.chdir(tmp_path)
    for kind, text in snippets():
        name = re.match(r"# (\S+\.(?:py|yaml))\n", text)
        if name is not None:
            Path(name[1]).write_text(text, encoding="utf-8")
        elif kind == "python":
            done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
        elif kind == "sh" and SET_UP not in text:
            for line in text.strip().splitlines():
                script = line.split("  #")[0].replace("hybridsim", command, 1)
                done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=600)
                assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "runs/mine/report.html").stat().st_size > 10_000
    assert "Traceback" not in (tmp_path / "runs/mine/log.txt").read_text()


def test_pictures_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert (ROOT / target).is_file(), target


@pytest.mark.slow
def test_set_up_commands_in_a_fresh_clone(tmp_path):
    """Both commands, as written, in a copy of the tracked files; the test command collects only, the tests being this run."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")[:-1]
    for file in files:
        target = tmp_path / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / file).is_symlink():
            target.symlink_to((ROOT / file).readlink())
        else:
            shutil.copy(ROOT / file, target)
    lines = [line for kind, text in snippets() if kind == "sh" for line in text.splitlines() if SET_UP in line]
    assert len(lines) == 2
    for line in lines:
        script = line + (" --collect-only -q" if line.endswith("pytest") else "")
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert (tmp_path / "runs/coarse_turbulence/report.html").is_file()
