"""The box, looked at from inside: what a submission can see, reach, write and use up. Every line here fails where a flag or a limit is left out."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from small import QUICK, needs_a_box

import cmlib.grade.box as box_module
from cmlib.grade.box import MB, Box, Limits, missing
from cmlib.grade.judge import Boxed
from cmlib.grade.trial import AnswerError, GraderError, StudentError
from cmlib.house.process import ROOT

pytestmark = needs_a_box
ROOMY = replace(QUICK, cell=30, call=30, total=90)  # no test here waits for an end of time


@pytest.fixture
def inside():
    """``inside(text)`` is the value of ``answer()`` that the text defines, run in a box; the boxes end with the test."""
    with contextlib.ExitStack() as stack:

        def ask(text: str, limits: Limits = ROOMY, *args):
            boxed = stack.enter_context(Boxed([text], limits))
            try:
                return boxed.call("answer", args, {})
            except AnswerError:
                assert not boxed.notes, boxed.notes
                raise

        yield ask


def test_files_are_the_interpreter_and_the_kit(inside):
    top, work, kit = inside("import os\ndef answer(): return sorted(os.listdir('/')), os.listdir('/tmp'), sorted(os.listdir('/kit'))")
    places = {Path(p).parts[1] for p in (sys.prefix, sys.base_prefix)}
    assert set(top) <= {"bin", "dev", "etc", "kit", "lib", "lib64", "proc", "tmp", "usr"} | places
    assert work == [] and kit == ["cmlib", "datasets"]
    own = [str(ROOT / name) for name in ("exercises", "tests", "README.md", ".git")]
    assert inside(f"import os\ndef answer(): return [p for p in {own} if os.path.exists(p)]") == []


@pytest.mark.parametrize("prefix", [ROOT, ROOT / "exercises"])
def test_a_course_in_the_interpreters_own_folder_stays_outside(monkeypatch, prefix):
    monkeypatch.setattr(sys, "prefix", str(prefix))
    words = box_module.command(MB)
    shown = [Path(words[i + 1]) for i, word in enumerate(words) if word == "--ro-bind"]
    assert ROOT / "cmlib" in shown and [p for p in shown if (ROOT / "exercises/source").is_relative_to(p)] == []


def test_nothing_but_the_work_folder_can_be_written(inside):
    text = """
import os
def answer():
    written = []
    for folder, inner, names in os.walk("/"):
        inner[:] = [n for n in inner if os.path.join(folder, n) not in ("/proc", "/sys", "/usr/share", "/usr/lib") and n != "site-packages"]
        try:
            open(os.path.join(folder, "mark"), "w").close()
            written.append(folder)
        except OSError:
            pass
    return sorted(written)
"""
    assert inside(text) == ["/tmp"]


def test_every_mount_but_the_work_folder_is_read_only(inside):
    mounts = inside("def answer(): return [line.split() for line in open('/proc/self/mounts')]")
    writable = {place for _, place, kind, options, *_ in mounts if "ro" not in options.split(",")}
    assert {p for p in writable if not p.startswith("/dev/")} == {"/tmp", "/proc"}


def test_not_one_file_of_the_kit_can_be_changed(inside):
    text = "import cmlib.grade.wire as w, os\ndef answer():\n    os.chmod(w.__file__, 0o777)"
    with pytest.raises(StudentError) as error:
        inside(text)
    assert error.value.type in ("PermissionError", "OSError")


def test_the_user_is_nobody_and_stays_so(inside):
    uid, capabilities, new = inside("""
import os
def answer():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    raised = []
    for change in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.chroot("/tmp"), lambda: os.nice(-1)):
        try:
            change()
            raised.append("possible")
        except OSError as error:
            raised.append(error.errno)
    return os.getuid(), (lines["CapEff"].strip(), lines["CapPrm"].strip(), lines["NoNewPrivs"].strip(), lines["Groups"].strip()), raised
""")
    assert uid != 0 and capabilities[:3] == ("0" * 16, "0" * 16, "1")
    if os.getuid() == 0:
        assert uid >= 1 << 20 and capabilities[3] == "" and set(new) <= {1, 13}


def test_two_boxes_have_two_users_so_that_one_cannot_use_up_the_processes_of_the_other(inside):
    if os.getuid() != 0:
        pytest.skip("without root each box has a user namespace, which counts by itself")
    assert inside("import os\nanswer = os.getuid") != inside("import os\nanswer = os.getuid")


def test_only_processes_of_the_box_are_seen(inside):
    names = inside("import os\ndef answer(): return [open(f'/proc/{p}/comm').read().strip() for p in os.listdir('/proc') if p.isdigit()]")
    assert len(names) == 2 and names[0] == "bwrap"
    with pytest.raises(StudentError, match=r"ProcessLookupError|PermissionError"):
        inside(f"import os\ndef answer(): os.kill({os.getpid()}, 0)")


def test_the_environment_is_empty_also_that_of_the_first_process(inside, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_GRADER", "swordfish")
    text = """
