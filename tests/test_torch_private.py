"""Every private PyTorch name in ``sparsecc/_torch.py`` exists and behaves as assumed."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import distributed, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from sparsecc import _torch


def compile_with(backend: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    return torch.compile(function, backend=backend, fullgraph=True)(*args)


def test_supported_release() -> None:
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    assert (2, 11) <= (major, minor) <= (2, 14), (
        "widen the range in pyproject.toml and run all tests"
    )


@pytest.fixture
def alone() -> Iterator[DeviceMesh]:
    """A process group of one."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_local_part(alone: DeviceMesh) -> None:
    plain = torch.randn(4)
    sharded = distribute_tensor(plain, alone, [Shard(0)])
    assert _torch.local_part(plain) is None
    part = _torch.local_part(sharded)
    assert part is not None
    assert part.data_ptr() == sharded.to_local().data_ptr()


@pytest.mark.parametrize("wrapped", [True, False])
def test_fsdp_marks_its_inputs(alone: DeviceMesh, wrapped: bool) -> None:
    """Dynamo's sources say so, for the module itself and for what is inside."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    model = Net()
    if wrapped:
        fully_shard(model, mesh=alone)
    found: dict[str, bool] = {}

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        for node in gm.graph.find_nodes(op="placeholder"):
            found[str(node.target)] = _torch.is_gathered(node)
        return gm.forward

    torch.compile(model, backend=backend)(torch.randn(2, 4))
    weights = {name: mark for name, mark in found.items() if "parameters" in name}
    assert len(weights) == 2
    assert set(weights.values()) == {wrapped}
    assert sum(found.values()) == 2 * wrapped


def test_fsdp_holds_the_version_still(alone: DeviceMesh) -> None:
    """Why such weights are never folded: new values in the same tensor, and its version does not move."""
    model = nn.Linear(4, 4)
    fully_shard(model, mesh=alone)
    seen: list[tuple[int, int, float]] = []

    def look(module: nn.Module, *_: Any) -> None:
        weight = module.weight
        seen.append((id(weight), weight._version, float(weight.detach().sum())))

    model.register_forward_hook(look)
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(2, 4))
            model.reshard()
            model.weight.to_local().add_(1)
    assert seen[0][:2] == seen[1][:2]
    assert seen[0][2] != seen[1][2]


@pytest.mark.parametrize("kind", _torch.RESTARTS)
def test_restarts_pass_through_dynamo(kind: type[Exception]) -> None:
    """Dynamo acts on these; were they reported as a failure of the backend, catching them would be right."""
    from torch._dynamo import exc

    assert issubclass(kind, exc.TorchDynamoException)
    assert not issubclass(kind, exc.BackendCompilerFailed)
    assert issubclass(exc.TensorifyScalarRestartAnalysis, exc.RestartAnalysis)


def test_a_restart_runs_the_backend_again() -> None:
    """What AOTAutograd does to specialise a float: the backend sees the same frame twice."""
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis

    calls: list[int] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise TensorifyScalarRestartAnalysis(restart_reason="canary")
        return gm.forward

    assert torch.equal(compile_with(backend, lambda x: x + 1, torch.zeros(2)), torch.ones(2))
    assert len(calls) == 2


def names_in_graph(function: Callable[..., Any], *args: Any) -> set[str]:
    """Modules of the functions in Dynamo's graph."""
    found: set[str] = set()

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        found.update(
            getattr(n.target, "__module__", "") or ""
            for n in gm.graph.nodes
            if n.op == "call_function"
        )
        return gm.forward

    compile_with(backend, function, *args)
    return found


def test_stateful_modules() -> None:
    """The transforms leave calls of exactly these modules in Dynamo's graph, and nothing else new."""
    x = torch.randn(3)
    seen = names_in_graph(lambda v: torch.vmap(torch.sin)(v), x)
    torch._dynamo.reset()
    seen |= names_in_graph(lambda v: torch.func.grad(lambda r: r.sin().sum())(v), x)
    torch._dynamo.reset()
    seen |= names_in_graph(lambda v: torch.func.jvp(torch.sin, (v,), (v,))[1], x)
    assert seen >= _torch.STATEFUL_MODULES
    assert seen - _torch.STATEFUL_MODULES <= {"torch", "torch._C", "_operator"}


