"""
Finetuning that leaves the base as it is and trains a small part beside it.

              in the place of a Linear's W x                  trained
  lora        W x + g B A x                                   A, B         https://arxiv.org/abs/2106.09685
  dora        m * (W + g B A) x, divided by the lengths of    A, B, m      https://arxiv.org/abs/2402.09353
              the rows of W + g B A
  vera        W x + b * B0 (d * A0 x), A0 and B0 random       b, d         https://arxiv.org/abs/2310.11454
  bottleneck  h + U gelu(D h + c) + e, of h = W x             D, c, U, e   https://arxiv.org/abs/1902.00751

              before the text, as if it had begun with it
  prompt      embeddings                                                   https://arxiv.org/abs/2104.08691
  prefix      keys and values, in every layer                              https://arxiv.org/abs/2101.00190

g is alpha / r, with rsLoRA (https://arxiv.org/abs/2312.03732) alpha / sqrt(r). All but the last two begin as the base.
The base's matrices may be held in fewer bits (QLoRA, https://arxiv.org/abs/2305.14314). Many low-rank adapters serve
one batch, a row each (Punica, https://arxiv.org/abs/2310.18547). adapter_files.py reads and writes what is trained.
"""

import math
import re
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import InputError
from model import GPT
from sologpt.files.hf_files import LINEARS
from sologpt.inference.contexts import Context
from sologpt.machine.devices import matmul_dtype
from sologpt.matmuls.attention import causal_mask
from sologpt.matmuls.held import NF4Linear, decode_base, decoded

NUMBER = (int, float)
KINDS = {  # of AdapterConfig's fields, and of what they contain
    'r': (int, int), 'lora_alpha': (NUMBER, NUMBER), 'use_rslora': (bool, bool), 'dropout': (NUMBER, NUMBER),
    'target_modules': ((list, str), str), 'exclude_modules': ((list, str, type(None)), str),
    'layers_to_transform': ((list, type(None)), int), 'rank_pattern': (dict, int), 'alpha_pattern': (dict, NUMBER),
    'projection_prng_key': (int, int), 'num_virtual_tokens': (int, int)}


@dataclass
class AdapterConfig:
    """What the trained tensors' shapes and meaning follow from; the names are peft's where it has them."""
    method: str
    r: int | None = None  # the rank; None: 16, with vera 256; of a bottleneck the width, None: 64
    lora_alpha: float = 32.0
    use_rslora: bool = False
    dropout: float = 0.0  # of the input of A, or of A0
    target_modules: list | str | None = None  # ends of Linears' names, or a regular expression for all of it
    exclude_modules: list | str | None = None
    layers_to_transform: list | None = None  # numbers of blocks; None: all
    rank_pattern: dict = field(default_factory=dict)  # end of a name, a regular expression -> rank
    alpha_pattern: dict = field(default_factory=dict)
    projection_prng_key: int = 0  # VeRA's A0 and B0 follow from it
    num_virtual_tokens: int = 16  # of prompt and prefix

    def __post_init__(self):
        if self.method not in METHODS:
            raise InputError(f'adapter={self.method!r} is not known: use {", ".join(METHODS)}')
        if self.r is None:
            self.r = {'vera': 256, 'bottleneck': 64}.get(self.method, 16)
        if self.target_modules is None:
            self.target_modules = list(LINEARS if self.method != 'bottleneck' else Bottleneck.linears)
        self._check_kinds()
        if self.r < 1 or self.num_virtual_tokens < 1 or any(r < 1 for r in self.rank_pattern.values()):
            raise InputError(f'an adapter with r={self.r}, num_virtual_tokens={self.num_virtual_tokens} and '
                             f'rank_pattern={self.rank_pattern}: each rank and number must be at least 1')
        if not 0 <= self.dropout < 1:
            raise InputError(f'adapter dropout {self.dropout} must be in [0, 1)')

    def _check_kinds(self):
        """A file may hold anything."""
        for name, (kind, inner) in KINDS.items():
            value = getattr(self, name)
            contained = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
            if not isinstance(value, kind) or not all(isinstance(item, inner) for item in contained):
                raise InputError(f'an adapter cannot have {name}={value!r}')
        for expression in (self.target_modules, self.exclude_modules, *self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(expression if isinstance(expression, str) else '')
            except re.error as e:
                raise InputError(f'the adapter has {expression!r}, which is no regular expression: {e}') from None

    def find_targets(self, model):
        """The names of the Linears that it stands beside. Raises InputError if it names others, or none."""
        # also the tables and the head, which peft would match: an adapter on them could not be merged where they are
        # one, and is refused
        names = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding, NF4Linear))]
        found = [name for name in names if self._matches(name)]
        outside = [name for name in found if not name.startswith('transformer.h.')]
        if outside:
            raise InputError(f'the adapter is for {", ".join(outside)}: only Linears of blocks can have one')
        if not isinstance(self.target_modules, str):
            for end in self.target_modules:
                if not any(_ends_with(name, end) for name in names):
                    raise InputError(f'the adapter is for {end!r}, which this model has not: it has '
                                     f'{", ".join(LINEARS)}')
        if not found:
            raise InputError(f'the adapter is for {self.target_modules!r}, and matches no Linear of this model')
        return found

    def _matches(self, name):
        if _any_matches(self.exclude_modules, name) or not _any_matches(self.target_modules, name):
            return False
        block = re.match(r'transformer\.h\.(\d+)\.', name)
        # peft asks for the block's number only where names are listed
        return self.layers_to_transform is None or isinstance(self.target_modules, str) or bool(
            block and int(block[1]) in self.layers_to_transform)

    def rank_and_scale(self, name):
        """(r, g) of the Linear `name`."""
        r, alpha = (next((value for end, value in pattern.items() if re.match(rf'(.*\.)?({end})$', name)), default)
                    for pattern, default in ((self.rank_pattern, self.r), (self.alpha_pattern, self.lora_alpha)))
        return r, alpha / (math.sqrt(r) if self.use_rslora else r)


