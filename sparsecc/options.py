"""``options={...}`` of ``torch.compile(model, backend="sparsecc", options=...)``: typed and validated."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from sparsecc.errors import OptionsError, unknown
from sparsecc.passes import registry
from sparsecc.passes.base import Pass
from sparsecc.recipe import Recipe, as_recipe

_CHOICES = {
    "preset": tuple(registry.PRESETS),
    "verify": ("off", "final", "each"),
    "codegen": ("auto", "aten", "cpp", "triton"),
    "lower": ("inductor", "aot_eager", "eager"),
    "freshness": ("probe", "version", "hash"),
}


@dataclass(frozen=True)
class Options:
    """Every option of the backend.

    Attributes:
        preset: which passes run when ``passes`` is not given ("default": the exact ones that pay; "none").
        passes: names of the passes to run, or a mapping name -> options of that pass. Naming a pass is an
            explicit request: a warning follows when it matched nothing, and its profit is not questioned.
        disable: names of passes to leave out of the preset.
        require: pass name -> least number of applications (``2``, ``">=1"`` or ``"==12"``); missing it raises.
        strict: raise where sparsecc would otherwise fall through to Inductor.
        verify: "off"; "final": compare the compiled graph with fp64 at its first call; "each": every pass too.
        codegen: what runs a region that has a kernel: "auto" (on CPU, through Inductor: the faster of its
            meaning and generated C++, measured once for each region and machine, where the region reads enough
            for that to pay), "aten" (its meaning), "cpp" (generated C++, on CPU), "triton" (generated Triton,
            on GPUs). Other than with "aten", the passes that make such regions run too.
        lower: who compiles the rewritten graph: "inductor", "aot_eager" (PyTorch's autograd, no code
            generation) or "eager".
        freshness: how changed weights are noticed at each call: "probe" (identity, address, version and a
            sampled content check), "version" (without the samples), "hash" (all contents, slow).
        prepack: in inference on CPU, keep the weights of convolutions in the kernels' layouts too (a copy,
            made anew when they change).
        floor: hand Inductor Dynamo's own graph where no rewrite applies. False compiles the captured program
            there too, so that tests of capture cannot pass by doing nothing.
        count: whether kernels count live neurons; ``sparsecc.live_neurons()`` tells them.
        fuel: apply at most this many rewrites (for bisection).
        dump: a folder to write every stage of every graph to, or None.
        report: a ``Report`` to fill, or a path (``.json`` or ``.html``) to write.
        recipe: a :class:`sparsecc.Recipe`, or the path of one, to carry out (lossy); None for none.
        inductor: options handed to Inductor as they are.
        keep_stages: a list that receives the stages of every graph (used by ``sparsecc.inspection``).
    """

    preset: str = "default"
    passes: tuple[tuple[str, Pass], ...] | None = None
    disable: tuple[str, ...] = ()
    require: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    strict: bool = False
    verify: str = "off"
    codegen: str = "auto"
    lower: str = "inductor"
    freshness: str = "probe"
    prepack: bool = True
    floor: bool = True
    count: bool = False
    fuel: int | None = None
    dump: str | None = None
    report: Any = None
    recipe: Recipe | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)
    keep_stages: list[Any] | None = None

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None) -> Options:
        """Validate user options.

        Raises:
            OptionsError: an unknown option, pass or value; the message names the nearest valid one.
        """
        values: dict[str, Any] = {}
        names = [f.name for f in fields(cls) if f.name != "keep_stages"]
        for key, value in (given or {}).items():
            if key not in names and key != "keep_stages":
                raise OptionsError(unknown("option", key, names))
            values[key] = _PARSERS.get(key, lambda _key, v: v)(key, value)
        if isinstance(values.get("report"), str):
            values["report"] = _report_at(values["report"], given)
        return cls(**values)

    def pipeline(self) -> list[Pass]:
        """The rewriting passes that these options select, in pipeline order."""
        if disabled():
            return []
        if self.passes is not None:
            chosen = dict(self.passes)
        else:
            names = registry.PRESETS[self.preset]
            chosen = {name: registry.load(name)() for name in names}
            if names:
                chosen |= self._for_kernels()
        if self.recipe is not None:
            for name in registry.FOR_RECIPES:
                chosen[name] = registry.load(name).configure({"recipe": self.recipe})
        return [chosen[n] for n in registry.REWRITES if n in chosen and n not in self.disable]

    def _for_kernels(self) -> dict[str, Pass]:
        """The passes that make regions for generated kernels, where ``codegen`` may generate any."""
        if self.codegen == "aten" or (self.codegen == "auto" and self.lower != "inductor"):
            return {}
        # Kernels for GPUs have not been measured on one: there they run where they are asked for.
        chosen: dict[str, Pass] = {}
        for name, least in registry.FOR_KERNELS.items():
            cls, given = registry.load(name), dict[str, Any]()
            if self.codegen == "auto":
                given = {"least": least if self.recipe is None else 0, "devices": ("cpu",)}
            if "recipe" in cls.option_names():
                given["recipe"] = self.recipe
            chosen[name] = cls.configure(given)
        return chosen

    @property
    def explicit(self) -> frozenset[str]:
        """Passes that the user named, in ``passes`` or ``require``."""
        named = {name for name, _ in self.passes} if self.passes is not None else set()
        return frozenset(named | set(self.require))


def disabled() -> bool:
    """Whether ``SPARSECC_DISABLE=1`` turns every rewrite off."""
    return os.environ.get("SPARSECC_DISABLE", "") not in ("", "0")


def _choice(key: str, value: Any) -> str:
    if value not in _CHOICES[key]:
        raise OptionsError(unknown(f"value of option {key!r}:", value, _CHOICES[key]))
    return str(value)


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise OptionsError(f"option {key!r} must be True or False, not {value!r}.")
    return value


def _pass_names(key: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise OptionsError(f"option {key!r} must be a list of pass names, not {value!r}.")
    for name in value:
        if name not in registry.REWRITES:
            raise OptionsError(unknown("pass", name, registry.REWRITES))
    return tuple(value)


def _passes(key: str, value: Any) -> tuple[tuple[str, Pass], ...] | None:
    if value is None:
        return None
    names = _pass_names(key, value)
    options = value if isinstance(value, Mapping) else {name: {} for name in names}
    for name in names:
        if not isinstance(options[name], Mapping):
            raise OptionsError(
                f"options of pass {name!r} must be a mapping, not {options[name]!r}."
            )
    return tuple((name, registry.load(name).configure(options[name])) for name in names)


def _require(key: str, value: Any) -> dict[str, tuple[str, int]]:
    if isinstance(value, (list, tuple, set, frozenset)):
        value = dict.fromkeys(value, 1)
    if not isinstance(value, Mapping):
        raise OptionsError(
            f"option {key!r} must map pass names to counts such as 1, '>=1' or '==12', not {value!r}."
        )
    parsed = {}
    for name, count in value.items():
        _pass_names(key, [name])
        found = re.fullmatch(r"\s*(>=|==)?\s*(\d+)\s*", str(count))
        if found is None or isinstance(count, bool):
            raise OptionsError(
                f"option 'require': count of pass {name!r} is {count!r}; give 1, '>=1' or '==12'."
            )
        parsed[str(name)] = (found[1] or ">=", int(found[2]))
    return parsed


def _count(key: str, value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise OptionsError(f"option {key!r} must be a whole number of rewrites, not {value!r}.")
    return None if value is None else int(value)


def _report(key: str, value: Any) -> Any:
    from sparsecc.report.model import Report

    if value is None or isinstance(value, Report):
        return value
    if str(value).endswith((".json", ".html")):
        return str(value)
    raise OptionsError(
        f"option {key!r} must be a sparsecc.Report or a path ending in .json or .html, not {value!r}."
    )


def _report_at(path: str, given: Any) -> Any:
    """The report of one ``torch.compile`` call: Dynamo hands its graphs over one at a time."""
    from sparsecc.report.model import Report

    owner, report = _reports.get(path, (None, None))
    if owner is not given:
        report = Report(path=path)
        _reports[path] = (given, report)
    return report


_reports: dict[str, tuple[Any, Any]] = {}


def _mapping(key: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise OptionsError(f"option {key!r} must be a mapping, not {value!r}.")
    return dict(value)


_PARSERS: dict[str, Any] = {
    **dict.fromkeys(_CHOICES, _choice),
    "passes": _passes,
    "disable": _pass_names,
    "require": _require,
    "strict": _flag,
    "prepack": _flag,
    "floor": _flag,
    "count": _flag,
    "fuel": _count,
    "report": _report,
    "recipe": lambda key, value: as_recipe(value),
    "inductor": _mapping,
    "dump": lambda key, value: None if value is None else os.fspath(value),
}
