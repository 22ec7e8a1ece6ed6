"""Child processes that need not import: forked from a server that has imported torch and transformers, and never hfcustom.

    done = forked.run([sys.executable, "script.py", "--flag"], cwd=folder, env=environment)   # as subprocess.run()

Importing is most of what a small child costs: 6 s, against 0.1 s here. What is tested must not be the interpreter's start itself:
when modules are imported, what environment they read at that time. Then use subprocess.run().
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
TimeoutExpired = subprocess.TimeoutExpired  # as whoever takes this module for subprocess catches it
READ_AT_IMPORT = ("HF_", "OMP_", "PYTHON", "TORCH")  # variables that a server which has imported cannot take anew
AT_FIRST = dict(os.environ)  # not what the test that first wants a child has patched
TAKEN = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "HF_MODULES_CACHE")  # but these: become() sees to them
IMPORTED = (
    "numpy",
    "PIL.Image",
    "torch",
    "safetensors.torch",
    "transformers.pipelines",
    "transformers.trainer",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.processing_auto",
    "accelerate",
    "datasets",
    "peft",
)


class Server:
    """A process that imports once and forks for each command; one command at a time."""

    def __init__(self) -> None:
        self.environment = {name: value for name, value in AT_FIRST.items() if name != "PYTHONPATH"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command = [sys.executable, "-P", str(HERE)]
        self.process = subprocess.Popen(command, text=True, env=self.environment, cwd=HERE.parent, **pipes)
        atexit.register(self.end)

    def ask(self, jobs: list[dict[str, Any]], timeout: float) -> list[int]:
        """Have commands run at once; return their exit codes, negative for a signal. Where one fails, the rest is killed."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(jobs) + "\n")
        self.process.stdin.flush()
        started = self.process.stdout.readline()
        assert started, "the server has ended: what it printed says why"
        late = threading.Event()
        timer = threading.Timer(timeout, lambda: late.set() or kill(json.loads(started)))
        timer.start()
        codes: list[int] = json.loads(self.process.stdout.readline())
        timer.cancel()
        if late.is_set():
            raise subprocess.TimeoutExpired(jobs[0]["command"], timeout)
        return codes

    def end(self) -> None:
        """Let the server go, which ends with its input."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


SERVERS: list[Server] = []


def run(
    command: Sequence[Any], *, cwd: Any = None, env: dict[str, str] | None = None, timeout: float = 300, **how: Any
) -> subprocess.CompletedProcess[str]:
    """Do what `subprocess.run(command, capture_output=True, text=True)` does of a Python command, without the imports."""
    assert how.items() <= {"capture_output": True, "text": True}.items(), how
    return _run(command, [dict(os.environ if env is None else env)], cwd, timeout)


def run_ranks(
    command: Sequence[Any], number: int, port: str, env: dict[str, str], timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a command in the processes that torchrun would start for it; the exit code is of the first that failed."""
    common = {**env, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
    return _run(command, ranks, None, timeout)


def _run(
    command: Sequence[Any], environments: list[dict[str, str]], cwd: Any, timeout: float
) -> subprocess.CompletedProcess[str]:
    assert command[0] == sys.executable, f"{command[0]} is not {sys.executable}"
    if not SERVERS:
        SERVERS.append(Server())
    (server,) = SERVERS
    for environment in environments:
        for name in environment.keys() | server.environment.keys():
            same = environment.get(name) == server.environment.get(name)
            assert same or name in TAKEN or not name.startswith(READ_AT_IMPORT), f"{name} is read at import"
    words = [str(word) for word in command]
    with tempfile.TemporaryDirectory() as folder:
        outs, errs = ([Path(folder) / f"{kind}{at}" for at in range(len(environments))] for kind in ("out", "err"))
        jobs = [
            {"command": words, "cwd": str(cwd or Path.cwd()), "env": environment, "out": str(out), "err": str(err)}
            for environment, out, err in zip(environments, outs, errs, strict=True)
        ]
        codes = server.ask(jobs, timeout)
        out, err = ("".join(path.read_text() for path in paths) for paths in (outs, errs))
        return subprocess.CompletedProcess(words, next(filter(None, codes), 0), out, err)


def kill(pids: Iterable[int]) -> None:
    """Kill processes, of which some may have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# ---- in the server ------------------------------------------------------------------------------------------------


def serve() -> dict[str, Any]:
    """Fork for each job that comes, and tell how they ended; return the job in the forked process."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        pids = []
        for job in json.loads(line):
            pids.append(os.fork())
            if not pids[-1]:
                answers.close()
                made: dict[str, Any] = job
                return made
        print(pids, file=answers, flush=True)
        codes: dict[int, int] = {}
        while len(codes) < len(pids):
            pid, status = os.wait()
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid]:
                kill(pid for pid in pids if pid not in codes)
        first = sorted(
            pids, key=list(codes).index
        )  # in the order of their ends: what was killed comes after its cause
        print([codes[pid] for pid in first], file=answers, flush=True)
    os._exit(0)


def become(request: dict[str, Any], path: list[str]) -> tuple[str, str]:
    """Take the place that a request describes; return what runs, and its kind: c, m or a file."""
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.dont_write_bytecode = "PYTHONDONTWRITEBYTECODE" in os.environ
    if cache := os.environ.get("HF_MODULES_CACHE"):
        for module in list(sys.modules.values()):
            if "HF_MODULES_CACHE" in getattr(module, "__dict__", {}):
                module.HF_MODULES_CACHE = cache  # type: ignore[attr-defined]
    for descriptor, stream in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        opened = os.open(stream, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
    words = request["command"][1:]
    flags = []
    while words[0].startswith("-") and words[0] not in ("-c", "-m"):
        flags.append(words.pop(0))
    assert set(flags) <= {"-P"}, f"a process that has started cannot take {flags}"
    kind = words.pop(0)[1:] if words[0] in ("-c", "-m") else "file"
    first = [] if flags else [str(Path(words[0]).resolve().parent) if kind == "file" else ""]
    sys.path[:] = [*first, *filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep)), *path]
    sys.argv = ["-c" if kind == "c" else words[0], *words[1:]]
    return kind, words[0]


def execute(kind: str, what: str) -> None:
    """Run code, a module or a file as the interpreter does."""
    import runpy

    if kind == "m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif kind == "file":
        runpy.run_path(what, run_name="__main__")
    else:
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(what, "<string>", "exec"), main.__dict__)


def prepare() -> None:
    """Import what children need; with torchvision, as tests/conftest.py does."""
    if folder := os.environ.get("HFCUSTOM_TORCHVISION"):
        from torch import library

        sys.path.append(folder)
        made = library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            made.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["OPERATORS"] = made
    import gc
    import importlib

    for name in IMPORTED:
        importlib.import_module(name)
    assert "hfcustom" not in sys.modules
    gc.freeze()  # the children's collections leave these objects alone


if __name__ == "__main__":
    PATH = list(sys.path)
    prepare()
    execute(*become(serve(), PATH))
