"""Every private PyTorch name that sparsecc uses, in one place, each with a canary test.

Supported releases: torch 2.11 to 2.14.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._dynamo.exc import RestartAnalysis, SkipFrame, exceptions_allowed_to_be_fallback
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode

# Raised by Dynamo or AOTAutograd to run the same graph again, or to leave the frame alone: never caught.
RESTARTS = (RestartAnalysis, SkipFrame)
# A graph that cannot be compiled (a size that depends on data): where the compiler raises these, Dynamo splits
# it and hands over the parts.
SPLITS = exceptions_allowed_to_be_fallback

# Functions of these modules switch functorch or autograd state; a copy keeps their order, a trace loses it.
STATEFUL_MODULES = frozenset(
    {
        "torch._C._autograd",
        "torch._C._functorch",
        "torch._functorch.eager_transforms",
        "torch._functorch.predispatch",
        "torch.autograd.forward_ad",
    }
)


def backend_fake_mode() -> FakeTensorMode | None:
    """The fake mode that AOTAutograd will use for the graph being compiled (None outside a compile)."""
    context = TracingContext.try_get()
    return None if context is None else context.fake_mode


def is_functorch_wrapped(value: torch.Tensor) -> bool:
    """Whether ``value`` lives inside a functorch transform (vmap, grad, jvp)."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(value))


def is_tensor_subclass(value: Any) -> bool:
    """A tensor that holds others inside (DTensor, a quantized weight), which retracing would unwrap."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return isinstance(value, torch.Tensor) and bool(is_traceable_wrapper_subclass(value))


def local_part(value: torch.Tensor) -> torch.Tensor | None:
    """What this rank holds of a DTensor; None for any other tensor."""
    if not is_tensor_subclass(value) or not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor

    return value._local_tensor if isinstance(value, DTensor) else None


def is_gathered(placeholder: fx.Node) -> bool:
    """Whether FSDP manages the module that an input comes from.

    Such a weight is gathered into fresh memory for each call, under a version counter that is held still:
    nothing that the tensor itself shows tells whether its values are those of the call before.
    """
    source: Any = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return False
    kind = source.guard_source
    kind = kind() if callable(kind) else kind  # a method before torch 2.12
    return bool(kind.is_fsdp_module())


def has_unbacked_symbols(value: Any) -> bool:
    """Whether a size in ``value`` is only known at run time (``.item()``, ``nonzero``)."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    if isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return bool(free_unbacked_symbols(value))
    if isinstance(value, (list, tuple)):
        return any(has_unbacked_symbols(item) for item in value)
    return False


@contextlib.contextmanager
def faking(mode: FakeTensorMode) -> Iterator[None]:
    """Inside, operators compute on fake values, and take composite operators apart as Dynamo does.

    Without the Python dispatcher, ``matmul`` is taken apart in C++, which in torch 2.11 asks for sizes as
    numbers: that guards, or raises.
    """
    from torch._dispatch.python import enable_python_dispatcher

    with mode, enable_python_dispatcher():
        yield


