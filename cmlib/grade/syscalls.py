"""The system calls that a box refuses, as a seccomp program (classic BPF) for ``bwrap --seccomp``.

What namespaces and limits leave open: memory that belongs to no process (memfd, System V and POSIX queues), namespaces of its own, in which a user
mounts file systems of any size, sockets of families that know no network namespace, and the parts of the kernel that break most often.
"""

from __future__ import annotations

import errno
import platform
import struct

# name: (x86-64, arm64)
_REFUSED = {
    "socket": (41, 198), "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186),
    "mq_open": (240, 180), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
}  # fmt: skip
_CLONE, _CLONE3 = (56, 220), (435, 435)
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000


def known() -> bool:
    return platform.machine() in _MACHINES


def program() -> bytes:
    """The compiled filter: refused calls fail with EPERM, clone3 with ENOSYS (its flags cannot be seen, and the C library then takes clone)."""
    column, architecture = _MACHINES[platform.machine()]
    lines = [(_LOAD, 0, 0, _ARCHITECTURE), *_unless(_EQUAL, architecture, _KILL), (_LOAD, 0, 0, _NUMBER), *_if(_AT_LEAST, 0x40000000, _KILL)]
    for numbers in _REFUSED.values():
        lines += _if(_EQUAL, numbers[column], _ERROR | errno.EPERM)
    lines += _if(_EQUAL, _CLONE3[column], _ERROR | errno.ENOSYS)
    lines += [(_EQUAL, 0, 3, _CLONE[column]), (_LOAD, 0, 0, _FIRST_ARGUMENT), *_if(_ANY_BIT, _NEW_NAMESPACES, _ERROR | errno.EPERM)]
    return b"".join(struct.pack("<HBBI", *line) for line in [*lines, (_RETURN, 0, 0, _ALLOW)])


def _if(test: int, value: int, answer: int) -> list[tuple[int, int, int, int]]:
    return [(test, 0, 1, value), (_RETURN, 0, 0, answer)]


def _unless(test: int, value: int, answer: int) -> list[tuple[int, int, int, int]]:
    return [(test, 1, 0, value), (_RETURN, 0, 0, answer)]
