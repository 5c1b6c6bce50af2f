"""Trace and span ids from what both nodes of a hop see alike: the SNAT'd tuple and the ISN.

The kernel makes the trace id (trace_id_of in bpf/lb_hop.c); `trace_id` here is its mirror, for tests and for
whoever knows only the packet. The low 56 bits are the randomness by which W3C trace context samples
(https://www.w3.org/TR/trace-context-2/#randomness-of-trace-id), so a ratio keeps or drops whole traces.
"""

from __future__ import annotations

import struct

_MASK = (1 << 64) - 1
_RANDOM_BITS = 56


def mix(value: int) -> int:
    """Finalize a 64-bit hash (splitmix64), as `mix` in bpf/lb_hop.c."""
    value ^= value >> 30
    value = value * 0xBF58476D1CE4E5B9 & _MASK
    value ^= value >> 27
    value = value * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


def trace_id(source: bytes, source_port: bytes, destination: bytes, destination_port: bytes, isn: int) -> int:
    """Make the 128-bit trace id of a translated connection; addresses and ports in network order."""
    # The kernel reads the ports as host-order integers out of network-order fields.
    (first,) = struct.unpack("=H", source_port)
    (second,) = struct.unpack("=H", destination_port)
    hashed = mix((first << 16 | second) << 32 | isn)
    for address in (source, destination):
        for low, high in struct.iter_unpack("=II", address):
            hashed = mix(hashed ^ (high << 32 | low))
    return mix(hashed ^ isn ^ 0x9E3779B97F4A7C15) << 64 | hashed


def span_id(trace_id: bytes) -> bytes:
    """Take the span id of the intermediate node's span out of the 16 bytes of its trace id: the low half, as B3 does.

    The backend's node can name it as parent.
    """
    return trace_id[8:]


def randomness(trace_id: bytes) -> int:
    """Read the 56 random bits of a trace id of 16 bytes, by which it is sampled."""
    return int.from_bytes(trace_id[-_RANDOM_BITS // 8 :], "big")


def rejection_threshold(ratio: float) -> int:
    """Turn a sampling ratio into the W3C rejection threshold: a trace is kept if its randomness reaches it."""
    return (1 << _RANDOM_BITS) - round(ratio * (1 << _RANDOM_BITS))


def tracestate(threshold: int) -> str:
    """Write the threshold as OpenTelemetry's tracestate member, trailing zeros left out (`0` keeps all)."""
    digits = f"{threshold:014x}".rstrip("0") or "0"
    return f"th:{digits}"
