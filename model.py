"""
The GPT: attention, MLP, blocks, loss, key-value cache, generation, FLOP count. Module names are GPT-2's in Hugging
Face, so that loading its weights is a loop.

References: GPT-2 (https://github.com/openai/gpt-2), nanoGPT (https://github.com/karpathy/nanoGPT).
"""

import math
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

import checkpoint
from configurator import InputError


@dataclass
class GPTConfig:
    """What the weights' shapes and meaning follow from; and, last, one key of how to compute."""
    block_size: int = 1024
    vocab_size: int = 50304  # rows of the embedding table
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linears and LayerNorms, as GPT-2 has; False is a little faster and no worse
    activation: str = 'gelu'  # or 'gelu_new', the tanh form that OpenAI's weights were trained with
    tied: bool = True  # whether lm_head is the embedding table
    n_ids: int | None = None  # ids from here up are padding of the table and never sampled; None: vocab_size
    loss_chunk: int | None = None  # tokens per piece of the cross-entropy; None: chosen by vocab_size; 0: all at once

    def __post_init__(self):
        self.n_ids = self.n_ids or self.vocab_size
        if self.loss_chunk is None:  # a small vocabulary's logits are no larger than the activations
            self.loss_chunk = 1024 if self.vocab_size >= 8192 else 0
        if self.activation not in ACTIVATIONS:
            raise InputError(f'activation={self.activation!r} is not known: use {" or ".join(ACTIVATIONS)}')
        for key in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, key) < 1:
                raise InputError(f'{key}={getattr(self, key)} must be at least 1')
        if not 0 <= self.dropout < 1:
            raise InputError(f'dropout={self.dropout} must be in [0, 1)')
        if self.n_embd % self.n_head:
            raise InputError(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}')

    @classmethod
    def from_saved(cls, model_args, **overrides):
        """From a checkpoint's model_args, nanoGPT's included."""
        unknown = model_args.keys() - {f.name for f in fields(cls)}
        if unknown:
            raise InputError(f'the checkpoint is of another kind of model: it has {", ".join(sorted(unknown))}')
        return cls(**{**model_args, **overrides})

    def to_save(self):
        """What the weights depend on, as plain values: nanoGPT's keys, and of the others those that say more."""
        saved = asdict(self)
        ours = {'activation': 'gelu', 'tied': True, 'n_ids': self.vocab_size}  # what they are if absent
        return {k: v for k, v in saved.items() if k != 'loss_chunk' and ours.get(k) != v}


def sdpa(q, k, v, dropout):
    """
    Causal attention by torch's fused kernels. q: (B, H, T, hd); k, v: (B, H, S, hd), of which q's are the last T
    positions, and T is S or 1. dropout: the probability, 0 outside training.
    """
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=q.size(2) > 1)


def math_attention(q, k, v, dropout):
    """The same by two matmuls and a softmax, with (B, H, T, T) scores in memory. A single query goes to sdpa."""
    T = q.size(2)
    if T == 1:
        return sdpa(q, k, v, dropout)
    scores = (q * q.size(-1) ** -0.5) @ k.mT
    scores += torch.full((T, T), -math.inf, device=q.device, dtype=scores.dtype).triu(1)
    weights = F.dropout(F.softmax(scores, dim=-1), dropout, training=dropout > 0)
    return weights @ v


