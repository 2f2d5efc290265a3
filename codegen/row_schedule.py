"""In which pass over a row each step of a ``sparsecc::rows`` spec happens, whatever language writes it."""

from __future__ import annotations

import ast

from sparsecc.runtime.ops import expressions
from sparsecc.runtime.ops.rows import Spec, Step

_CHEAP = {"abs", "maximum", "minimum", "clamp", "relu", "round", "sign"}


class Schedule:
    """Everything that can be had in one pass over the row is made in it.

    Attributes:
        steps: the statements, by name.
        passes: how many there are.
        kept: the values for each element that are written into a buffer beside the row by the first pass that
            computes them, because it costs less to read them again.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.steps = {step.name: step for step in spec.steps}
        levels = [s.level for s in spec.results]
        levels += [s.level - 1 for s in spec.steps if s.op != "let"]
        self.passes = 1 + max(levels)
        self.kept: list[str] = []
        for step in spec.steps:
            if step.op == "hadamard" or (_is_dear(step) and len(self._readers(step)) > 1):
                self.kept.append(step.name)

    def goals(self, turn: int) -> list[Step]:
        """What pass ``turn`` over the row is made for: operations on the row, and outputs."""
        whole = [s for s in self.spec.steps if s.op != "let" and s.level - 1 == turn]
        return whole + [s for s in self.spec.results if s.by_feature and s.level == turn]

    def needed(self, turn: int, stop: bool = True) -> list[Step]:
        """The values for each element that pass ``turn`` computes or, if ``stop``, reads from their buffers."""
        found: set[str] = set()
        todo = [name for goal in self.goals(turn) for name in expressions.names(goal.tree)]
        while todo:
            step = self.steps.get(todo.pop())
            if step is None or not step.by_feature or step.name in found:
                continue
            found.add(step.name)
            if step.op == "let" and not (stop and self.is_kept(step, turn)):
                todo += expressions.names(step.tree)
        return [step for step in self.spec.steps if step.name in found]

    def is_kept(self, step: Step, turn: int) -> bool:
        """Whether an earlier pass has written ``step`` into its buffer."""
        if step.name not in self.kept:
            return False
        return step.op == "hadamard" or self._readers(step)[0] < turn

    def scalars(self, turn: int) -> list[Step]:
        """What is one number for a row and can be had right before pass ``turn``: statements, then outputs."""
        lets = [s for s in self.spec.steps if s.op == "let"]
        return [s for s in (*lets, *self.spec.results) if not s.by_feature and s.level == turn]

    def read(self, steps: list[Step], kind: str) -> list[str]:
        """The operands of a kind that ``steps`` read."""
        names = {name for step in steps for name in expressions.names(step.tree)}
        return [name for name in self.spec.operands(kind) if name in names]

    def _readers(self, step: Step) -> list[int]:
        return [turn for turn in range(self.passes) if step in self.needed(turn, stop=False)]


def law(spec: Spec, comment: str) -> str:
    """The spec as lines of a comment."""
    lines = [f"{comment}   {statement}" for statement in spec.statements]
    for j, (output, step) in enumerate(zip(spec.outputs, spec.results, strict=True)):
        where = "[n]" if output.summed else "[m, n]" if step.by_feature else "[m]"
        text = f"sum over m of {output.text}" if output.summed else output.text
        note = "" if output.dtype == "x" or output.summed else f", as {output.dtype}"
        lines.append(f"{comment}   out{j}{where} = {text}{note}")
    return "\n".join(lines)


def _is_dear(step: Step) -> bool:
    """Whether it costs more to compute a value again than to read it from the cache."""
    divided = any(isinstance(node, ast.Div) for node in ast.walk(step.tree))
    dear = divided or bool(expressions.functions(step.tree) - _CHEAP)
    return step.op == "let" and step.by_row and step.by_feature and dear
