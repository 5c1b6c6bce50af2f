"""The only room that speaks to the kernel: compile child, bpf(2), hooks, ring, counters."""
