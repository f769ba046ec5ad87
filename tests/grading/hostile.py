"""What a submission may try, each a cell or two.

``double`` is to return 2 x of a fresh x, ``secret`` a text that stands in the hidden check, in another submission, in the grader's environment and in
a file beside; ``best`` is to ask the function that it is given. Words in capitals are filled in by the test. ``spoils``: the attack also ruins the
honest answer of its own notebook (``total``); every other attack leaves it its points.
"""

from dataclasses import dataclass
from textwrap import dedent


@dataclass(frozen=True)
class Attack:
    text: str
    spoils: bool = False


def attack(text: str, spoils: bool = False) -> Attack:
    return Attack(dedent(text), spoils)


ATTACKS = {
    # time
    "endless loop in a cell": attack("while True: pass"),
    "endless loop in an answer": attack("def double(x):\n    while True: pass"),
    "loop in C": attack("import itertools\ndef double(x): return sum(itertools.repeat(0))"),
    "regular expression that backtracks": attack("import re\ndef double(x): return re.match('(a+)+$', 'a' * 60 + 'b')"),
    "signals ignored": attack("""
        import signal
        for n in range(1, 65):
            try: signal.signal(n, signal.SIG_IGN)
            except (OSError, ValueError): pass
        def double(x):
            while True: pass
    """),
    "every exception caught": attack("""
        def double(x):
            while True:
                try:
                    while True: pass
                except BaseException: pass
    """),
    "endless in the result's iterator": attack("""
        class Endless(list):
            def __iter__(self):
                while True: yield 0
        def double(x): return Endless([1])
    """),
    "stops itself": attack("import os, signal\ndef double(x): os.kill(os.getpid(), signal.SIGSTOP)"),
    "threads left running": attack("""
        import threading, os
        def spin():
            while True: os.write(2, b"x")
        for _ in range(4): threading.Thread(target=spin, daemon=True).start()
        def double(x): return 2 * x + 1
    """),
    "processes left running": attack("""
        import os, signal
        def double(x):
            for _ in range(4):
                if not os.fork():
                    os.setsid()
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)
                    if os.fork(): os._exit(0)
                    while True: pass
            return x
    """),
    "endless at exit": attack("""
        import atexit
        def forever(*_):
            while True: pass
        class Last: __del__ = forever
        last = Last()
        atexit.register(forever)
        def double(x): raise SystemExit
    """),
    # memory, processes, disk
    "fork bomb": attack("""
        import os
        def double(x):
            while True:
                try: os.fork()
                except OSError: pass
    """),
    "memory bomb": attack("def double(x):\n    hoard = []\n    while True: hoard.append(bytearray(1 << 24))"),
    "memory bomb of many processes": attack("""
        import os
        def double(x):
            for _ in range(12): os.fork()
            hoard = []
            while True: hoard.append(os.urandom(1 << 20))
    """),
    "memory that belongs to no process": attack("""
        import os
        def double(x):
            hoard = []
            while True:
                hoard.append(os.memfd_create("hoard"))
                os.write(hoard[-1], bytes(1 << 24))
    """),
    "disk filler": attack("""
        import tempfile
        def double(x):
            with tempfile.NamedTemporaryFile() as file:
                while True: file.write(bytes(1 << 20))
    """),
    "many empty files": attack("import os, tempfile\ndef double(x):\n    for i in range(10**9): os.mknod(f'{tempfile.gettempdir()}/{i}')"),
    "huge output": attack("""
        import os, sys
        print("x" * 10**7)
        print("x" * 10**7, file=sys.stderr)
        def double(x):
            while True: os.write(1, b"x" * 10**6); os.write(2, b"x" * 10**6)
    """),
    "giant array": attack("import numpy as np\ndef double(x): return np.zeros(1 << 24)"),
    "giant array that is empty": attack("import numpy as np\ndef double(x): return np.zeros((1 << 50, 0))"),
    "giant number": attack("def double(x): return 1 << 10**6"),
    "giant text": attack("def double(x): return 'x' * 10**8"),
    "deep recursion": attack("import sys\nsys.setrecursionlimit(10**9)\ndef double(x): return double(x)"),
    "deeply nested result": attack("def double(x):\n    deep = []\n    for _ in range(500): deep = [deep]\n    return deep"),
    "result that holds itself": attack("def double(x):\n    me = {}\n    me['me'] = [me]\n    return me"),
    "keys that collide": attack("def double(x): return {i * (2**61 - 1): 0 for i in range(10**5)}"),
    # the process's end
    "os._exit in a cell": attack("import os\nos._exit(0)"),
    "os._exit in an answer": attack("import os\ndef double(x): os._exit(0)"),
    "crash": attack("import ctypes\ndef double(x): ctypes.string_at(0)"),
    "all processes killed": attack("import os\ndef double(x):\n    os.kill(-1, 9)\n    os.kill(1, 9)\n    os.kill(os.getpid(), 9)"),
    "pipe closed, process left": attack("import os, time\ndef double(x):\n    os.closerange(0, 256)\n    time.sleep(60)"),
    # reading
    "files searched for the answer": attack("""
        import os
        found = []
        def search(folder):
            for inside, inner, names in os.walk(folder):
                inner[:] = [n for n in inner if n not in ("site-packages", "python3", "proc", "sys", "share", "include")]
                for name in names:
                    try:
                        with open(os.path.join(inside, name), "rb") as file: text = file.read(1 << 16)
                    except OSError: continue
                    at = text.find(b"swordfish-")
                    if at >= 0: found.append(text[at:at + 26].decode())
        for folder in ("/kit", "/tmp", "/home", "/work", "/root", "/etc", "/var", "/mnt", "/opt", "/srv"): search(folder)
        def secret(): return found[0]
    """),
    "answer, neighbour and file read by their paths": attack("""
        import os, re
        def secret():
            for path in PATHS:
                for way in ("", "/proc/1/root", "/proc/self/root", "/tmp/../..", "/proc/2/cwd/../"):
                    try: return re.search("swordfish-[0-9a-f]{16}", open(way + path).read())[0]
                    except OSError: pass
    """),
    "environment": attack("import os\ndef secret(): return os.environ['GRADERS_SECRET']"),
    "environments in proc": attack("""
        import os, re
        def secret():
            for pid in os.listdir("/proc"):
                for name in ("environ", "cmdline", "maps"):
                    try: text = open(f"/proc/{pid}/{name}").read()
                    except OSError: continue
                    if hit := re.search("swordfish-[0-9a-f]{16}", text): return hit[0]
    """),
    "memory of other processes": attack("""
        import ctypes, os, re
        def secret():
            for pid in {1, os.getppid(), GRADING}:
                ctypes.CDLL(None).ptrace(16, pid, 0, 0)
                try:
                    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb") as memory:
                        for line in maps:
                            if "heap" in line or "rw-p" in line:
                                start, end = (int(n, 16) for n in line.split()[0].split("-"))
                                memory.seek(start)
                                if hit := re.search(b"swordfish-[0-9a-f]{16}", memory.read(end - start)): return hit[0].decode()
                except OSError: pass
    """),
    "own frames and objects": attack("""
        import gc, sys
        def secret():
            frame, texts = sys._getframe(), []
            while frame:
                texts += [repr(frame.f_locals), repr(frame.f_code.co_consts)]
                frame = frame.f_back
            texts += [o for o in gc.get_objects() if isinstance(o, str)]
            text = " ".join(texts)
            at = text.index("fish-") - 5
            return text[at:at + 26]
    """),
    "socket out": attack("import socket\ndef secret(): return socket.create_connection(('127.0.0.1', PORT), 1).recv(99).decode()"),
    "socket of the machine, by name": attack("""
        import socket
        def secret():
            s = socket.socket(socket.AF_UNIX)
            s.connect("\\0grader-TOKEN")
            return s.recv(99).decode()
    """),
    "socket in": attack("""
        import socket
        server = socket.create_server(("0.0.0.0", BACK))
        server.settimeout(1)
        def secret(): return server.accept()[0].recv(99).decode()
    """),
    # writing
    "writing outside": attack("""
        for folder in PLACES:
            for way in ("", "/proc/1/root", "/proc/self/cwd/../../.."):
                try: open(f"{way}{folder}/MARK", "w").write("here")
                except OSError: pass
        def double(x): return x
    """),
    "links out of the work folder": attack("""
        import os
        for i, folder in enumerate(PLACES):
            try:
                os.symlink(folder, f"/tmp/{i}")
                open(f"/tmp/{i}/MARK", "w").write("here")
            except OSError: pass
        def double(x): return x
    """),
    "sitecustomize, pth and the kit": attack("""
        import os, site, sys
        for folder in {*sys.path, *site.getsitepackages(), sys.prefix, "/kit", "/kit/cmlib/grade"}:
            for name in ("sitecustomize.py", "usercustomize.py", "MARK.pth", "MARK"):
                try: open(os.path.join(folder, name), "a").write("import os; os.abort()")
                except OSError: pass
        for path in ("/kit/cmlib/grade/trial.py", "/kit/cmlib/grade/runner.py"):
            try: os.remove(path)
            except OSError: pass
        def double(x): os._exit(0)
    """),
    "mounts and namespaces": attack("""
        import ctypes, os
        libc = ctypes.CDLL(None)
        libc.unshare(0x10000000)
        libc.mount(b"none", b"/kit", b"tmpfs", 0, 0)
        libc.mount(b"none", b"/", None, 32 | 4096, None)
        os.system("mount -o remount,rw / ; umount -l /kit ; chroot /proc/1/root touch /MARK ; nsenter -t 1 -m touch /tmp/MARK")
        def double(x): return open("/kit/MARK", "w") and x
    """),
    "root asked for": attack("""
        import os
        for change in (os.setuid, os.seteuid, os.setgid):
            try: change(0)
            except OSError: pass
        os.system("su -c 'touch PLACE/MARK' ; sudo -n touch PLACE/MARK ; pkexec touch PLACE/MARK")
        def double(x): return x
    """),
    "keys typed into the terminal": attack("""
        import fcntl, os
        def double(x):
            for name in ("/dev/tty", "/dev/console", "/proc/self/fd/0", "/dev/pts/0"):
                try:
                    fd = os.open(name, os.O_RDWR)
                    for c in b"touch PLACE/MARK\\n": fcntl.ioctl(fd, 0x5412, bytes([c]))
                except OSError: pass
            return x
    """),
    "folder changed": attack("import os\nos.chdir('/proc')\nos.umask(0o777)\ndef double(x): return x"),
    # faking
    "checker patched": attack("""
        import cmlib.grade.trial as t, cmlib.grade.wire as w
        t.Trial.close = t.Trial.equal = lambda *a, **k: None
        t.Trial.score = lambda self, points: points
        t.difference = lambda *a: ""
        t.Part.ok = property(lambda self: True, lambda self, v: None)
        def double(x): return x
        def secret(): return "?"
    """),
    "numpy patched": attack("""
        import numpy as np
        for name in ("isclose", "allclose", "array_equal", "asarray", "count_nonzero", "all", "any", "testing"):
            setattr(np, name, lambda *a, **k: True)
        np.testing = None
        def double(x): return x
    """),
    "builtins patched": attack("""
        import builtins
        builtins.AssertionError = builtins.Exception = type("Quiet", (BaseException,), {})
        builtins.abs = builtins.len = builtins.max = lambda *a: 0
        builtins.isinstance = lambda *a: True
        def double(x): return x
    """),
    "runner patched": attack("""
        import sys
        def reply(self, kind, *rest):
            from cmlib.grade.wire import pack
            return pack([self.number, "value", True])
        sys.modules["cmlib.grade.runner"].Runner.reply = reply
    """, spoils=True),
    "replies written ahead": attack("""
        import os
        from cmlib.grade.wire import pack
        pipes = [n for n in range(3, 20) if os.path.exists(f"/proc/self/fd/{n}") and "pipe" in os.readlink(f"/proc/self/fd/{n}")]
        for fd in pipes:
            for number in range(1, 30):
                try: os.write(fd, pack([number, "value", True]))
                except OSError: break
        def double(x): return x
    """, spoils=True),
    "replies that claim points": attack("""
        import gc
        from cmlib.grade.wire import Pipe, pack
        pipe = next(o for o in gc.get_objects() if isinstance(o, Pipe))
        def double(x):
            for n in range(1, 30):
                for kind in ("points", "score", "ok", "value", "ask", "__class__"):
                    pipe.send(pack([n, kind, 2]))
        def secret():
            pipe.send(pack({"points": 2, "max": 2, "ok": True}))
    """, spoils=True),
    "replies that are no messages": attack("""
        import gc, os
        from cmlib.grade.wire import Pipe
        pipe = next(o for o in gc.get_objects() if isinstance(o, Pipe))
        def double(x): os.write(pipe.writable, b"\\xff" * 8)
        def secret(): os.write(pipe.writable, b"\\x08\\0\\0\\0\\0\\0\\0\\0[[[[[[[[")
        def best(f): os.write(pipe.writable, (10**5).to_bytes(4, "little") + bytes(4) + b"[" * 10**4)
    """),
    "bytes of an array that lie": attack("""
        import gc, json, os, struct
        from cmlib.grade.wire import Pipe
        pipe = next(o for o in gc.get_objects() if isinstance(o, Pipe))
        def send(dtype, shape):
            for n in range(1, 30):
                text = json.dumps([n, "value", {"array": [dtype, shape]}]).encode()
                os.write(pipe.writable, struct.pack("<II", len(text), 8) + text + b"\\x93NUMPY\\1\\0")
        def double(x): send("<f8", [1 << 40, 1 << 40])
        def secret(): send("|O", [1])
        def best(f): send("<f8", [-1])
    """),
    "late writing to the pipe": attack("""
        import gc, threading, time
        from cmlib.grade.wire import Pipe, pack
        pipe = next(o for o in gc.get_objects() if isinstance(o, Pipe))
        def late():
            time.sleep(.05)
            while True: pipe.send(pack([1, "value", True]) + b"junk")
        def double(x):
            threading.Thread(target=late, daemon=True).start()
            time.sleep(.2)
            return x
    """),
    "function asked a million times": attack("def best(f):\n    for i in range(10**7): f(i)"),
    "function asked from threads": attack("""
        import threading
        def best(f):
            threads = [threading.Thread(target=lambda: [f(i) for i in range(100)]) for _ in range(8)]
            for t in threads: t.start()
            for t in threads: t.join()
            return -1
    """),
    "function asked with anything": attack("""
        import numpy as np
        def best(f):
            for args in ((), (None,), ("x" * 10**6,), (np.zeros(10**6),), ([[[]]],), (f,), (1, 2, 3)):
                try: f(*args)
                except Exception: pass
            for kwargs in ({"__class__": 1}, {"self": 1}, {"": 1}):
                try: f(**kwargs)
                except Exception: pass
            return f.__globals__, f.__closure__
    """),
    "functions that nobody handed over": attack("""
        import gc
        from cmlib.grade.runner import Runner
        runner = next(o for o in gc.get_objects() if isinstance(o, Runner))
        def double(x): return runner.outside(0)("os")
        def secret(): return runner.outside(-1)()
        def best(f): return runner.outside("__class__")(0)
    """),
    "objects that equal everything": attack("""
        class Yes:
            __eq__ = __ne__ = __lt__ = __gt__ = __le__ = __ge__ = lambda *a: True
            __bool__ = lambda self: True
            __len__ = lambda self: 12
            __array__ = lambda self, *a, **k: __import__("numpy").zeros((4, 3))
            __sub__ = __rsub__ = __abs__ = __getattr__ = __call__ = __getitem__ = lambda self, *a: self
            shape = (4, 3)
        def double(x): return Yes()
        def secret(): return Yes()
        best = Yes()
    """),
    "subclasses of plain types": attack("""
        import numpy as np
        class Array(np.ndarray):
            __array_ufunc__ = __array_function__ = __eq__ = lambda *a, **k: np.True_
            tobytes = lambda self, *a: b"\\0" * 96
        class Text(str):
            __eq__ = lambda *a: True
            __hash__ = str.__hash__
        class Number(float): __eq__ = __lt__ = __gt__ = lambda *a: True
        class Keys(dict): keys = lambda self: {"a": 1}.keys()
        def double(x): return x.view(Array)
        def secret(): return Text("?")
        def best(f): return Number(3), Keys()
    """),
    "pickles": attack("""
        import numpy as np, os, pickle
        class Run: __reduce__ = lambda self: (os.system, ("touch PLACE/MARK",))
        def double(x): return np.array([Run()])
        def secret(): return pickle.dumps(Run())
        def best(f): return Run()
    """),
    "nan": attack("""
        import numpy as np
        def double(x): return np.full_like(x, np.nan)
        def secret(): return float("nan")
        def best(f): return np.nan
    """),
    "infinite, empty and broadcast": attack("""
        import numpy as np
        def double(x): return np.inf * np.ones((1, 1))
        def secret(): return ""
        def best(f): return []
    """),
    "exceptions that bite": attack("""
        class Bite(BaseException):
            def __str__(self): raise Bite
            __repr__ = __str__
            __traceback__ = property(lambda self: 1 / 0)
        def double(x): raise Bite
        def secret(): raise KeyboardInterrupt
        def best(f): raise GeneratorExit
    """),
    "constant, and right on the visible example": attack("def double(x): return [2.0, 4.0]\ndef secret(): return 'swordfish-0000000000000000'"),
    "names shadowed": attack("check = trial = t = np = __builtins__ = None\ndef double(x): return x\ndef secret(): return trial", spoils=True),
}  # fmt: skip
