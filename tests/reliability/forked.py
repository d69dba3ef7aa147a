"""The command line in forked processes, with faults at chosen calls of its writer.

`python forked.py` imports everything once and then forks a process per request, before JAX has started a backend (and so threads):
a command costs what it computes, not what it imports. `Forked` is the other end. In the child a `Shim` stands between hybridsim
and the operating system: every call with which `storage` writes, syncs, renames or removes is counted, and at one of them the
process can be killed, sent a signal, or be refused.
"""

import errno
import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATIENCE = 900.0
"""Seconds without an answer after which a test gives up: a benchmark elsewhere may stop all processes for minutes."""


# --- in the child ----------------------------------------------------------------------------------------------------------------


class Shim:
    """Counts the calls of the writer, and does at one of them what a request says.

    `fault`: `do` is kill, signal, error or short; `at` the number of the call (from 1); `when` before, half or after (kill,
    signal); `times`, how often the signal comes, a moment apart; `errno`, and `on`, how many calls from there fail (0: all);
    `slow`, seconds that every call takes longer.
    """

    def __init__(self, fault: dict[str, Any], notes: int):
        self.fault, self.notes, self.count = fault, notes, 0
        self.acting = False

    def note(self, **values: Any) -> None:
        os.write(self.notes, json.dumps({**values, "time": time.monotonic(), "cpu": time.process_time()}).encode() + b"\n")

    def _die(self) -> None:
        number = self.fault.get("signal", signal.SIGKILL)
        self.note(what="signal", signal=int(number))
        for _ in range(self.fault.get("times", 1)):
            os.kill(os.getpid(), number)
            time.sleep(0.01)  # the handler runs

    def call(self, kind: str, path: Any, real: Callable[[], Any], half: Callable[[], Any] = lambda: None) -> Any:
        """One call of the writer; `half` does it in part."""
        self.count += 1
        self.note(what="call", call=self.count, kind=kind, path=os.fspath(path))
        time.sleep(self.fault.get("slow", 0.0))
        do, at, on = self.fault.get("do"), self.fault.get("at", 0), self.fault.get("on", 1)
        here = self.count == at
        if do == "error" and self.count >= at and (here or not on or self.count < at + on):
            if self.fault.get("when") == "half":
                half()
            code = self.fault["errno"]
            raise OSError(code, os.strerror(code), os.fspath(path))
        if not here or do not in ("kill", "signal", "short"):
            return real()
        if do == "short":
            return half()
        when = self.fault.get("when", "before")
        if when == "after":
            found = real()
            self._die()
            return found
        if when == "half":
            half()
        self._die()
        # a signal that is taken later lets the call go on; a killed process never comes here
        return real()

    def install(self) -> None:
        import pathlib

        import xarray

        from hybridsim import storage

        true_open, true_unlink, true_netcdf = pathlib.Path.open, pathlib.Path.unlink, xarray.Dataset.to_netcdf
        shim, paths = self, {}

        class Handle:
            """A file whose writes are calls."""

            def __init__(self, kind: str, path: Path, file: Any):
                self.kind, self.path, self.file = kind, path, file

            def __enter__(self) -> "Handle":
                return self

            def __exit__(self, *_: object) -> None:
                self.file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(self.file, name)

            def write(self, data: Any) -> int:
                data = data if isinstance(data, str) else memoryview(data)

                def half() -> None:
                    self.file.write(data[: len(data) // 2])
                    self.file.flush()

                return shim.call(self.kind, self.path, lambda: self.file.write(data), half)

        class System:
            """`os` as `storage` and `shutil` see it."""

            def __getattr__(self, name: str) -> Any:
                return getattr(os, name)

            def open(self, path: Any, *args: Any, **kwargs: Any) -> int:
                writes = bool(args) and args[0] & os.O_CREAT and ".part" in str(path)
                handle = (
                    shim.call("open", path, lambda: os.open(path, *args, **kwargs)) if writes else os.open(path, *args, **kwargs)
                )
                paths[handle] = path
                return handle

            def fsync(self, handle: int) -> None:
                shim.call("fsync", paths.get(handle, "?"), lambda: os.fsync(handle))

            def replace(self, source: Any, target: Any) -> None:
                shim.call("replace", target, lambda: os.replace(source, target))  # noqa: PTH105

            def unlink(self, path: Any, **kwargs: Any) -> None:
                shim.call("remove", path, lambda: os.unlink(path, **kwargs))

        def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = true_open(path, mode, *args, **kwargs)
            kind = {"wb": "write", "a": "log"}.get(mode)
            return file if kind is None or (kind == "write" and path.suffix != ".part") else Handle(kind, path, file)

        def unlinked(path: Path, *args: Any, **kwargs: Any) -> None:
            if path.suffix in (".part", "") or not path.exists():
                true_unlink(path, *args, **kwargs)
            else:
                shim.call("remove", path, lambda: true_unlink(path, *args, **kwargs))

        def stored(ds: Any, path: Any = None, *args: Any, **kwargs: Any) -> Any:
            def half() -> None:
                true_netcdf(ds, path, *args, **kwargs)
                os.truncate(path, Path(path).stat().st_size // 2)

            return shim.call("netcdf", path, lambda: true_netcdf(ds, path, *args, **kwargs), half)

        true_save = storage.Checkpoints.save

        def saved(checkpoints: Any, step: int, *args: Any, **kwargs: Any) -> None:
            true_save(checkpoints, step, *args, **kwargs)
            self.note(
                what="saved", step=int(step), folder=os.fspath(checkpoints.folder), compiled=compiled[0], resident=_resident()
            )

        compiled = [0]

        def counted(name: str, *_: Any, **__: Any) -> None:
            compiled[0] += name == "/jax/core/compile/jaxpr_trace_duration" or "backend_compile" in name

        import jax

        jax.monitoring.register_event_duration_secs_listener(counted)
        storage.os = shutil.os = System()  # type: ignore[assignment]
        pathlib.Path.open, pathlib.Path.unlink = opened, unlinked  # type: ignore[method-assign]
        xarray.Dataset.to_netcdf, storage.Checkpoints.save = stored, saved  # type: ignore[method-assign]


def _resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _lighten() -> None:
    """Leave out what takes long and says nothing here: timings and the figures of the report."""
    import functools

    from hybridsim import experiment, figures, report, storage

    def page(folder: Path) -> Path:
        storage.atomic_write(folder / "report.html", "<html></html>\n")
        return folder / "report.html"

    experiment._reference_cost = lambda *_: 0.0
    experiment.run_locked = functools.partial(experiment.run_locked, timed=False)
    report.write_report = page
    figures.training_figure = lambda history, path: storage.atomic_write(path, b"")


def save_often() -> None:
    """A checkpoint after every chunk, however short a chunk is."""
    if importlib.util.find_spec("hybridsim.journal") is not None:
        importlib.import_module("hybridsim.journal").Cadence.has_waited = lambda _: True


def _child(request: dict[str, Any]) -> None:
    import resource
    import traceback

    os.chdir(request["folder"])
    os.environ["HYBRIDSIM_CACHE"] = request["cache"]
    for number, name in ((1, "out"), (2, "err")):
        handle = os.open(request[name], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)
    # a limit on files holds for this one too
    notes = os.open(os.devnull if request["largest"] else request["notes"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND)
    import jax

    from hybridsim import cli, storage

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_compilation_cache_dir", str(storage.compiled_folder()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if request["light"]:
        _lighten()
    if request["often"]:
        save_often()
    shim = Shim(request["fault"], notes)
    shim.install()
    if limit := request["largest"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    code: Any = 1
    try:
        shim.note(what="begins")
        cli.app(request["words"])
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
    shim.note(what="ends", calls=shim.count)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    """Answers requests, one JSON object per line, until there are no more."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot
    import netCDF4
    import xarray  # noqa: F401

    import hybridsim.ablation
    import hybridsim.bench
    import hybridsim.experiment
    import hybridsim.figures
    import hybridsim.report
    import hybridsim.training
    from hybridsim.config import solver_tables

    for table in solver_tables().values():
        for classes in table.values():
            for target in classes.values():
                if "hosted" not in target:
                    __import__(target.partition(":")[0])
    import hybridsim.corrections.learned  # noqa: F401

    del matplotlib, netCDF4
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "shell" in request:
            print(json.dumps({"code": subprocess.run(request["shell"], shell=True, check=False).returncode}), flush=True)
            continue
        process = os.fork()
        if process == 0:
            try:
                _child(request)
            finally:
                os._exit(70)
        print(json.dumps({"process": process}), flush=True)
        _, status = os.waitpid(process, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


# --- the other end ---------------------------------------------------------------------------------------------------------------


@dataclass
class Done:
    """A command that has ended: its exit code (minus the signal where one ended it), what it said, and what the shim saw."""

    code: int
    out: str
    err: str
    notes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def calls(self) -> list[dict[str, Any]]:
        return [n for n in self.notes if n["what"] == "call"]

    @property
    def saved(self) -> list[dict[str, Any]]:
        """Checkpoints in the order in which they were finished."""
        return [n for n in self.notes if n["what"] == "saved"]

    @property
    def seconds(self) -> float:
        """From the beginning of the command to its end."""
        return self.notes[-1]["time"] - self.notes[0]["time"]

    @property
    def saved_after_signal(self) -> list[dict[str, Any]]:
        at = next((i for i, n in enumerate(self.notes) if n["what"] == "signal"), len(self.notes))
        return [n for n in self.notes[at:] if n["what"] == "saved"]


class Forked:
    """A server of forked commands; `prefix` words go before Python, `root` is where its files are seen from here."""

    def __init__(self, prefix: tuple[str, ...] = ()):
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
        self._server = subprocess.Popen(
            [*prefix, sys.executable, "-W", "ignore::DeprecationWarning", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            bufsize=0,
        )
        self._rest = b""
        self.process = self._answer()["ready"]

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self._server.stdout is not None
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._server.stdout], [], [], PATIENCE)
            piece = os.read(self._server.stdout.fileno(), 65536) if ready else b""
            if not piece:
                raise RuntimeError("the server of forked commands does not answer")
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def _ask(self, request: dict[str, Any]) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request).encode() + b"\n")

    def shell(self, command: str) -> int:
        self._ask({"shell": command})
        return self._answer()["code"]

    def run(
        self,
        words: list[str],
        folder: Path,
        *,
        cache: Path,
        fault: dict[str, Any] | None = None,
        light: bool = True,
        often: bool = True,
        largest: int | None = None,
        after: float | None = None,
        root: str = "",
    ) -> Done:
        """`hybridsim *words` in `folder`. `after`: seconds from its beginning after which `fault["signal"]` (kill) is sent."""
        files = {name: f"{folder}/{name}.txt" for name in ("out", "err", "notes")}
        request = {"words": words, "folder": str(folder), "cache": str(cache), "fault": fault or {}, "light": light, "often": often}
        for name in files.values():
            Path(root + name).unlink(missing_ok=True)
        self._ask({**request, **files, "largest": largest})
        process = self._answer()["process"]
        if after is not None:
            self._strike(process, Path(root + files["notes"]), after, (fault or {}).get("signal", signal.SIGKILL))
        code = self._answer()["code"]
        out, err, notes = (p.read_text(errors="replace") if p.exists() else "" for p in (Path(root + f) for f in files.values()))
        return Done(code, out, err, [json.loads(line) for line in notes.splitlines() if line.endswith("}")])

    def _strike(self, process: int, notes: Path, after: float, number: int) -> None:
        """A signal from outside, `after` seconds after the command has begun to listen."""
        limit = time.monotonic() + PATIENCE
        while not (notes.exists() and notes.stat().st_size) and time.monotonic() < limit:
            time.sleep(0.002)
        time.sleep(after)
        try:
            with notes.open("ab") as file:
                file.write(json.dumps({"what": "signal", "signal": int(number), "time": time.monotonic()}).encode() + b"\n")
            os.kill(process, number)
        except OSError as error:
            if error.errno != errno.ESRCH:
                raise


if __name__ == "__main__":
    serve()
