"""merge-branches: summed layers of one input become one, the input itself included, and where they must not."""

from __future__ import annotations

import copy

import pytest
import torch
from support import (
    check_exact,
    check_training,
    error,
    left,
    managed_by_fsdp,
    randomise,
    refusals,
    run,
)
from torch import nn
from torch.nn import functional as F

NAME = "merge-branches"
ONLY = {"passes": [NAME]}
SPACE = torch.randn(2, 4, 9, 8)


class Branches(nn.Module):
    """The sum of layers over one input, and the input itself as often as said."""

    def __init__(self, *layers: nn.Module, identity: int = 0) -> None:
        super().__init__()
        self.layers, self.identity = nn.ModuleList(layers), identity

    def forward(self, x):
        total = sum(layer(x) for layer in self.layers)
        for _ in range(self.identity):
            total = x + total
        return torch.relu(total)


def conv(out: int, kernel, **options) -> nn.Module:
    return nn.Conv2d(4, out, kernel, **options)


PAIRS = {
    "3 and 1": (conv(6, 3, padding=1), conv(6, 1)),
    "1 and 3": (conv(6, 1), conv(6, 3, padding=1)),
    "three": (conv(6, 3, padding=1), conv(6, 1), conv(6, (1, 3), padding=(0, 1))),
    "31 and 5": (
        conv(4, 7, padding=3, groups=4),
        conv(4, 3, padding=1, groups=4, bias=False),
    ),
    "strided": (
        conv(6, 3, stride=2, padding=1, bias=False),
        conv(6, 1, stride=2),
    ),
    "grouped": (conv(8, 3, padding=1, groups=2), conv(8, 1, groups=2)),
    "dilated": (conv(6, 3, padding=2, dilation=2), conv(6, 1)),
    "same": (conv(6, 5, padding="same"), conv(6, 3, padding="same")),
    "not at the centre": (conv(6, 3, padding=(1, 0)), conv(6, (3, 2), padding=(1, 0))),
    "without bias": (conv(6, 3, padding=1, bias=False), conv(6, 1, bias=False)),
}
FIT = [name for name in PAIRS if name != "not at the centre"]


@pytest.mark.parametrize("pair", FIT)
def test_convolutions(pair: str) -> None:
    check_exact(randomise(Branches(*PAIRS[pair])).eval(), SPACE, applied={NAME: 1}, **ONLY)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("identity", [1, 2])
def test_the_input_itself(groups: int, identity: int) -> None:
    layers = conv(4, 3, padding=1, groups=groups), conv(4, 1, groups=groups)
    model = randomise(Branches(*layers, identity=identity)).eval()
    check_exact(model, SPACE, applied={NAME: 1}, **ONLY)


def test_one_and_three_axes() -> None:
    one = randomise(Branches(nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 1), identity=1)).eval()
    check_exact(one, SPACE[..., 0], applied={NAME: 1}, **ONLY)
    three = Branches(nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1)), nn.Conv3d(4, 4, 1), identity=1)
    space = torch.randn(2, 4, 3, 5, 6)
    check_exact(randomise(three).eval(), space, applied={NAME: 1}, **ONLY)


@pytest.mark.parametrize("identity", [0, 1])
def test_linear_layers(identity: int) -> None:
    model = randomise(Branches(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), identity=identity))
    check_exact(model, torch.randn(2, 5, 4), applied={NAME: 1}, **ONLY)


class Mixed(nn.Module):
    """The same map, in two spellings of opposite orientation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Parameter(torch.ones(4, 6))

    def forward(self, x):
        return x @ self.second + self.first(x)


def test_other_orientation() -> None:
    check_exact(randomise(Mixed()), torch.randn(5, 4), applied={NAME: 1}, **ONLY)


class RepVGG(nn.Module):
    """Equation 1 of the paper: three branches, each with its BatchNorm."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.large = nn.Conv2d(4, 4, 3, padding=1, groups=groups, bias=False)
        self.small = nn.Conv2d(4, 4, 1, groups=groups, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x):
        a, b, c = self.norms
        return torch.relu(a(self.large(x)) + b(self.small(x)) + c(x))


