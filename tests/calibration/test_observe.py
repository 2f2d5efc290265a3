"""Observation: sites, statistics against hooks on the eager model, links, resuming, files, errors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration.models import (
    LN_AS_IT_IS,
    Chain,
    Decoder,
    decoder,
    rows,
    token_batches,
)
from support import randomise
from torch import nn

from sparsecc.errors import CalibrationError, OptionsError, RecipeError
from sparsecc.observations import Observations
from sparsecc.observe import observe


def same(a: Observations, b: Observations, rounding: float = 1e-12) -> None:
    assert a.batches == b.batches
    assert a.sites.keys() == b.sites.keys()
    assert a.links == b.links
    for name, site in a.sites.items():
        assert site.shape == b.sites[name].shape
        assert torch.equal(a.weight(name), b.weight(name))
        x, y = a.input(name), b.input(name)
        assert x.rows == y.rows
        for vector in ("low", "high", "total", "squares", "sample"):
            scale = getattr(y, vector).abs().max() + 1e-30
            assert (getattr(x, vector) - getattr(y, vector)).abs().max() <= rounding * scale, vector
        assert int((x.bins - y.bins).abs().sum()) <= (0 if not rounding else 2)


def hooked(model: nn.Module, batches: list[Any]) -> dict[str, torch.Tensor]:
    """The rows that every nn.Linear of the eager model reads."""
    read: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: read.setdefault(name + ".weight", []).append(
                args[0].flatten(0, -2)
            )
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in read.items()}


def test_statistics_are_those_of_the_eager_model() -> None:
    # Without folds of the norms' weights, so that inputs are the eager model's own.
    model, batches = decoder().double(), token_batches()
    seen = observe(model, batches, {"passes": []})
    read = hooked(model, batches)
    assert seen.sites.keys() == read.keys()
    for name, x in read.items():
        found = seen.input(name)
        assert found.rows == len(x)
        assert torch.allclose(found.low, x.amin(0), rtol=1e-12)
        assert torch.allclose(found.high, x.amax(0), rtol=1e-12)
        assert torch.allclose(found.mean_magnitude, x.abs().mean(0), rtol=1e-12)
        assert torch.allclose(found.squares, x.square().sum(0), rtol=1e-12)
        # Fewer rows than are sampled: all of them are there.
        assert torch.allclose(found.sample.sort(0)[0], x.float().sort(0)[0], rtol=1e-5, atol=1e-6)
        assert torch.equal(seen.weight(name), model.get_parameter(name).float())


def test_weights_are_those_that_the_passes_leave() -> None:
    """γ of a norm is folded into what reads it: input and weight change, the product does not."""
    model, batches = decoder().double(), token_batches()
    seen = observe(model, batches)
    read = hooked(model, batches)
    name = "blocks.0.up.weight"
    weight = model.get_parameter(name)
    folded = weight * model.blocks[0].norm2.weight
    assert torch.allclose(seen.weight(name), folded.float(), rtol=1e-6)
    plain = read[name] / model.blocks[0].norm2.weight
    assert torch.allclose(seen.input(name).high, plain.amax(0), rtol=1e-9)


def test_readers_of_one_value_share_its_statistics() -> None:
    seen = observe(decoder(), token_batches(1))
    q, k = seen.sites["blocks.0.q.weight"], seen.sites["blocks.0.k.weight"]
    assert q.groups == k.groups == ["blocks.0.k.weight, blocks.0.q.weight, blocks.0.v.weight"]
    assert seen.input("blocks.0.q.weight").rows == 64


def test_links_by_site() -> None:
    seen = observe(decoder(), token_batches(1))
    kinds = {link.kind for link in seen.links.values()}
    assert kinds == {"norm-linear", "v-o", "up-down", "q-k"}
    vo = seen.links["v-o: blocks.0.o.weight"]
    assert list(vo.producers) == ["blocks.0.v.weight"]
    assert vo.size == 32
    # Two query heads read one head of v: their columns are of the same channels.
    columns = vo.consumers["blocks.0.o.weight"]
    assert sorted(columns) == sorted([*range(32)] * 2)
    assert vo.carries_shift
    assert not seen.links["up-down: blocks.0.down.weight"].carries_shift
    assert "q-k: blocks.0.q.weight" not in seen.movable()


def test_a_tied_head_is_a_site_and_has_no_link() -> None:
    model = decoder(tied=True)
    seen = observe(model, token_batches(1))
    assert "embed.weight" in seen.sites
    assert not any("embed.weight" in link.consumers for link in seen.movable().values())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.tanh(self.fc(x)))


def test_a_layer_called_twice_has_the_rows_of_both() -> None:
    model = randomise(Twice()).eval()
    x = rows(10, 8) * 100
    seen = observe(model, [x])
    assert seen.input("fc.weight").rows == 20
    assert float(seen.input("fc.weight").low.min()) == float(x.min())


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        torch._dynamo.graph_break()
        return self.b(y)


def test_several_graphs() -> None:
    seen = observe(randomise(Broken()).eval(), [rows(4, 8), rows(6, 8)])
    assert {name: seen.input(name).rows for name in seen.sites} == {"a.weight": 10, "b.weight": 10}


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x).tanh()


class Shared(nn.Module):
    """One compiled function serves two layers: both have the same name in it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = Inner(), Inner(), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = _apart(self.two, _apart(self.one, x))
        return self.last(x)


