"""`python -m tests.kernel.fuzz [N [SEED]]`: N random inputs, on all CPUs, kernel against oracle.

Exit codes: 0 no difference, 1 a difference (its shortest form is printed), 2 this machine cannot, 130 interrupted. The
same N, seed and number of CPUs make the same inputs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import random
import signal
import sys
import time
import traceback
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from tests.kernel.fuzz.referee import Class, Fuzzer, classes_to_meet, explain, referee
from tests.kernel.requirements import lacking

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

INPUTS = 10_000_000
PORTION = 5_000
"""Inputs between two words of a worker."""
PROGRESS_SECONDS = 5.0
SILENT_SECONDS = 120.0
"""A worker that is silent for so long while it lives is not waited for."""
EXIT_DIFFERENT, EXIT_UNABLE, EXIT_INTERRUPTED = 1, 2, 130


class Word(NamedTuple):
    """What a worker tells: inputs more, by their classes; at its end a difference, an error, or that it is done."""

    classes: Counter[Class]
    done: bool = False
    difference: str = ""
    error: str = ""


def work(number: int, count: int, seed: str, words: Queue[Word]) -> None:
    """Compare so many inputs on a CPU of its own, as long as the parent is there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = os.getppid()
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[number % len(cpus)]})
    try:
        with referee() as judge:
            fuzzer = Fuzzer(judge, seed)
            while count > 0 and os.getppid() == parent:
                found = fuzzer.run(min(count, PORTION))
                count -= PORTION
                words.put(Word(fuzzer.classes.copy(), difference=explain(judge.shrink(found)) if found else ""))
                fuzzer.classes.clear()
                if found:
                    return
        words.put(Word(Counter(), done=True))
    except BaseException:  # noqa: BLE001 - told to the parent, whatever it is
        words.put(Word(Counter(), error=traceback.format_exc()))


def fuzz(count: int, seed: str) -> int:
    """Run workers, print what they tell; returns the exit code."""
    workers = len(os.sched_getaffinity(0))
    words: Queue[Word] = multiprocessing.Queue()
    shares = [count // workers + (number < count % workers) for number in range(workers)]
    processes = [
        multiprocessing.Process(target=work, args=(number, share, f"{seed}.{number}", words), daemon=True)
        for number, share in enumerate(shares)
    ]
    print(f"{count:,} inputs on {workers} CPUs, seed {seed}", flush=True)
    began = time.monotonic()
    for each in processes:
        each.start()
    try:
        return follow(words, count, workers, began)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    finally:
        for each in processes:
            each.terminate()
            each.join()


def follow(words: Queue[Word], count: int, workers: int, began: float) -> int:
    """Print progress until all workers are done or one has found a difference."""
    classes: Counter[Class] = Counter()
    printed = began
    done = 0
    while done < workers:
        try:
            word = words.get(timeout=SILENT_SECONDS)
        except queue.Empty:
            print("fuzz: no worker says a word", file=sys.stderr)
            return EXIT_UNABLE
        classes += word.classes
        done += word.done
        now = time.monotonic()
        if word.difference:
            print(f"after {classes.total():,} inputs kernel and oracle differ:\n{word.difference}")
            return EXIT_DIFFERENT
        if word.error:
            print(word.error, file=sys.stderr)
            return EXIT_UNABLE
        if now - printed >= PROGRESS_SECONDS or done == workers:
            printed = now
            rate = classes.total() / (now - began)
            print(f"{classes.total():>12,} of {count:,}, {rate:,.0f} inputs/s, {len(classes)} classes", flush=True)
    to_meet = classes_to_meet()
    met = len(to_meet & classes.keys())
    fewest, rarest = min((classes[each], each) for each in to_meet)
    print(f"no difference; {met} of {len(to_meet)} classes met, the rarest {fewest:,} times: {rarest}")
    return 0


def main() -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernel.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("inputs", nargs="?", type=int, default=INPUTS)
    parser.add_argument("seed", nargs="?", default=str(random.SystemRandom().getrandbits(32)))
    arguments = parser.parse_args()
    if reason := lacking():
        print(f"fuzz: {reason}", file=sys.stderr)
        return EXIT_UNABLE
    # As after Ctrl-C, the workers end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_INTERRUPTED))
    return fuzz(arguments.inputs, arguments.seed)


if __name__ == "__main__":
    sys.exit(main())
