"""What an operator reads when the programs cannot be loaded, and where their source is."""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from otel_lb_hop.errors import KernelError
from otel_lb_hop.kernel import loader
from otel_lb_hop.kernel.compiler import exchange_maps
from otel_lb_hop.kernel.pins import Pinning

Asked = tuple[dict[str, Any], dict[str, int]]
"""What the compile child was asked, and the maps that it was given."""

REFUSED = "loading BPF programs was refused: by a seccomp profile, a security module, or in a user namespace: "
FAILED = "compiling or loading the BPF programs failed: "
NO_BPF = "this kernel has no bpf(2): it needs CONFIG_BPF_SYSCALL and CONFIG_NET_CLS_BPF: "
NO_BCC = "RuntimeError: the Python package bcc cannot be imported (No module named 'bcc'): install python3-bpfcc"
VERIFIER = "Exception: Failed to load BPF program b'lbh_ingress': Permission denied"
NOT_PERMITTED = "bpf: Failed to load program: Operation not permitted"

CASES = [
    (NO_BCC, "", f"bcc is missing: {NO_BCC}"),
    ("Exception: Failed to compile", "a.c:1:1: error: no\n1 error generated.\n\n", f"{FAILED}@ 1 error generated."),
    (VERIFIER, "R1 invalid mem access\nprocessed 9 insns\n", f"{FAILED}@ processed 9 insns"),
    (VERIFIER, "", f"{FAILED}@"),
    ("Exception: Failed to load BPF", NOT_PERMITTED, f"{REFUSED}@ {NOT_PERMITTED}"),
    ("OSError: [Errno 1] Operation not permitted", "", f"{REFUSED}@"),
    ("OSError: [Errno 38] Function not implemented", "", f"{NO_BPF}@"),
    ("Exception: Failed to load BPF", "bpf: Function not implemented", f"{NO_BPF}@ bpf: Function not implemented"),
    ("FileNotFoundError: /usr/include/linux/bpf.h is missing", "", f"{FAILED}@"),
    ("the compile child ended with -9", "", f"{FAILED}@"),
    ("the compile child ended with -6", "LLVM ERROR: out of memory\n", f"{FAILED}@ LLVM ERROR: out of memory"),
]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """Keep what the compile child would be asked; there is none."""
    requests: list[Asked] = []

    def ask(request: dict[str, Any], given: dict[str, int]) -> None:
        requests.append((request, given))
        raise KernelError("no child here")

    monkeypatch.setattr(loader, "_ask_child", ask)
    return requests


@pytest.mark.parametrize(("error", "output", "told"), CASES)
def test_explain(error: str, output: str, told: str) -> None:
    """Each failure is told with what to do first, then the child's error and its last line."""
    assert loader._explain(error, output) == told.replace("@", error)


def test_explain_the_verifier() -> None:
    """What the verifier refuses without CAP_PERFMON it may accept with it."""
    told = loader._explain(VERIFIER, "processed 9 insns\n", guarded=True)
    assert told == (
        "CAP_PERFMON is missing, without it this kernel's verifier does not accept the programs: "
        f"{VERIFIER} processed 9 insns"
    )


def test_bpf_folder() -> None:
    """The C sources are found, with the header and the stub headers beside them."""
    folder = loader.bpf_folder()
    for name in ("lb_hop.c", "lb_hop.h", "parse.h", "conntrack.h", "include"):
        assert (folder / name).exists()


