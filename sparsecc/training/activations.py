"""The hidden values of feed-forward networks, caught on their way while a model trains."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from sparsecc.errors import OptionsError
from sparsecc.modules import named


class FFNActivations:
    """Catches what the down projections of a model read, with its gradients, as a context manager.

    ::

        with FFNActivations(model) as seen:
            loss = model(input_ids, labels=labels).loss + weight * l1(seen.values)
            loss.backward()

    Each call of the model begins anew. Hooks go when the block ends, however it ends; what was caught stays.
    Gradient checkpointing of the reentrant kind runs layers without gradients: losses on these values then
    train nothing. Values are kept until the next call: ``clear`` lets go of the graph behind them.

    Attributes:
        modules: name -> down projection.
        caught: name -> its inputs [..., F] of the last call of the model, one for each call of the layer.
    """

    def __init__(self, model: nn.Module, modules: Sequence[str] | str | None = None) -> None:
        """Args:
            model: whose forward is called.
            modules: patterns of the names of down projections ("*.mlp.down_proj", "*.fc2"); None to find them
                by structure (:func:`down_projections`).

        Raises:
            OptionsError: a pattern matches no linear layer, or no down projection is found.
        """
        self.model = model
        found = down_projections(model) if modules is None else named(model, modules, nn.Linear)
        self.modules: dict[str, nn.Linear] = found
        self.caught: dict[str, list[torch.Tensor]] = {name: [] for name in found}
        self._handles: list[Any] = []

    @property
    def values(self) -> list[torch.Tensor]:
        """All that was caught, in the model's order of the layers."""
        return [value for values in self.caught.values() for value in values]

    def clear(self) -> None:
        """Forget what was caught, and the graph behind it."""
        for values in self.caught.values():
            values.clear()

    def __enter__(self) -> FFNActivations:
        if self._handles:
            raise RuntimeError("FFNActivations: the block is entered already; make another one.")
        self.clear()
        self._handles.append(self.model.register_forward_pre_hook(lambda *_: self.clear()))
        for name, module in self.modules.items():
            self._handles.append(module.register_forward_pre_hook(self._catch(name)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _catch(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            self.caught[name].append(args[0])

        return hook


def down_projections(model: nn.Module) -> dict[str, nn.Linear]:
    """The down projections of feed-forward networks, by structure: name -> layer.

    A module is a feed-forward network where its own linear layers are one or two from d to F features (or one
    from d to 2F), and one from F back to d < F. Attention has more layers of its own; networks whose layers
    lie in several modules (BERT's) are not found: name them.

    Raises:
        OptionsError: there are none.
    """
    found = {}
    for name, module in model.named_modules():
        own = {k: m for k, m in module.named_children() if isinstance(m, nn.Linear)}
        for key, down in own.items():
            width, size = down.in_features, down.out_features
            first = [(m.in_features, m.out_features) for m in own.values() if m is not down]
            fits = first in ([(size, width)], [(size, width)] * 2, [(size, 2 * width)])
            if width > size and fits:
                found[f"{name}.{key}".lstrip(".")] = down
    if not found:
        linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        raise OptionsError(
            "no down projection of a feed-forward network was found by structure. Give patterns of their names "
            f"in `modules`; the model's linear layers: {', '.join(linears[:20]) or '(none)'}."
        )
    return found
