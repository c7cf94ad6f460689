"""Linux: which calls of the kernel a program may make. All others are refused.

Computing a value needs neither new processes nor threads, signals to others, the network, executing files,
other processes' memory, namespaces, mounts, keys, nor shared memory, so none of these stands here. Owners,
modes, times and attributes of files are refused too: Landlock does not watch over them.
"""

import ctypes
import os
import sys

# Name of the call: its number on x86-64, and on arm64, where old ones are missing.
ALLOWED: dict[str, tuple[int | None, int | None]] = {
    # Data, through descriptors that are open.
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "preadv": (295, 69), "pwritev": (296, 70), "preadv2": (327, 286),
    "pwritev2": (328, 287), "lseek": (8, 62), "close": (3, 57), "close_range": (436, 436), "dup": (32, 23),
    "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59), "recvfrom": (45, 207),
    "recvmsg": (47, 212), "sendto": (44, 206), "sendmsg": (46, 211), "shutdown": (48, 210),
    "getsockopt": (55, 209), "setsockopt": (54, 208), "getsockname": (51, 204), "getpeername": (52, 205),
    "fsync": (74, 82), "fdatasync": (75, 83), "ftruncate": (77, 46), "fallocate": (285, 47),
    "fadvise64": (221, 223), "sendfile": (40, 71), "copy_file_range": (326, 285), "flock": (73, 32),
    # Files by name; the backend says which.
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "stat": (4, None),
    "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291), "statfs": (137, 43),
    "fstatfs": (138, 44), "readlink": (89, None), "readlinkat": (267, 78), "getdents": (78, None),
    "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "mkdir": (83, None),
    "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "symlink": (88, None),
    "symlinkat": (266, 36), "link": (86, None), "linkat": (265, 37), "umask": (95, 166),
    # Waiting.
    "select": (23, None), "pselect6": (270, 72), "poll": (7, None), "ppoll": (271, 73),
    "epoll_create": (213, None), "epoll_create1": (291, 20), "epoll_ctl": (233, 21),
    "epoll_wait": (232, None), "epoll_pwait": (281, 22), "epoll_pwait2": (441, 441), "eventfd": (284, None),
    "eventfd2": (290, 19), "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "pause": (34, None),
    "sched_yield": (24, 124), "wait4": (61, 260), "waitid": (247, 95), "futex": (202, 98),
    "futex_waitv": (449, 449), "futex_wake": (454, 454), "futex_wait": (455, 455),
    # Memory.
    "brk": (12, 214), "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216),
    "madvise": (28, 233), "msync": (26, 227), "mincore": (27, 232), "membarrier": (324, 283),
    # Time.
    "time": (201, None), "gettimeofday": (96, 169), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "times": (100, 153), "alarm": (37, None), "getitimer": (36, 102), "setitimer": (38, 103),
    # Its own signals.
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136), "rt_sigsuspend": (130, 133), "rt_sigtimedwait": (128, 137),
    "sigaltstack": (131, 132), "restart_syscall": (219, 128),
    # What it is.
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getresuid": (118, 148),
    "getresgid": (120, 150), "getgroups": (115, 158), "getpgid": (121, 155), "getpgrp": (111, None),
    "getsid": (124, 156), "getpriority": (140, 141), "getrlimit": (97, 163), "getrusage": (98, 165),
    "getcpu": (309, 168), "sched_getaffinity": (204, 123), "sched_getparam": (143, 121),
    "sched_getscheduler": (145, 120), "sched_get_priority_max": (146, 125),
    "sched_get_priority_min": (147, 126), "uname": (63, 160), "sysinfo": (99, 179), "getrandom": (318, 278),
    "arch_prctl": (158, None), "set_tid_address": (218, 96), "set_robust_list": (273, 99), "rseq": (334, 293),
    # Its end.
    "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip

