"""All passes, by name, in the order in which they run (methods' rule G8). Importing this imports no pass."""

from __future__ import annotations

import importlib

from sparsecc.errors import OptionsError, unknown
from sparsecc.passes.base import Pass

# name -> "module:class", in pipeline order. Canonical forms run before all of them and are not optional.
CANONICAL: dict[str, str] = {
    "drop-identities": "sparsecc.passes.canonical.identities:DropIdentities",
    "functionalize-inplace": "sparsecc.passes.canonical.inplace:FunctionalizeInplace",
    "raise-layernorm": "sparsecc.passes.canonical.layernorm:RaiseLayerNorm",
    "raise-rmsnorm": "sparsecc.passes.canonical.rmsnorm:RaiseRMSNorm",
    "raise-activation": "sparsecc.passes.canonical.activation:RaiseActivation",
    "raise-attention": "sparsecc.passes.canonical.attention:RaiseAttention",
    "raise-gated-ffn": "sparsecc.passes.canonical.gated_ffn:RaiseGatedFFN",
}

REWRITES: dict[str, str] = {
    "merge-duplicates": "sparsecc.passes.linear.merge_duplicates:MergeDuplicates",
    "drop-dead-features": "sparsecc.passes.linear.drop_dead_features:DropDeadFeatures",
    "fold-repbn": "sparsecc.passes.batchnorm.fold_repbn:FoldRepBN",
    "fold-batchnorm": "sparsecc.passes.batchnorm.fold_batchnorm:FoldBatchNorm",
    "push-batchnorm": "sparsecc.passes.batchnorm.push_batchnorm:PushBatchNorm",
    "fold-layerscale": "sparsecc.passes.norm.fold_layerscale:FoldLayerScale",
    "fold-shift": "sparsecc.passes.linear.fold_shift:FoldShift",
    "merge-branches": "sparsecc.passes.batchnorm.merge_branches:MergeBranches",
    "merge-concatenated": "sparsecc.passes.linear.merge_concatenated:MergeConcatenated",
    "fold-norm-scale": "sparsecc.passes.norm.fold_norm_scale:FoldNormScale",
    "fold-norm-affine": "sparsecc.passes.norm.fold_norm_affine:FoldNormAffine",
    "push-affine": "sparsecc.passes.norm.push_affine:PushAffine",
    "collapse-linear": "sparsecc.passes.linear.collapse_linear:CollapseLinear",
    "layernorm-to-rmsnorm": "sparsecc.passes.norm.layernorm_to_rmsnorm:LayerNormToRMSNorm",
    "layernorm-to-crmsnorm": "sparsecc.passes.norm.layernorm_to_crmsnorm:LayerNormToCRMSNorm",
    "balance-channels": "sparsecc.passes.quant.balance_channels:BalanceChannels",
    "raise-linear": "sparsecc.passes.quant.raise_linear:RaiseLinear",
    "migrate-channels": "sparsecc.passes.quant.migrate_channels:MigrateChannels",
    "quantize-softmax": "sparsecc.passes.quant.quantize_softmax:QuantizeSoftmax",
    "prune-neurons": "sparsecc.passes.ffn.prune_neurons:PruneNeurons",
    "sparsify-input": "sparsecc.passes.ffn.sparsify_input:SparsifyInput",
    "sparsify-ffn": "sparsecc.passes.ffn.sparsify_ffn:SparsifyFFN",
    "fuse-cached-attention": "sparsecc.passes.kv.fuse_cached_attention:FuseCachedAttention",
    "skip-zeros": "sparsecc.passes.ffn.skip_zeros:SkipZeros",
    "fuse-few-rows": "sparsecc.passes.linear.fuse_few_rows:FuseFewRows",
    "quantize-linear": "sparsecc.passes.quant.quantize_linear:QuantizeLinear",
    "fuse-rows": "sparsecc.passes.activation.fuse_rows:FuseRows",  # what those before left
}

# They make regions for generated kernels: with a preset they run where ``codegen`` asks for them. The numbers
# are the bytes that a region must read where measurement chooses: a smaller one does not earn its compilation.
FOR_KERNELS = {
    "fuse-cached-attention": 2**18,
    "skip-zeros": 2**20,
    "fuse-few-rows": 2**20,
    "fuse-rows": 2**22,
}

# They carry out a recipe, and run with one.
FOR_RECIPES = frozenset(
    {
        "raise-linear",
        "migrate-channels",
        "quantize-softmax",
        "prune-neurons",
        "sparsify-input",
        "sparsify-ffn",
        "quantize-linear",
    }
)

# Exact, but not measured to pay, or a preparation for a pass that is not exact: they run when they are named.
BY_NAME = frozenset({"layernorm-to-crmsnorm", "balance-channels", *FOR_KERNELS, *FOR_RECIPES})

# preset -> the passes that it runs; only bitwise and exact ones may stand here.
PRESETS: dict[str, tuple[str, ...]] = {
    "default": tuple(name for name in REWRITES if name not in BY_NAME),
    "none": (),
}


def load(name: str) -> type[Pass]:
    """The class of a pass.

    Raises:
        OptionsError: no such pass; the message names the nearest one.
    """
    where = CANONICAL.get(name) or REWRITES.get(name)
    if where is None:
        raise OptionsError(unknown("pass", name, REWRITES))
    module, _, attribute = where.partition(":")
    found: type[Pass] = getattr(importlib.import_module(module), attribute)
    return found


def all_passes() -> dict[str, type[Pass]]:
    """Every pass, canonical ones first, in pipeline order."""
    return {name: load(name) for name in (*CANONICAL, *REWRITES)}
