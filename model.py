"""
The GPT: its configuration, the parts it is made of, attention, MLP, block, loss and FLOP count, top to bottom.

An architecture is a named set of parts (ARCHITECTURES). Each part is a key of GPTConfig and is chosen when the model is
built. Module names are GPT-2's in Hugging Face, so that loading its weights is a loop.

References: GPT-2 (https://github.com/openai/gpt-2), nanoGPT (https://github.com/karpathy/nanoGPT), and for the modern
parts modded-nanogpt (https://github.com/KellerJordan/modded-nanogpt) and nanochat
(https://github.com/karpathy/nanochat).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from configurator import InputError
from sologpt.files.checkpoint import load_weights
from sologpt.files.models import read_model
from sologpt.inference import generation
from sologpt.inference.contexts import Context, Documents, KVCache
from sologpt.machine.devices import matmul_dtype
from sologpt.matmuls.attention import ATTENTION
from sologpt.matmuls.chunked_loss import ChunkedCrossEntropy, loss_of_logits
from sologpt.matmuls.document_attention import DOCUMENT_MASK, dense_mask
from sologpt.matmuls.elementwise import ReLUSquared, RMSNorm, RMSNormWithGain, SwiGLU
from sologpt.matmuls.ordinary import whole
from sologpt.matmuls.recompute import RECOMPUTE
from sologpt.matmuls.rotary import NoRotation, Rotary, rotate, unturned

Tensor = torch.Tensor

ARCHITECTURES = {
    'gpt2': dict(bias=True, norm='layernorm', positions='learned', qk_norm=False, activation='gelu', tied=True,
                 zero_init=False, embd_norm=False),
    'modern': dict(bias=False, norm='rmsnorm', positions='rotary', qk_norm=True, activation='relu2', tied=False,
                   zero_init=True, embd_norm=True),
    'llama': dict(bias=False, norm='rmsnorm_gain', positions='rotary', qk_norm=False, activation='swiglu', tied=False,
                  zero_init=False, embd_norm=False),
}
# values of the key bias -> what has biases: Linears of a block, and norms
BIASES = {False: (), True: ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj', 'norm'), 'qkv': ('attn.c_attn',),
          'attention': ('attn.c_attn', 'attn.c_proj'), 'mlp': ('mlp.c_fc', 'mlp.c_proj'),
          'linears': ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')}
OPTIONAL = ('smear', 'norm_eps', 'rope_base', 'rope_scaling', 'window', 'windowed')  # keys that most models leave as is
COMPUTE_KEYS = ('loss_chunk', 'attn_backend', 'checkpoint_activations', 'document_eot')


@dataclass
class GPTConfig:
    """What the weights' shapes and meaning follow from, and COMPUTE_KEYS, which say how to compute with them."""
    block_size: int = 1024
    vocab_size: int = 50304  # rows of the embedding table
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_kv_head: int | None = None  # heads of keys and values: each serves n_head / n_kv_head queries; None: n_head
    head_dim: int | None = None  # the width of a head; None: n_embd / n_head
    n_inner: int | None = None  # the width within the MLP; None: 4 n_embd, and with 'swiglu' two thirds of that
    dropout: float = 0.0
    arch: str = 'gpt2'  # a name in ARCHITECTURES; it decides the parts that are None
    bias: bool | str | None = None  # a key of BIASES
    norm: str | None = None  # 'layernorm', 'rmsnorm' without a gain, or 'rmsnorm_gain'
    norm_eps: float = 1e-5  # of norms with a gain
    positions: str | None = None  # 'learned' or 'rotary'
    rope_base: float = 10000.0  # of rotary positions
    rope_scaling: dict | None = None  # see rotary.py
    window: int | None = None  # a token sees itself and the window - 1 tokens before it; None: all before it
    windowed: list | None = None  # numbers of the blocks that have the window; None: all
    qk_norm: bool | str | None = None  # queries and keys are normalised: True, without a gain, or 'gain'
    activation: str | None = None  # 'gelu', 'gelu_new' (by tanh, as OpenAI's weights were trained), 'relu2' or 'swiglu'
    tied: bool | None = None  # lm_head is the embedding table
    zero_init: bool | None = None  # projections into the residual stream, and an untied head, begin at zero
    embd_norm: bool | None = None  # the embedding is normalised, without a gain
    smear: bool = False  # each position's embedding takes in a gated part of the one before
    n_ids: int | None = None  # ids from here up are padding of the table and are never sampled; None: vocab_size
    loss_chunk: int | None = None  # tokens in a piece of the cross-entropy; None: by vocab_size; 0: all at once
    attn_backend: str = 'sdpa'  # a name in ATTENTION
    checkpoint_activations: bool | str = False  # a key of RECOMPUTE
    document_eot: int | None = None  # the id that begins a document; tokens see only their own; None: no documents

    def __post_init__(self):
        if self.arch not in ARCHITECTURES:
            raise InputError(f'arch={self.arch!r} is not known: use {" or ".join(ARCHITECTURES)}')
        for key, value in ARCHITECTURES[self.arch].items():
            if getattr(self, key) is None:
                setattr(self, key, value)
        self.n_ids = self.n_ids or self.vocab_size
        if self.loss_chunk is None:  # a small vocabulary's logits are no larger than the activations
            self.loss_chunk = 2048 if self.vocab_size >= 8192 else 0
        for key, known in (('norm', NORMS), ('positions', POSITIONS), ('activation', ACTIVATIONS), ('bias', BIASES),
                           ('qk_norm', QK_NORMS)):
            if getattr(self, key) not in known:
                names = ' or '.join(map(str, known))
                raise InputError(f'{key}={getattr(self, key)!r} is not known: use {names}')
        for key in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'n_kv_head', 'head_dim', 'n_inner',
                    'window'):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise InputError(f'{key}={getattr(self, key)} must be at least 1')
        if not 0 <= self.dropout < 1:
            raise InputError(f'dropout={self.dropout} must be in [0, 1)')
        if self.head_dim is None and self.n_embd % self.n_head:
            raise InputError(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}')
        for key, value in self._derived().items():
            if getattr(self, key) is None:
                setattr(self, key, value)
        if self.n_head % self.n_kv_head:
            raise InputError(f'n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}')
        if self.positions == 'rotary' and self.head_dim % 2:
            raise InputError(f'a head_dim of {self.head_dim} is odd, but rotary positions turn pairs of dimensions: '
                             f'change n_embd={self.n_embd}, n_head={self.n_head} or head_dim')

    def _derived(self):
        """The sizes that follow from others where they are None."""
        gated = 64 * math.ceil(8 * self.n_embd / 3 / 64)
        return {'n_kv_head': self.n_head, 'head_dim': self.n_embd // self.n_head,
                'n_inner': gated if self.activation == 'swiglu' else 4 * self.n_embd}

    def parts_of(self, linear: str) -> list[int]:
        """
        The rows of each part of a block's Linear: of 'attn.c_attn' those of queries, keys and values, and with a gated
        activation of 'mlp.c_fc' those of the gate and of what it multiplies. Other Linears have one part.
        """
        keys = self.n_kv_head * self.head_dim
        return {'attn.c_attn': [self.n_head * self.head_dim, keys, keys],
                'mlp.c_fc': [self.n_inner] * (2 if self.activation == 'swiglu' else 1)}.get(linear, [self.n_embd])

    def window_of(self, block: int) -> int | None:
        """The window of a block, by its number."""
        return self.window if self.windowed is None or block in self.windowed else None

    @classmethod
    def from_saved(cls, model_args: dict, **overrides) -> 'GPTConfig':
        """The config of a checkpoint's model_args, nanoGPT's included. Raises InputError for unknown ones."""
        unknown = model_args.keys() - {f.name for f in fields(cls)}
        if unknown:
            raise InputError(f'the checkpoint is of another kind of model: it has {", ".join(sorted(unknown))}')
        return cls(**{**model_args, **overrides})

    def to_save(self) -> dict:
        """Plain values for a checkpoint: nanoGPT's keys, and of the others those that depart from what it has."""
        parts = {k: v for k, v in ARCHITECTURES[self.arch].items() if k != 'bias'}
        # what an absent key means
        default = parts | self._derived() | {f.name: f.default for f in fields(self) if f.name in OPTIONAL} | {
            'arch': 'gpt2', 'n_ids': self.vocab_size}
        return {k: v for k, v in asdict(self).items() if k not in COMPUTE_KEYS and default.get(k) != v}


