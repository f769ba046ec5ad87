"""A process in a box that can be thrown away: no network, no files but the interpreter and the kit, limits on memory, time, processes and disk.

Bubblewrap makes the namespaces: pids, network, ipc, hostname and mounts of its own, everything read-only but one folder in memory. Inside, ``runner``
gives up root, limits itself and then runs the submission. Outside, a thread adds up what all processes of the box hold, since a limit of the kernel
counts for one process alone (control groups would need root). Run as root, each box has a user id of its own; else it has a user namespace.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..house.process import ROOT
from . import syscalls
from .trial import GraderError
from .wire import Pipe, WireError

MB = 1 << 20
INODE = 1024  # bytes that an empty file costs
PARTS = ("bin", "lib", "lib64", "pyvenv.cfg")  # of an interpreter's folder


@dataclass(frozen=True)
class Limits:
    """What a submission may use. Seconds are wall-clock."""

    start: float = 60  # until the interpreter answers
    cell: float = 30  # one cell of the notebook
    call: float = 10  # one call of an answer
    total: float = 600  # all cells and calls together
    memory: int = 4096 * MB  # all processes together, the work folder included
    processes: int = 32  # threads count too
    disk: int = 256 * MB  # the work folder, which lies in memory


def missing() -> str:
    """What the box needs and this machine lacks, and how to install it; empty where all is there."""
    if sys.platform != "linux" or not syscalls.known():
        return "the box needs Linux on x86-64 or arm64 (WSL or a virtual machine will do)"
    if not shutil.which("bwrap"):
        return "the box needs bubblewrap: apt install bubblewrap (Debian, Ubuntu), dnf install bubblewrap (Fedora)"
    return _refusal()


@functools.cache
def _refusal() -> str:
    """Containers and some systems forbid the namespaces that bubblewrap needs; it then says which."""
    tried = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "true"]
    done = subprocess.run(tried, capture_output=True, text=True, env=ENVIRONMENT)
    return f"bubblewrap is installed but may not make a box here: {done.stderr.strip()}" if done.returncode else ""


def command(disk: int) -> list[str]:
    """Bubblewrap's flags; what is not named here does not exist in the box. ``disk``: bytes of the one folder that can be written."""
    kit = {ROOT / "cmlib": "/kit/cmlib", Path(os.environ.get("CMLIB_DATASETS", ROOT / "datasets")): "/kit/datasets"}
    system = [Path(p) for p in ("/usr", "/bin", "/lib", "/lib64", "/etc/alternatives", "/etc/ld.so.cache")]
    python = [Path(prefix, part) for prefix in (sys.base_prefix, sys.prefix) for part in PARTS]  # and nothing beside them: a course, say
    own = {path: path for path in (*system, *(p for p in python if not p.is_relative_to("/usr")))}
    return [
        *("bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"),
        *([] if os.getuid() == 0 else ["--unshare-user"]),
        *("--die-with-parent", "--new-session"),
        *("--perms", "1777", "--size", str(disk), "--tmpfs", "/tmp"),
        *(word for source, place in (own | kit).items() for word in _read_only(source, Path(place))),
        *("--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"),
        *("--chdir", "/tmp", "--remount-ro", "/"),
    ]


def _read_only(source: Path, place: Path) -> list[str]:
    """A file or folder; a link (/lib on a merged system, a virtual environment's lib64) stays one; nothing where there is nothing.

    The folders above are made first: those that bubblewrap makes by itself can be entered by root alone."""
    above = [word for parent in reversed(place.parents[:-1]) for word in ("--dir", str(parent))]
    bound = ["--symlink", os.readlink(source), str(place)] if source.is_symlink() else ["--ro-bind", str(source), str(place)]
    return [*above, *bound] if source.exists() else []


ENVIRONMENT = {  # all of it: nothing is inherited
    "PATH": "/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "USER": "student", "LOGNAME": "student", "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MPLBACKEND": "agg",
}  # fmt: skip
_START = "import sys; sys.path.insert(0, sys.argv[1]); from cmlib.grade.runner import main; main(sys.argv[2])"