# Calls that are allowed for some values of an argument: its place, a mask, and the values.
NARROW: dict[str, tuple[tuple[int | None, int | None], int, int, tuple[int, ...]]] = {
    # Not F_SETOWN and F_SETSIG, by which the kernel sends any signal to any process.
    "fcntl": ((72, 25), 1, 0xFFFFFFFF, (0, 1, 2, 3, 4, 5, 6, 7, 1030)),
    # Whether it is a terminal, bytes to read, closing on exec, blocking.
    "ioctl": ((16, 29), 1, 0xFFFFFFFF, (0x5401, 0x541B, 0x5451, 0x5450, 0x5421)),
    # AF_UNIX alone (asyncio needs a pair), see `_filter` for its type.
    "socketpair": ((53, 199), 0, 0xFFFFFFFF, (1,)),
    # Opening for reading or writing as is usual; O_TRUNC only for writing (Landlock before its third version
    # lets a file be emptied that may be read), and not the access mode 3, which is none of the three.
    "open": ((2, None), 1, 0x203, (0, 1, 2, 0x201, 0x202)),
    "openat": ((257, 56), 2, 0x203, (0, 1, 2, 0x201, 0x202)),
    # Reading a limit, not setting one.
    "prlimit64": ((302, 261), 2, 0xFFFFFFFF, (0,)),
}

_COLUMN = {"x86_64": 0, "aarch64": 1}
_KERNEL_NAME = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_NEWEST = 470  # a number beyond is of a call that did not exist yet: "no such call" lets libc do without

# Classic BPF, see the kernel's seccomp_filter.rst.
_LOAD, _EQUAL, _AT_LEAST, _AND, _ANSWER = 0x20, 0x15, 0x35, 0x54, 0x06
_KILL, _REFUSE, _NO_SUCH, _ALLOW = 0x80000000, 0x00050001, 0x00050026, 0x7FFF0000  # errno 1 and 38

_Step = tuple[int, int, int, int]  # operation, steps to skip if true, if false, constant


def allow_only() -> None:
    """From here on the kernel refuses this process everything else, for good.

    Raises:
        OSError: it has no filters for calls, or this processor is none of the two.
    """
    machine = os.uname().machine
    if machine not in _COLUMN or sys.maxsize < 2**32:
        raise OSError(f"no table of kernel calls for {machine}")
    steps = _filter(machine)
    code = b"".join(
        operation.to_bytes(2, sys.byteorder) + bytes([true, false]) + constant.to_bytes(4, sys.byteorder)
        for operation, true, false, constant in steps
    )
    held = ctypes.create_string_buffer(code, len(code))

    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_void_p)]

    program = Filter(len(steps), ctypes.addressof(held))
    libc = ctypes.CDLL(None, use_errno=True)
    number = ctypes.c_ulong
    if libc.prctl(22, number(2), ctypes.byref(program), number(0), number(0)):  # PR_SET_SECCOMP, a filter
        raise OSError(ctypes.get_errno(), "no filter for kernel calls")


def _filter(machine: str) -> list[_Step]:
    column = _COLUMN[machine]
    steps: list[_Step] = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, _KERNEL_NAME[machine]),
        (_ANSWER, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
    ]
    for numbers in ALLOWED.values():
        if numbers[column] is not None:
            steps += [(_EQUAL, 0, 1, numbers[column] or 0), (_ANSWER, 0, 0, _ALLOW)]
    for name, (numbers, place, mask, values) in NARROW.items():
        number = numbers[column]
        if number is None:
            continue
        body = _values(place, mask, values)
        if name == "socketpair":  # SOCK_STREAM: a datagram could be sent to any named socket
            body = _values(1, 0xF, (1,), more=True) + body
        if name == "prlimit64":  # the upper half of the address as well, and of this process
            body = _values(2, ~0, (0,), upper=True, more=True) + _values(0, ~0, (0,), more=True) + body
        steps += [(_EQUAL, 0, len(body), number), *body]
    return [*steps, (_AT_LEAST, 0, 1, _NEWEST), (_ANSWER, 0, 0, _NO_SUCH), (_ANSWER, 0, 0, _REFUSE)]


def _values(
    place: int, mask: int, values: tuple[int, ...], *, upper: bool = False, more: bool = False
) -> list[_Step]:
    """Refuse unless the argument at `place`, masked, is one of `values`; then allow, or go on if `more`."""
    half = 4 if upper == (sys.byteorder == "little") else 0
    steps: list[_Step] = [(_LOAD, 0, 0, 16 + 8 * place + half), (_AND, 0, 0, mask & 0xFFFFFFFF)]
    steps += [(_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
    steps += [(_ANSWER, 0, 0, _REFUSE)]
    return steps if more else [*steps, (_ANSWER, 0, 0, _ALLOW)]