# ---- the parts -------------------------------------------------------------------------------------------------------

class LearnedPositions(nn.Embedding):
    def forward(self, x, context):
        """x: (B, T, n_embd), embeddings of the T positions after the context's."""
        return x + context.rows(self.weight, x.size(1))


class Smear(nn.Module):
    """
    Adds to each position's embedding the embedding before it, times a gate between 0 and 1. The gate depends on the
    embedding itself. So two neighbouring tokens are seen as one before any attention (modded-nanogpt).
    """
    inputs = 16  # dimensions of the embedding that the gate sees

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(min(self.inputs, config.n_embd), 1)

    def forward(self, x, context):
        """x: (B, T, n_embd), embeddings of the T positions after the context's."""
        gate = torch.sigmoid(self.gate(x[..., :self.gate.in_features]))
        return x + gate * context.previous(x)


NORMS = {'layernorm': lambda config: nn.LayerNorm(config.n_embd, config.norm_eps, bias='norm' in BIASES[config.bias]),
         'rmsnorm': lambda config: RMSNorm(),
         'rmsnorm_gain': lambda config: RMSNormWithGain(config.n_embd, config.norm_eps)}
QK_NORMS = {False: lambda config: nn.Identity(), True: lambda config: RMSNorm(),
            'gain': lambda config: RMSNormWithGain(config.head_dim, config.norm_eps)}
