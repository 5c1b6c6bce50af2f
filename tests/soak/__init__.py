"""The agents over a long time: everything around them comes and goes, they are watched; see `python -m tests.soak`."""
