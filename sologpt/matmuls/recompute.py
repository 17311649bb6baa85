"""
Activation checkpointing: what a block keeps for the backward, and what the backward computes again.

Each function is called as recompute(function, *args), and returns function(*args).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sologpt.matmuls import products  # noqa: F401 (it defines int8_mm)

aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default, aten.mm.dtype, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten._scaled_mm.default,
    aten._int_mm.default, torch.ops.sologpt.int8_mm.default, aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default, aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default, torch.ops.higher_order.flex_attention}


def keep_all(function: Callable, *args: Any) -> Any:
    """Keeps everything: nothing is computed again."""
    return function(*args)


def keep_inputs(function: Callable, *args: Any) -> Any:
    """Keeps only the inputs: the least memory, and a third more FLOPs."""
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False)


def keep_products(function: Callable, *args: Any) -> Any:
    """Keeps the results of matmuls and of attention. What lies between them is computed again."""
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, context_fn=_keep_products)


def _keep_products():
    return create_selective_checkpoint_contexts(
        lambda ctx, op, *args, **kwargs: CheckpointPolicy.MUST_SAVE if op in PRODUCTS
        else CheckpointPolicy.PREFER_RECOMPUTE)


# by the key checkpoint_activations
RECOMPUTE = {False: keep_all, True: keep_inputs, 'selective': keep_products}