def _ends_with(name, end):
    return name == end or name.endswith('.' + end)


def _any_matches(targets, name):
    if targets == 'all-linear':  # in peft's files
        targets = LINEARS
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(_ends_with(name, end) for end in targets or ())


class BesideLinear(nn.Module):
    """In the place of a Linear, which is its `base`."""
    files = {}  # parameter -> what its name ends with in a file

    def __init__(self, base):
        super().__init__()
        self.base = base

    @classmethod
    def attach(cls, model, config):
        for name in config.find_targets(model):
            model.set_submodule(name, cls(model.get_submodule(name), *config.rank_and_scale(name), config.dropout))

    def new(self, *shape, value=0.0):
        return nn.Parameter(torch.full(shape, value, device=self.base.weight.device))

    def flops_per_token(self):
        return 6 * sum(p.numel() for p in self.parameters(recurse=False) if p.dim() == 2)

    def delta(self):
        """What merging adds to the base's weight, (out, in), in float32."""
        A, B = self.low_rank()
        return B @ A

    def low_rank(self):
        """(A, B), (r, in) and (out, r), in float32, with delta = B A."""
        raise InputError(f'adapter={method_of(self)} is no product of two small matrices: it cannot be stacked, nor '
                         f'share a batch with other adapters')


class LoRA(BesideLinear):
    files = {'A': 'lora_A.weight', 'B': 'lora_B.weight'}

    def __init__(self, base, r, scale, dropout):
        super().__init__(base)
        n_out, n_in = base.weight.shape
        self.A, self.B = self.new(r, n_in), self.new(n_out, r)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale, self.dropout = scale, nn.Dropout(dropout)

    def forward(self, x):
        rows = x.flatten(0, -2)
        y, h = self.base(rows), F.linear(self.dropout(rows), self.A)
        # in place, for another pass over y would be a tenth of the whole; nothing needs what y was
        return y.addmm_(h, self.B.mT.to(y.dtype), alpha=self.scale).unflatten(0, x.shape[:-1])

    def low_rank(self):
        return self.A.detach(), self.B.detach() * self.scale


class DoRA(LoRA):
    """
    The rows of the merged weight have lengths m of their own. They are divided by their present lengths, which count as
    constants in the backward, as the paper proposes.
    """
    files = LoRA.files | {'m': 'lora_magnitude_vector'}

    def __init__(self, base, r, scale, dropout):
        super().__init__(base, r, scale, dropout)
        self.register_buffer('base_squared', base.weight.detach().float().square().sum(1), persistent=False)
        self.m = nn.Parameter(self.base_squared.sqrt())

    def forward(self, x):
        y = super().forward(x)
        factor = self.m / self.lengths()
        bias = self.base.bias  # which stays outside
        y = y * factor if bias is None else torch.addcmul(bias * (1 - factor), y, factor)
        return y.to(matmul_dtype(x))

    @torch.no_grad()
    def lengths(self):
        """Of the merged weight's rows, without making it: |W|^2 + 2 g W A^T . B + g^2 B A A^T . B."""
        with torch.autocast(self.A.device.type, enabled=False):
            A, B = self.A, self.B * self.scale
            mixed = self.base.weight.float() @ A.mT
            return (self.base_squared + ((2 * mixed + B @ (A @ A.mT)) * B).sum(1)).clamp(min=1e-20).sqrt()

    def delta(self):
        weight = self.base.weight.float()
        merged = weight + self.scale * self.B @ self.A
        return merged * (self.m / merged.norm(dim=1).clamp(min=1e-10))[:, None] - weight

    low_rank = BesideLinear.low_rank


