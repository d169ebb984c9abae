"""What the kernel can do to confine this very process, by ctypes alone: it runs inside `python -I -S`.

Every function makes one layer and says by its return value what it has achieved, since kernels and containers
differ in what they allow: a pod often forbids namespaces but has seccomp and Landlock. Nothing here can be undone
by the process it confines. Linux on x86-64 and arm64; elsewhere every layer is simply missing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
import sys

_LINUX = sys.platform == "linux"
_libc = ctypes.CDLL(None, use_errno=True) if _LINUX else None

_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 2, 4, 8, 0x4000, 0x40000
_AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = -100, 0x8000, 1
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 24, 38, 22
_SYS_MOUNT_SETATTR, _SYS_LANDLOCK = 442, (444, 445, 446)

#: Rights of Landlock that change a file system: write, remove, make, refer, truncate; and to read files and folders.
_LANDLOCK_WRITES = 1 << 1 | sum(1 << bit for bit in range(4, 15))
_LANDLOCK_READS = 1 << 2 | 1 << 3
#: Folders of the root that are not read: devices (root may read the kernel's log there), other processes, the kernel.
_UNREAD = ("dev", "proc", "sys")
#: The first version of Landlock that also covers truncating.
_LANDLOCK_NEEDED = 3

#: Refused system calls by machine. Networks and sockets on paths; new processes and other programs; signals to and
#: memory of other processes; attributes of files (Landlock does not cover them); mounts and namespaces; limits and
#: priorities of others; and what outlives the process or is a common way around all this (io_uring, bpf, keys, IPC).
_REFUSED: dict[str, tuple[int, tuple[int, ...], int, int]] = {
    # machine: (audit architecture, numbers, clone, clone3)
    "x86_64": (
        0xC000003E,
        (
            *(41, 42, 425),
            *(57, 58, 59, 322, 109, 112),
            *(62, 200, 234, 129, 297, 424, 434, 101, 310, 311),
            *(90, 91, 268, 452, 92, 93, 94, 260, 188, 189, 190, 197, 198, 199, 132, 235, 261, 280),
            *(165, 166, 272, 308, 160, 302, 141, 203),
            *(321, 298, 323, 248, 249, 250, 29, 64, 68),
        ),
        56,
        435,
    ),
    "aarch64": (
        0xC00000B7,
        (
            *(198, 203, 425),
            *(221, 281, 154, 157),
            *(129, 130, 131, 138, 240, 424, 434, 117, 270, 271),
            *(52, 53, 452, 54, 55, 5, 6, 7, 14, 15, 16, 88),
            *(40, 39, 97, 268, 164, 261, 140, 122),
            *(280, 241, 282, 217, 218, 219, 194, 190, 186),
        ),
        220,
        435,
    ),
}


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent goes, however that happens."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0)


def namespaces() -> set[str]:
    """Enter namespaces of our own, where allowed: a network without any interface; processes (from the next fork
    on), mounts and IPC that see nobody else's. Returns `{"user", "network", "processes", "mounts"}` or nothing."""
    if _libc is None:
        return set()
    uid, gid = os.getuid(), os.getgid()
    if _libc.unshare(_NEWUSER | _NEWNET | _NEWPID | _NEWNS | _NEWIPC) != 0:
        return set()
    # The same user inside as outside, so that the interpreter's files stay readable.
    with contextlib.suppress(OSError):
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{uid} {uid} 1")
        _write("/proc/self/gid_map", f"{gid} {gid} 1")
    return {"user", "network", "processes", "mounts"}


def read_only_files(folder: str) -> bool:
    """Within a mount namespace of our own: everything read-only, `/proc` and `/dev` hidden, `folder` a small empty
    memory disk. A read-only mount alone does not keep root from devices."""
    if _libc is None or _libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) != 0:
        return False
    attributes = struct.pack("QQQQ", _MOUNT_ATTR_RDONLY, 0, 0, 0)
    if _libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, attributes, len(attributes)) != 0:
        return False
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    hidden = all(
        _libc.mount(b"tmpfs", path, b"tmpfs", flags, b"size=4k,nr_inodes=16,mode=555") == 0
        for path in (b"/proc", b"/dev")
    )
    options = b"size=64m,nr_inodes=1024,mode=700"
    private = _libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options) == 0
    if private:
        os.chdir(folder)  # the old one lies beneath
    return bool(hidden and private)


def no_new_privileges() -> None:
    """Give up every capability, for good: those of a user namespace of our own would undo its mounts."""
    if _libc is None:
        return
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break
    header = struct.pack("Ii", 0x20080522, 0)
    _libc.capset(header, bytes(24))


def landlock(folder: str) -> bool:
    """Refuse whatever changes files outside `folder`, and to read devices and other processes. Needs Linux 6.2 with
    Landlock switched on."""
    if _libc is None:
        return False
    create, add, restrict = _SYS_LANDLOCK
    if _libc.syscall(create, None, 0, 1) < _LANDLOCK_NEEDED:
        return False
    ruleset = _libc.syscall(create, struct.pack("Q", _LANDLOCK_WRITES | _LANDLOCK_READS), 8, 0)
    if ruleset < 0:
        return False
    read = [f"/{name}" for name in os.listdir("/") if name not in _UNREAD and os.path.isdir(f"/{name}")]
    rules = [(folder, _LANDLOCK_WRITES | _LANDLOCK_READS), *((path, _LANDLOCK_READS) for path in read)]
    try:
        for path, rights in rules:
            beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                if _libc.syscall(add, ruleset, 1, struct.pack("=Qi", rights, beneath), 0) != 0:
                    return False
            finally:
                os.close(beneath)
        return bool(_libc.syscall(restrict, ruleset, 0) == 0)
    finally:
        os.close(ruleset)


def seccomp() -> bool:
    """Refuse sockets, new processes (threads stay), signals to others and what else the table above names."""
    machine = platform.machine()
    if _libc is None or machine not in _REFUSED or sys.maxsize < 2**32:
        return False
    program = _filter(*_REFUSED[machine])
    buffer = ctypes.create_string_buffer(program, len(program))
    descriptor = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    return int(_libc.prctl(_PR_SET_SECCOMP, 2, ctypes.c_char_p(descriptor), 0, 0)) == 0


def _filter(architecture: int, numbers: tuple[int, ...], clone: int, clone3: int) -> bytes:
    """A classic BPF program over `struct seccomp_data` (number at 0, architecture at 4, arguments from 16)."""
    load, jump_equal, jump_set, jump_above, answer = 0x20, 0x15, 0x45, 0x25, 0x06
    kill, allow, no_permission, no_such_call = 0x80000000, 0x7FFF0000, 0x50000 | 1, 0x50000 | 38
    code = [
        (load, 0, 0, 4),
        (jump_equal, 1, 0, architecture),
        (answer, 0, 0, kill),
        (load, 0, 0, 0),
        (jump_above, 0, 1, 0x3FFFFFFF),  # the x32 calls of an x86-64 kernel
        (answer, 0, 0, kill),
        # Its flags lie in memory that a filter cannot read; libc falls back to clone.
        (jump_equal, 0, 1, clone3),
        (answer, 0, 0, no_such_call),
        (jump_equal, 0, 4, clone),
        (load, 0, 0, 16),
        (jump_set, 1, 0, 0x10000),  # CLONE_THREAD
        (answer, 0, 0, no_permission),
        (answer, 0, 0, allow),
    ]
    for number in numbers:
        code += [(jump_equal, 0, 1, number), (answer, 0, 0, no_permission)]
    code.append((answer, 0, 0, allow))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
