"""What watches the pipeline: snapshots, tlparse artifacts, prints on change, fuel. Callbacks, not ifs."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsecc import log
from sparsecc.dump.stages import Stage
from sparsecc.program import Program


class Instrument:
    """Base: every hook does nothing."""

    def stage(self, name: str, program: Program, changed: bool) -> None:
        """After the stage ``name`` ("captured", "canonical", a pass, "lowered")."""

    def may_rewrite(self, pass_name: str) -> bool:
        """Asked before each rewrite; False skips it."""
        del pass_name
        return True


@dataclass
class Snapshots(Instrument):
    """Keeps a copy of the program after every stage that changed it (for dumps, diffs and proofs)."""

    stages: list[Stage] = field(default_factory=list)

    def stage(self, name: str, program: Program, changed: bool) -> None:
        if changed or name in ("captured", "lowered"):
            self.stages.append(Stage(name, program.copy()))


@dataclass
class Artifacts(Instrument):
    """Sends each changed stage to the structured trace, where tlparse shows it."""

    graph: int

    def stage(self, name: str, program: Program, changed: bool) -> None:
        if changed:
            log.artifact(f"{self.graph}_{name}", program.text)


@dataclass
class PrintOnChange(Instrument):
    """Logs the program's text at DEBUG after every stage that changed it."""

    def stage(self, name: str, program: Program, changed: bool) -> None:
        if changed and log.log.isEnabledFor(10):
            log.log.debug("after %s:\n%s", name, program.text())


@dataclass
class Fuel(Instrument):
    """Allows a number of rewrites, over all passes, then no more: what bisection turns."""

    left: int

    def may_rewrite(self, pass_name: str) -> bool:
        self.left -= 1
        return self.left >= 0