class Projection(nn.Module):
    """VeRA's A0 and B0, (r, in) and (out, r) of the widest Linears: the same random numbers as peft's."""

    def __init__(self, r, n_in, n_out, key):
        super().__init__()
        generator = torch.Generator('cpu').manual_seed(key)
        for name, shape in (('A', (r, n_in)), ('B', (n_out, r))):
            bound = math.sqrt(3) * math.sqrt(2) / math.sqrt(shape[1])
            self.register_buffer(name, torch.empty(shape, device='cpu').uniform_(-bound, bound, generator=generator))


class VeRA(BesideLinear):
    files = {'b': 'vera_lambda_b', 'd': 'vera_lambda_d'}

    def __init__(self, base, projection, dropout):
        super().__init__(base)
        self.projection = projection  # the same of all
        self.n_out, self.n_in = base.weight.shape
        self.b, self.d = self.new(self.n_out), self.new(len(projection.A), value=0.1)
        self.dropout = nn.Dropout(dropout)

    @classmethod
    def attach(cls, model, config):
        names = config.find_targets(model)
        widest = [max(model.get_submodule(name).weight.shape[i] for name in names) for i in (1, 0)]
        projection = Projection(config.r, *widest, config.projection_prng_key)
        for name in names:
            model.set_submodule(name, cls(model.get_submodule(name), projection, config.dropout))

    def forward(self, x):
        h = F.linear(self.dropout(x), self.projection.A[:, :self.n_in]) * self.d
        z = F.linear(h, self.projection.B[:self.n_out])
        return torch.addcmul(self.base(x), z, self.b.to(z.dtype))

    def flops_per_token(self):
        return 4 * len(self.d) * (self.n_in + self.n_out)

    def low_rank(self):
        A, B = self.projection.A[:, :self.n_in], self.projection.B[:self.n_out]
        return A * self.d.detach()[:, None], B * self.b.detach()[:, None]


class Bottleneck(BesideLinear):
    """After the projections into the residual stream, before they are added to it."""
    files = {'D': 'adapter_down.weight', 'c': 'adapter_down.bias', 'U': 'adapter_up.weight', 'e': 'adapter_up.bias'}
    linears = ('attn.c_proj', 'mlp.c_proj')

    def __init__(self, base, r, scale, dropout):
        super().__init__(base)
        n = base.weight.shape[0]
        self.D, self.c, self.U, self.e = self.new(r, n), self.new(r), self.new(n, r), self.new(n)
        nn.init.kaiming_uniform_(self.D, a=math.sqrt(5))

    def forward(self, x):
        h = self.base(x)
        return h + F.linear(F.gelu(F.linear(h, self.D, self.c)), self.U, self.e)

    def delta(self):
        raise InputError('adapter=bottleneck is not linear: it cannot be merged into the weights')


class WithPrompt(GPT):
    """A GPT to which attach() has given embeddings of virtual tokens, which stand before every text."""

    @classmethod
    def attach(cls, model, config):
        model.virtual = nn.Parameter(torch.zeros(config.num_virtual_tokens, model.config.n_embd))
        _become(model, cls, config)

    @torch.no_grad()
    def begin_from(self, idx):
        """As the embeddings of idx, (1, P) ids of a text."""
        self.virtual.copy_(self.transformer.wte(idx)[0])

    def hidden(self, idx, context=None):
        context = context or self.context(idx)
        if context.length:
            return super().hidden(idx, context)
        x = self.transformer.wte(idx)
        virtual = self.virtual.to(x.dtype).expand(len(idx), -1, -1)
        return self.contextual(torch.cat([virtual, x], dim=1), context)[:, self.n_virtual:]

    def new_cache(self, batch, positions):
        return super().new_cache(batch, positions + self.n_virtual)

    def flops_per_token(self, block_size=None):
        T = block_size or self.config.block_size - self.n_virtual
        head = self.lm_head.weight.numel() * 4
        return (super().flops_per_token(T + self.n_virtual) - head) * (T + self.n_virtual) / T + head


