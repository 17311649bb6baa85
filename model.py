"""
The GPT: attention, MLP, blocks, loss, key-value cache, generation, FLOP count. Module names are GPT-2's in Hugging
Face, so that loading its weights is a loop. An architecture is a set of parts (ARCHITECTURES), each of which is chosen
when the model is built and can be replaced by itself.

References: GPT-2 (https://github.com/openai/gpt-2), nanoGPT (https://github.com/karpathy/nanoGPT), and for the modern
parts modded-nanogpt (https://github.com/KellerJordan/modded-nanogpt), nanochat (https://github.com/karpathy/nanochat).
"""

import functools
import math
import os
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as checkpointed

import checkpoint
import hardware
import hf_files
import tokenizer
from configurator import InputError
from hf_files import RMS_EPS

ARCHITECTURES = {
    'gpt2': dict(bias=True, norm='layernorm', positions='learned', qk_norm=False, activation='gelu', tied=True,
                 zero_init=False, embd_norm=False),
    'modern': dict(bias=False, norm='rmsnorm', positions='rotary', qk_norm=True, activation='relu2', tied=False,
                   zero_init=True, embd_norm=True),
}


@dataclass
class GPTConfig:
    """What the weights' shapes and meaning follow from; and, last, one key of how to compute."""
    block_size: int = 1024
    vocab_size: int = 50304  # rows of the embedding table
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    arch: str = 'gpt2'  # a name in ARCHITECTURES: what the parts are that are None
    bias: bool | None = None  # in Linears and LayerNorms
    norm: str | None = None  # 'layernorm', 'rmsnorm' (without a gain)
    positions: str | None = None  # 'learned', 'rotary'
    qk_norm: bool | None = None  # queries and keys normalised, without a gain
    activation: str | None = None  # 'gelu', 'gelu_new' (by tanh, as OpenAI's weights were trained), 'relu2'
    tied: bool | None = None  # whether lm_head is the embedding table
    zero_init: bool | None = None  # projections into the residual stream, and an untied head, begin at zero
    embd_norm: bool | None = None  # the embedding normalised, without a gain
    smear: bool = False  # each position's embedding takes in a gated part of the one before
    n_ids: int | None = None  # ids from here up are padding of the table and never sampled; None: vocab_size
    loss_chunk: int | None = None  # tokens per piece of the cross-entropy; None: chosen by vocab_size; 0: all at once

    def __post_init__(self):
        if self.arch not in ARCHITECTURES:
            raise InputError(f'arch={self.arch!r} is not known: use {" or ".join(ARCHITECTURES)}')
        for key, value in ARCHITECTURES[self.arch].items():
            if getattr(self, key) is None:
                setattr(self, key, value)
        self.n_ids = self.n_ids or self.vocab_size
        if self.loss_chunk is None:  # a small vocabulary's logits are no larger than the activations
            self.loss_chunk = 2048 if self.vocab_size >= 8192 else 0
        for key, known in (('norm', NORMS), ('positions', POSITIONS), ('activation', ACTIVATIONS)):
            if getattr(self, key) not in known:
                raise InputError(f'{key}={getattr(self, key)!r} is not known: use {" or ".join(known)}')
        for key in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, key) < 1:
                raise InputError(f'{key}={getattr(self, key)} must be at least 1')
        if not 0 <= self.dropout < 1:
            raise InputError(f'dropout={self.dropout} must be in [0, 1)')
        if self.n_embd % self.n_head:
            raise InputError(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}')
        if self.positions == 'rotary' and self.n_embd // self.n_head % 2:
            raise InputError(f'n_embd={self.n_embd} / n_head={self.n_head} is odd, but rotary positions turn pairs of '
                             f'dimensions: change one of them')

    @classmethod
    def from_saved(cls, model_args, **overrides):
        """From a checkpoint's model_args, nanoGPT's included."""
        unknown = model_args.keys() - {f.name for f in fields(cls)}
        if unknown:
            raise InputError(f'the checkpoint is of another kind of model: it has {", ".join(sorted(unknown))}')
        return cls(**{**model_args, **overrides})

    def to_save(self):
        """What the weights depend on, as plain values: nanoGPT's keys, and of the others those that say more."""
        parts = {k: v for k, v in ARCHITECTURES[self.arch].items() if k != 'bias'}
        absent = parts | {'arch': 'gpt2', 'smear': False, 'n_ids': self.vocab_size}  # what they are if absent
        return {k: v for k, v in asdict(self).items() if k != 'loss_chunk' and absent.get(k) != v}