ATTENTION = {'sdpa': sdpa, 'math': math_attention}
ACTIVATIONS = {'gelu': 'none', 'gelu_new': 'tanh'}  # nn.GELU's approximation


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout = config.n_head, config.dropout
        self.attend = sdpa

    def forward(self, x, cache=None):
        """x: (B, T, n_embd); cache: this layer's keys and values of the positions before x, to which x's are added."""
        B, T, C = x.shape
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, hd)
                   for z in self.c_attn(x).split(C, dim=2))
        if cache is not None:
            k, v = cache.append(k, v)
        y = self.attend(q, k, v, self.dropout if self.training else 0.0)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.act = nn.GELU(approximate=ACTIVATIONS[config.activation])
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.transformer.wte.weight = self.lm_head.weight
        for name, p in self.named_parameters():
            if p.dim() == 2:  # the projections into the residual stream smaller, by the number of them (GPT-2)
                std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith('c_proj.weight') else 0.02
                nn.init.normal_(p, mean=0.0, std=std)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def use_attention(self, backend):
        """'sdpa' or 'math': the same values by another kernel."""
        for block in self.transformer.h:
            block.attn.attend = ATTENTION[backend]

    def hidden(self, idx, cache=None):
        """idx: (B, T) ids -> (B, T, n_embd), after the final norm. With a cache, idx are the positions after it."""
        start = cache.length if cache else 0
        T = idx.size(1)
        if start + T > self.config.block_size:
            raise ValueError(f'{start + T} tokens, but block_size is {self.config.block_size}')
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[start:start + T]
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            x = block(x, cache.layers[i] if cache else None)
        if cache:
            cache.length += T
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
        return ChunkedCrossEntropy.apply(x, weight, targets, self.config.loss_chunk, torch.is_grad_enabled())

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
        FLOPs of forward and backward per token at that length: 6 per weight used in a matmul, and 12 L d T for
        attention (PaLM, appendix B). The embedding tables are looked up, not multiplied; a tied one counts as the head.
        """
        c = self.config
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * weights + 12 * c.n_layer * c.n_embd * (block_size or c.block_size)

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    def crop_block_size(self, block_size):
        """Forget the positions from block_size on."""
        self.config.block_size = block_size
        self.transformer.wpe = nn.Embedding.from_pretrained(self.transformer.wpe.weight[:block_size].detach().clone(),
                                                            freeze=False)

    @classmethod
    def from_pretrained(cls, source, override_args=None):
        """
        GPT-2 weights from Hugging Face: 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', any repository's name, or a
        folder with config.json and model.safetensors. override_args: GPTConfig keys that do not shape the weights.
        Raises InputError for what is not a GPT-2.
        """
        hf, weights = checkpoint.load_hf(source)
        for key in ('model_type', 'n_positions', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if key not in hf:
                raise InputError(f'{source}: config.json has no {key}, so it is no GPT-2')
        for key, needed in {'model_type': 'gpt2', 'layer_norm_epsilon': 1e-5, 'scale_attn_weights': True,
                            'scale_attn_by_inverse_layer_idx': False, 'add_cross_attention': False}.items():
            if hf.get(key, needed) != needed:
                raise InputError(f'{source}: config.json has {key}={hf[key]!r}; only {needed!r} can be loaded')
        activation = {'gelu': 'gelu', 'gelu_new': 'gelu_new', 'gelu_pytorch_tanh': 'gelu_new'}.get(
            hf.get('activation_function', 'gelu_new'))
        if activation is None or hf.get('n_inner') not in (None, 4 * hf['n_embd']):
            raise InputError(f'{source}: config.json has activation_function={hf.get("activation_function")!r} and '
                             f'n_inner={hf.get("n_inner")!r}; only GELU and 4 x n_embd can be loaded')
        tied = hf.get('tie_word_embeddings', True)
        model = cls(GPTConfig(**{**dict(
            block_size=hf['n_positions'], vocab_size=hf['vocab_size'], n_layer=hf['n_layer'], n_head=hf['n_head'],
            n_embd=hf['n_embd'], bias=True, activation=activation, tied=tied), **(override_args or {})}))
        # older files leave out the prefix and hold the causal masks as buffers
        weights = {k if k.startswith(('transformer.', 'lm_head.')) else f'transformer.{k}': v
                   for k, v in weights.items() if not k.endswith(('.attn.bias', '.attn.masked_bias'))}
        if tied and 'transformer.wte.weight' in weights:
            weights['lm_head.weight'] = weights['transformer.wte.weight']
        for name in weights:  # Hugging Face's Conv1D holds the transpose of a Linear's weight
            if name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')):
                weights[name] = weights[name].t()
        checkpoint.load_weights(model, weights, source)
        return model

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eot=None, window_step=1,
               generator=None):
        """
        Continue idx, (B, T) ids, token by token: yields (B,) ids, max_new_tokens times or until every row has drawn
        `eot` (a row that has, repeats it).

        temperature 0 takes the likeliest token. top_k, top_p: draw among the k likeliest, or the likeliest that
        together have probability p. Up to block_size tokens each step computes its one new position against cached
        keys and values. Beyond, learned positions move with the window, and every move computes the whole window
        again: with window_step=1 for each token, as nanoGPT does, otherwise once in window_step tokens, with between
        block_size - window_step + 1 and block_size tokens of context.
        """
        block_size = self.config.block_size
        cache = None
        done = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            if cache is None or cache.length == block_size:
                keep = block_size if idx.size(1) <= block_size else block_size - window_step + 1
                window = idx[:, -keep:]
                cache = KVCache(self.config, idx.size(0), min(block_size, window.size(1) + max_new_tokens))
            else:
                window = idx[:, -1:]
            logits = self.lm_head(self.hidden(window, cache)[:, -1]).float()
            logits[:, self.config.n_ids:] = -math.inf
            next_ids = sample(logits, temperature, top_k, top_p, generator)
            if eot is not None:
                next_ids = torch.where(done, eot, next_ids)
                done |= next_ids == eot
            yield next_ids
            if eot is not None and done.all():
                return
            idx = torch.cat([idx, next_ids[:, None]], dim=1)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """idx, (B, T) ids, and what stream() continues it by: (B, T + max_new_tokens), or less if stopped by `eot`."""
        new = list(self.stream(idx, max_new_tokens, temperature, top_k, **options))
        return torch.cat([idx] + [ids[:, None] for ids in new], dim=1)


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """One id per row of logits, (B, vocab_size) -> (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, [-1]]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = F.softmax(logits, dim=-1)
    if top_p is not None and top_p < 1:
        ordered, ids = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # the probability of all likelier ones
        probs = torch.zeros_like(probs).scatter(-1, ids, ordered.masked_fill(before >= top_p, 0.0))
    return torch.multinomial(probs, num_samples=1, generator=generator)[:, 0]


