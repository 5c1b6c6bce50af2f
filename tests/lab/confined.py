"""Runs a program confined as a container runtime does it: `python -I -S confined.py OPTIONS -- PROGRAM...`.

Capabilities, user, no_new_privs, a read-only file system and a seccomp filter, in the order of runc. As root the
program holds the capabilities by its bounding set, as another user only if they are ambient.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import platform
import re
import struct
from pathlib import Path

CAPABILITIES = {"NET_ADMIN": 12, "SYS_ADMIN": 21, "PERFMON": 38, "BPF": 39}

# What the default profile of containerd and Docker (RuntimeDefault in Kubernetes) denies on x86_64 of the system calls
# that this machine's headers know, and the capability with which it allows it. Of those that need capabilities which
# nothing here is given, only that they are denied. Everything else it allows.
WITH_CAPABILITY = {"bpf": "BPF", "perf_event_open": "PERFMON"}
DENIED = {
    "acct", "add_key", "chroot", "clock_settime", "create_module", "delete_module", "fanotify_init", "finit_module",
    "fsconfig", "fsmount", "fsopen", "fspick", "get_kernel_syms", "get_mempolicy", "init_module", "io_uring_enter",
    "io_uring_register", "io_uring_setup", "ioperm", "iopl", "kcmp", "kexec_file_load", "kexec_load", "keyctl",
    "lookup_dcookie", "mbind", "migrate_pages", "mount", "mount_setattr", "move_mount", "move_pages", "nfsservctl",
    "open_by_handle_at", "open_tree", "pidfd_getfd", "pivot_root", "process_madvise", "query_module", "quotactl",
    "quotactl_fd", "reboot", "request_key", "set_mempolicy", "set_mempolicy_home_node", "setdomainname",
    "sethostname", "setns", "settimeofday", "swapoff", "swapon", "sysfs", "syslog", "umount2", "unshare", "uselib",
    "userfaultfd", "ustat", "vhangup", "_sysctl", "afs_syscall", "getpmsg", "putpmsg", "security", "tuxcall",
    "vserver",
}  # fmt: skip
PERSONALITIES = (0, 8, 0x20000, 0x20008, 0xFFFFFFFF)
FAMILIES = (38, 39, 40)
"""AF_ALG, AF_NFC and AF_VSOCK: sockets that are denied."""
NEW_NAMESPACES = 0x7E020000

UNISTD = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
AUDIT_ARCH_X86_64 = 0xC000003E
ALLOW, KILL = 0x7FFF0000, 0x80000000
LOAD, EQUAL, ABOVE, ANY_BIT, RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
NUMBER_AT, ARCH_AT, ARGUMENT_AT = 0, 4, 16

CLONE_NEWNS = 0x00020000
MS_REC_PRIVATE = 0x4000 | 0x40000
NR_MOUNT_SETATTR, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, 0x8000, 1
PR_CAPBSET_DROP, PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 24, 8, 22, 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 47, 2

libc = ctypes.CDLL(None, use_errno=True)


def lacking() -> str | None:
    """Tell what this machine lacks for it; None if nothing."""
    if platform.machine() != "x86_64" or not UNISTD.exists():
        return "the seccomp filter of the tests is for x86_64 and wants linux-libc-dev"
    return None


def check(result: int, what: str) -> None:
    """Raise what libc reports."""
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)


def prctl(option: int, *arguments: int) -> None:
    """Set a property of this process, or raise what libc reports."""
    check(libc.prctl(option, *(ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4])), f"prctl {option}")


def filter_code(numbers: dict[str, int], capabilities: list[str]) -> bytes:
    """Write the profile as a classic BPF program (struct sock_filter: code, jump if true, jump if false, value)."""
    code: list[tuple[int, int, int, int]] = []

    def fail(number: int) -> tuple[int, int, int, int]:
        return RETURN, 0, 0, 0x00050000 | number

    def on(number: int, *then: tuple[int, int, int, int]) -> None:
        code.extend([(EQUAL, 0, len(then), number), *then])

    code += [(LOAD, 0, 0, ARCH_AT), (EQUAL, 1, 0, AUDIT_ARCH_X86_64), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER_AT)]
    code += [(ABOVE, 0, 1, max(numbers.values())), fail(errno.EPERM)]
    for name in DENIED:
        on(numbers[name], fail(errno.EPERM))
    for name, capability in WITH_CAPABILITY.items():
        if capability not in capabilities:
            on(numbers[name], fail(errno.EPERM))
    on(numbers["clone3"], fail(errno.ENOSYS))
    argument = (LOAD, 0, 0, ARGUMENT_AT)
    allow = (RETURN, 0, 0, ALLOW)
    on(numbers["clone"], argument, (ANY_BIT, 0, 1, NEW_NAMESPACES), fail(errno.EPERM), allow)
    refused = [(EQUAL, len(FAMILIES) - i, 0, family) for i, family in enumerate(FAMILIES)]
    on(numbers["socket"], argument, *refused, allow, fail(errno.EPERM))
    kept = [(EQUAL, len(PERSONALITIES) - i, 0, value) for i, value in enumerate(PERSONALITIES)]
    on(numbers["personality"], argument, *kept, fail(errno.EPERM), allow)
    code.append(allow)
    return b"".join(struct.pack("=HBBI", *each) for each in code)


def filter_calls(capabilities: list[str]) -> None:
    """Put this process under the filter."""
    text = UNISTD.read_text(encoding="ascii")
    numbers = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+) (\d+)", text)}
    code = ctypes.create_string_buffer(filter_code(numbers, capabilities))
    program = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", (len(code) - 1) // 8, ctypes.addressof(code)))
    prctl(PR_SET_SECCOMP, 2, ctypes.addressof(program))


def make_read_only(writable: list[str]) -> None:
    """Make all file systems read-only, but for a new tmpfs on each of these."""
    check(libc.unshare(CLONE_NEWNS), "unshare")
    check(libc.mount(None, b"/", None, ctypes.c_ulong(MS_REC_PRIVATE), None), "mount")
    attributes = ctypes.create_string_buffer(struct.pack("=QQQQ", MOUNT_ATTR_RDONLY, 0, 0, 0))
    check(libc.syscall(NR_MOUNT_SETATTR, -100, b"/", AT_RECURSIVE, attributes, 32), "mount_setattr")
    for folder in writable:
        check(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", ctypes.c_ulong(0), b"mode=1777"), f"tmpfs on {folder}")


def give_up_capabilities(keep: list[int], user: int, *, ambient: bool) -> None:
    """Become this user with exactly these capabilities."""
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text(encoding="ascii"))
    for number in range(last + 1):
        if number not in keep:
            prctl(PR_CAPBSET_DROP, number)
    if user:
        prctl(PR_SET_KEEPCAPS, 1)
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    mask = sum(1 << number for number in keep)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
    words = struct.pack("=6I", low, low, low * ambient, high, high, high * ambient)
    check(libc.capset(header, ctypes.create_string_buffer(words)), "capset")
    for number in keep if ambient else ():
        prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number)


def main() -> None:
    """Confine this process and become the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capabilities", default="", help="names without CAP_, with commas")
    parser.add_argument("--user", type=int, default=0)
    parser.add_argument("--ambient", action="store_true")
    parser.add_argument("--writable", action="append", default=[], help="a folder that becomes a tmpfs")
    parser.add_argument("--profile", help="the capabilities that the filter is made for, if not those")
    parser.add_argument("program", nargs="+")
    arguments = parser.parse_args()
    names = [name for name in arguments.capabilities.split(",") if name]
    make_read_only(arguments.writable)
    filtered = names if arguments.profile is None else arguments.profile.split(",")
    give_up_capabilities([CAPABILITIES[name] for name in names], arguments.user, ambient=arguments.ambient)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    filter_calls(filtered)
    os.execvp(arguments.program[0], arguments.program)  # noqa: S606 - this is what it is for


if __name__ == "__main__":
    main()