def without_new_guards(mode: FakeTensorMode, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` on fake values; None where the result would only hold for some of the sizes.

    A guard makes Dynamo compile again for other sizes, which no rewrite is worth.
    """
    environment: Any = mode.shape_env
    if environment is None:
        return function(*args)
    from torch.fx.experimental import symbolic_shapes

    refusing: contextlib.AbstractContextManager[Any]
    error: type[Exception]
    if hasattr(environment, "error_on_new_guards"):
        refusing, error = environment.error_on_new_guards(), symbolic_shapes._ShapeEnvGuardError
    else:  # torch 2.11: by what it asks before it adds one
        from unittest import mock

        refusing, error = mock.patch.object(environment, "_check_frozen", _refuse_guard), _NewGuard
    with refusing:
        try:
            return function(*args)
        except error:
            return None


class _NewGuard(Exception):
    pass


def _refuse_guard(*_: Any) -> None:
    raise _NewGuard


def inductor(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    mode: str | None,
    config: dict[str, Any],
    inner: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Inductor's own compile of a graph, as ``backend="inductor"`` would do it.

    ``inner`` compiles the graph that AOTAutograd makes (:func:`compile_inner` unless given). It is called under
    ``freezing``, which prepares convolutions for packing and keeps AOTAutograd's cache, which would not call
    it, out of the way. The module must hold no parameters of its own: freezing would take them as constants.
    """
    from torch._inductor.compile_fx import compile_fx

    patches = inductor_patches(mode, config)
    if inner is None:
        compiled: Any = compile_fx(module, list(inputs), config_patches=patches or None)
    else:
        patches["freezing"] = True
        compiled = compile_fx(module, list(inputs), inner_compile=inner, config_patches=patches)
    return cast("Callable[..., Any]", compiled)


def inductor_alone(module: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
    """Inductor's compile of a graph for real tensors, apart from a compile that may be under way.

    The fake mode of that one, and the sizes that are symbols to it, are not used.
    """
    with tracing(None), torch.no_grad(), real_tensors():
        return inductor(module, inputs, None, {})


def inductor_patches(mode: str | None, config: dict[str, Any]) -> dict[str, Any]:
    """What ``torch.compile(mode=..., options=...)`` changes of Inductor's configuration."""
    from torch._inductor import list_mode_options

    patches = dict(list_mode_options(mode)) if mode and mode != "default" else {}
    patches.update(config)
    return patches


def packs_weights(patches: dict[str, Any]) -> bool:
    """Whether Inductor, so configured, would pack constant weights, in ways that inputs can follow.

    Not where it generates its own matrix kernels, which read constants at compile time, nor in C++ wrappers.
    """
    from torch._inductor import config

    mkldnn: Any = torch.backends.mkldnn
    if not (mkldnn.is_available() and mkldnn.enabled):
        return False
    off = ("freezing", "max_autotune", "max_autotune_gemm", "cpp_wrapper", "fx_wrapper")
    with config.patch(patches):
        return bool(
            config.cpp.weight_prepack
            and config.layout_optimization
            and not any(getattr(config, name, False) for name in off)
        )


def compile_inner(gm: fx.GraphModule, inputs: Sequence[Any], opaque: bool, **options: Any) -> Any:
    """Inductor's compile of AOTAutograd's graph; ``opaque``: some inputs have a layout without strides."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    if not opaque:
        return compile_fx_inner(gm, inputs, **options)
    with config.patch(size_asserts=False):  # they would ask opaque inputs for their strides
        return compile_fx_inner(gm, inputs, **options)


def packing_patterns(gm: fx.GraphModule) -> None:
    """Rewrite convolutions (2d, 3d) over ``get_attr`` weights to operators on packed weights."""
    from torch._inductor.fx_passes import freezing_patterns, mkldnn_fusion
    from torch._inductor.pattern_matcher import stable_topological_sort

    freezing_patterns.lazy_init()
    # The later ones pack linear layers, whose lowering takes packed constants alone.
    freezing_patterns.pass_patterns[0].apply(gm.graph)
    mkldnn_fusion._eliminate_duplicate_packed_nodes(gm)
    stable_topological_sort(gm.graph)


# Operators that pack a weight; what they return is opaque: only mkldnn's own operators can read it.
_PACKERS = "mkldnn::_reorder_"


def packs(target: Any) -> bool:
    """Whether an operator packs a weight into an opaque layout."""
    name = getattr(getattr(target, "_schema", None), "name", None)
    if name is None:  # patterns insert packets, which stand for their only overload
        name = getattr(target, "_qualified_op_name", "")
    return str(name).startswith(_PACKERS)


def position(placeholder: fx.Node) -> int | None:
    """Which input of the compiled module an input of AOTAutograd's graph is, None where it is a part of one."""
    from torch._functorch._aot_autograd.descriptors import PlainAOTInput

    found = placeholder.meta.get("desc")
    return found.idx if type(found) is PlainAOTInput else None


def boxed(function: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Mark a compiled function as taking its arguments in one list, which it empties."""
    function._boxed_call = True  # type: ignore[attr-defined]
    return function


def real_tensors() -> contextlib.AbstractContextManager[Any]:
    """Inside, operators compute, also in the middle of a trace."""
    from torch.utils._python_dispatch import _disable_current_modes

    return cast("contextlib.AbstractContextManager[Any]", _disable_current_modes())


def aot_eager(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """PyTorch's autograd ahead of time, no code generation."""
    from torch._dynamo.backends.registry import lookup_backend

    compiled: Callable[..., Any] = lookup_backend("aot_eager")(module, list(inputs))
    return compiled


def constant_sources(names: Iterable[str]) -> dict[str, Any]:
    """Where tensors come from that a trace made and no input holds: AOTAutograd asks for each attribute."""
    from torch._dynamo.source import ConstantSource

    return {name: ConstantSource(name) for name in names}


def graph_breaks() -> dict[str, int]:
    """Dynamo's graph breaks so far in this process: reason -> count."""
    from torch._dynamo.utils import counters

    return dict(counters["graph_break"])


@contextlib.contextmanager
def throwaway_compile() -> Iterator[None]:
    """Compiles made for inspection must not hit the limit of recompiles that serves real ones."""
    from torch._dynamo import config

    with config.patch(recompile_limit=1000, accumulated_recompile_limit=10000):
        yield


def toolchain_problem(error: BaseException | None) -> str:
    """What of the machine (not of the model) keeps Inductor from generating code, with the next step; or ""."""
    while error is not None:
        name = type(error).__name__
        if name in ("InvalidCxxCompiler", "TritonMissing"):
            what = "C++ compiler" if name == "InvalidCxxCompiler" else "Triton"
            step = "apt install g++" if name == "InvalidCxxCompiler" else "pip install triton"
            return f"no working {what} was found; install one ({step}), see `sparsecc doctor`"
        if isinstance(error, OSError) and _in_cache_folder(error.filename):
            return (
                f"Inductor's cache folder cannot be written ({error.strerror}: {error.filename}); "
                "set TORCHINDUCTOR_CACHE_DIR to a folder that can"
            )
        error = error.__cause__ or error.__context__ or getattr(error, "inner_exception", None)
    return ""


def cpp_compiler() -> str:
    """The C++ compiler that Inductor uses; its own exception where there is none."""
    from torch._inductor import cpp_builder  # imports much, and at the first build is soon enough

    return str(cpp_builder.get_cpp_compiler())


def cache_folder() -> str:
    """The folder in which Inductor keeps what it builds."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return str(cache_dir())


def _in_cache_folder(path: object) -> bool:
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or os.path.join(
        tempfile.gettempdir(), "torchinductor_"
    )
    return isinstance(path, str) and os.path.abspath(path).startswith(os.path.abspath(folder))
