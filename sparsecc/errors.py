"""Errors that a user can meet. Each says what was wrong, where, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SparseccError(Exception):
    """Base of every error that sparsecc raises on purpose.

    ``exit_code`` is what the command line returns for it: 1 a verification failed, 2 bad usage, 3 internal.
    """

    exit_code = 3


class OptionsError(SparseccError):
    """An option, pass or value does not exist; the message names the nearest valid one."""

    exit_code = 2


class RequirementError(SparseccError):
    """A pass named in ``require`` did not match as often as asked for."""

    exit_code = 1


class VerificationError(SparseccError):
    """The rewritten program is further from the fp64 reference than the law allows."""

    exit_code = 1


class CaptureError(SparseccError):
    """A graph could not be brought into ATen form (raised only under ``strict=True``)."""


class PassError(SparseccError):
    """A pass failed inside; names the pass, the node and the user's source line (``strict=True``)."""


class BuildError(SparseccError):
    """A native library could not be built; whoever asked for it does without, and says so."""


class RecipeError(OptionsError):
    """A recipe cannot be read or written, or is not of this model; names the site."""

    exit_code = 2


class CheckpointError(RecipeError):
    """A quantized checkpoint cannot be read, or is not of this model; names the tensor."""

    exit_code = 2


class CalibrationError(SparseccError):
    """The data or the model cannot be calibrated on: no batches, NaN, nothing to quantize; names the site."""

    exit_code = 2


class ModelError(SparseccError):
    """A model named on the command line could not be loaded."""

    exit_code = 2


def first_line(error: BaseException) -> str:
    """The first line of an error's text; FX appends whole graphs to some."""
    return (str(error).strip().splitlines() or [""])[0][:200]


def unknown(kind: str, name: object, valid: Iterable[str]) -> str:
    """Words for an unknown name: the nearest valid one first, then all of them."""
    names = sorted(valid)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Valid: {', '.join(names) or '(none)'}."