class Box:
    """A running box: ``pipe`` leads to its runner; ``close`` ends every process in it. ``why``: what the watch killed it for."""

    def __init__(self, limits: Limits, boxed: bool = True):
        if boxed and (problem := missing()):
            raise GraderError(problem)
        self.limits, self.why = limits, ""
        self._over, self._killing = threading.Event(), threading.Lock()
        self.folder = None if boxed else tempfile.TemporaryDirectory(prefix="cmlib-grade-")
        self.process = self._boxed() if boxed else self._bare()
        self.pipe = Pipe(self.process.stdout.fileno(), self.process.stdin.fileno())
        self._first: int | None = None  # the first process inside, as a descriptor: numbers of processes are used again
        self._greet()
        if boxed:
            self._first = os.pidfd_open([*self.pids()][1])
        threading.Thread(target=self._watch, daemon=True).start()

    def _boxed(self) -> subprocess.Popen:
        filter_, program = os.pipe()
        try:
            os.write(program, syscalls.program())
            os.close(program)
            return self._start([*command(self.limits.disk), "--seccomp", str(filter_), "--"], "/kit", (filter_,), ENVIRONMENT)
        finally:
            os.close(filter_)

    def _bare(self) -> subprocess.Popen:
        folder = self.folder.name
        return self._start([], str(ROOT), (), {**os.environ, **ENVIRONMENT, "HOME": folder, "TMPDIR": folder}, folder)

    def _start(self, before: list[str], kit: str, fds: tuple, env: dict[str, str], folder: str | None = None) -> subprocess.Popen:
        settings = dataclasses.asdict(self.limits) | {
            "uid": random.SystemRandom().randrange(1 << 20, 1 << 31) if before and os.getuid() == 0 else None
        }
        words = [*before, sys.executable, "-I", "-c", _START, kit, json.dumps(settings)]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            words, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, env=env, pass_fds=fds, cwd=folder or "/", start_new_session=True
        )

    def _greet(self) -> None:
        """Wait until the interpreter answers; no line of the submission has run by then, so a failure is ours."""
        try:
            self.pipe.receive(time.monotonic() + self.limits.start)
        except (EOFError, TimeoutError, WireError) as error:
            self.kill()
            said = self.process.stderr.read(2000).decode(errors="replace").strip()
            self.close()
            raise GraderError(f"the box did not start: {said or type(error).__name__}") from error

    def __enter__(self) -> Box:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        return not self._over.is_set() and self.process.poll() is None

    def pids(self) -> Iterator[int]:
        """The processes of the box, bubblewrap's own two included: orphans fall to the second, so that all are its descendants."""
        waiting = [self.process.pid]
        while waiting:
            yield (pid := waiting.pop())
            with suppress(OSError):
                for task in os.listdir(f"/proc/{pid}/task"):
                    waiting += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())

    def memory(self) -> int:
        """Bytes that all processes and the work folder hold. What forked processes share counts once (looked up only where it decides)."""
        pids = list(self.pids())
        folder = sum(map(_held, pids[1:2] if not self.folder else []))
        often = sum(_memory(f"/proc/{pid}/status", ("RssAnon:", "RssShmem:", "VmSwap:")) for pid in pids)
        if often + folder <= self.limits.memory:
            return often + folder
        return sum(_memory(f"/proc/{pid}/smaps_rollup", ("Pss_Anon:", "Pss_Shmem:", "SwapPss:")) for pid in pids) + folder

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            if self.memory() > self.limits.memory:
                self.why = f"used more than {self.limits.memory // MB} MB of memory"
                return self.kill()

    def kill(self) -> None:
        """End every process. With the first of a pid namespace die all others before it is gone itself; bubblewrap outside may return earlier."""
        self._over.set()
        with self._killing:
            if self._first is not None:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._first, signal.SIGKILL)
                _ended(self._first, 10)
                os.close(self._first)
                self._first = None
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(5)
            for pid in [*self.pids()] if self.folder else []:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        self.kill()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            stream.close()
        if self.folder:
            self.folder.cleanup()


def _ended(process: int, seconds: float) -> None:
    """Wait for a process, given as a descriptor."""
    poll = select.poll()
    poll.register(process, select.POLLIN)
    poll.poll(seconds * 1000)


def _memory(path: str, lines: tuple[str, ...]) -> int:
    with suppress(OSError):
        found = (line.split() for line in Path(path).read_text().splitlines())
        return sum(int(words[1]) << 10 for words in found if words[0] in lines)
    return 0


def _held(pid: int) -> int:
    """What lies in the work folder of this process of the box."""
    with suppress(OSError):
        room = os.statvfs(f"/proc/{pid}/root/tmp")
        return (room.f_blocks - room.f_bfree) * room.f_frsize + (room.f_files - room.f_ffree) * INODE
    return 0