class Stack(nn.Sequential):
    pass


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_repvgg(groups: int) -> None:
    model = randomise(nn.Sequential(RepVGG(groups), RepVGG(groups), RepVGG(groups))).eval()
    check_exact(model, SPACE, applied={"fold-batchnorm": 6, NAME: 3})


def test_only_relu_and_convolutions_are_left() -> None:
    from support import capture

    from sparsecc import pipeline
    from sparsecc.options import Options
    from sparsecc.report.model import GraphReport

    model = randomise(nn.Sequential(RepVGG(), RepVGG())).eval()
    with torch.no_grad():
        program = capture(model, SPACE)
    pipeline.run(program, Options.parse({}), GraphReport(0))
    targets = [str(n.target) for n in program.graph.nodes if not n.meta.get("sparsecc_weight")]
    called = [t for t in targets if t.startswith("aten")]
    assert called == ["aten.conv2d.default", "aten.relu.default"] * 2


class Pooled(nn.Module):
    """A convolution and the average of the neighbours (a diverse branch block)."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.conv, self.options = nn.Conv2d(4, 4, 3, padding=1, groups=2), options

    def forward(self, x):
        return self.conv(x) + F.avg_pool2d(x, 3, 1, 1, **self.options)


def test_average_pooling_that_counts_its_padding() -> None:
    check_exact(randomise(Pooled()), SPACE, applied={NAME: 1}, **ONLY)
    without = randomise(Pooled(count_include_pad=False))
    check_exact(without, SPACE, applied={NAME: 0}, **ONLY)


class Twice(nn.Module):
    """The result of one convolution, added to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        y = self.conv(x)
        return y + y


def test_added_to_itself() -> None:
    check_exact(randomise(Twice()), SPACE, applied={NAME: 1}, **ONLY)


class Rest(nn.Module):
    """Other summands stay, wherever they stand."""

    def __init__(self, order: int) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, k, padding=k // 2) for k in (3, 1, 1))
        self.order = order

    def forward(self, x, y):
        a, b, c = self.a(x), self.b(x), self.c(torch.tanh(x))
        sums = (
            lambda: (a + c) + (b + y),
            lambda: (a + b) + (c + y),
            lambda: a + (c + (y + (x + b))),
            lambda: ((x + b) + y) + (a + c),
        )
        return sums[self.order]()


