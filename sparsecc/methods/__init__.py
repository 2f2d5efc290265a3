"""Methods of quantization and sparsity: each takes observations and options, and returns a recipe.

A method is a pure function in a file of its own: it decides numbers and touches no model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparsecc.errors import CalibrationError, unknown

if TYPE_CHECKING:
    from sparsecc.ffn_statistics import FFNObservations
    from sparsecc.observations import Observations
    from sparsecc.recipe import Recipe

# name -> the module in this folder and the function in it, options that the name stands for.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("int8", {}),
    "w8a8": ("w8a8", {}),
    "smoothquant": ("smoothquant", {}),
    "outliertune": ("outliertune", {}),
    "repq": ("repq", {}),
    "noisyquant": ("noisyquant", {}),
    "int4": ("int4", {}),
    "llm_fp4": ("llm_fp4", {}),
    "awq": ("awq", {}),
    "lorc": ("lorc", {}),
}

# Those that say which neurons or features count -> what they look at: "ffn" (``observe_ffn``), "input"
# (``observe``), or "networks" (``observe``, and which layers are one network). Each is the function in the
# module of its name.
SPARSITY: dict[str, str] = {
    "cats": "ffn",
    "cett": "ffn",
    "top": "ffn",
    "gaussian": "ffn",
    "coreinfer": "ffn",
    "teal": "input",
    "cfsp": "networks",
}


def make(name: str, observations: Observations | FFNObservations, **options: Any) -> Recipe:
    """The recipe of a method.

    Raises:
        CalibrationError: no such method or option; the message names the nearest one.
    """
    if name not in METHODS and name not in SPARSITY:
        raise CalibrationError(unknown("method", name, (*METHODS, *SPARSITY)))
    where, given = METHODS.get(name, (name, {}))
    module = importlib.import_module(f"sparsecc.methods.{where}")
    function = getattr(module, where)
    known = list(function.__annotations__)[1:-1]
    for option in options:
        if option not in known:
            raise CalibrationError(unknown(f"option of method {name!r}:", option, known))
    recipe: Recipe = function(observations, **{**given, **options})
    recipe.about |= {"fingerprint": observations.fingerprint}
    return recipe