def table_rows(vocab_size, arch):
    """Rows of the embedding table of a new model: GPUs multiply whole tiles."""
    padded = arch == 'modern' or vocab_size == tokenizer.GPT2_VOCAB  # others as in nanoGPT
    return math.ceil(vocab_size / 64) * 64 if padded else vocab_size


def read(source, **overrides):
    """
    (GPTConfig, name -> tensor, what else its checkpoint holds) of a model; a tensor is read from the file when it is
    used. source: an out_dir, a checkpoint, a folder in Hugging Face's format, or a name that is downloaded. overrides:
    GPTConfig keys that do not shape the weights. Raises InputError.
    """
    path = checkpoint.find(source) or source
    if not path.endswith('.pt'):
        model_args, weights, family, folder = hf_files.read(source)
        described = tokenizer.read_folder(folder)
        # without one a GPT-2 may be taken for one with GPT-2's, if it is OpenAI's, or a folder's and large enough
        if described is None and not (family == 'gpt2' and (os.path.isdir(source) or '/' not in source)
                                      and model_args['vocab_size'] >= tokenizer.GPT2_VOCAB):
            described = tokenizer.no_tokenizer(source)
        return GPTConfig(**model_args | overrides), weights, {'tokenizer': described} if described else {}
    saved = checkpoint.load(path, mmap=True)
    if 'adapter' in saved:
        raise InputError(f"{path} holds an adapter alone: give its base, and the adapter's folder as an adapter")
    return GPTConfig.from_saved(saved['model_args'], **overrides), saved.pop('model'), saved


def sdpa(q, k, v, dropout, mask=None):
    """
    Attention by torch's fused kernels. q: (B, H, T, hd); k, v: (B, H, S, hd). dropout: the probability, 0 outside
    training. mask: (T, S) or (B, 1, T, S), whether a query may see a key; None: T = S and causal, or a single query
    that sees all keys.
    """
    if q.size(2) == 1 and mask is not None:
        return single_query(q, k, v, dropout, mask)
    is_causal = mask is None and q.size(2) > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)


def single_query(q, k, v, dropout, mask):
    """
    The same of one query, written out: a fused kernel that takes a mask gives a whole head to one of a GPU's
    multiprocessors, while torch.compile spreads sums like these over all of them.
    """
    scores = (q.float() * k).sum(-1, keepdim=True).mT * q.size(-1) ** -0.5  # (B, H, 1, S)
    weights = F.dropout(F.softmax(scores.masked_fill(~mask, -math.inf), dim=-1), dropout, training=dropout > 0)
    return (weights.mT * v).sum(-2, keepdim=True).to(v.dtype)