@pytest.mark.parametrize("order", range(4))
@pytest.mark.parametrize("dynamic", [None, True])
def test_other_summands_stay(order: int, dynamic: bool | None) -> None:
    model = randomise(Rest(order))
    check_exact(model, SPACE, torch.randn_like(SPACE), applied={NAME: 1}, dynamic=dynamic, **ONLY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_fp64_as_eager(dtype: torch.dtype) -> None:
    model = randomise(nn.Sequential(RepVGG(), RepVGG(2))).eval()
    exact = copy.deepcopy(model).to(dtype).double()(SPACE.to(dtype).double())
    model = model.to(dtype)
    with torch.no_grad():
        result, report = run(model, SPACE.to(dtype))
        eager = model(SPACE.to(dtype))
    assert report[NAME].applied == 2
    assert result.dtype == dtype
    assert error(result, exact) <= 1.5 * error(eager, exact)


def test_updated_after_compile() -> None:
    model = randomise(nn.Sequential(RepVGG(), RepVGG())).eval()
    fast = torch.compile(
        model, backend="sparsecc", options={"lower": "eager", "require": {NAME: 2}}
    )
    with torch.no_grad():
        for seed in (1, 2):
            assert error(fast(SPACE), model(SPACE)) < 1e-5
            model.load_state_dict(randomise(copy.deepcopy(model), seed).state_dict())
        model[0].large.weight.data.mul_(2)
        assert error(fast(SPACE), model(SPACE)) < 1e-5


class Frozen(nn.Module):
    """Fine-tuning with a frozen BatchNorm on the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(20, 4), nn.BatchNorm1d(4)
        self.large, self.small = nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 1, bias=False)

    def train(self, mode: bool = True):
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, ids):
        x = self.embed(ids).transpose(1, 2)
        return torch.tanh(self.small(x) + self.large(x) + self.norm(x))


def test_fine_tuning_walks_the_same_path() -> None:
    check_training(lambda: randomise(Frozen()), applied={NAME: 1}, passes=[NAME])


# ---- signs and scales ----------------------------------------------------------------------------


class Signed(nn.Module):
    """Two convolutions, a BatchNorm and a scale, and how they meet."""

    def __init__(self, join, groups: int = 1, scale: tuple[int, ...] = (4, 1, 1)) -> None:
        super().__init__()
        self.large = nn.Conv2d(4, 4, 3, padding=1, groups=groups)
        self.small = nn.Conv2d(4, 4, 1, groups=groups, bias=False)
        self.norm, self.scale, self.join = nn.BatchNorm2d(4), nn.Parameter(torch.ones(scale)), join

    def forward(self, x):
        return self.join(self, x)


def mixer(m, x):
    """RepMixer of FastViT."""
    return x + (m.large(x) + m.small(x) - m.norm(x)) * m.scale


SIGNED = {
    "mixer": mixer,
    "difference": lambda m, x: m.small(x) - m.large(x),
    "all negative": lambda m, x: -(m.small(x) + m.norm(x)) - m.large(x),
    "alpha": lambda m, x: torch.add(x, m.large(x), alpha=3),
    "alpha of sub": lambda m, x: torch.sub(m.small(x), m.norm(x) - m.large(x), alpha=0.5),
    "numbers": lambda m, x: 0.5 * m.large(x) - 2 * (x - m.small(x) * 3),
    "scale of the host": lambda m, x: m.small(x) - m.scale * m.large(x),
    "scale of a scale": lambda m, x: m.scale * (x - m.scale * (m.large(x) - m.norm(x) * m.scale)),
    "expression": lambda m, x: x - m.large(x) * (1 - m.scale.exp()),
    "twice": lambda m, x: (m.large(x) - x) - x,
    "pooled": lambda m, x: m.scale * m.large(x) - F.avg_pool2d(x, 3, 1, 1),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("how", SIGNED)
def test_signs_and_scales(how: str, groups: int, dynamic: bool | None) -> None:
    model = randomise(Signed(SIGNED[how], groups))
    check_exact(model, SPACE, applied={NAME: 1}, dynamic=dynamic, **ONLY)


OTHERS = {  # summands that stay, and what is left of their operators
    "behind the minus": (lambda m, x, y: m.large(x) - y + m.small(x), ["neg", "add"]),
    "before it": (lambda m, x, y: y - m.large(x) + m.small(x), ["add"]),
    "with alpha": (lambda m, x, y: torch.sub(m.large(x), y, alpha=2) + x, ["mul", "add"]),
    "scaled": (lambda m, x, y: x + m.scale * (m.large(x) - y), ["neg", "mul", "add"]),
    "first of all": (lambda m, x, y: (y - x) * m.scale - m.large(x), ["mul", "add"]),
    "two": (lambda m, x, y: (y - (x - m.large(x))) - y * y, ["mul", "sub", "add"]),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("how", OTHERS)
def test_what_is_left_keeps_its_sign_and_scale(how: str, dynamic: bool | None) -> None:
    join, _ = OTHERS[how]
    y = torch.randn_like(SPACE)
    model = randomise(Signed(lambda m, xy: join(m, *xy))).double().eval()
    pair = (SPACE.double(), y.double())
    with torch.no_grad():
        result, report = run(model, pair, dynamic=dynamic, **ONLY)
        assert error(result, model(pair)) < 1e-12
    assert report[NAME].applied == 1


@pytest.mark.parametrize("how", OTHERS)
def test_operators_of_what_is_left(how: str) -> None:
    from support import capture

    from sparsecc import pipeline
    from sparsecc.options import Options
    from sparsecc.report.model import GraphReport

    join, operators = OTHERS[how]
    model = randomise(Signed(lambda m, xy: join(m, *xy))).eval()
    with torch.no_grad():
        program = capture(model, (SPACE, torch.randn_like(SPACE)))
    pipeline.run(program, Options.parse(ONLY), GraphReport(0))
    targets = [str(n.target) for n in program.graph.nodes if not n.meta.get("sparsecc_weight")]
    called = [t.split(".")[1] for t in targets if t.startswith("aten")]
    assert sorted(called) == sorted(["conv2d", *operators])


def test_linear_layers_with_signs_and_scales() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return (x - self.a(x)) * self.scale - self.b(x)

    check_exact(randomise(Layers()), torch.randn(2, 5, 4), applied={NAME: 1}, **ONLY)


def test_other_orientation_with_a_scale() -> None:
    class MixedScaled(Mixed):
        def forward(self, x):
            return self.first(x) - (x @ self.second) * self.first.bias

    check_exact(randomise(MixedScaled()), torch.randn(5, 4), applied={NAME: 1}, **ONLY)


def test_a_mixer_becomes_one_convolution_beside_its_norms() -> None:
    class Whole(Signed):
        def __init__(self) -> None:
            super().__init__(None, groups=4)
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

        def forward(self, x):
            a, b = self.norms
            return torch.relu(x + self.scale * (a(self.large(x)) + b(self.small(x)) - self.norm(x)))

    model = randomise(nn.Sequential(Whole(), Whole())).eval()
    check_exact(model, SPACE, applied={"fold-batchnorm": 4, NAME: 2})
    assert left(model, SPACE) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixer_in_half_precision(dtype: torch.dtype) -> None:
    model = randomise(Signed(mixer, 4)).eval().to(dtype)
    x = SPACE.to(dtype)
    with torch.no_grad():
        result, report = run(model, x, **ONLY)
        exact = copy.deepcopy(model).double()(x.double())
        assert error(result, exact) <= 1.5 * error(model(x), exact)
    assert report[NAME].applied == 1
    assert result.dtype == dtype


def test_mixer_updated_after_compile() -> None:
    model = randomise(nn.Sequential(Signed(mixer), Signed(mixer, 4))).eval()
    options = {"lower": "eager", "require": {NAME: 2}}
    fast = torch.compile(model, backend="sparsecc", options=options)
    with torch.no_grad():
        for seed in (1, 2):
            assert error(fast(SPACE), model(SPACE)) < 1e-5
            model.load_state_dict(randomise(copy.deepcopy(model), seed).state_dict())
        model[0].scale.data.mul_(2)
        model[1].norm.running_mean.add_(1)
        assert error(fast(SPACE), model(SPACE)) < 1e-5


def test_other_sizes_do_not_recompile() -> None:
    model = randomise(Signed(lambda m, x: mixer(m, x) - torch.tanh(x))).eval()
    torch._dynamo.reset()
    options = {"lower": "eager", "require": {NAME: 1}}
    fast = torch.compile(model, backend="sparsecc", options=options, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for size in (9, 12, 7):
            x = torch.randn(3, 4, size, size + 1)
            assert error(fast(x), model(x)) < 1e-6


class FrozenMixer(Frozen):
    """A difference with a scale that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 1))

    def forward(self, ids):
        x = self.embed(ids).transpose(1, 2)
        return torch.tanh(self.scale * (self.small(x) - self.norm(x) + self.large(x)) + x)