def test_level_switches_are_named_so() -> None:
    """Capture counts functorch's level by the names of its switches."""
    names: list[str] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        names.extend(getattr(n.target, "__name__", "") for n in gm.graph.nodes)
        return gm.forward

    compile_with(backend, lambda v: torch.vmap(torch.func.grad(torch.sin))(v), torch.randn(3))
    up = [n for n in names if n.endswith("_increment_nesting")]
    down = [n for n in names if n.endswith("_decrement_nesting")]
    assert up == ["_vmap_increment_nesting", "_grad_increment_nesting"]
    assert down == ["_grad_decrement_nesting", "_vmap_decrement_nesting"]


def test_backend_fake_mode() -> None:
    """Inside a compile, the mode that the example inputs' fake values belong to in AOTAutograd."""
    assert _torch.backend_fake_mode() is None
    modes: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        mode = _torch.backend_fake_mode()
        (placeholder,) = gm.graph.find_nodes(op="placeholder")
        modes.append((mode, placeholder.meta["example_value"].fake_mode))
        return gm.forward

    compile_with(backend, lambda x: x + 1, torch.zeros(2))
    ((mode, dynamos),) = modes
    assert isinstance(mode, FakeTensorMode)
    assert mode.shape_env is dynamos.shape_env, "sizes of both modes are the same symbols"


def test_functorch_wrapped() -> None:
    seen: list[bool] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(_torch.is_functorch_wrapped(x))
        return x.sum()

    torch.vmap(look)(torch.zeros(2, 2))
    torch.func.grad(look)(torch.zeros(2))
    look(torch.zeros(2))
    assert seen == [True, True, False]


def test_tensor_subclasses() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    assert _torch.is_tensor_subclass(TwoTensor(torch.zeros(1), torch.ones(1)))
    assert not _torch.is_tensor_subclass(torch.nn.Parameter(torch.zeros(1)))
    assert not _torch.is_tensor_subclass(3)


def test_unbacked_symbols() -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    env = ShapeEnv()
    size = env.create_unbacked_symint()
    with FakeTensorMode(shape_env=env):
        tensor = torch.zeros(size)
    assert _torch.has_unbacked_symbols(size)
    assert _torch.has_unbacked_symbols(tensor)
    assert _torch.has_unbacked_symbols([1, (tensor,)])
    assert not _torch.has_unbacked_symbols([torch.zeros(2), 1, "text"])


@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, "default", "max-autotune-no-cudagraphs"])
def test_inductor(mode: str | None) -> None:
    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        return _torch.inductor(gm, inputs, mode, {"epilogue_fusion": False})

    x = torch.randn(4)
    assert torch.allclose(compile_with(backend, lambda v: v.sin() + 1, x), x.sin() + 1)


def test_inductor_alone_knows_nothing_of_the_compile_around() -> None:
    """Real tensors compile in the middle of a compile, whose fake mode and symbols stay as they were."""
    seen: list[tuple[int, int]] = []
    results: list[torch.Tensor] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        environment = _torch.backend_fake_mode().shape_env  # type: ignore[union-attr]
        before = len(environment.var_to_range), len(environment.guards)
        graph = fx.Graph()
        x = graph.placeholder("x")
        graph.output((graph.call_function(torch.ops.aten.mul.Tensor, (x, 3)),))
        alone = _torch.inductor_alone(fx.GraphModule(nn.Module(), graph), [torch.ones(5, 7)])
        results.extend(alone(torch.full((5, 7), 2.0)))
        seen.extend([before, (len(environment.var_to_range), len(environment.guards))])
        return gm.forward

    torch._dynamo.reset()
    torch.compile(torch.sin, backend=backend, dynamic=True)(torch.randn(5, 7))
    assert seen[0] == seen[1]
    assert torch.equal(results[0], torch.full((5, 7), 6.0))


def test_inductor_validates_its_options() -> None:
    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        return _torch.inductor(gm, inputs, None, {"no_such_option": 1})

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no_such_option"):
        compile_with(backend, torch.sin, torch.zeros(2))


