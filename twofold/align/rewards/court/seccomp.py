"""The system calls that a candidate may not make, as a classic BPF program: no privilege is needed to install it.

Refused: sockets, new processes and programs, leaving the process group, signals and any other hand on other
processes, mounts and namespaces, shared memory that outlives its maker, and what has been the kernel's weakest side
(io_uring, bpf, keyrings).
Threads, files and memory stay. Each refusal is EPERM, which Python shows as PermissionError.
"""

from __future__ import annotations

import ctypes
import platform
import struct

_REFUSED = """
    socket 41 198; socketpair 53 199; connect 42 203; bind 49 200; accept 43 202; fork 57 -; vfork 58 -;
    execve 59 221; execveat 322 281; kill 62 129; tkill 200 130; tgkill 234 131; rt_sigqueueinfo 129 138;
    rt_tgsigqueueinfo 297 240; pidfd_send_signal 424 424; pidfd_open 434 434; pidfd_getfd 438 438;
    ptrace 101 117; process_vm_readv 310 270; kcmp 312 272; process_vm_writev 311 271; process_madvise 440 440;
    process_mrelease 448 448; sched_setaffinity 203 122; sched_setscheduler 144 119; sched_setparam 142 118;
    sched_setattr 314 274; setpriority 141 140; ioprio_set 251 30; setsid 112 157; setpgid 109 154;
    migrate_pages 256 238; move_pages 279 239; personality 135 92; unshare 272 97; setns 308 268; mount 165 40;
    umount2 166 39; chroot 161 51; pivot_root 155 41; open_tree 428 428; move_mount 429 429; fsopen 430 430;
    mount_setattr 442 442; open_by_handle_at 304 265; name_to_handle_at 303 264; bpf 321 280;
    perf_event_open 298 241; userfaultfd 323 282; io_uring_setup 425 425; add_key 248 217; request_key 249 218;
    keyctl 250 219; memfd_create 319 279; shmget 29 194; semget 64 190; msgget 68 186; mq_open 240 180
"""  # name, number on x86_64, number on aarch64
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH
_CLONE, _CLONE3, _PRLIMIT = (56, 220), 435, (302, 261)
_SIGNALS_OF_FILES = (  # number of the call, values of its second argument: who is sent which signal by a file
    ((72, 25), (8, 10, 15)),  # fcntl: F_SETOWN, F_SETSIG, F_SETOWN_EX
    ((16, 29), (0x8901, 0x8902)),  # ioctl: FIOSETOWN, SIOCSPGRP
)
_THREAD = 0x10000  # CLONE_THREAD
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _EPERM, _ENOSYS, _KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
_NUMBER, _ARCH, _FIRST, _SECOND = 0, 4, 16, 24  # offsets into struct seccomp_data; low halves of arguments


def program(machine: str) -> bytes | None:
    """The filter for a machine as struct sock_filter items; None where its system calls are not listed."""
    if machine not in _MACHINES:
        return None
    column, arch = _MACHINES[machine]
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, 0x40000000),  # x32: the same calls under other numbers
        (_RETURN, 0, 0, _EPERM),
        (_EQUAL, 0, 1, _CLONE3),  # its flags lie in memory, out of a filter's sight: libc falls back to clone
        (_RETURN, 0, 0, _ENOSYS),
    ]
    for call in _REFUSED.split(";"):
        number = call.split()[1 + column]
        if number != "-":
            code += [(_EQUAL, 0, 1, int(number)), (_RETURN, 0, 0, _EPERM)]
    for numbers, values in _SIGNALS_OF_FILES:
        code += [(_EQUAL, 0, 2 + 2 * len(values), numbers[column]), (_LOAD, 0, 0, _SECOND)]
        for value in values:
            code += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, _EPERM)]
        code.append((_RETURN, 0, 0, _ALLOW))
    code += [
        (_EQUAL, 0, 4, _CLONE[column]),
        (_LOAD, 0, 0, _FIRST),
        (_ANY_BIT, 1, 0, _THREAD),
        (_RETURN, 0, 0, _EPERM),
        (_RETURN, 0, 0, _ALLOW),
        (_EQUAL, 0, 3, _PRLIMIT[column]),  # limits of its own (pid 0) only
        (_LOAD, 0, 0, _FIRST),
        (_EQUAL, 1, 0, 0),
        (_RETURN, 0, 0, _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in code)


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def install(libc: ctypes.CDLL) -> bool:
    """Hold this process and all its threads to the filter, for good; False where the kernel or machine has none."""
    code = program(platform.machine())
    if code is None:
        return False
    held = ctypes.create_string_buffer(code, len(code))
    whole = _Program(len(code) // 8, ctypes.cast(held, ctypes.c_void_p))
    return bool(libc.prctl(22, 2, ctypes.byref(whole), 0, 0) == 0)