def causal_mask(T, S, device):
    """(T, S): whether a query, of the last T of S positions, may see a key. Torch's is_causal means the first T."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def math_attention(q, k, v, dropout, mask=None):
    """The same by two matmuls and a softmax, with (B, H, T, S) scores in memory. A single query goes to sdpa."""
    B, H, T, hd = q.shape
    if T == 1:
        return sdpa(q, k, v, dropout, mask)
    S = k.size(2)
    mask = causal_mask(T, S, q.device) if mask is None else mask
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -math.inf)
    q, k, v, bias = (z.flatten(0, 1) for z in (q, k, v, bias.expand(B, H, T, S)))
    scores = torch.baddbmm(bias, q, k.mT, alpha=hd ** -0.5)
    weights = F.dropout(F.softmax(scores, dim=-1), dropout, training=dropout > 0)
    return (weights @ v).view(B, H, T, hd)


def _by(kernel):
    # a mask, or a shape that the kernel does not take, goes to the next
    order = [kernel, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    def attention(q, k, v, dropout, mask=None):
        with sdpa_kernel(order, set_priority=True):
            return sdpa(q, k, v, dropout, mask)
    return attention


ATTENTION = {'sdpa': sdpa, 'math': math_attention} | {
    name: _by(kernel) for name, kernel in hardware.GPU_ATTENTION.items()}


class rms_norm(torch.autograd.Function):
    """
    x / sqrt(mean(x^2) + eps) over the last dimension, without a gain (https://arxiv.org/abs/1910.07467).

    By hand because this keeps y for backward, which the next matmul keeps anyway, where torch's keeps x; and on a CPU
    torch takes twice as long.
    """

    @staticmethod
    def forward(ctx, x):
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(length.square() / x.size(-1) + RMS_EPS)
        y = x * scale
        if y.dtype != x.dtype:  # a `to` without effect, when compiled by torch 2.11, gives wrong gradients
            y = y.to(x.dtype)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, y).unsqueeze(-1) / -y.size(-1)  # what would only change the length of x
        return (torch.addcmul(grad, y, along) * scale).to(y.dtype)


class relu_squared(torch.autograd.Function):
    """relu(x)^2 (https://arxiv.org/abs/2109.08668), with an elementwise pass less in backward than by autograd."""

    @staticmethod
    def forward(ctx, x):
        y = F.relu(x)
        ctx.save_for_backward(y)
        return y * y

    @staticmethod
    def backward(ctx, grad):
        y, = ctx.saved_tensors
        return (grad * y).mul_(2)


class RMSNorm(nn.Module):
    def forward(self, x, context=None):
        """x: (..., n). What stands between the embedding and the first block is called with the context."""
        return rms_norm.apply(x)


class ReLUSquared(nn.Module):
    def forward(self, x):
        return relu_squared.apply(x)


class LearnedPositions(nn.Embedding):
    def forward(self, x, context):
        """x: (B, T, n_embd), embeddings of the T positions after the context's."""
        return x + context.rows(self.weight, x.size(1))


class Unturned(nn.Module):
    """In Rotary's place where positions are learned."""

    def forward(self, qk, context):
        return qk


class Rotary(nn.Module):
    """
    Rotary positions (https://arxiv.org/abs/2104.09864): each pair of dimensions (i, i + hd/2) of a query or key is
    turned by position * base^(-2i/hd), in the order of pairs that Hugging Face's models have.
    """

    def __init__(self, config, base=10000.0):
        super().__init__()
        hd = config.n_embd // config.n_head
        # on the CPU also where the weights are on the meta device, until they are loaded
        positions, dims = (torch.arange(*span, device='cpu') for span in ((config.block_size,), (0, hd, 2)))
        angles = torch.outer(positions, base ** -(dims / hd))[:, None, None]
        self.register_buffer('cos', angles.cos().repeat(1, 1, 1, 2), persistent=False)  # (T, 1, 1, hd)
        self.register_buffer('sin', torch.cat([-angles.sin(), angles.sin()], dim=-1), persistent=False)

    def forward(self, qk, context):
        """qk: (B, T, 2, H, hd), queries and keys of the T positions after the context's."""
        cos, sin = (context.rows(table, qk.size(1)).to(qk.dtype) for table in (self.cos, self.sin))
        return torch.addcmul(qk * cos, qk.roll(qk.size(-1) // 2, dims=-1), sin)


class Smear(nn.Module):
    """
    Adds to each position's embedding that of the position before, times a gate between 0 and 1 that depends on the
    embedding itself: two neighbouring tokens are seen as one before any attention (modded-nanogpt).
    """
    inputs = 16  # dimensions of the embedding that the gate sees

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(min(self.inputs, config.n_embd), 1)

    def forward(self, x, context):
        """x: (B, T, n_embd), embeddings of the T positions after the context's."""
        gate = torch.sigmoid(self.gate(x[..., :self.gate.in_features]))
        return x + gate * context.previous(x)


def layer_norm(config):
    return nn.LayerNorm(config.n_embd, bias=config.bias)


NORMS = {'layernorm': layer_norm, 'rmsnorm': lambda config: RMSNorm()}
POSITIONS = {'learned': lambda config: Unturned(), 'rotary': Rotary}
ACTIVATIONS = {'gelu': nn.GELU, 'gelu_new': lambda: nn.GELU(approximate='tanh'), 'relu2': ReLUSquared}


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.qk_norm = RMSNorm() if config.qk_norm else nn.Identity()
        self.rotary = POSITIONS[config.positions](config)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout = config.n_head, config.dropout
        self.attend = sdpa

    def forward(self, x, context):
        """x: (B, T, n_embd); context: this layer's part of what they see, to which x's keys and values are added."""
        B, T, C = x.shape
        qk, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).split([2, 1], dim=2)
        qk = self.rotary(self.qk_norm(qk), context)
        q, k, v = (z.transpose(1, 2) for z in (*qk.unbind(2), v.squeeze(2)))  # (B, H, T, hd)
        k, v, mask = context.append(k, v)
        y = self.attend(q, k, v, self.dropout if self.training else 0.0, mask)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.act = ACTIVATIONS[config.activation]()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = NORMS[config.norm](config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = NORMS[config.norm](config)
        self.mlp = MLP(config)

    def forward(self, x, context):
        x = x + self.attn(self.ln_1(x), context)
        return x + self.mlp(self.ln_2(x))


class CheckpointedBlock(Block):
    """A Block that keeps only its input for backward, and computes the rest again there."""

    def forward(self, x, context):
        if not torch.is_grad_enabled():
            return super().forward(x, context)
        return checkpointed(super().forward, x, context, use_reentrant=False)


class SelectivelyCheckpointedBlock(Block):
    """A Block that keeps the products of matmuls and attention for backward, and computes what lies between again."""

    def forward(self, x, context):
        if not torch.is_grad_enabled():
            return super().forward(x, context)
        return checkpointed(super().forward, x, context, use_reentrant=False, context_fn=_keep_products)


def _keep_products():
    return create_selective_checkpoint_contexts(
        lambda ctx, op, *args, **kwargs: CheckpointPolicy.MUST_SAVE if op in PRODUCTS
        else CheckpointPolicy.PREFER_RECOMPUTE)


aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten._int_mm.default,
            aten._scaled_mm.default, aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_efficient_attention.default, aten._scaled_dot_product_cudnn_attention.default,
            aten._scaled_dot_product_flash_attention_for_cpu.default}
CHECKPOINTED = {True: CheckpointedBlock, 'selective': SelectivelyCheckpointedBlock}


class _Undrawn(TorchFunctionMode):
    """Leaves out nn.init.normal_(), of which the meta device has no kernel, but a second's worth of imports."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if func is nn.init.normal_ else func(*args, **kwargs or {})


class GPT(nn.Module):
    n_virtual = 0  # positions that go to an adapter's virtual tokens

    def __init__(self, config):
        super().__init__()
        self.config = config
        stem = {}  # what the looked-up embeddings go through before the first block
        if config.positions == 'learned':
            stem['wpe'] = LearnedPositions(config.block_size, config.n_embd)
        if config.embd_norm:
            stem['ln_e'] = RMSNorm()
        if config.smear:
            stem['smear'] = Smear(config)
        self.stem = list(stem)
        self.loss_of_chunk, self.attn_backend = loss_of_chunk, 'sdpa'
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            **stem,
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=NORMS[config.norm](config),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.transformer.wte.weight = self.lm_head.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """
        GPT-2's: normal, of standard deviation 0.02, and less, by their number, for projections into the residual
        stream. With zero_init those and an untied head are zero, and the other matrices begin at half the size that
        keeps activations as large as they are (which at n_embd=768 is 0.018).
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

    def compile(self, mode=None, **options):
        """
        torch.compile with its options. A loss in chunks is compiled chunk by chunk: in one graph with the rest their
        matmuls would be put together, and all logits exist at once. Every size of batch gets kernels of its own.
        """
        options = {'dynamic': False} | options
        if self.config.loss_chunk == 0:
            self.loss = torch.compile(self.loss, mode=mode, **options)
        else:
            self.hidden = torch.compile(self.hidden, mode=mode, **options)
            self.loss_of_chunk = torch.compile(loss_of_chunk, **options)

    def undo_compile(self):
        """For generation, whose every step has another shape."""
        self.__dict__.pop('loss', None)
        self.__dict__.pop('hidden', None)
        self.loss_of_chunk = loss_of_chunk

    def use_attention(self, backend):
        """A name in ATTENTION: the same values by another kernel."""
        self.attn_backend = backend
        for block in self.transformer.h:
            block.attn.attend = ATTENTION[backend]

    def checkpoint_activations(self, how):
        """
        From now on each block keeps less for backward. True: only its input, and a third more FLOPs. 'selective': also
        the products of its matmuls and attention.
        """
        for block in self.transformer.h:
            block.__class__ = CHECKPOINTED[how]

    def within_documents(self, eot):
        """
        From now on each position sees its own document alone, as if that were a row of its own, but for learned
        positions, which stay those of the row. A document begins with the id eot, and so with the end of the one before
        it. Generation, with its KVCache, is not concerned. Raises InputError for virtual tokens.
        """
        if self.n_virtual:
            raise InputError('document_mask would need the virtual tokens of prompt and prefix before each document: '
                             'leave it out, or use another adapter')
        self.context = functools.partial(Documents, eot=eot)

    def context(self, idx):
        """What the positions of idx, (B, T) ids, see unless hidden() is told."""
        return Context()

    def hidden(self, idx, context=None):
        """idx: (B, T) ids -> (B, T, n_embd), after the final norm. With a KVCache, idx are the positions after it."""
        return self.contextual(self.transformer.wte(idx), context or self.context(idx))

    def contextual(self, x, context):
        """x: (B, T, n_embd), embeddings of the T positions after the context's -> the same after the final norm."""
        for part in self.stem:
            x = self.transformer[part](x, context)
        x = self.transformer.drop(x)
        if torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) == torch.bfloat16:
            x = x.bfloat16()  # the residual stream, as in llm.c; float16's range is too small for it
        for i, block in enumerate(self.transformer.h):
            x = block(x, context.layer(i))
        return self.transformer.ln_f(x)

    def loss(self, idx, targets):
        """Mean cross-entropy in nats over targets other than -1; a large vocabulary's logits never exist whole."""
        x, targets = self.hidden(idx).flatten(0, 1), targets.flatten()
        if self.config.loss_chunk == 0:
            return F.cross_entropy(self.lm_head(x).float(), targets, ignore_index=-1)
        weight = self.lm_head.weight
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        return ChunkedCrossEntropy.apply(x, weight, targets, self.config.loss_chunk, self.loss_of_chunk,
                                         torch.is_grad_enabled())

    def forward(self, idx, targets=None):
        """
        (logits, loss). Without targets: the logits of the last position, (B, 1, vocab_size), and None. With targets:
        in evaluation the logits of all positions; in training None in their place, for nothing there needs them.
        """
        if targets is None:
            return self.lm_head(self.hidden(idx)[:, [-1]]), None
        if self.training:
            return None, self.loss(idx, targets)
        logits = self.lm_head(self.hidden(idx))
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)

    def flops_per_token(self, block_size=None):
        """
        FLOPs of forward and backward per token at that length: 6 per weight used in a matmul, 4 if it is frozen, and
        12 L d T for attention (PaLM, appendix B). The embedding tables are looked up, not multiplied; a tied one counts
        as the head. Modules that hold weights otherwise than an nn.Linear say so by a `flops_per_token` of their own.
        """
        c = self.config
        attention = 12 * c.n_layer * c.n_embd * (block_size or c.block_size)
        return attention + sum(
            m.weight.numel() * (6 if m.weight.requires_grad else 4) if isinstance(m, nn.Linear) else
            m.flops_per_token() if m is not self and hasattr(m, 'flops_per_token') else 0 for m in self.modules())

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    def crop_block_size(self, block_size):
        """Forget the positions from block_size on."""
        self.config.block_size = block_size
        if self.config.positions == 'learned':
            kept = self.transformer.wpe.weight[:block_size].detach().clone()
            self.transformer.wpe = LearnedPositions.from_pretrained(kept, freeze=False)
        else:
            for block in self.transformer.h:
                rotary = block.attn.rotary
                rotary.cos, rotary.sin = rotary.cos[:block_size].clone(), rotary.sin[:block_size].clone()

    @classmethod
    def skeleton(cls, config):
        """A model whose weights have names and shapes alone, on the meta device: it takes neither time nor memory."""
        with torch.device('meta'), _Undrawn():
            return cls(config)

    @classmethod
    def from_checkpoint(cls, source, **overrides):
        """(model, what else its checkpoint holds) of what read() takes."""
        config, weights, saved = read(source, **overrides)
        saved.pop('optimizer', None)  # which would keep the file open
        model = cls.skeleton(config)
        checkpoint.load_weights(model, weights, source)
        return model, saved

    @classmethod
    def from_pretrained(cls, source, override_args=None):
        """
        The model of 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', another repository's name, or a folder with
        config.json and model.safetensors. override_args: GPTConfig keys that do not shape the weights. Raises
        InputError.
        """
        return cls.from_checkpoint(source, **override_args or {})[0]

    def new_cache(self, batch, positions):
        """An empty KVCache for sequences of so many tokens."""
        return KVCache(self.config, batch, positions)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eot=None, window_step=1,
               generator=None, step=None):
        """
        Continue idx, (B, T) ids, token by token: yields (B,) ids, max_new_tokens times, without waiting for the device.
        A row that has drawn `eot` repeats it.

        temperature 0 takes the likeliest token. top_k, top_p: draw among the k likeliest, or the likeliest that
        together have probability p. Up to block_size tokens each step computes its one new position against cached
        keys and values. Beyond, learned positions move with the window, and every move computes the whole window
        again: with window_step=1 for each token, as nanoGPT does, otherwise once in window_step tokens, with between
        block_size - window_step + 1 and block_size tokens of context. step: what computes the one new position; None:
        a Step.
        """
        step = step or Step(self)
        block_size = self.config.block_size - self.n_virtual
        length = None
        done = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            if length is None or length == block_size:
                keep = block_size if idx.size(1) <= block_size else block_size - window_step + 1
                window = idx[:, -keep:]
                length = window.size(1)
                cache = self.new_cache(idx.size(0), min(block_size, length + max_new_tokens))
                logits = self.lm_head(self.hidden(window, cache)[:, -1])
                if length < block_size:
                    step.begin(cache)
            else:
                logits = step(idx[:, -1:])
                length += 1
            logits = logits.float()
            logits[:, self.config.n_ids:] = -math.inf
            next_ids = sample(logits, temperature, top_k, top_p, generator)
            if eot is not None:
                next_ids = torch.where(done, eot, next_ids)
                done |= next_ids == eot
            idx = torch.cat([idx, next_ids[:, None]], dim=1)
            yield next_ids

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, eot=None, **options):
        """
        idx, (B, T) ids, and what stream() continues it by: (B, T + max_new_tokens), or less if every row has drawn
        `eot`.
        """
        new = []
        for ids in self.stream(idx, max_new_tokens, temperature, top_k, eot=eot, **options):
            new.append(ids)
            if eot is not None and (ids == eot).all():
                break
        return torch.cat([idx] + [ids[:, None] for ids in new], dim=1)


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """One id per row of logits, (B, vocab_size) -> (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = F.softmax(logits, dim=-1)
    if top_p is not None and top_p < 1:
        ordered, ids = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # the probability of all likelier ones
        probs = torch.zeros_like(probs).scatter(-1, ids, ordered.masked_fill(before >= top_p, 0.0))
    # what torch.multinomial does, which then looks at the probabilities, and so waits for the device
    return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(dim=-1)


class Context:
    """What the positions of x see: here those before them in x, in every layer the same."""
    length = 0  # positions before x

    def rows(self, table, T):
        """Of a table of positions, (block_size, ...), the rows of x's T positions. Raises ValueError beyond its end."""
        end = self.length + T
        if end > len(table):
            raise ValueError(f'{end} tokens, but block_size is {len(table)}')
        return table[self.length:end]

    def previous(self, x):
        """x: (B, T, n_embd) -> at each position what x is at the one before, zeros where none is seen."""
        return torch.cat([torch.zeros_like(x[:, :1]), x], dim=1)[:, :-1]

    def layer(self, i):
        return self

    def append(self, k, v):
        """
        k, v: (B, H, T, hd) of x's positions -> (k, v, mask), of all positions there are, and which of them those of x
        may see, as attention takes it.
        """
        return k, v, None


