"""The command `otel-lb-hop`. Exit codes: 0 done, 1 the kernel or bcc refused, 2 a setting or the VIP file is wrong."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from otel_lb_hop import __version__
from otel_lb_hop.cluster.file_source import FileSource
from otel_lb_hop.config import PIN_PATH, VIPS_FILE, Config, closest_setting, pin_path_of
from otel_lb_hop.errors import ConfigError, KernelError
from otel_lb_hop.export.otlp_settings import OTLP, unheeded
from otel_lb_hop.kernel.loader import Sizes, begin_loading, ring_pages
from otel_lb_hop.kernel.pins import claim, leave
from otel_lb_hop.kernel.privileges import least
from otel_lb_hop.ops.logs import set_up_logging
from otel_lb_hop.ops.stop import Stop

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

EXIT_KERNEL = 1
EXIT_CONFIG = 2

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the exit code."""
    parser = argparse.ArgumentParser(prog="otel-lb-hop", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="watch this node until SIGTERM or SIGINT; configured by the environment")
    commands.add_parser("uninstall", help="take off what agents left attached or pinned on this node")
    commands.add_parser("version", help="print the version")
    arguments = parser.parse_args(argv)
    if arguments.command == "version":
        print(__version__)
        return 0
    try:
        if arguments.command == "uninstall":
            take_off(os.environ)
        else:
            run(os.environ)
    except ConfigError as error:
        print(f"otel-lb-hop: the configuration is wrong:\n{error}", file=sys.stderr)
        return EXIT_CONFIG
    except KernelError as error:
        print(f"otel-lb-hop: {error}", file=sys.stderr)
        return EXIT_KERNEL
    except OSError as error:
        print(f"otel-lb-hop: the system refused: {error}", file=sys.stderr)
        return EXIT_KERNEL
    return 0


def run(environ: Mapping[str, str]) -> None:
    """Run the agent until it is told to stop."""
    config = read_config(environ)
    lines = set_up_logging(config.log_level)
    for name in config.unknown:
        near = closest_setting(name)
        log.warning("%s is no setting%s", name, f"; is {near} meant?" if near else "")
    for warning in unheeded(environ) if OTLP in config.metrics.exporters and not config.sdk_disabled else ():
        log.warning("%s", warning)
    stop = Stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    # Before any other thread: what it holds besides is given up here.
    with least():
        pinning = claim(config.pin_path)
        if pinning.folder is None and (done := leave(config.pin_path or Path(PIN_PATH.default))):
            log.warning("%s", done)
        loading = begin_loading(
            Sizes(ring_pages=ring_pages(config.record_rate)), pinning, config.node_name, xdp=config.hook != "tc"
        )
    # The agent's imports go on while the child compiles.
    from otel_lb_hop.agent import Agent  # noqa: PLC0415

    agent = Agent(config, environ, loading, stop, lines)
    if agent.start():
        agent.run()


def take_off(environ: Mapping[str, str]) -> None:
    """Leave nothing of any agent on this node."""
    from otel_lb_hop.ops.uninstall import uninstall  # noqa: PLC0415 - `run` is quicker without it

    for line in uninstall(pin_path_of(environ)) or ["nothing was left on this node"]:
        print(line)


def read_config(environ: Mapping[str, str]) -> Config:
    """Read the settings; what is wrong in them and in the VIP file is told together."""
    try:
        return Config.from_environ(environ, socket.gethostname())
    except ConfigError as error:
        problems = list(error.problems)
        try:
            if path := environ.get(VIPS_FILE.name, "").strip():
                FileSource(Path(path)).poll()
        except ConfigError as file_error:
            problems += file_error.problems
        raise ConfigError(problems) from error
