"""What holds for all tests: what a skip means, what marks mean, and how work is shared out over processes.

What a machine lacks is skipped with its reason, and the number of skips stands at the end; with CI=true in the
environment a skip makes the run fail, because there a missing program is a hole in the net.
"""

from __future__ import annotations

import importlib
import os
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from tests.peers import build

if TYPE_CHECKING:
    from collections.abc import Iterable

# A slow machine is no failure: time belongs in the bench.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

PEER_OF = {
    "collector": "otelcol",
    "kubernetes": "kubernetes",
    "kustomize": "kustomize",
    "loki": "loki",
    "prometheus": "prometheus",
    "tempo": "tempo",
}
"""Mark → the peer that tests with it need."""
_peer_errors = pytest.StashKey[dict[str, str]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build the peers that the chosen tests need: here, where it may take minutes and can be watched."""
    errors: dict[str, str] = {}
    session.config.stash[_peer_errors] = errors
    if session.config.option.collectonly:
        return
    for mark, peer in PEER_OF.items():
        if any(item.get_closest_marker(mark) for item in session.items) and not isinstance(build.find_go(peer), str):
            try:
                build.build(peer)
            except build.PeerError as error:
                errors[peer] = str(error)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot do, and say why; a peer that should build but does not is a failure."""
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.skip("needs root: BPF and network namespaces")
    for mark, peer in PEER_OF.items():
        if item.get_closest_marker(mark):
            lacking = build.find_go(peer)
            if isinstance(lacking, str):
                pytest.skip(lacking)
            if error := item.config.stash[_peer_errors].get(peer):
                pytest.fail(error, pytrace=False)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:  # noqa: ANN401 - xdist has no type for it
    """Keep the tests of a file in one process, so that what they share is built once."""
    if config.getvalue("dist") != "load":
        return None  # somebody asked for another way
    scheduler = importlib.import_module("xdist.scheduler")  # only here, where it is known to be installed
    by_file: object = scheduler.LoadFileScheduling(config, log)
    return by_file


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let the run fail if CI=true and something was skipped."""
    if _skip_is_failure() and _skips(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Count the skips, by reason."""
    reasons = _skips(config)
    if not reasons:
        return
    verdict = "a failure, because CI=true" if _skip_is_failure() else "not tested on this machine"
    terminalreporter.section(f"{reasons.total()} skipped: {verdict}", red=_skip_is_failure(), yellow=True)
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count} x {reason}")


def _skip_is_failure() -> bool:
    return os.environ.get("CI", "").lower() in {"true", "1"}


def _skips(config: pytest.Config) -> Counter[str]:
    """Count the skips of all processes by reason; empty in a worker, which has no terminal."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reports: Iterable[pytest.TestReport] = reporter.stats.get("skipped", ()) if reporter else ()
    return Counter(_reason(report) for report in reports)


def _reason(report: pytest.TestReport) -> str:
    # A skip is told by a path, a line and "Skipped: " with the reason.
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")
