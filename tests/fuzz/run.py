"""``python -m fuzz.run``: fuzz until interrupted, or a number of cases; or try one case again.

PYTHONPATH=tests python -m fuzz.run --cases 1000 --seed 7 --jobs 2
PYTHONPATH=tests python -m fuzz.run --reproduce case.txt     (a file, "-", or the case itself)
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import multiprocessing
import os
import pathlib
import shlex
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from fuzz import blocks, images, maps, streams
from fuzz.builder import Builder
from fuzz.case import Case, T
from fuzz.check import Outcome, Wrong, blame, check
from fuzz.generator import cases
from fuzz.reduce import reduced
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS, HypothesisProvider


class SeedAlone(HypothesisProvider):
    """Draws that depend on the seed alone.

    Hypothesis's own provider now and then draws a number that it read in the modules loaded so far, so that the
    same seed gives other programs when other tests have run before.
    """

    def _maybe_draw_constant(self, *_: Any, **__: Any) -> None:
        return None


AVAILABLE_PROVIDERS["seed-alone"] = f"{__name__}.SeedAlone"

# Kinds of programs: a seed takes one by its remainder.
KINDS = (blocks, images, blocks, maps, blocks, streams)
CHUNK = 200  # cases of one seed


@dataclass
class Tally:
    """What a number of cases showed."""

    programs: int = 0
    cases: int = 0
    seconds: float = 0.0
    modes: Counter[str] = field(default_factory=Counter)
    applied: Counter[str] = field(default_factory=Counter)
    refused: Counter[tuple[str, str]] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, Case]] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.cases += 1
        self.modes[outcome.mode] += 1
        self.applied.update(outcome.applied)
        self.refused.update(outcome.refused)
        self.notes.update(outcome.notes)

    def merge(self, other: Tally) -> None:
        self.programs += other.programs
        self.cases += other.cases
        self.seconds += other.seconds
        for name in ("modes", "applied", "refused", "notes"):
            getattr(self, name).update(getattr(other, name))
        self.failures += other.failures


def chunk(
    seed: int,
    count: int = CHUNK,
    *,
    through_dynamo: int = 20,
    judge: Callable[[Case], Outcome] = check,
    shrink: bool = True,
    program: Callable[[Builder], None] = blocks.program,
) -> Tally:
    """About ``count`` cases from ``seed``; it ends at the first failure, which is shrunk."""
    tally = Tally()
    failing: list[tuple[Wrong, Case]] = []
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]

    @seeded(seed)
    @settings(
        max_examples=(count + 1) // 2,
        phases=phases,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        print_blob=False,
        backend="seed-alone",
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(through_dynamo, program))
    def run(drawn: tuple[Case, ...]) -> None:
        if not failing:  # what shrinking tries is not counted
            tally.programs += 1
        for case in drawn:
            try:
                outcome = judge(case)
            except Wrong as error:
                failing[:] = [(error, case)]
                raise
            except Exception as error:
                failing[:] = [(Wrong("the fuzzer", traceback.format_exc()), case)]
                raise failing[0][0] from error
            if not failing:
                tally.add(outcome)

    started = time.perf_counter()
    with quiet():
        try:
            run()
        except Wrong:
            error, case = failing[0]
            if shrink and judge is check:
                case = reduced(case, error.kind)
            tally.failures.append((str(error), case))
    tally.seconds = time.perf_counter() - started
    return tally


class quiet:  # noqa: N801 - reads as a statement
    """Without the warnings that a thousand odd programs give."""

    def __enter__(self) -> None:
        self.level = logging.getLogger("sparsecc").level
        logging.getLogger("sparsecc").setLevel(logging.ERROR)
        self.caught = warnings.catch_warnings()
        self.caught.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *error: Any) -> None:
        self.caught.__exit__(*error)
        logging.getLogger("sparsecc").setLevel(self.level)


def reproducer(words: str, case: Case) -> str:
    """What to print of a failure: words, the case as Python, and the command that runs it again."""
    command = f"PYTHONPATH=tests {sys.executable} -m fuzz.run --reproduce {shlex.quote(repr(case))}"
    return f"{words}\n\n{case!r}\n\nRun it again:\n{command}\n"


def reproduce(given: str) -> int:
    """Check one case; on a failure say after which pass it goes wrong."""
    text = given
    if given == "-":
        text = sys.stdin.read()
    elif "(" not in given and os.path.exists(given):
        text = pathlib.Path(given).read_text(encoding="utf-8")
    case: Case = eval(text, {"Case": Case, "T": T})
    print(repr(case))
    try:
        outcome = check(case)
    except Wrong as error:
        print(f"\nWRONG: {error}")
        for line in blame(case):
            print("   ", line)
        return 1
    applied = {n: c for n, c in outcome.applied.items() if c}
    print(
        f"\nright. applied: {applied}; refused: {dict(outcome.refused)}; notes: {dict(outcome.notes)}"
    )
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz.run", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=0, help="stop after so many (0: never)")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="the first seed; each 200 cases take the next, and the next kind of programs",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument(
        "--through-dynamo", type=int, default=20, metavar="N", help="one case in N, 0: none"
    )
    parser.add_argument("--reproduce", metavar="CASE", help="a file, '-' or the text of a case")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.reproduce:
        with quiet():
            return reproduce(options.reproduce)
    total = Tally()
    started = time.perf_counter()
    try:
        for seed, tally in _tallies(options):
            total.merge(tally)
            rate = total.cases / (time.perf_counter() - started)
            print(
                f"seed {seed}: {tally.programs} programs, {tally.cases} cases in {tally.seconds:.0f} s; "
                f"in all {total.cases}, {rate:.1f}/s, {len(total.failures)} failures",
                flush=True,
            )
            for words, case in tally.failures:
                print(f"\n=== FAILURE, seed {seed}: {reproducer(words, case)}", flush=True)
    except KeyboardInterrupt:
        print("interrupted")
    _summary(total, time.perf_counter() - started)
    return int(bool(total.failures))


def _tallies(options: argparse.Namespace) -> Iterator[tuple[int, Tally]]:
    """Chunk after chunk, until there are as many cases as were asked for."""
    done = 0
    size = min(CHUNK, options.cases or CHUNK)
    work = ((seed, size, options.through_dynamo) for seed in itertools.count(options.seed))
    with contextlib.ExitStack() as stack:
        results: Iterator[tuple[int, Tally]] = map(_one, work)
        if options.jobs > 1:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(context.Pool(options.jobs))
            rounds = iter(lambda: list(itertools.islice(work, options.jobs)), [])
            results = (found for seeds in rounds for found in pool.imap_unordered(_one, seeds))
        for seed, tally in results:
            yield seed, tally
            done += tally.cases
            if options.cases and done >= options.cases:
                return


def _one(work: tuple[int, int, int]) -> tuple[int, Tally]:
    torch.set_num_threads(1)
    seed, size, through_dynamo = work
    program = KINDS[seed % len(KINDS)].program
    return seed, chunk(seed, size, through_dynamo=through_dynamo, program=program)


def _summary(total: Tally, seconds: float) -> None:
    rate = total.cases / max(seconds, 1e-9)
    print(f"\n{total.programs} programs, {total.cases} cases in {seconds:.0f} s ({rate:.1f}/s)")
    for title, counts in (
        ("modes", total.modes),
        ("applied", total.applied),
        ("notes", total.notes),
    ):
        print(f"{title}:", ", ".join(f"{n}: {c}" for n, c in counts.most_common() if c))
    print("refused:", ", ".join(f"{p} {c}: {n}" for (p, c), n in total.refused.most_common()))
    print(f"failures: {len(total.failures)}")


if __name__ == "__main__":
    sys.exit(main())