def test_fine_tuning_with_signs_and_scales_walks_the_same_path() -> None:
    check_training(lambda: randomise(FrozenMixer()), applied={NAME: 1}, passes=[NAME])


def test_a_scale_that_widens_ends_the_sum() -> None:
    """The branches in it are merged; the scale stays, and so does what is added behind it."""
    model = randomise(Signed(mixer)).eval().bfloat16()
    model.scale.data = model.scale.data.float()
    x = SPACE.bfloat16()
    with torch.no_grad():
        result, report = run(model, x, **ONLY)
        exact = copy.deepcopy(model).double()(x.double())
        assert error(result, exact) <= 1.5 * error(model(x), exact)
    assert report[NAME].applied == 1
    assert result.dtype == torch.float32


# ---- refuses -------------------------------------------------------------------------------------


class Read(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.a(x)
        return (y + self.b(x)) * y


class Shared(Read):
    def forward(self, x):
        return self.a(x) + self.b(x) + self.b(x + 1)


class Region(Read):
    def forward(self, x):
        y = self.a(x)
        with torch.autocast("cpu", torch.bfloat16):
            z = self.b(x)
        return y + z.float()


class Widened(Read):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = self.a(x)
            return y + x


class Written(Read):
    """The caller's tensor changes between the branches."""

    def forward(self, x):
        y = self.a(x)
        x.mul_(2)
        return y + self.b(x) + x


class WrittenSummand(Read):
    """The value that stays is read after the caller's tensor has changed."""

    def forward(self, x):
        y = torch.tanh(x)
        total = self.b(y) + x
        x.mul_(2)
        return total - self.a(y)


class OtherAxis(Read):
    """A scale along another axis than that of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x - self.scale * self.a(x)


REFUSED = {
    Read: "fan-out",
    Shared: "tied",
    Widened: "widened",
    Written: "written",
    WrittenSummand: "written",
    OtherAxis: "scale",
}


@pytest.mark.parametrize("cls", REFUSED, ids=lambda c: c.__name__)
def test_refuses(cls: type[nn.Module]) -> None:
    model = randomise(cls()).eval()
    with torch.no_grad():
        result, report = run(model, SPACE.clone(), **ONLY)
        assert error(result, model(SPACE.clone())) < 1e-6
    assert refusals(report, NAME) == [REFUSED[cls]]


MISFITS = {
    "groups": (conv(4, 3, padding=1), conv(4, 1, groups=2)),
    "dilation": (conv(4, 5, padding=2), conv(4, 3, padding=2, dilation=2)),
    "off the grid": (conv(4, 3, padding=2, dilation=2), conv(4, (1, 3), padding=(0, 1))),
    "a tap too far": (conv(4, 3, padding=(1, 0)), conv(4, (1, 5), padding=(0, 1))),
}


@pytest.mark.parametrize("pair", MISFITS)
def test_taps_that_do_not_line_up(pair: str) -> None:
    model = randomise(Branches(*MISFITS[pair])).eval()
    with torch.no_grad():
        result, report = run(model, SPACE, **ONLY)
        assert error(result, model(SPACE)) < 1e-6
    assert set(refusals(report, NAME)) <= {"taps"}
    assert report[NAME].applied == 0


@pytest.mark.parametrize("small_last", [True, False])
def test_strides_of_the_sum_stay(small_last: bool) -> None:
    """One weight has its channels last, so one branch has, too; the sum follows one of them."""
    model = randomise(Branches(conv(4, 3, padding=1), conv(4, 1))).eval()
    model.layers[int(small_last)].to(memory_format=torch.channels_last)
    with torch.no_grad():
        result, report = run(model, SPACE, **ONLY)
        expected = model(SPACE)
    assert result.stride() == expected.stride()
    assert error(result, expected) < 1e-6
    assert refusals(report, NAME) in ([], ["layout"])


def test_a_sum_with_other_strides_is_refused() -> None:
    first = randomise(conv(4, 3, padding=1))
    second = randomise(conv(4, 1, bias=False)).to(memory_format=torch.channels_last)
    first.to(memory_format=torch.channels_last)
    image = torch.randn(2, 4, 1, 8)

    def model(x):
        return (first(x) + second(x)) + torch.ones(2, 4, 1, 8)

    with torch.no_grad():
        result, _ = run(model, image, **ONLY)
        expected = model(image)
    assert result.stride() == expected.stride()
    assert error(result, expected) < 1e-6


def test_a_strided_convolution_is_no_identity() -> None:
    model = randomise(Branches(nn.Conv1d(4, 4, 4, stride=2, padding=1), identity=0))
    check_exact(model, SPACE[..., 0], applied={NAME: 0}, **ONLY)


def test_batch_statistics_stay() -> None:
    model = randomise(RepVGG()).train()
    plain = copy.deepcopy(model)
    result, report = run(model, SPACE, passes=["fold-batchnorm", NAME])
    assert report[NAME].applied == 0
    assert error(result, plain(SPACE)) < 1e-6


def test_training_and_gathered_weights_are_refused_unless_named() -> None:
    model = randomise(Branches(conv(4, 3, padding=1), conv(4, 1)))
    _, report = run(model, SPACE)
    assert "training" in refusals(report, NAME)
    with torch.no_grad():
        _, report = run(managed_by_fsdp(model), SPACE)
    assert "gathered" in refusals(report, NAME)


def test_another_region() -> None:
    model = randomise(Region()).eval()
    with torch.no_grad():
        result, report = run(model, SPACE, **ONLY)
        assert error(result, model(SPACE)) < 1e-2
    assert report[NAME].applied == 0