def conv_graph(seen: Callable[[fx.GraphModule, list[Any], dict[str, Any]], None]) -> torch.Tensor:
    """Compile a convolution through ``_torch.inductor`` with an inner compiler that reports what it gets."""
    model = nn.Conv2d(3, 4, 3).eval()

    def inner(gm: fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        seen(gm, inputs, options)
        return _torch.compile_inner(gm, inputs, False, **options)

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        return _torch.inductor(gm, inputs, None, {}, inner)

    x = torch.randn(1, 3, 8, 8)
    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(model, backend=backend)(x)
        assert torch.allclose(result, model(x), atol=1e-5)
    return result


def test_inner_compiler_and_positions() -> None:
    """It gets AOTAutograd's graph, in inference, with inputs that say where they come from."""
    calls: list[list[int | None]] = []

    def seen(gm: fx.GraphModule, inputs: list[Any], options: dict[str, Any]) -> None:
        assert torch._inductor.config.freezing
        assert options["is_inference"]
        assert set(options["static_input_idxs"]) <= set(range(len(inputs)))
        calls.append([_torch.position(n) for n in gm.graph.find_nodes(op="placeholder")])

    conv_graph(seen)
    assert [sorted(c, key=str) for c in calls] == [[0, 1, 2]]
    assert not torch._inductor.config.freezing


def test_packing_patterns() -> None:
    """They take weights that are attributes, and put packers before the operators that read packed weights."""
    targets: list[Any] = []

    def seen(gm: fx.GraphModule, inputs: list[Any], options: dict[str, Any]) -> None:
        gm = fx.GraphModule(gm, gm.graph)
        conv = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.convolution.default)
        gm.weight = torch.zeros(4, 3, 3, 3)
        with gm.graph.inserting_before(conv):
            weight = gm.graph.get_attr("weight")
        weight.meta = dict(conv.args[1].meta)
        copied = gm.graph.node_copy(conv, lambda n: weight if n is conv.args[1] else n)
        conv.append(copied)
        conv.replace_all_uses_with(copied, delete_user_cb=lambda n: n is not copied)
        _torch.packing_patterns(gm)
        targets.extend(n.target for n in gm.graph.nodes if n.op == "call_function")
        for node in list(gm.graph.nodes):  # as it was
            if node.target is torch.ops.mkldnn._convolution_pointwise.default:
                node.replace_all_uses_with(conv)
        gm.graph.eliminate_dead_code()

    conv_graph(seen)
    assert [t for t in targets if _torch.packs(t)]
    assert torch.ops.mkldnn._convolution_pointwise.default in targets


def test_packers() -> None:
    packer = torch.ops.mkldnn._reorder_convolution_weight
    assert _torch.packs(packer)
    assert _torch.packs(packer.default)
    assert not _torch.packs(torch.ops.aten.clone.default)
    assert not _torch.packs("output")
    weight = torch.randn(4, 3, 3, 3)
    packed = packer(weight, [0, 0], [1, 1], [1, 1], 1, [1, 3, 8, 8])
    assert packed.layout is not torch.strided
    assert packed.shape == weight.shape
    x = torch.randn(1, 3, 8, 8)
    args: tuple[Any, ...] = (None, [0, 0], [1, 1], [1, 1], 1, "none", [], "")
    pointwise = torch.ops.mkldnn._convolution_pointwise
    assert torch.allclose(pointwise(x, packed, *args), pointwise(x, weight, *args), atol=1e-5)


@pytest.mark.parametrize(
    "patches",
    [
        {"freezing": True},
        {"max_autotune": True},
        {"cpp_wrapper": True},
        {"layout_optimization": False},
        {"cpp.weight_prepack": False},
    ],
    ids=str,
)
def test_packs_weights(patches: dict[str, Any]) -> None:
    assert _torch.packs_weights({}) == torch.backends.mkldnn.is_available()
    assert not _torch.packs_weights(patches)


def test_patches_of_a_mode() -> None:
    assert _torch.inductor_patches(None, {"a": 1}) == {"a": 1}
    assert _torch.inductor_patches("max-autotune", {})["max_autotune"] is True


def test_boxed() -> None:
    def function(args: list[Any]) -> int:
        return len(args)

    assert _torch.boxed(function) is function
    assert function._boxed_call  # type: ignore[attr-defined]


def test_real_tensors() -> None:
    with FakeTensorMode(), _torch.real_tensors():
        assert float(torch.ones(2).sum()) == 2


def test_aot_eager() -> None:
    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        return _torch.aot_eager(gm, inputs)

    x = torch.randn(4, requires_grad=True)
    compile_with(backend, torch.sin, x).sum().backward()
    assert torch.allclose(x.grad, x.detach().cos())


