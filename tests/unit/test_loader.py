"""What an operator reads when the programs cannot be loaded, and where their source is."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from otel_lb_hop.errors import KernelError
from otel_lb_hop.kernel import loader

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
def test_request(release: str, old: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    """The child is told sizes, source and types; kernels before 5.12 have no atomic compare and exchange."""
    monkeypatch.setattr(platform, "release", lambda: release)
    request = loader._request(loader.Sizes(vip_ports=7, places=8), xdp=False)
    assert request["defines"]["LBH_MAX_VIP_PORTS"] == 7
    assert request["defines"]["LBH_MAX_PLACES"] == 8
    assert request["programs"]["lbh_ingress"] == "tc"
    assert request["programs"]["lbh_conntrack"] == "socket_filter"
    assert ("LBH_NO_COMPARE_EXCHANGE" in request["defines"]) is old
    assert Path(request["source"]).is_file()


def test_xdp_only_where_it_is_wanted() -> None:
    """The program for XDP is compiled and loaded only when asked for: it costs a start its time."""
    plain, more = (loader._request(loader.Sizes(), xdp=xdp) for xdp in (False, True))
    assert more["programs"] == plain["programs"] | {"lbh_xdp": "xdp"}
    assert ("LBH_XDP" in plain["defines"], more["defines"]["LBH_XDP"]) == (False, 1)


def test_secrets_differ() -> None:
    """The numbers by which the table is hashed are drawn anew for each load and fit in 64 bits."""
    drawn = [loader._request(loader.Sizes(), xdp=False)["defines"] for _ in range(20)]
    for name in ("LBH_HASH_MULTIPLIER", "LBH_HASH_ADDEND"):
        numbers = {int(defines[name].removesuffix("ull")) for defines in drawn}
        assert len(numbers) == 20
        assert all(0 <= number < 2**64 for number in numbers)


@pytest.mark.parametrize(("rate", "pages"), [(0, 16), (1, 16), (1_000, 128), (20_000, 2_048), (10_000_000, 4_096)])
def test_ring_holds_three_seconds(rate: int, pages: int) -> None:
    """The ring is a power of two of pages with room for three seconds of records, within bounds."""
    assert loader.ring_pages(rate) == pages
    assert pages == loader.LARGEST_RING_PAGES or pages * 4096 >= 3 * rate * 128