POSITIONS = {'learned': (NoRotation, unturned), 'rotary': (Rotary, rotate)}  # what is computed once, and in each block
ACTIVATIONS = {'gelu': nn.GELU, 'gelu_new': lambda: nn.GELU(approximate='tanh'), 'relu2': ReLUSquared, 'swiglu': SwiGLU}


# ---- the block -------------------------------------------------------------------------------------------------------

def block_linear(config: GPTConfig, name: str, n_in: int) -> nn.Linear:
    """The Linear `name` of a block, such as 'attn.c_attn', of all its parts."""
    return nn.Linear(n_in, sum(config.parts_of(name)), bias=name in BIASES[config.bias])


class CausalSelfAttention(nn.Module):
    def __init__(self, config, window):
        super().__init__()
        self.c_attn = block_linear(config, 'attn.c_attn', config.n_embd)  # q, k, v of all heads
        self.c_proj = block_linear(config, 'attn.c_proj', config.n_head * config.head_dim)
        self.q_norm, self.k_norm = (QK_NORMS[config.qk_norm](config) for _ in range(2))
        _, self.turn = POSITIONS[config.positions]
        self.resid_dropout = nn.Dropout(config.dropout)
        self.heads, self.window, self.dropout = (config.n_head, config.n_kv_head), window, config.dropout
        self.project = whole
        self.attend = ATTENTION[config.attn_backend]

    def forward(self, x, context, by):
        """x: (B, T, n_embd); context: this layer's, to which the keys and values of x are added; by: see rotate()."""
        q, k, v = self.project(self.c_attn, x, self.heads)  # each (B, T, its heads, hd)
        q, k = self.turn(self.q_norm(q), by), self.turn(self.k_norm(k), by)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # (B, H or G, T, hd)
        k, v, mask = context.append(k, v, self.window)
        y = self.attend(q, k, v, self.dropout if self.training else 0.0, mask)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = block_linear(config, 'mlp.c_fc', config.n_embd)
        self.act = ACTIVATIONS[config.activation]()
        self.c_proj = block_linear(config, 'mlp.c_proj', config.n_inner)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config, i):
        super().__init__()
        self.ln_1 = NORMS[config.norm](config)
        self.attn = CausalSelfAttention(config, config.window_of(i))
        self.ln_2 = NORMS[config.norm](config)
        self.mlp = MLP(config)
        self.recompute = RECOMPUTE[config.checkpoint_activations]

    def forward(self, x, context, by):
        return self.recompute(self.layers, x, context, by)

    def layers(self, x, context, by):
        x = x + self.attn(self.ln_1(x), context, by)
        return x + self.mlp(self.ln_2(x))


# ---- the model -------------------------------------------------------------------------------------------------------

