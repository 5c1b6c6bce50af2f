"""`python -m tests.soak [MINUTES [SEED]]`: agents in the lab while everything around them comes and goes.

Exit codes: 0 all is well, 1 something is wrong (a sentence for each thing), 2 this machine cannot, 130 interrupted. The
same seed makes the same plan, though not at the same moments.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time

from tests.kernel import requirements as kernel
from tests.lab import requirements as lab
from tests.soak.run import soak
from tests.soak.verdict import problems, table

MINUTES = 10.0
EXIT_WRONG, EXIT_UNABLE, EXIT_INTERRUPTED = 1, 2, 130


def main() -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument(
        "minutes", nargs="?", type=float, default=MINUTES, help="of churn; from 10 on slopes are judged"
    )
    parser.add_argument("seed", nargs="?", default=str(random.SystemRandom().getrandbits(32)))
    arguments = parser.parse_args()
    if reason := lab.lacking() or kernel.lacking():
        print(f"soak: {reason}", file=sys.stderr)
        return EXIT_UNABLE
    # As after Ctrl-C, what was built is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_INTERRUPTED))
    began = time.monotonic()

    def tell(what: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {what}", flush=True)

    tell(f"{arguments.minutes:g} minutes, seed {arguments.seed}")
    try:
        with soak(arguments.seed) as running:
            course = running.run(arguments.minutes * 60, tell)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    print(table(course))
    wrong = problems(course)
    for sentence in wrong:
        print(f"WRONG: {sentence}")
    return EXIT_WRONG if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
