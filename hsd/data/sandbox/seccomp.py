"""System calls that no program in the sandbox needs, refused by a seccomp filter (seccomp(2)).

They are ways to reach other processes, to make namespaces (and with them capabilities), to hold
memory that no limit counts, and rarely used parts of the kernel.
"""

from __future__ import annotations

import ctypes
import platform
import struct

# name: (x86_64, aarch64)
_REFUSED = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
}
_SOCKET = (41, 198)
_FAMILIES = (1, 2, 10)
"""Of sockets: unix, IPv4 and IPv6. A network namespace does not bound all of the others: through
AF_VSOCK, a virtual machine's programs reach its host."""
_CLONE = (56, 220)
_CLONE3 = (435, 435)

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_NAMESPACE_FLAGS = 0x7E020000  # every CLONE_NEW... that clone(2) takes

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _ENOSYS, _EAFNOSUPPORT = 1, 38, 97
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def available() -> bool:
    """Whether the numbers of this machine's system calls are known here."""
    return platform.machine() in _ARCHITECTURES and struct.calcsize("P") == 8


def install(*, sockets: bool) -> None:
    """Installs the filter for good, here and in all children; no_new_privs must be set.

    Args:
        sockets: leave the families of _FAMILIES allowed, where there is no network to reach.

    Raises:
        OSError: the kernel has no seccomp.
    """
    column, architecture = _ARCHITECTURES[platform.machine()]
    refused = [numbers[column] for numbers in _REFUSED.values()]
    if not sockets:
        refused.append(_SOCKET[column])
    # seccomp_data: number at 0, architecture at 4, first argument at 16
    code = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, 0, 1, 0x40000000),  # the x32 table of x86_64
        (_RETURN, 0, 0, _ERRNO | _ENOSYS),
        (_EQUAL, 0, 1, _CLONE3[column]),  # its flags are behind a pointer; libc falls back to clone
        (_RETURN, 0, 0, _ERRNO | _ENOSYS),
    ]
    for number in refused:
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    code += [
        (_EQUAL, 0, 6, _SOCKET[column]),
        (_LOAD, 0, 0, 16),
        (_EQUAL, 3, 0, _FAMILIES[0]),
        (_EQUAL, 2, 0, _FAMILIES[1]),
        (_EQUAL, 1, 0, _FAMILIES[2]),
        (_RETURN, 0, 0, _ERRNO | _EAFNOSUPPORT),
        (_RETURN, 0, 0, _ALLOW),
        (_EQUAL, 0, 3, _CLONE[column]),
        (_LOAD, 0, 0, 16),
        (_ANY_BIT, 0, 1, _NAMESPACE_FLAGS),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    packed = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = _Program(len(code), ctypes.cast(packed, ctypes.c_void_p).value)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel refuses a seccomp filter")