class GPT(nn.Module):
    n_virtual = 0  # positions that an adapter's virtual tokens take

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.document_mask = DOCUMENT_MASK.get(config.attn_backend, dense_mask)
        stem = {}  # what the looked-up embeddings go through before the first block
        if config.positions == 'learned':
            stem['wpe'] = LearnedPositions(config.block_size, config.n_embd)
        if config.embd_norm:
            stem['ln_e'] = RMSNorm()
        if config.smear:
            stem['smear'] = Smear(config)
        self.stem = list(stem)
        self.rotary = POSITIONS[config.positions][0](config)
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            **stem,
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config, i) for i in range(config.n_layer)]),
            ln_f=NORMS[config.norm](config),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.transformer.wte.weight = self.lm_head.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """
        GPT-2's initial weights: normal with a standard deviation of 0.02; projections into the residual stream have
        less, by their number. With zero_init, those and an untied head are zero, and the other matrices begin at half
        the size that keeps activations as large as they are (0.018 at n_embd=768).
        """
        zero_init, n_layer = self.config.zero_init, self.config.n_layer
        for name, p in self.named_parameters():
            std = 0.02
            if name.endswith('c_proj.weight'):
                std = 0.0 if zero_init else 0.02 / math.sqrt(2 * n_layer)
            elif zero_init and name.endswith(('lm_head.weight', 'gate.weight')):
                std = 0.0
            elif zero_init and name.endswith(('c_attn.weight', 'c_fc.weight')):
                std = 0.5 / math.sqrt(p.size(1))
            if p.dim() == 2:
                nn.init.normal_(p, mean=0.0, std=std)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def context(self, idx: Tensor) -> Context:
        """What the tokens idx, (B, T), see if hidden() is given no context."""
        eot = self.config.document_eot
        windows = {self.config.window_of(i) for i in range(self.config.n_layer)}
        return Context() if eot is None else Documents(idx, eot, self.document_mask, windows)

    def hidden(self, idx: Tensor, context: Context | None = None) -> Tensor:
        """idx: (B, T) ids -> (B, T, n_embd), after the final norm. With a KVCache, idx are the positions after it."""
        return self.contextual(self.transformer.wte(idx), context or self.context(idx))

    def contextual(self, x: Tensor, context: Context) -> Tensor:
        """
        x: (B, T, n_embd), embeddings of the T positions after the context's -> (B, T, n_embd), after the final norm.
        """
        for part in self.stem:
            x = self.transformer[part](x, context)
        x = self.transformer.drop(x)
        if torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) == torch.bfloat16:
            x = x.bfloat16()  # the residual stream, as in llm.c; float16's range is too small for it
        by = self.rotary(x, context)
        for i, block in enumerate(self.transformer.h):
            x = block(x, context.layer(i), by)
        return self.transformer.ln_f(x)

    def loss(self, idx: Tensor, targets: Tensor, piece=loss_of_logits) -> Tensor:
        """
        idx, targets: (B, T) ids -> the mean cross-entropy in nats over targets other than -1. A large vocabulary's
        logits never exist as a whole. piece: loss_of_logits() or the same compiled.
        """
        return self.loss_of_hidden(self.hidden(idx), targets, piece)

    def loss_of_hidden(self, x: Tensor, targets: Tensor, piece=loss_of_logits) -> Tensor:
        """The loss() of x, (B, T, n_embd), as hidden() returns it."""
        x, targets = x.flatten(0, 1), targets.flatten()
        if self.config.loss_chunk == 0:
            return F.cross_entropy(self.lm_head(x).float(), targets, ignore_index=-1)
        x = x.to(matmul_dtype(x))
        return ChunkedCrossEntropy.apply(x, self.lm_head.weight, targets, self.config.loss_chunk, piece,
                                         torch.is_grad_enabled())

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """
        nanoGPT's (logits, loss). Without targets: the logits of the last position, (B, 1, vocab_size), and None. With
        targets: in evaluation the logits of all positions, in training None, because nothing there needs them.
        """
        if targets is None:
            return self.lm_head(self.hidden(idx)[:, [-1]]), None
        if self.training:
            return None, self.loss(idx, targets)
        logits = self.lm_head(self.hidden(idx))
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)

    def flops_per_token(self, block_size: int | None = None) -> int:
        """
        FLOPs of forward and backward per token at that length (PaLM, appendix B: https://arxiv.org/abs/2204.02311).

        6 per weight used in a matmul, 4 if it is frozen, and 12 H hd T for the attention of a block, where T is at most
        the block's window. The embedding tables are looked up, not multiplied; a tied one counts as the head. A module
        that holds its weights in another way than an nn.Linear has a `flops_per_token` of its own.
        """
        c = self.config
        seen = [min(block_size or c.block_size, c.window_of(i) or math.inf) for i in range(c.n_layer)]
        attention = 12 * c.n_head * c.head_dim * sum(seen)
        return attention + sum(
            m.weight.numel() * (6 if m.weight.requires_grad else 4) if isinstance(m, nn.Linear) else
            m.flops_per_token() if m is not self and hasattr(m, 'flops_per_token') else 0 for m in self.modules())

    def n_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def crop_block_size(self, block_size: int) -> None:
        """Forget the positions from block_size on."""
        self.config.block_size = block_size
        if self.config.positions == 'learned':
            kept = self.transformer.wpe.weight[:block_size].detach().clone()
            self.transformer.wpe = LearnedPositions.from_pretrained(kept, freeze=False)

    # ---- from files --------------------------------------------------------------------------------------------------

    @classmethod
    def skeleton(cls, config: GPTConfig) -> 'GPT':
        """A model on the meta device: its weights have names and shapes, and take neither time nor memory."""
        with torch.device('meta'), _NoNormalInit():
            return cls(config)

    @classmethod
    def from_weights(cls, config: GPTConfig, weights: Mapping[str, Tensor], source: str,
                     kept: tuple[torch.dtype, ...] = ()) -> 'GPT':
        """
        A model with copies of these weights, in float32 but for matrices in one of the dtypes `kept`. Raises
        InputError, which names `source`, if they do not fit.
        """
        model = cls.skeleton(config)
        load_weights(model, weights, source, kept)
        return model

    @classmethod
    def from_checkpoint(cls, source: str, kept: tuple[torch.dtype, ...] = (),
                        **overrides) -> tuple['GPT', dict]:
        """
        (model, what else its checkpoint holds). source: see read_model(). kept: see from_weights(). overrides: keys of
        GPTConfig that do not shape the weights. Raises InputError.
        """
        model_args, weights, saved = read_model(source)
        saved.pop('optimizer', None)  # it would keep the file open
        return cls.from_weights(GPTConfig.from_saved(model_args, **overrides), weights, source, kept), saved

    @classmethod
    def from_pretrained(cls, source: str, override_args: dict | None = None) -> 'GPT':
        """
        The model of 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', another repository's name, or a folder with
        config.json and model.safetensors. override_args: keys of GPTConfig that do not shape the weights. Raises
        InputError.
        """
        return cls.from_checkpoint(source, **override_args or {})[0]

    # ---- drawing text ------------------------------------------------------------------------------------------------

    def new_cache(self, batch: int, positions: int) -> KVCache:
        """An empty cache for `batch` rows of up to `positions` tokens."""
        c = self.config
        return KVCache(c.n_layer, c.n_kv_head, c.head_dim, batch, positions)

    def next_logits(self, idx: Tensor, context: Context) -> Tensor:
        """idx: (B, T) ids after the context's -> (B, vocab_size), the logits of the position that follows."""
        return self.lm_head(self.hidden(idx, context)[:, -1])

    def stream(self, idx: Tensor, max_new_tokens: int, *args, **options) -> Iterator[Tensor]:
        """Yields the ids that continue idx, (B, T): see generation.stream()."""
        return generation.stream(self, idx, max_new_tokens, *args, **options)

    def generate(self, idx: Tensor, max_new_tokens: int, *args, **options) -> Tensor:
        """idx, (B, T) ids, continued by max_new_tokens: see generation.generate()."""
        return generation.generate(self, idx, max_new_tokens, *args, **options)


class _NoNormalInit(TorchFunctionMode):
    """Skips nn.init.normal_(): the meta device does not implement it, and finding that out imports for a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if func is nn.init.normal_ else func(*args, **kwargs or {})
