"""The command line: exit codes and what is said on stderr. The agent itself is a stand-in."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop import __version__, agent, cli
from otel_lb_hop.errors import ConfigError, KernelError, Problem
from otel_lb_hop.ops import uninstall

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from otel_lb_hop.config import Config
    from otel_lb_hop.kernel.loader import Sizes
    from otel_lb_hop.kernel.pins import Pinning
    from otel_lb_hop.ops.logs import LineKeeper
    from otel_lb_hop.ops.stop import Stop

GOOD_FILE = "services:\n- {name: a/b, vips: [10.0.0.1], ports: [{port: 80}]}\n"


class FakeAgent:
    """Stands in for the agent: notes its settings, fails as told, and ends by the signal that it sends itself."""

    error: Exception | None = None
    signal = signal.SIGTERM
    last: FakeAgent | None = None

    def __init__(
        self, config: Config, environ: Mapping[str, str], loading: object, stop: Stop, lines: LineKeeper
    ) -> None:
        self.config = config
        self.environ = environ
        self.lines = lines
        self.loading = loading
        self.stop = stop
        self.stopped = False
        FakeAgent.last = self

    def start(self) -> bool:
        """Fail, if told to."""
        if self.error:
            raise self.error
        return True

    def run(self) -> None:
        """Be told to stop by a real signal."""
        assert not self.stop.wait(0)
        os.kill(os.getpid(), self.signal)
        self.stopped = self.stop.wait(10)


begun: list[tuple[Sizes, Pinning, bool]] = []
"""What was told to be loaded, where to be pinned, and whether with the program for XDP."""


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start with no settings and the stand-in, and put signals and the root logger back in the end."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(agent, "Agent", FakeAgent)
    monkeypatch.setattr(cli, "begin_loading", lambda sizes, pinning, _, *, xdp: begun.append((sizes, pinning, xdp)))
    monkeypatch.setattr(cli, "least", contextlib.nullcontext)  # the tests after this one keep their rights
    monkeypatch.setenv("OTEL_LB_HOP_PIN_PATH", "off")
    monkeypatch.setattr(FakeAgent, "last", None)
    begun.clear()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    logger = logging.getLogger()
    log_handlers, level = list(logger.handlers), logger.level
    logger.handlers.clear()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for log_handler in logger.handlers:
        log_handler.close()
    logger.handlers[:] = log_handlers
    logger.setLevel(level)


@pytest.fixture
def vips_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set a good VIP file."""
    path = tmp_path / "vips.yaml"
    path.write_text(GOOD_FILE)
    monkeypatch.setenv("OTEL_LB_HOP_VIPS_FILE", str(path))
    return path


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`version` prints the version and nothing else."""
    assert cli.main(["version"]) == 0
    assert capsys.readouterr() == (f"{__version__}\n", "")


@pytest.mark.parametrize("arguments", [[], ["fly"], ["run", "now"], ["--version"]])
def test_wrong_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A command that is not there ends with 2 and the usage on stderr."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: otel-lb-hop")


@pytest.mark.usefixtures("vips_file")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_ends_by_signal(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` hands the settings over and ends with 0 on either signal."""
    monkeypatch.setattr(FakeAgent, "signal", number)
    monkeypatch.setenv("OTEL_LB_HOP_NODE_NAME", "node7")
    assert cli.main(["run"]) == 0
    assert FakeAgent.last is not None
    assert (FakeAgent.last.stopped, FakeAgent.last.config.node_name) == (True, "node7")
    assert [(sizes.ring_pages, pinning, xdp) for sizes, pinning, xdp in begun] == [(128, (None, None), False)]