class KVCache:
    """Keys and values of the positions computed so far, in memory allocated at once, for every layer."""

    def __init__(self, config, batch, positions):
        self.length = 0
        self.layers = [self.Layer((batch, config.n_head, positions, config.n_embd // config.n_head))
                       for _ in range(config.n_layer)]

    class Layer:
        def __init__(self, shape):
            self.shape, self.end, self.k, self.v = shape, 0, None, None

        def append(self, k, v):
            """k, v: (B, H, T, hd) of the next T positions. Returns those of all positions so far."""
            if self.k is None:  # allocated here because autocast decides the dtype
                self.k, self.v = k.new_empty(self.shape), v.new_empty(self.shape)
            start, self.end = self.end, self.end + k.size(2)
            self.k[:, :, start:self.end], self.v[:, :, start:self.end] = k, v
            return self.k[:, :, :self.end], self.v[:, :, :self.end]


class ChunkedCrossEntropy(torch.autograd.Function):
    """
    Mean cross-entropy of x @ weight.T, `chunk` rows at a time: (chunk, V) logits exist in float32, never (N, V).

    The gradients are computed in the forward, while the chunk's logits are there; backward only scales them. The idea
    is Liger-Kernel's (https://arxiv.org/abs/2410.10989). x: (N, d), weight: (V, d), both in the matmul's dtype;
    targets: (N,), -1 is ignored.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, chunk, with_grad):
        need_x, need_weight = (with_grad and needed for needed in ctx.needs_input_grad[:2])
        count = (targets != -1).sum().clamp(min=1)
        loss = torch.zeros((), device=x.device, dtype=torch.float32)
        dx = torch.empty_like(x) if need_x else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for start in range(0, x.size(0), chunk):
            rows, target = x[start:start + chunk], targets[start:start + chunk, None]
            kept, target = target != -1, target.clamp(min=0)
            logp = F.log_softmax(rows @ weight.mT, dim=-1, dtype=torch.float32)  # (chunk, V)
            loss = loss - (logp.gather(1, target) * kept).sum()
            if need_x or need_weight:
                # d loss / d logits, of kept rows and before the division by count: at most 1, which suits float16
                dlogits = logp.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=logp.dtype)).to(x.dtype)
            if need_x:
                dx[start:start + chunk] = dlogits @ weight * kept
            if need_weight:
                dweight += dlogits.mT @ (rows * kept)
        ctx.save_for_backward(dx, dweight, count)
        ctx.dtype = weight.dtype
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        dx, dweight, count = ctx.saved_tensors
        grad = grad / count
        return (None if dx is None else dx * grad,
                None if dweight is None else (dweight * grad).to(ctx.dtype), None, None, None)
