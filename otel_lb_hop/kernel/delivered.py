"""The pinned map of what was delivered as deltas (core/pinned.py), so that the next agent goes on from there."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from otel_lb_hop.core.pinned import DELIVERED_BYTES, DELIVERED_KEY_BYTES
from otel_lb_hop.kernel import bpf

if TYPE_CHECKING:
    from otel_lb_hop.kernel.pins import Pins

NAME = "delivered"
SHAPE = bpf.MapShape(bpf.HASH, DELIVERED_KEY_BYTES, DELIVERED_BYTES, 65_536)
"""Entries take memory when they come, some 250 bytes each."""


def open_delivered(pins: Pins | None) -> bpf.Map | None:
    """Open the map of the counters that are pinned, or make it; None if nothing outlives the agent.

    Each caller gets a map of its own, for one thread.
    """
    if pins is None:
        return None
    try:
        fd = pins.open_map(NAME)
    except FileNotFoundError:
        pass
    else:
        if bpf.map_shape(fd) == SHAPE:
            return bpf.Map(fd, SHAPE.key_size, SHAPE.value_size)
        os.close(fd)
    made = bpf.create_map(SHAPE, NAME)
    pins.pin_map(NAME, made.fd)
    return made
