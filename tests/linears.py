"""A Linear's tensors, and Linears and small models that follow a recipe."""

import torch
import torch.nn as nn

from model import GPT, GPTConfig
from sologpt.matmuls.recipe_linear import RecipeLinear, find_strategy
from sologpt.matmuls.spec import MatmulSpec

CPU = torch.device('cpu')
STOCHASTIC = ('mxfp4', 'nvfp4', 'block_dropout')


def tensors(tokens=32, n_in=64, n_out=128, dtype=torch.float32):
    torch.manual_seed(0)
    x, w, g = torch.randn(tokens, n_in), torch.randn(n_out, n_in) / n_in ** 0.5, torch.randn(tokens, n_out)
    return x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), g.to(dtype)


def through(function, x, w, g):
    """(y, dx, dw)"""
    x, w = (t.detach().clone().requires_grad_() for t in (x, w))
    y = function(x, w)
    y.backward(g.to(y.dtype))
    return y.detach(), x.grad, w.grad


def apart(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def linear(name, n_in=64, n_out=128, dtype='float32', tokens=32, **options):
    torch.manual_seed(0)
    layer = nn.Linear(n_in, n_out, bias=False)
    return RecipeLinear(layer, find_strategy(MatmulSpec(name, **options), CPU, dtype, (n_in, n_out), tokens))


def straight_through(rounded, t):
    return t + (rounded - t).detach()


def small(arch='gpt2', n_layer=4):
    torch.manual_seed(0)
    return GPT(GPTConfig(arch=arch, n_layer=n_layer, n_head=2, n_embd=32, block_size=8, vocab_size=11))