def test_constant_sources() -> None:
    """AOTAutograd asks where each attribute comes from, also of one that a backend made."""

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        gm.register_buffer("made", torch.full((2,), 3.0))
        add = next(n for n in gm.graph.nodes if n.op == "call_function")
        with gm.graph.inserting_before(add):
            add.update_arg(1, gm.graph.get_attr("made"))
        gm._param_name_to_source.update(_torch.constant_sources(["made"]))
        gm.recompile()
        return _torch.aot_eager(gm, inputs)

    result = compile_with(backend, lambda x: x + 1, torch.zeros(2))
    assert torch.equal(result, torch.full((2,), 3.0))


def test_graph_breaks_are_counted() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    before = sum(_torch.graph_breaks().values())
    torch.compile(broken, backend="eager")(torch.zeros(2))
    assert sum(_torch.graph_breaks().values()) == before + 1


def test_throwaway_compiles_are_not_limited() -> None:
    from torch._dynamo import config

    limits = config.recompile_limit, config.accumulated_recompile_limit
    with _torch.throwaway_compile():
        assert config.recompile_limit > limits[0]
        assert config.accumulated_recompile_limit > limits[1]
    assert (config.recompile_limit, config.accumulated_recompile_limit) == limits


# Private names outside the shim that capture and hoisting rest on.


def test_region_switches() -> None:
    """Autocast and grad mode are calls in Dynamo's graph, with these targets and arguments."""
    nodes: list[fx.Node] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        nodes.extend(n for n in gm.graph.nodes if n.op == "call_function")
        return gm.forward

    def function(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            x = x @ x
        return x

    compile_with(backend, function, torch.eye(2))
    grad, enter, _, leave, grad_back = nodes
    assert grad.target is grad_back.target is torch._C._set_grad_enabled
    assert (grad.args, grad_back.args) == ((False,), (True,))
    assert enter.target is torch.amp.autocast_mode._enter_autocast
    assert leave.target is torch.amp.autocast_mode._exit_autocast
    assert leave.args == (enter,)
    assert enter.args[:3] == ("cpu", torch.bfloat16, True)


def test_sources_of_inputs() -> None:
    """Names, parameters and buffers are read off Dynamo's sources."""
    from sparsecc.capture import qualified_name

    names: list[str] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        for node in gm.graph.find_nodes(op="placeholder"):
            name = node._dynamo_source.name
            names.append(name() if callable(name) else name)
        return gm.forward

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).eval()
    compile_with(backend, model, torch.zeros(1, 2))
    assert "0.weight" in {qualified_name(n) for n in names if "_parameters[" in n}
    assert "1.running_mean" in {qualified_name(n) for n in names if "_buffers[" in n}


def test_static_inputs_keep_their_address() -> None:
    """The mark that folded weights carry makes an input static: CUDA graphs do not copy it."""
    from torch._dynamo.backends.common import aot_autograd

    found: list[list[int]] = []

    def record(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        found.append(torch._guards.TracingContext.get().fw_metadata.static_input_indices)
        return gm.forward

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        second = list(gm.graph.find_nodes(op="placeholder"))[1]
        second.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        return aot_autograd(fw_compiler=record)(gm, inputs)

    compile_with(backend, torch.add, torch.zeros(2), torch.zeros(2))
    assert found == [[1]]


def test_faking() -> None:
    """A linear layer without bias, over rows of any number, is faked without a guard on the numbers."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    dynamic = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x = mode.from_tensor(torch.randn(3, 5, 8), symbolic_context=dynamic)
    weight = mode.from_tensor(torch.randn(4, 8), static_shapes=True)
    with _torch.faking(mode), torch.no_grad():
        y = torch.ops.aten.linear.default(x, weight)
    assert (y.shape[:2], y.shape[2]) == (x.shape[:2], 4)
    assert not environment.guards


def test_without_new_guards() -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    x = mode.from_tensor(torch.randn(4, 6), static_shapes=False)
    before = len(environment.guards)
    assert _torch.without_new_guards(mode, lambda: bool(x.shape[0] == 4)) is None
    assert len(environment.guards) == before
    assert _torch.without_new_guards(mode, lambda v: v.shape[0] * 2, x) == x.shape[0] * 2
    plain = FakeTensorMode()
    assert _torch.without_new_guards(plain, lambda: 3) == 3


def test_compiler_and_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    assert shutil.which(_torch.cpp_compiler())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert _torch.cache_folder() == str(tmp_path)
