"""Child processes that need not import: forked from a server that has imported torch and transformers, and never hfcustom.

    done = forked.run([sys.executable, "script.py", "--flag"], cwd=folder, env=environment)   # as subprocess.run()

Importing is most of what a small child costs: 6 s, against 0.1 s here. What is tested must not be the interpreter's start itself:
when modules are imported, what environment they read at that time. Then use subprocess.run().
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
TimeoutExpired = subprocess.TimeoutExpired  # as whoever takes this module for subprocess catches it
READ_AT_IMPORT = ("HF_", "OMP_", "PYTHON", "TORCH")  # variables that a server which has imported cannot take anew
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
        self.environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, "-P", HERE], text=True, env=self.environment, **pipes)
        atexit.register(self.end)

    def ask(self, request: dict[str, Any], timeout: float) -> int:
        """Have a command run; return its exit code, negative for a signal."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        pid = self.process.stdout.readline()
        assert pid, "the server has ended: what it printed says why"
        late = threading.Event()
        timer = threading.Timer(timeout, lambda: late.set() or os.kill(int(pid), signal.SIGKILL))
        timer.start()
        code = int(self.process.stdout.readline())
        timer.cancel()
        if late.is_set():
            raise subprocess.TimeoutExpired(request["command"], timeout)
        return code

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
    assert command[0] == sys.executable, f"{command[0]} is not {sys.executable}"
    assert how.items() <= {"capture_output": True, "text": True}.items(), how
    if not SERVERS:
        SERVERS.append(Server())
    (server,) = SERVERS
    environment = dict(os.environ if env is None else env)
    for name in environment.keys() | server.environment.keys():
        same = environment.get(name) == server.environment.get(name)
        assert same or name in TAKEN or not name.startswith(READ_AT_IMPORT), f"{name} is read at import"
    words = [str(word) for word in command]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        request = {
            "command": words,
            "cwd": str(cwd or Path.cwd()),
            "env": environment,
            "out": str(out),
            "err": str(err),
        }
        code = server.ask(request, timeout)
        return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())


# ---- in the server ------------------------------------------------------------------------------------------------


def serve() -> dict[str, Any]:
    """Fork for each request that comes, and tell how it ended; return the request in the forked process."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            answers.close()
            request: dict[str, Any] = json.loads(line)
            return request
        print(pid, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)
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
