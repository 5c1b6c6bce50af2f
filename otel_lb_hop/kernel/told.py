"""Pinned maps of what exports have told (core/pinned.py), so that the next agent goes on from there."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from otel_lb_hop.core.pinned import DELIVERED_BYTES, DELIVERED_KEY_BYTES
from otel_lb_hop.kernel import bpf

if TYPE_CHECKING:
    from otel_lb_hop.kernel.pins import Pins

DELIVERED, SUMMED = "delivered", "summed"
"""What was delivered as deltas; which series are summed, there being no room for them."""
SHAPE = bpf.MapShape(bpf.HASH, DELIVERED_KEY_BYTES, DELIVERED_BYTES, 65_536)
"""Entries take memory when they come, some 250 bytes each."""


def open_told(pins: Pins | None, name: str, *, make: bool) -> bpf.Map | None:
    """Open a map beside the pinned counters, or make it; None if it is not there or nothing outlives the agent.

    Each caller gets a map of its own, for one thread.
    """
    if pins is None:
        return None
    try:
        fd = pins.open_map(name)
    except FileNotFoundError:
        pass
    else:
        if bpf.map_shape(fd) == SHAPE:
            return bpf.Map(fd, SHAPE.key_size, SHAPE.value_size)
        os.close(fd)
    if not make:
        return None
    made = bpf.create_map(SHAPE, name)
    pins.pin_map(name, made.fd)
    return made