import os
def answer():
    found = [" ".join(os.environ)]
    for place in ("/proc/1/environ", "/proc/2/environ", "/proc/self/environ", "/proc/1/cmdline"):
        try:
            found.append(open(place).read())
        except OSError:
            pass
    return " ".join(found)
"""
    found = inside(text)
    assert "SECRET" not in found and "swordfish" not in found and str(os.getcwd()) + "/tests" not in found


def test_no_descriptor_leads_outside(inside):
    links = inside("""
import os
def answer():
    places = [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")]
    return [os.readlink(p) for p in places if os.path.lexists(p)]
""")
    assert [link for link in links if not link.startswith(("pipe:", "/dev/null", "/proc/"))] == []
    assert sum(link.startswith("pipe:") for link in links) == 2


def test_the_network_is_closed_both_ways(inside):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        text = f"""
import socket
def answer():
    socket.create_connection(("127.0.0.1", {port}), 0.2)
"""
        with pytest.raises(StudentError, match=r"PermissionError|OSError|ConnectionRefused"):
            inside(text)
        with pytest.raises(TimeoutError):
            server.accept()
    assert inside("import os\ndef answer(): return sorted(line.split(':')[0].strip() for line in open('/proc/net/dev').readlines()[2:])") == ["lo"]


@pytest.mark.parametrize(
    "call",
    ["memfd_create(b'x', 0)", "shmget(0, 4096, 0o1600)", "unshare(0x10000000)", "socket(40, 1, 0)", "ptrace(16, 1, 0, 0)", "msgget(0, 0o1600)"],
)
def test_system_calls_that_no_limit_covers_are_refused(inside, call):
    text = f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\ndef answer(): return libc.{call}, ctypes.get_errno()"
    assert inside(text) == (-1, 1)


def test_a_process_can_be_cloned_but_not_into_namespaces_of_its_own(inside):
    text = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def answer():
    made = libc.syscall({number}, 0x10000000 | 17, 0, 0, 0, 0), ctypes.get_errno()
    if made[0] == 0:
        os._exit(0)
    child = os.fork()
    if not child:
        os._exit(7)
    return made, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""
    assert inside(text.replace("{number}", "56" if os.uname().machine == "x86_64" else "220")) == ((-1, 1), 7)


def test_memory_of_one_process_ends_at_the_limit(inside):
    with pytest.raises(StudentError, match="MemoryError"):
        inside("def answer(): return len(bytearray(1 << 30))")


def test_memory_of_all_processes_together_ends_at_the_limit(inside):
    text = """
import os, time
def answer():
    for _ in range(8):
        if not os.fork():
            hoard = bytearray(os.urandom(1 << 10)) * (100 << 10)
            time.sleep(60)
    time.sleep(60)
"""
    with pytest.raises(AnswerError, match="used more than 384 MB"):
        inside(text)


def test_shared_memory_counts(inside):
    text = """
import mmap, os, time
def answer():
    hoard = [mmap.mmap(-1, 100 << 20) for _ in range(8)]
    for h in hoard:
        for i in range(0, len(h), 4096):
            h[i] = 1
    time.sleep(60)
"""
    with pytest.raises(AnswerError, match="used more than 384 MB"):
        inside(text)


def test_memory_that_forked_processes_share_counts_once(inside):
    text = """
import os, time
hoard = bytearray(os.urandom(1 << 10)) * (100 << 10)
def answer():
    for _ in range(8):
        if not os.fork():
            time.sleep(60)
    time.sleep(1)
    return len(hoard) >> 20
"""
    assert inside(text) == 100


def test_the_work_folder_has_a_size(inside):
    text = """
import errno
def answer():
    written = 0
    try:
        for i in range(100):
            with open(f"/tmp/{i}", "wb") as file:
                written += file.write(bytes(1 << 20))
    except OSError as error:
        return written >> 20, errno.errorcode[error.errno]
"""
    written, why = inside(text)
    assert written <= QUICK.disk // MB and why == "ENOSPC"


def test_empty_files_count_as_memory(inside):
    limits = replace(ROOMY, memory=128 * MB)
    with pytest.raises(AnswerError, match="used more than 128 MB"):
        inside("import os\ndef answer():\n    for i in range(10**7):\n        os.mknod(f'/tmp/{i}')", limits)


def test_processes_have_a_number(inside):
    text = """
import os, time
def answer():
    children = 0
    try:
        for _ in range(1000):
            if not os.fork():
                time.sleep(60)
            children += 1
    except OSError:
        return children
"""
    assert 20 <= inside(text) < QUICK.processes


def test_limits_are_hard(inside):
    limits = inside(
        "import resource as r\ndef answer(): return [r.getrlimit(k) for k in (r.RLIMIT_DATA, r.RLIMIT_NPROC, r.RLIMIT_FSIZE, r.RLIMIT_CORE)]"
    )
    assert limits == [(n, n) for n in (QUICK.memory, QUICK.processes, QUICK.disk, 0)]
    with pytest.raises(StudentError, match=r"ValueError|PermissionError"):
        inside("import resource as r\ndef answer(): r.setrlimit(r.RLIMIT_NPROC, (10**4, 10**4))")


def in_namespace(inode: int) -> list[str]:
    found = []
    for pid in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if pid.isdigit() and os.stat(f"/proc/{pid}/ns/pid").st_ino == inode and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
                found.append(pid)
    return found


ORPHANS = """
import os, signal, time
def answer():
    for _ in range(5):
        child = os.fork()
        if child:
            os.waitpid(child, 0)  # it has left its own child behind when it ends
        else:
            os.setsid()
            for n in range(1, 65):
                try:
                    signal.signal(n, signal.SIG_IGN)
                except (OSError, ValueError):
                    pass
            if os.fork():
                os._exit(0)
            while True:
                time.sleep(1)
    return 1
"""


def test_with_the_box_ends_every_process_in_it():
    with Boxed([ORPHANS], ROOMY) as boxed:
        assert boxed.call("answer", (), {}) == 1
        held = os.open(f"/proc/{[*boxed.box.pids()][-1]}/ns/pid", os.O_RDONLY)  # numbers of namespaces are used again
        inode = os.fstat(held).st_ino
        assert inode != os.stat("/proc/self/ns/pid").st_ino and len(in_namespace(inode)) >= 6
    assert in_namespace(inode) == []
    os.close(held)


def test_a_grader_that_is_killed_leaves_no_box_behind():
    program = f"""
import os, sys
sys.path[:0] = {[str(ROOT), str(Path(__file__).parent)]}
from test_box import ORPHANS, ROOMY
from cmlib.grade.judge import Boxed
boxed = Boxed([ORPHANS, "def forever():\\n    while True: pass"], ROOMY)
boxed.call("answer", (), {{}})
print([*boxed.box.pids()][-1], flush=True)
boxed.call("forever", (), {{}})
"""
    grader = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    held = os.open(f"/proc/{int(grader.stdout.readline())}/ns/pid", os.O_RDONLY)
    inode = os.fstat(held).st_ino
    assert len(in_namespace(inode)) >= 6
    grader.kill()
    grader.communicate()
    end = time.monotonic() + 20
    while in_namespace(inode) and time.monotonic() < end:
        time.sleep(0.02)
    assert in_namespace(inode) == []
    os.close(held)


def test_no_descriptor_or_thread_is_left_of_many_boxes():
    before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        Box(QUICK).close()
    time.sleep(0.2)
    assert len(os.listdir("/proc/self/fd")) == before and threading.active_count() <= threads


def test_without_bubblewrap_it_refuses_and_says_what_to_install(monkeypatch):
    monkeypatch.setattr(box_module.shutil, "which", lambda name: None)
    assert "apt install bubblewrap" in missing()
    with pytest.raises(GraderError, match="apt install bubblewrap"):
        Box(QUICK)


def test_without_a_box_it_runs_only_where_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(box_module.shutil, "which", lambda name: None)
    with Boxed(["def answer(): return 3"], QUICK, boxed=False) as boxed:
        assert boxed.call("answer", (), {}) == 3
        process, folder = boxed.box.process, Path(boxed.box.folder.name)
    assert process.returncode and not folder.exists()


def test_a_box_that_does_not_start_is_the_graders_trouble(monkeypatch):
    monkeypatch.setattr(box_module, "_START", "import sys; sys.exit('no such kit')")
    with pytest.raises(GraderError, match="did not start: no such kit"):
        Box(QUICK)