class WithPrefix(GPT):
    """A GPT to which attach() has given keys and values, in every layer, of virtual tokens before every text."""

    @classmethod
    def attach(cls, model, config):
        c = model.config
        model.virtual = nn.Parameter(torch.zeros(config.num_virtual_tokens, 2 * c.n_layer * c.n_embd))
        _become(model, cls, config)

    @torch.no_grad()
    def begin_from(self, idx):
        """As the keys and values of idx, (1, P) ids of a text."""
        cache = GPT.new_cache(self, 1, self.n_virtual)
        GPT.hidden(self, idx, cache)
        layers = torch.stack([z[0] for layer in cache.layers for z in (layer.k, layer.v)])  # (2L, H, P, hd)
        self.virtual.copy_(layers.permute(2, 0, 1, 3).flatten(1))

    def keys_and_values(self, batch, dtype):
        """[(k, v), ...] of the layers, each (batch, H, P, hd)."""
        c = self.config
        layers = self.virtual.to(dtype).view(self.n_virtual, 2 * c.n_layer, c.n_head, -1).permute(1, 2, 0, 3)
        layers = layers.unsqueeze(1).expand(-1, batch, -1, -1, -1)
        return list(zip(layers[0::2], layers[1::2], strict=True))

    def context(self, idx):
        return self.Before(self.keys_and_values(len(idx), matmul_dtype(self.virtual)))

    class Before(Context):
        """The prefix, and nothing that is appended stays: for training, where nothing may be overwritten."""

        def __init__(self, keys_and_values):
            self.layers = [self.Layer(k, v) for k, v in keys_and_values]
            self.length = self.layers[0].length

        def layer(self, i):
            return self.layers[i]

        class Layer(Context):
            def __init__(self, k, v):
                self.k, self.v, self.length = k, v, k.size(2)

            def append(self, k, v):
                k, v, T = torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2), k.size(2)
                return k, v, causal_mask(T, k.size(2), k.device)

    def new_cache(self, batch, positions):
        cache = super().new_cache(batch, positions + self.n_virtual)
        for layer, (k, v) in zip(cache.layers, self.keys_and_values(batch, matmul_dtype(self.virtual)), strict=True):
            layer.append(k, v)
        return cache

    def flops_per_token(self, block_size=None):
        return super().flops_per_token((block_size or self.config.block_size - self.n_virtual) + self.n_virtual)


def _become(model, cls, config):
    if config.num_virtual_tokens >= model.config.block_size:
        raise InputError(f'num_virtual_tokens={config.num_virtual_tokens} leaves no room in block_size='
                         f'{model.config.block_size}')
    model.__class__, model.n_virtual = cls, config.num_virtual_tokens


METHODS = {'lora': LoRA, 'dora': DoRA, 'vera': VeRA, 'bottleneck': Bottleneck, 'prompt': WithPrompt,
           'prefix': WithPrefix}


def method_of(part):
    return next(name for name, cls in METHODS.items() if cls is type(part))


def attach(model, config):
    """Freeze the model, on the CPU, and put an untrained adapter to it. Raises InputError if it has no place for it."""
    model.requires_grad_(False)
    METHODS[config.method].attach(model, config)


def parts(model):
    """[(name of the Linear, what stands in its place), ...]"""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, BesideLinear)]


def low_rank_Bs(model):
    """LoRA's matrices B, which LoRA+ (https://arxiv.org/abs/2402.12354) gives a higher learning rate than A."""
    return [part.B for _, part in parts(model) if isinstance(part, LoRA)]


def training_bytes(model):
    """Of weights, gradients and AdamW's moments: all that training holds besides activations."""
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    return weights + sum(p.numel() * (p.element_size() + 8) for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def merge(model, weight=1.0):
    """
    Add `weight` times what the adapter changes to the weights, in float32, and take it away: a plain model, of the
    base's dtype, or float32 from NF4. Raises InputError where a method cannot be merged.
    """
    if model.n_virtual:
        raise InputError('virtual tokens are no part of the weights: prompt and prefix cannot be merged')
    for name, part in parts(model):
        part.base = decoded(part.base)
        part.base.weight.copy_(part.base.weight.float() + weight * part.delta())
        model.set_submodule(name, part.base)
    decode_base(model)
    model.requires_grad_(True)
