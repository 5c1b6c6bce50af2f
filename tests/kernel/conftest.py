"""Loads the programs once for all tests of a worker, and keeps every test in a network namespace of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.kernel.loader import Sizes, load
from otel_lb_hop.kernel.netlink import Netlink
from tests.kernel.handshakes import Handshakes
from tests.kernel.rig import Namespace, Rig, close

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def namespace() -> Iterator[Namespace]:
    """Make the namespace whose interfaces the packets pass."""
    made = Namespace()
    yield made
    made.close()


def _rig(sizes: Sizes, namespace: Namespace) -> Iterator[Rig]:
    loaded = load(sizes, xdp=True)
    made = Rig(loaded, namespace)
    yield made
    made.close()
    close(loaded)


@pytest.fixture(scope="session")
def _wide(namespace: Namespace) -> Iterator[Rig]:
    yield from _rig(Sizes(table_buckets=128, ring_pages=64), namespace)


@pytest.fixture(scope="session")
def _narrow(namespace: Namespace) -> Iterator[Rig]:
    yield from _rig(
        Sizes(vip_ports=8, backends=8, hops=16, places=8, datagram_flows=8, table_buckets=1, ring_pages=1), namespace
    )


@pytest.fixture(scope="session")
def _default(namespace: Namespace) -> Iterator[Rig]:
    yield from _rig(Sizes(), namespace)


@pytest.fixture
def rig(_wide: Rig) -> Iterator[Rig]:
    """Give a test programs with room for 1,024 handshakes and 2,047 records, and nothing in them."""
    with _wide.namespace.entered():
        _wide.reset()
        yield _wide


@pytest.fixture
def narrow(_narrow: Rig) -> Iterator[Rig]:
    """Give a test programs with room for 8 handshakes and 31 records, and nothing in them."""
    with _narrow.namespace.entered():
        _narrow.reset()
        yield _narrow


@pytest.fixture
def netlink(rig: Rig) -> Iterator[Netlink]:  # noqa: ARG001 - whose namespace the thread is in
    """Give a test a netlink socket in the namespace of the rig."""
    made = Netlink()
    yield made
    made.close()


@pytest.fixture
def handshakes(rig: Rig) -> Iterator[Handshakes]:
    """Give a test a VIP port of each family, and a way to send handshakes."""
    made = Handshakes(rig)
    yield made
    made.close()


@pytest.fixture
def default(_default: Rig) -> Iterator[Rig]:
    """Give a test programs of the sizes that an agent loads, and nothing in them."""
    with _default.namespace.entered():
        _default.reset()
        yield _default