@torch._dynamo.disable(recursive=False)
def _apart(inner: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return inner(x)


def test_a_name_that_is_two_weights_is_left_out() -> None:
    seen = observe(randomise(Shared()).eval(), [rows(4, 8), rows(5, 8)])
    assert list(seen.sites) == ["last.weight"]
    assert seen.left_out == ["fc.weight"]


def test_sizes_of_batches_may_differ() -> None:
    model = decoder().double()
    whole = token_batches(1, 12)[0]
    parts = [whole[:1], whole[1:5], whole[5:7], whole[7:]]
    a, b = observe(model, [whole]), observe(model, parts)
    b.batches = 1
    same(a, b, 1e-6)  # samples are fp32, products of other batches round apart


def test_tuples_and_dicts() -> None:
    model = decoder()
    (batch,) = token_batches(1)
    same(observe(model, [(batch,)]), observe(model, [{"input_ids": batch}]), 0)
    same(observe(model, [batch]), observe(model, [[batch]]), 0)


def test_a_function_is_a_model() -> None:
    model = decoder()
    seen = observe(lambda batch: model(batch).softmax(-1), token_batches(1))
    assert seen.sites.keys() == observe(model, token_batches(1)).sites.keys()


def test_gradients_and_weights_are_untouched() -> None:
    model = decoder()
    before = {name: p.clone() for name, p in model.named_parameters()}
    observe(model, token_batches(1))
    assert all(
        torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters()
    )
    assert torch.is_grad_enabled()


# ---- parts ------------------------------------------------------------------------------------------


def test_resuming_equals_one_run(tmp_path: Path) -> None:
    model, batches = decoder(), token_batches(5)
    path = tmp_path / "seen.json"
    whole = observe(model, batches)
    observe(model, batches[:2], resume=path)
    torch._dynamo.reset()
    same(observe(model, batches, resume=path), whole, 0)
    same(observe(model, batches, resume=path), whole, 0)  # nothing is left to do
    same(Observations.load(path), whole, 0)


def test_an_interrupted_run_goes_on_from_the_last_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsecc.observe._EVERY", 2)
    model, batches = decoder(), token_batches(5)
    path = tmp_path / "seen.json"

    def stream() -> Any:
        yield from batches[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        observe(model, stream(), resume=path)
    half = Observations.load(path)
    assert half.batches == 2
    with pytest.raises(CalibrationError, match=r"blocks\.0\.q\.weight: its weight was not kept"):
        half.weight("blocks.0.q.weight")
    same(observe(model, batches, resume=path), observe(model, batches), 0)


def test_a_run_that_was_left_before_its_end_gets_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsecc.observe._EVERY", 1)
    model, batches = decoder(), token_batches(2)
    path = tmp_path / "seen.json"
    whole = observe(model, batches, resume=path)
    whole.save(path, weights=False)
    same(observe(model, batches, resume=path), whole, 0)


def test_parts_merge() -> None:
    model, batches = decoder(), token_batches(4)
    parts = [observe(model, batches[:2]), observe(model, batches[2:], shard=1)]
    both, whole = parts[0].merge(parts[1]), observe(model, batches)
    assert both.fingerprint == whole.fingerprint
    assert both.links == whole.links
    assert both.batches == 4
    for name in whole.sites:
        a, b = both.input(name), whole.input(name)
        assert torch.equal(a.low, b.low)
        assert torch.equal(a.bins, b.bins)
        assert torch.allclose(a.squares, b.squares, rtol=1e-12)


def test_without_ranks_there_is_nothing_to_reduce() -> None:
    seen = observe(decoder(), token_batches(1))
    assert seen.all_reduce() is seen


def test_parts_of_two_models_do_not_merge() -> None:
    a, b = observe(decoder(), token_batches(1)), observe(decoder(f=64), token_batches(1))
    with pytest.raises(CalibrationError, match=r"blocks\.0\.gate\.weight is \[128, 64\] here"):
        a.merge(b)


def test_a_link_that_one_graph_lacks_is_dropped() -> None:
    seen = observe(decoder(), token_batches(1))
    name = "up-down: blocks.0.down.weight"
    links = {key: link for key, link in seen.links.items() if key != name}
    other = Observations(sites=dict(seen.sites), inputs=dict(seen.inputs), links=links)
    for both in (seen.merge(other), other.merge(seen)):
        assert both.dropped == [name]
        assert name not in both.links
        assert set(both.links) == set(links)
    again = seen.merge(other).merge(seen)
    assert name not in again.links


def test_files_hold_in_another_process(tmp_path: Path) -> None:
    seen = observe(decoder(tied=True), token_batches(2))
    path = tmp_path / "seen.json"
    seen.save(path)
    code = (
        "import sys; from sparsecc.observations import Observations as O; from sparsecc.methods import make;"
        f"o = O.load({str(path)!r}); r = make('awq', o, group=32); print(o.fingerprint);"
        f"r.save({str(tmp_path / 'r.json')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == seen.fingerprint
    same(Observations.load(path), seen, 0)
    assert len(list(tmp_path.iterdir())) == 4


def test_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"end in \.json"):
        Observations.load(tmp_path / "seen")
    with pytest.raises(CalibrationError, match="cannot be read: FileNotFoundError"):
        Observations.load(tmp_path / "absent.json")
    seen = observe(decoder(), token_batches(1))
    path = tmp_path / "seen.json"
    seen.save(path)
    path.write_text(path.read_text().replace('"version": 1', '"version": 0'))
    with pytest.raises(CalibrationError, match="not of version 1"):
        Observations.load(path)
    seen.save(path)
    path.with_suffix(".safetensors").write_bytes(b"nothing")
    with pytest.raises(CalibrationError, match="cannot be read"):
        Observations.load(path)
    with pytest.raises(CalibrationError, match="observations"):
        seen.save(tmp_path / "no" / "seen.json")


# ---- errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "batches", "words"),
    [
        (decoder, [], "no batches"),
        (lambda: nn.Sequential(nn.Tanh()).eval(), [rows()], "nothing to calibrate"),
        (lambda: Chain().eval(), [rows() / 0], r"the input of a\.weight, b\.weight holds a NaN"),
        (
            lambda: nn.Sequential(nn.Linear(32, 4)).eval(),
            [rows() + torch.inf],
            "0.weight holds an inf",
        ),
        (
            lambda: nn.Sequential(nn.Linear(32, 4)).eval(),
            [rows(0)],
            "0.weight: its input has no rows",
        ),
        (lambda: nn.Sequential(nn.Linear(32, 4)).eval(), [3], "not int"),
    ],
)
def test_what_cannot_be_calibrated(
    model: Callable[[], nn.Module], batches: list[Any], words: str
) -> None:
    with pytest.raises(CalibrationError, match=words):
        observe(model(), batches)


def test_another_models_state_is_not_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "seen.json"
    observe(decoder(), token_batches(1), resume=path)
    with pytest.raises(
        CalibrationError, match=r"blocks\.0\.gate\.weight is \[64, 64\] and was \[128, 64\]"
    ):
        observe(decoder(f=64), token_batches(2), resume=path)


def test_options_are_checked() -> None:
    with pytest.raises(OptionsError, match="Did you mean"):
        observe(decoder(), token_batches(1), {"pases": []})


def test_dead_and_constant_channels_are_legal() -> None:
    model = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = rows()
    x[:, 3], x[:, 4] = 0, 7
    seen = observe(model, [x])
    found = seen.input("0.weight")
    assert float(found.largest[3]) == 0
    assert float(found.low[4]) == float(found.high[4]) == 7


def test_a_shift_is_known_to_move_where_the_norm_is_left() -> None:
    seen = observe(Chain().eval(), [rows()], LN_AS_IT_IS)
    (link,) = (link for link in seen.links.values() if link.kind == "norm-linear")
    assert link.carries_shift
    assert set(link.consumers) == {"a.weight", "b.weight"}


def test_decoder_is_deterministic() -> None:
    assert torch.equal(Decoder().head.weight, Decoder().head.weight)
