"""Every snippet of the README and of the page on closures runs, in order, in one empty folder; the two set-up commands by `.ci/run`
and a slow test."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hybridsim import storage
from hybridsim.cli import app

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
SET_UP = "python3 -m venv"


NAMED = re.compile(r"# (\S+\.(?:py|yaml))\n")


def snippets(page: str = "README.md") -> list[tuple[str, str]]:
    return FENCE.findall((ROOT / page).read_text(encoding="utf-8"))


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
        name = NAMED.match(text)
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


def test_the_page_on_closures_runs(tmp_path, monkeypatch, x64):
    """Its commands run in this process, where what one compiles serves the next; its Python in one of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    kinds = []
    for kind, text in snippets("docs/your_closure.md"):
        kinds.append(kind)
        if name := NAMED.match(text):
            Path(name[1]).write_text(text, encoding="utf-8")
        elif kind == "python":
            done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, done.stderr
        else:
            for program, *arguments in map(shlex.split, text.strip().splitlines()):
                if program == "hybridsim":
                    result = CliRunner().invoke(app, arguments)
                    assert result.exit_code == 0, (arguments, result.output, result.exception)
                else:
                    assert program == "python"
                    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False)
                    assert done.returncode == 0, done.stdout
    assert kinds == ["python", "sh", "yaml", "sh", "sh", "python", "python", "sh"]
    code = Path("subgrid.py").read_text().splitlines()
    assert len([line for line in code if line.strip() and not line.startswith("#")]) <= 20
    # trained for seconds, it is better than nothing; the swaps have taken place
    runs = storage.read_json(Path("runs/subgrid/summary.json"))["runs"]
    assert runs["subgrid"]["outcome"] == "finished"
    assert runs["subgrid"]["t95"] > runs["bare"]["t95"]
    swapped = storage.read_json(Path("runs/smagorinsky/summary.json"))["runs"]
    assert swapped["subgrid"]["t95"] != runs["subgrid"]["t95"]


def test_pages_that_the_readme_leads_to_exist():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), (page.name, target)


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
