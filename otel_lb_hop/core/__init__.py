"""Pure: layouts, topology, hops. No I/O, no clock, no environment; bytes and values in, bytes and values out."""
