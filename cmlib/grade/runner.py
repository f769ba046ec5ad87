"""The process in the box: it runs the cells of one submission and calls what they define. It knows no question, no check and no expected value.

Requests: ``["run", number, text, filename]``, ``["call", number, name, args, kwargs]``, ``["get", number, name]``, ``["names", number]``. Replies:
``[number, "value", value]``, ``[number, "raised", type, message, line]``, ``[number, "error", reason]``, and, while a call runs, ``[number, "ask",
place, args, kwargs]`` for a function that came as an argument and lives outside. The submission shares this process and can send what it likes: that
is worth as much as returning it.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import functools
import json
import linecache
import os
import re
import resource
import sys
import threading
import types
from typing import Any

import numpy as np

from .trial import AnswerError, Local, StudentError
from .wire import Pipe, WireError, pack

_MAGIC = re.compile(r"^\s*([%!?].*|[\w.]+\?{1,2}\s*)$", re.MULTILINE)
_PYTHON_MAGICS = ("%%time", "%%timeit", "%%capture", "%%prun")


def main(settings: str) -> None:
    pipe = Pipe(os.dup(0), os.dup(1))
    pipe.send(pack("ready"))
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):  # what is printed goes nowhere
        os.dup2(nothing, fd)
    restrict(json.loads(settings))
    Runner(pipe).serve()


def restrict(limits: dict[str, Any]) -> None:
    """For good: hard limits, and a user who may not raise them."""
    for what, value in (
        (resource.RLIMIT_DATA, int(limits["memory"])),  # not the address space, of which torch's libraries alone take gigabytes
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_CPU, int(limits["cell"] + limits["call"]) * 10),
        (resource.RLIMIT_FSIZE, limits["disk"]),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError):  # where a lower hard limit holds already
            resource.setrlimit(what, (value, value))
    if limits["uid"] is not None:
        os.setgroups([])
        os.setresgid(*[limits["uid"]] * 3)
        os.setresuid(*[limits["uid"]] * 3)
    ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS


class Runner:
    """A submission's namespace at the inner end of the pipe."""

    def __init__(self, pipe: Pipe):
        self.pipe, self.lock, self.number = pipe, threading.Lock(), 0
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        self.namespace = vars(module)
        self.answers = Local(self.namespace)
        _silence(self.namespace)

    def serve(self) -> None:
        with contextlib.suppress(EOFError):
            while True:
                kind, self.number, *rest = self.pipe.receive(function=self.outside, tensor=_tensor)
                self.pipe.send(self.reply(kind, *rest))

    def reply(self, kind: str, *rest: Any) -> bytes:
        try:
            return pack([self.number, "value", getattr(self, kind)(*rest)])
        except StudentError as error:
            return pack([self.number, "raised", error.type[:100], error.message[:500], error.line[:200]])
        except (AnswerError, WireError) as error:
            return pack([self.number, "error", str(error)[:500]])
        except BaseException as error:  # what gets past Exception, and what is raised while the result is looked at
            return pack([self.number, "raised", type(error).__name__, "", ""])

    def run(self, text: str, filename: str) -> None:
        """One cell. ``inspect.getsource`` finds its text."""
        linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
        try:
            code = _compiled(text, filename)
        except Exception as error:
            raise StudentError(type(error).__name__, str(error)) from error
        Local({"cell": functools.partial(exec, code, self.namespace)}).call("cell", (), {})

    def call(self, name: str, args: list, kwargs: dict) -> Any:
        return self.answers.call(name, tuple(args), kwargs)

    def get(self, name: str) -> Any:
        return self.answers.get(name)

    def names(self) -> list[str]:
        return self.answers.names()

    def outside(self, place: int) -> Any:
        """A function whose calls are answered at the other end of the pipe."""

        def function(*args: Any, **kwargs: Any) -> Any:
            with self.lock:
                self.pipe.send(pack([self.number, "ask", place, list(args), kwargs]))
                kind, *rest = self.pipe.receive(tensor=_tensor)
            if kind == "value":
                return rest[0]
            error = getattr(builtins, rest[0], None)
            raise (error if isinstance(error, type) and issubclass(error, Exception) else RuntimeError)(rest[1])

        return function


def _compiled(text: str, filename: str) -> types.CodeType:
    """The cell's code; where it is no Python as it stands, without its magics and shell lines."""
    try:
        return compile(text, filename, "exec")
    except SyntaxError:
        first, _, rest = text.lstrip().partition("\n")
        if first.startswith("%%"):
            text = "\n" + rest if first.split()[0] in _PYTHON_MAGICS else ""  # line numbers stay
        return compile(_MAGIC.sub("pass", text), filename, "exec")


def _silence(namespace: dict[str, Any]) -> None:
    """Checks and hints are for the learner; here they would cost time and say nothing."""
    import cmlib.grade

    def nothing(*_: Any, **__: Any) -> None:
        """Nothing."""

    cmlib.grade.check = cmlib.grade.hint = nothing
    namespace |= {"check": nothing, "hint": nothing, "display": nothing}


def _tensor(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(array)
