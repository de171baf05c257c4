"""Namespaces, mounts, identity and limits of the sandbox, asked of the kernel directly.

unshare(2), user_namespaces(7), pivot_root(2), mount_setattr(2), capabilities(7). Runs before any
untrusted code, in the process that becomes the root of the sandbox's process tree.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import resource
import signal
import sys
from typing import Any

INNER_ID = 1000
"""User and group inside the namespace."""

OUTER_ID_OF_ROOT = 65534
"""Who the sandbox is outside, where root starts it: nobody."""

_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_SYS_MOUNT_SETATTR = 442
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_AT_RECURSIVE, _AT_FDCWD = 0x8000, -100
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SUBREAPER = 1, 38, 36

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _prctl(option: int, value: int) -> None:
    _checked(_libc.prctl(option, value, 0, 0, 0), f"prctl({option})")


def become_subreaper() -> None:
    """Orphans among the descendants become children of this process, which can then reap them."""
    _prctl(_PR_SET_SUBREAPER, 1)


def die_with_parent() -> None:
    """SIGKILL when the parent ends. A change of user undoes it."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def enter_namespaces() -> None:
    """New user, mount, pid (for children), network, ipc, host name and cgroup namespaces.

    Raises:
        OSError: the kernel or a container's policy forbids them.
    """
    flags = _NEWUSER | _NEWNS | _NEWPID | _NEWNET | _NEWIPC | _NEWUTS | _NEWCGROUP
    _checked(_libc.unshare(flags), "unshare")


def map_identity(pid: int) -> None:
    """From outside: writes who a process is that has entered a user namespace.

    Where root starts it, root is mapped as well, because the mounts need it: building the root
    directory reads root's Python. drop_privileges() comes before anything untrusted.
    """
    if os.geteuid() == 0:
        user_map = group_map = f"0 0 1\n{INNER_ID} {OUTER_ID_OF_ROOT} 1"
    else:
        _write(f"/proc/{pid}/setgroups", "deny")
        user_map, group_map = f"{INNER_ID} {os.geteuid()} 1", f"{INNER_ID} {os.getegid()} 1"
    _write(f"/proc/{pid}/uid_map", user_map)
    _write(f"/proc/{pid}/gid_map", group_map)


def _write(path: str, text: str) -> None:
    with open(path, "wb", buffering=0) as file:  # the kernel takes a map in one write only
        file.write(text.encode())


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    def text(value: str | None) -> bytes | None:
        return None if value is None else os.fsencode(value)

    result = _libc.mount(text(source), text(target), text(kind), ctypes.c_ulong(flags), text(data))
    _checked(result, f"mount {target}")


def _pivot_root(new: str, old: str) -> None:
    number = _SYS_PIVOT_ROOT[os.uname().machine]
    _checked(_libc.syscall(number, os.fsencode(new), os.fsencode(old)), "pivot_root")


def _read_only(path: str, *, devices: bool = False) -> None:
    """Makes a mount and those below it read-only, without set-user-ID and (by default) devices."""
    flags = _ATTR_RDONLY | _ATTR_NOSUID | (0 if devices else _ATTR_NODEV)
    attributes = (ctypes.c_uint64 * 4)(flags, 0, 0, 0)
    result = _libc.syscall(
        _SYS_MOUNT_SETATTR,
        _AT_FDCWD,
        os.fsencode(path),
        _AT_RECURSIVE,
        ctypes.byref(attributes),
        ctypes.sizeof(attributes),
    )
    _checked(result, f"mount_setattr {path}")


def build_root(*, work_bytes: int) -> None:
    """Replaces the file system: Python and /usr, read-only; three devices; an empty /tmp.

    There is no /proc, /sys, /etc or home directory, and Python is the standard library alone.

    Raises:
        OSError: the kernel is older than 5.12 or refuses a mount.
    """
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    # A tmpfs in front of /tmp becomes the root, and from there the old one can be bound from.
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m")
    for name in ("/tmp/old", "/tmp/new"):
        os.mkdir(name, 0o755)
    _pivot_root("/tmp", "/tmp/old")
    _mount("tmpfs", "/new", "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    for path in dict.fromkeys(
        ["/usr", "/bin", "/lib", "/lib64", os.path.realpath(sys.base_prefix)]
    ):
        _show(path)
    _hide_packages()
    for name in ("null", "zero", "urandom"):
        _bind(f"/dev/{name}", devices=True)
    os.mkdir("/new/tmp", 0o755)
    os.chdir("/new")
    _pivot_root(".", ".")
    _checked(_libc.umount2(b".", _MNT_DETACH), "umount")
    os.chdir("/")
    _read_only("/", devices=True)
    owner = f"uid={INNER_ID},gid={INNER_ID},mode=700"
    options = f"size={work_bytes},nr_inodes=4096,{owner}"
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, options)
    os.chdir("/tmp")


def _show(path: str) -> None:
    if os.path.islink(f"/old{path}"):
        os.symlink(os.readlink(f"/old{path}"), f"/new{path}")
    elif os.path.isdir(f"/old{path}") and not os.path.exists(f"/new{path}"):
        _bind(path)


def _hide_packages() -> None:
    """Puts an empty directory over installed packages: some hold tasks with their solutions."""
    for prefix in {"/usr", "/usr/local", os.path.realpath(sys.base_prefix)}:
        for folder in ("site-packages", "dist-packages"):
            for path in glob.glob(f"/new{prefix}/lib*/python3*/{folder}"):
                _mount("tmpfs", path, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=4k,mode=755")


def _bind(path: str, *, devices: bool = False) -> None:
    if os.path.isdir(f"/old{path}"):
        os.makedirs(f"/new{path}", exist_ok=True)
    else:
        os.makedirs(os.path.dirname(f"/new{path}"), exist_ok=True)
        with open(f"/new{path}", "w"):
            pass
    _mount(f"/old{path}", f"/new{path}", None, _MS_BIND | _MS_REC)
    _read_only(f"/new{path}", devices=devices)


def nest_pid_namespace() -> None:
    """The next child is the first process of a namespace of its own, and cannot name this one."""
    _checked(_libc.unshare(_NEWPID), "unshare")


def drop_privileges(*, user: int | None) -> None:
    """Gives up user, groups and every capability, for good.

    Args:
        user: who to become; None to stay, where this is not root already.
    """
    if user is not None:
        with contextlib.suppress(PermissionError):  # of a mapping that an ordinary user wrote
            os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    nothing = (ctypes.c_uint32 * 6)()
    _checked(_libc.capset(ctypes.byref(header), ctypes.byref(nothing)), "capset")
    forbid_new_privileges()
    die_with_parent()
    if os.getuid() == 0:
        raise PermissionError("found user 0, expected an unprivileged one")


def limit_resources(limits: Any, *, processes: int | None) -> None:
    """Per-process limits of setrlimit(2), and the number of processes of the user namespace."""
    pairs = {
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if processes is not None:
        pairs[resource.RLIMIT_NPROC] = processes
    for name, value in pairs.items():
        _, hard = resource.getrlimit(name)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def limit_cpu(seconds: int) -> None:
    """SIGXCPU after so many seconds of processor time, SIGKILL a second later."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))


def forbid_new_privileges() -> None:
    """No program that is executed from now on gains any; seccomp(2) asks for it."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
