"""Real programs that tests speak to, built once from pinned Go modules into a cache outside the tree."""
