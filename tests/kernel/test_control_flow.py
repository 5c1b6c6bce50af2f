"""What Linux before 6.7 asks of a program's control flow: the compiler lays out loops as it likes, the old kernels not.

Said here for the kernel at hand and every other: the programs as they are compiled are held against the old rule.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from typing import NamedTuple

import pytest

from otel_lb_hop.kernel import loader
from otel_lb_hop.kernel.loader import Sizes
from tests.kernel.requirements import needs_kernel

pytestmark = needs_kernel

JUMP_CLASSES = 5, 6
EXIT, CALL, ALWAYS = 0x90, 0x80, 0x00
"""linux/bpf.h and linux/bpf_common.h: BPF_JMP, BPF_JMP32; BPF_EXIT, BPF_CALL, BPF_JA."""

COMPILE = """
import json, os, sys, tempfile
from pathlib import Path
from bcc import BPF
from otel_lb_hop.kernel.compiler import make_header_tree
request = json.loads(sys.argv[1])
with tempfile.TemporaryDirectory() as folder:
    tree = Path(folder) / "headers"
    make_header_tree(Path(request["headers"]), tree)
    os.environ["BCC_KERNEL_SOURCE"] = str(tree)
    flags = [f"-I{path}" for path in request["includes"]] + [f"-D{n}={v}" for n, v in request["defines"].items()]
    module = BPF(src_file=request["source"], cflags=flags)
    print(json.dumps({name: module.dump_func(name).hex() for name in request["programs"]}))
"""
"""In a process of its own, because of the memory; it loads nothing."""


class Instruction(NamedTuple):
    """struct bpf_insn."""

    code: int
    registers: int
    offset: int
    immediate: int


def compiled(sizes: Sizes, **defines: int) -> dict[str, list[Instruction]]:
    """Compile the programs and answer their instructions, as the kernel would get them."""
    request = loader._request(loader._recipe(sizes, xdp=True), (3, 5), ())
    request["defines"] |= defines
    done = subprocess.run([sys.executable, "-c", COMPILE, json.dumps(request)], check=True, capture_output=True)
    return {
        name: [Instruction(*fields) for fields in struct.iter_unpack("=BBhi", bytes.fromhex(code))]
        for name, code in json.loads(done.stdout.splitlines()[-1]).items()
    }


def edges(number: int, instruction: Instruction) -> list[tuple[int, bool]]:
    """List where it goes on after an instruction, and whether a loop may be closed so (kernel/bpf/verifier.c, 6.6)."""
    operation = instruction.code & 0xF0
    if instruction.code & 7 not in JUMP_CLASSES or operation == CALL:
        return [(number + 1, False)]
    if operation == EXIT:
        return []
    target = number + 1 + instruction.offset
    return [(target, True)] if operation == ALWAYS else [(number + 1, True), (target, True)]


def back_edges_refused(program: list[Instruction]) -> list[tuple[int, int]]:
    """Walk a program as check_cfg() of Linux 6.6 does: which loops are closed by falling through, not by a jump."""
    refused = []
    path, rest = [0], {0: edges(0, program[0])}
    left: set[int] = set()
    while path:
        number = path[-1]
        if not rest[number]:
            left.add(path.pop())
            continue
        target, loop_allowed = rest[number].pop(0)
        if target not in rest:
            path.append(target)
            rest[target] = edges(target, program[target])
        elif target not in left and not loop_allowed:
            refused.append((number, target))
    return refused


@pytest.mark.parametrize(
    ("sizes", "defines"),
    [
        (Sizes(), {}),
        (Sizes(table_buckets=1), {}),
        (Sizes(), {"LBH_NO_COMPARE_EXCHANGE": 1}),
        (Sizes(), {"LBH_GUARDED": 1}),
    ],
    ids=["", "narrow", "before-5.12", "guarded"],
)
def test_loops_are_closed_by_jumps(sizes: Sizes, defines: dict[str, int]) -> None:
    """No program has a loop that Linux before 6.7 refuses ("back-edge from insn 475 to 476")."""
    programs = compiled(sizes, **defines)
    assert programs.keys() == loader.PROGRAMS.keys() | loader.XDP_PROGRAMS.keys()
    assert [(name, edge) for name, program in programs.items() for edge in back_edges_refused(program)] == []


def test_the_rule_itself() -> None:
    """A loop that is closed by a jump is let through; one that falls through into its beginning is not."""
    move, leave = Instruction(0xB7, 0, 0, 0), Instruction(0x95, 0, 0, 0)
    jump_if = Instruction(0x15, 0, -2, 0)
    assert back_edges_refused([move, move, jump_if, leave]) == []
    # Into the condition first; the body stands before it and falls through into it.
    assert back_edges_refused([Instruction(0x05, 0, 1, 0), move, jump_if, leave]) == [(1, 2)]