@pytest.mark.parametrize("place", ["package/bpf", "bpf"])
def test_bpf_folder_places(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed, the sources are in the package; in a checkout beside it; nowhere is an incomplete installation."""
    monkeypatch.setattr(loader, "__file__", str(tmp_path / "package/kernel/loader.py"))
    with pytest.raises(KernelError, match="the installation is not complete"):
        loader.bpf_folder()
    (tmp_path / place).mkdir(parents=True)
    with pytest.raises(KernelError, match="BPF sources are not in"):
        loader.bpf_folder()
    (tmp_path / place / "lb_hop.c").touch()
    assert loader.bpf_folder() == tmp_path / place


def test_installed_sources_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's own sources win over a folder that happens to stand beside it."""
    monkeypatch.setattr(loader, "__file__", str(tmp_path / "package/kernel/loader.py"))
    for place in ("package/bpf", "bpf"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "lb_hop.c").touch()
    assert loader.bpf_folder() == tmp_path / "package/bpf"


@pytest.mark.parametrize(
    ("release", "old"),
    [
        ("5.11.22", True),
        ("4.19.0-27-amd64", True),
        ("5.12.0", False),
        ("6.1.0-49-amd64", False),
        ("6.10", False),
        ("strange", True),
    ],
)
def test_request(release: str, old: bool, asked: list[Asked], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    """The child is told sizes, source and types; kernels before 5.12 have no atomic compare and exchange."""
    monkeypatch.setattr(platform, "release", lambda: release)
    with pytest.raises(KernelError, match="no child here"):
        loader.load(loader.Sizes(vip_ports=7, places=8))
    ((request, given),) = asked
    assert request["defines"]["LBH_MAX_VIP_PORTS"] == 7
    assert request["defines"]["LBH_MAX_PLACES"] == 8
    assert request["defines"]["LBH_MAX_TOLD_FLOWS"] == 16_384
    assert request["programs"]["lbh_ingress"] == "tc"
    assert request["programs"]["lbh_conntrack"] == "socket_filter"
    assert ("LBH_NO_COMPARE_EXCHANGE" in request["defines"]) is old
    assert Path(request["source"]).is_file()
    assert (request["given"], given) == ([], {})


def test_xdp_only_where_it_is_wanted(asked: list[Asked]) -> None:
    """The program for XDP is compiled and loaded only when asked for: it costs a start its time."""
    for xdp in (False, True):
        with pytest.raises(KernelError):
            loader.load(loader.Sizes(), xdp=xdp)
    (plain, _), (more, _) = asked
    assert more["programs"] == plain["programs"] | {"lbh_xdp": "xdp"}
    assert ("LBH_XDP" in plain["defines"], more["defines"]["LBH_XDP"]) == (False, 1)


def test_secrets_differ(asked: list[Asked]) -> None:
    """The numbers by which the table is hashed are drawn anew for each load and fit in 64 bits."""
    for _ in range(20):
        with pytest.raises(KernelError):
            loader.load(loader.Sizes())
    for name in ("LBH_HASH_MULTIPLIER", "LBH_HASH_ADDEND"):
        numbers = {int(request["defines"][name].removesuffix("ull")) for request, _ in asked}
        assert len(numbers) == 20
        assert all(0 <= number < 2**64 for number in numbers)


def test_layouts() -> None:
    """Counters go on only in maps of the same shape; the ring's size is none of it, every other size is."""
    same = loader._layout(loader.Sizes())
    assert loader._layout(loader.Sizes(ring_pages=1)) == same
    others = [loader._layout(loader.Sizes()._replace(**{name: 8})) for name in loader.Sizes._fields[:-1]]
    assert len({same, *others}) == 8
    assert all(re.fullmatch("[0-9a-f]{64}", each) for each in (same, *others))


def build_of(sizes: loader.Sizes | None = None) -> str:
    """Name the programs that these sizes ask for."""
    return loader._recipe(sizes or loader.Sizes(), xdp=False).build


def test_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs are those of another source, header, define, or type; not those of other secrets."""
    shutil.copytree(loader.bpf_folder(), tmp_path / "bpf")
    monkeypatch.setattr(loader, "bpf_folder", lambda: tmp_path / "bpf")
    builds = [build_of()]
    assert build_of() == builds[0]
    builds.append(build_of(loader.Sizes(ring_pages=1)))
    stubs = sorted((tmp_path / "bpf/include").rglob("*.h"))
    for path in (tmp_path / "bpf/lb_hop.c", tmp_path / "bpf/parse.h", stubs[0]):
        path.write_text(path.read_text() + " ")
        builds.append(build_of())
    (tmp_path / "bpf/README.md").write_text("other words")
    assert build_of() == builds[-1]
    monkeypatch.setattr(loader, "PROGRAMS", loader.PROGRAMS | {"lbh_sweep": "socket_filter"})
    builds.append(build_of())
    assert len(set(builds)) == 6


def test_loading_goes_on_in_the_background(asked: list[Asked]) -> None:
    """What comes of it, here an error, is told to whoever waits; where it pins is known at once."""
    pinning = Pinning(None, "nowhere")
    loading = loader.begin_loading(loader.Sizes(), pinning, "node1", xdp=False)
    assert loading.pinning is pinning
    with pytest.raises(KernelError, match="no child here"):
        loading.loaded.result(30)
    assert len(asked) == 1


def instructions(*each: tuple[int, int, int, int]) -> ctypes.Array[ctypes.c_char]:
    """Write instructions of 8 bytes: opcode, registers (source in the upper half), offset, constant."""
    raw = b"".join(struct.pack("=BBhi", *one) for one in each)
    return ctypes.create_string_buffer(raw, len(raw))


def test_maps_are_exchanged() -> None:
    """The map of a load of 16 bytes is another; all else stays, whatever it looks like."""
    code = instructions(
        (0x18, 0x11, 0, 5), (0, 0, 0, 0),  # r1 = map 5
        (0x18, 0x12, 0, 7), (0, 0, 0, 0),  # r2 = map 7, which is not exchanged
        (0x18, 0x03, 0, 5), (0, 0, 0, 5),  # r3 = 5, a constant
        (0x18, 0x21, 0, 5), (0, 0, 0, 8),  # r1 = the address of a value in map 5 (BPF_PSEUDO_MAP_VALUE)
        (0x18, 0x31, 0, 5), (0, 0, 0, 0),  # r1 = a kernel variable (BPF_PSEUDO_BTF_ID)
        (0x85, 0x10, 0, 5),  # call of a function of the program (BPF_PSEUDO_CALL)
        (0xB7, 0x11, 0, 5),  # r1 = 5
        (0x18, 0x11, 0, 6), (0, 0, 0, 0),  # r1 = map 6
        (0x95, 0, 0, 0),
    )  # fmt: skip
    before = code.raw
    exchange_maps(code, {5: 50, 6: 60})
    assert code.raw == before[:4] + struct.pack("=i", 50) + before[8:100] + struct.pack("=i", 60) + before[104:]


def test_the_second_half_of_a_constant_is_no_instruction() -> None:
    """Its opcode is 0 whatever the constant is, and the constant of a load may have any bytes."""
    # 0x11180000000 and the like: bytes that are those of a load of a map, at an offset that is none.
    looks = int.from_bytes(struct.pack("=BBh", 0x18, 0x11, 0), "little")
    code = instructions((0x18, 0x02, 0, looks), (0, 0, 0, looks), (0x95, 0, 0, 5))
    before = code.raw
    exchange_maps(code, {5: 50, looks: 60})
    assert code.raw == before


@pytest.mark.parametrize(("rate", "pages"), [(0, 16), (1, 16), (1_000, 128), (20_000, 2_048), (10_000_000, 4_096)])
def test_ring_holds_three_seconds(rate: int, pages: int) -> None:
    """The ring is a power of two of pages with room for three seconds of records, within bounds."""
    assert loader.ring_pages(rate) == pages
    assert pages == loader.LARGEST_RING_PAGES or pages * 4096 >= 3 * rate * 128