class Documents(Context):
    """The positions before them in their own document. The id eot, between two, is the first of the second."""

    def __init__(self, idx, eot):
        """idx: (B, T) ids."""
        self.begins = idx == eot
        document = self.begins.cumsum(dim=1)
        self.mask = (document[:, :, None] == document[:, None]).tril()[:, None]  # (B, 1, T, T)

    def previous(self, x):
        return super().previous(x).masked_fill(self.begins[..., None], 0.0)

    def append(self, k, v):
        return k, v, self.mask


class KVCache(Context):
    """Also the positions computed so far: their keys and values, in memory allocated at once, for every layer."""

    def __init__(self, config, batch, positions):
        self.last_embedding = None
        self.layers = [self.Layer((batch, config.n_head, positions, config.n_embd // config.n_head))
                       for _ in range(config.n_layer)]

    @property
    def length(self):
        return self.layers[0].length

    def previous(self, x):
        before, self.last_embedding = self.last_embedding, x[:, -1:]
        return super().previous(x) if before is None else torch.cat([before, x], dim=1)[:, :-1]

    def layer(self, i):
        return self.layers[i]

    class Layer(Context):
        def __init__(self, shape):
            self.shape, self.length, self.k, self.v = shape, 0, None, None

        def append(self, k, v):
            if self.k is None:  # allocated here because autocast decides the dtype
                self.k, self.v = k.new_empty(self.shape), v.new_empty(self.shape)
            start, T = self.length, k.size(2)
            S = self.length = start + T
            self.k[:, :, start:S], self.v[:, :, start:S] = k, v
            return self.k[:, :, :S], self.v[:, :, :S], causal_mask(T, S, k.device) if 1 < T < S else None


class Step:
    """The logits of one position after those of a KVCache, which keeps it."""

    def __init__(self, model):
        self.model = model

    def begin(self, cache):
        self.cache = cache

    def __call__(self, ids):
        """ids: (B, 1) -> (B, vocab_size)"""
        return self.model.lm_head(self.model.hidden(ids, self.cache)[:, -1])


class ChunkedCrossEntropy(torch.autograd.Function):
    """
    Mean cross-entropy of x @ weight.T, `chunk` rows at a time: logits of a chunk exist, never (N, V).

    The gradients are computed in the forward, while the chunk's logits are there; backward only scales them. The idea
    is Liger-Kernel's (https://arxiv.org/abs/2410.10989). x: (N, d), weight: (V, d), both in the matmul's dtype;
    targets: (N,), -1 is ignored; piece: loss_of_chunk, or the same compiled.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, chunk, piece, with_grad):
        need_x, need_weight = (with_grad and needed for needed in ctx.needs_input_grad[:2])
        count = (targets != -1).sum().clamp(min=1)
        loss = torch.zeros((), device=x.device, dtype=torch.float32)
        dx = torch.empty_like(x) if need_x else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for start in range(0, x.size(0), chunk):
            rows = slice(start, start + chunk)  # all of one size, if it divides: each size is compiled
            loss = loss + piece(x[rows], weight, targets[rows, None], dx[rows] if need_x else None, dweight)
        ctx.save_for_backward(dx, dweight, count)
        ctx.dtype = weight.dtype
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        dx, dweight, count = ctx.saved_tensors
        grad = grad / count
        return (None if dx is None else dx * grad,
                None if dweight is None else (dweight * grad).to(ctx.dtype), None, None, None, None)


def loss_of_chunk(x, weight, targets, dx, dweight):
    """
    Sum of the cross-entropies of x, (n, d), against targets, (n, 1). Writes its gradient by x to dx and adds that by
    weight to dweight, unless they are None.
    """
    kept, targets = targets != -1, targets.clamp(min=0)
    logp = F.log_softmax(x @ weight.mT, dim=-1, dtype=torch.float32)  # (n, V)
    loss = -(logp.gather(1, targets) * kept).sum()
    if dx is not None or dweight is not None:
        # d loss / d logits, of kept rows and before the division by their number: at most 1, which suits float16
        dlogits = minus_one_hot(logp.exp_(), targets).to(x.dtype)
        if dx is not None:
            dx.copy_(dlogits @ weight * kept)
        if dweight is not None:
            dweight += dlogits.mT @ (x * kept)
    return loss


def minus_one_hot(p, targets):
    """p, (n, V), less 1 at each row's target, (n, 1). May overwrite p."""
    if torch.compiler.is_compiling():  # a comparison is fused with what is around it; a scatter needs p in memory
        return torch.where(torch.arange(p.size(1), device=p.device) == targets, p - 1, p)
    return p.scatter_add_(1, targets, -torch.ones_like(targets, dtype=p.dtype))
