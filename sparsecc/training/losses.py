"""Losses that make activations sparse. Each takes what :class:`FFNActivations` caught and returns a scalar.

Means over elements, then over layers: the weight of a loss does not depend on sizes. All compute in fp32 at
least: squares of small numbers vanish in half precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.nn import functional as F

Activations = torch.Tensor | Iterable[torch.Tensor]


def l1(activations: Activations) -> torch.Tensor:
    """mean |a|: the regularizer of ProSparse (Song et al. 2024, arXiv:2402.13516), up to its constant.

    Args:
        activations: one tensor [..., F], or one for each layer.
    Raises:
        ValueError: there are no activations.
    """
    return _mean(activations, torch.abs)


def density_loss(activations: Activations, epsilon: float = 1e-3) -> torch.Tensor:
    """mean a² / (a² + ε): a smooth count of what is not 0, as DEFT's density loss.

    Runwal et al. 2024, "From PEFT to DEFT" (arXiv:2402.01911); the form is that of the authors' published code,
    which takes ε from the command line; the default here is ours. It is ½ at |a| = √ε, and its gradient is
    largest at √(ε/3): for larger activations it fades, so what is clearly alive is left alone.

    Args:
        activations: one tensor [..., F], or one for each layer.
        epsilon: above 0; near 0 the loss is the density itself, and has no gradient to speak of.
    Raises:
        ValueError: there are no activations, or ε is not above 0.
    """
    if not epsilon > 0:
        raise ValueError(f"density_loss: epsilon must be above 0, not {epsilon}.")

    def count(a: torch.Tensor) -> torch.Tensor:
        squares = a * a
        return squares / (squares + epsilon)

    return _mean(activations, count)


def density(activations: Activations) -> float:
    """The share of activations that are not 0, as a number without gradients.

    Raises:
        ValueError: there are no activations.
    """
    return float(_mean(activations, lambda a: (a.detach() != 0).float()))


def chunk_loss(routing: torch.Tensor, chunk: int = 8) -> torch.Tensor:
    """mean over experts of 1 − Π_{t ∈ chunk} (1 − p_t): how many experts a chunk of tokens needs together.

    Song et al. 2025, "BlockFFN" (arXiv:2507.08771), chunk-sparsification loss. The product is the
    exponential of a sum of log(1 − p + 1e-5), as theirs: it has a gradient at p = 1.

    Args:
        routing: p [..., T, N] between 0 and 1, the routers' activations made relative to their sum; 0 where
            tokens are padding.
        chunk: tokens that are decoded together; T is a multiple of it.
    Raises:
        ValueError: T is no multiple of ``chunk``.
    """
    tokens, experts = routing.shape[-2:]
    if chunk < 1 or tokens % chunk:
        raise ValueError(
            f"chunk_loss: {tokens} tokens are no multiple of chunks of {chunk}: pad them."
        )
    p = _wide(routing).reshape(-1, chunk, experts)
    return (1 - (1 - p + 1e-5).log().sum(1).exp()).mean()


def locality_loss(logits: torch.Tensor, sharpness: float = 100.0) -> torch.Tensor:
    """Cross-entropy between the routers' choices at neighbouring tokens: those of one token serve the next.

    BCE(σ(α u_{t−1}), σ(α u_t)), Song et al. 2025, "BlockFFN" (arXiv:2507.08771), activation-locality loss.
    Gradients flow into both tokens.

    Args:
        logits: u [..., T, N], what the routers' ReLU reads, of one sequence along T.
        sharpness: α.
    Raises:
        ValueError: there is one token alone.
    """
    if logits.shape[-2] < 2:
        raise ValueError("locality_loss: it compares neighbours, and there is one token alone.")
    u = _wide(logits) * sharpness
    before, now = u[..., :-1, :], u[..., 1:, :]
    # Written out: the gradient into the target counts, too.
    return (F.softplus(before) - before * now.sigmoid()).mean()


def _mean(
    activations: Activations, function: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    given = [activations] if isinstance(activations, torch.Tensor) else list(activations)
    if not given:
        raise ValueError(
            "there are no activations: call the model inside `with FFNActivations(model)`."
        )
    device = given[0].device  # layers may lie on several
    return torch.stack([function(_wide(a)).mean().to(device) for a in given]).mean()


def _wide(value: torch.Tensor) -> torch.Tensor:
    return value if value.dtype is torch.float64 else value.float()
