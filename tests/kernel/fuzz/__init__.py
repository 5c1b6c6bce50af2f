"""Random packets by the million: the programs in the kernel against the oracle."""