@pytest.mark.usefixtures("vips_file")
@pytest.mark.parametrize(("hook", "xdp"), [("tc", False), ("xdp", True), ("xdp-generic", True)])
def test_loads_what_the_hook_needs(hook: str, xdp: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    """The program for XDP is loaded where uplinks are to be watched by it."""
    monkeypatch.setenv("OTEL_LB_HOP_HOOK", hook)
    assert cli.main(["run"]) == 0
    assert [each for *_, each in begun] == [xdp]


@pytest.mark.usefixtures("vips_file")
def test_pins_are_claimed_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be pinned the agent runs all the same, and has the reason."""
    monkeypatch.setenv("OTEL_LB_HOP_PIN_PATH", str(tmp_path / "pins"))
    assert cli.main(["run"]) == 0
    ((_, pinning, _),) = begun
    assert pinning.folder is None
    assert "and not on a bpffs" in str(pinning.problem)
    assert not (tmp_path / "pins").exists()


@pytest.mark.usefixtures("vips_file")
def test_another_agent_counts_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Then this one does not begin: no compiler, no agent, exit code 1."""

    def refuse(path: Path) -> None:
        raise KernelError(f"another agent counts here, it holds {path}")

    monkeypatch.setattr(cli, "claim", refuse)
    monkeypatch.setenv("OTEL_LB_HOP_PIN_PATH", "/pins")
    assert cli.main(["run"]) == 1
    assert capsys.readouterr() == ("", "otel-lb-hop: another agent counts here, it holds /pins\n")
    assert (begun, FakeAgent.last) == ([], None)


@pytest.mark.parametrize(
    ("done", "said"),
    [
        ([], "nothing was left on this node\n"),
        (["/pins: programs, links and counters removed", "filters removed from 2 interfaces"],
         "/pins: programs, links and counters removed\nfilters removed from 2 interfaces\n"),
    ],
)  # fmt: skip
def test_uninstall(
    done: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It needs no other setting than where agents pin, heeds no wrong one, and says line by line what it did."""
    asked: list[Path | None] = []

    def take_off(path: Path | None) -> list[str]:
        asked.append(path)
        return done

    monkeypatch.setattr(uninstall, "uninstall", take_off)
    monkeypatch.setenv("OTEL_LB_HOP_LISTEN", "nonsense")
    for path in ("/pins", "off", ""):
        monkeypatch.setenv("OTEL_LB_HOP_PIN_PATH", path)
        assert cli.main(["uninstall"]) == 0
        assert capsys.readouterr() == (said, "")
    assert asked == [Path("/pins"), None, Path("/sys/fs/bpf/otel-lb-hop")]
    assert (begun, FakeAgent.last) == ([], None)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KernelError("another agent counts here"), 1, "otel-lb-hop: another agent counts here\n"),
        (
            PermissionError(1, "Operation not permitted"),
            1,
            f"otel-lb-hop: the system refused: [Errno 1] {os.strerror(1)}\n",
        ),
    ],
)
def test_uninstall_fails(
    error: Exception, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What stands in its way is said without a traceback."""

    def refuse(_: Path | None) -> list[str]:
        raise error

    monkeypatch.setattr(uninstall, "uninstall", refuse)
    assert cli.main(["uninstall"]) == code
    assert capsys.readouterr() == ("", said)


def test_uninstall_with_a_wrong_path(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A path that is none ends with 2, and nothing is touched."""
    monkeypatch.setenv("OTEL_LB_HOP_PIN_PATH", "here")
    assert cli.main(["uninstall"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "otel-lb-hop: the configuration is wrong:",
        "OTEL_LB_HOP_PIN_PATH: read 'here', accepted: an absolute path on a bpffs, or off",
    ]


def test_bad_settings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every bad setting is on stderr, each on its line, the exit code is 2, and nothing was started."""
    bad = {"OTEL_LB_HOP_RECORD_RATIO": "2", "OTEL_LB_HOP_LISTEN": "here", "OTEL_LOGS_EXPORTER": "a b"}
    for name, text in bad.items():
        monkeypatch.setenv(name, text)
    assert cli.main(["run"]) == 2
    out, err = capsys.readouterr()
    head, *lines = err.splitlines()
    assert (out, head) == ("", "otel-lb-hop: the configuration is wrong:")
    assert {line.split(":")[0] for line in lines} == {*bad, "OTEL_LB_HOP_VIPS_FILE"}
    assert "OTEL_LB_HOP_RECORD_RATIO: read '2', accepted: a number from 0 to 1" in lines
    assert FakeAgent.last is None


def test_bad_settings_and_bad_file(
    vips_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is wrong in the VIP file is told together with what is wrong in the settings."""
    monkeypatch.setenv("OTEL_LB_HOP_LOG_LEVEL", "loud")
    vips_file.write_text("services:\n- {name: web, vips: [10.0.0.1], ports: [{port: 0}]}\n")
    assert cli.main(["run"]) == 2
    lines = capsys.readouterr().err.splitlines()[1:]
    assert [line.split(": read")[0] for line in lines] == [
        "OTEL_LB_HOP_LOG_LEVEL",
        f"{vips_file} line 2: services[0].name",
        f"{vips_file} line 2: services[0].ports[0].port",
    ]


def test_bad_settings_and_missing_file(
    vips_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is not there is one more problem."""
    monkeypatch.setenv("OTEL_LB_HOP_LOG_LEVEL", "loud")
    vips_file.unlink()
    assert cli.main(["run"]) == 2
    assert f"{vips_file}: read 'No such file or directory'" in capsys.readouterr().err


@pytest.mark.usefixtures("vips_file")
@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KernelError("bcc is missing"), 1, "otel-lb-hop: bcc is missing\n"),
        (
            ConfigError([Problem("A", "1", "2"), Problem("B", "3", "4")]),
            2,
            "otel-lb-hop: the configuration is wrong:\nA: read '1', accepted: 2\nB: read '3', accepted: 4\n",
        ),
    ],
)
def test_agent_does_not_start(
    error: Exception, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What stands in the agent's way is said without a traceback, with an exit code by its kind."""
    monkeypatch.setattr(FakeAgent, "error", error)
    assert cli.main(["run"]) == code
    assert capsys.readouterr() == ("", said)


@pytest.mark.usefixtures("vips_file")
def test_unknown_settings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each variable with our prefix that means nothing is a warning, with what may be meant; the agent runs."""
    monkeypatch.setenv("OTEL_LB_HOP_LOGLEVEL", "debug")
    monkeypatch.setenv("OTEL_LB_HOP_RECORDS_RATE", "5")
    monkeypatch.setenv("OTEL_LB_HOP_ZZZ", "%s")
    assert cli.main(["run"]) == 0
    said = [line.partition(" WARNING otel_lb_hop.cli: ")[2] for line in capsys.readouterr().err.splitlines()]
    assert said == [
        "OTEL_LB_HOP_LOGLEVEL is no setting; is OTEL_LB_HOP_LOG_LEVEL meant?",
        "OTEL_LB_HOP_RECORDS_RATE is no setting; is OTEL_LB_HOP_RECORD_RATE meant?",
        "OTEL_LB_HOP_ZZZ is no setting",
    ]


def test_good_settings_do_not_read_the_file(vips_file: Path) -> None:
    """With good settings the file is left to the agent, which reads it once."""
    vips_file.unlink()
    assert cli.read_config(os.environ).vips_file == vips_file
