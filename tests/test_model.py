import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from configurator import InputError
from model import GPT, GPTConfig, Rotary
from sologpt.inference.contexts import Context
from sologpt.inference.generation import sample
from sologpt.machine.devices import autocast
from sologpt.matmuls import attention, chunked_loss, elementwise
from sologpt.matmuls.chunked_loss import ChunkedCrossEntropy, loss_of_logits
from sologpt.matmuls.rotary import rotate
from sologpt.training.loss import TrainingLoss

transformers = pytest.importorskip('transformers')


def tiny(attention='sdpa', **changes):
    torch.manual_seed(0)
    config = dict(block_size=16, vocab_size=33, n_layer=2, n_head=2, n_embd=16, dropout=0.0, attn_backend=attention)
    m = GPT(GPTConfig(**config | changes)).eval()
    with torch.no_grad():
        for p in m.parameters():  # far from the small initial weights, so that errors show
            p.mul_(8)
    return m


def varied(attention='sdpa', **changes):
    """A tiny model whose weights are all far from zero."""
    m = tiny(attention, **changes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in m.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return m


@pytest.mark.parametrize('activation, tied, vocab_size', [
    ('gelu_new', True, 101), ('gelu', True, 50257), ('gelu_new', False, 64), ('gelu', False, 7)])
def test_logits_and_greedy_text_equal_transformers(tmp_path, activation, tied, vocab_size):
    torch.manual_seed(1)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=24, n_embd=32, n_layer=3, n_head=4, activation_function=activation,
        tie_word_embeddings=tied, initializer_range=0.3, bos_token_id=0, eos_token_id=None)).eval()
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    idx = torch.randint(vocab_size, (2, 20))
    with torch.no_grad():
        logits, loss = ours(idx, idx)
        expected = theirs(idx, labels=idx).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert loss.item() == pytest.approx(F.cross_entropy(expected.flatten(0, 1), idx.flatten()).item(), rel=1e-5)
    their_text = theirs.generate(idx[:, :5], max_new_tokens=15, do_sample=False,
                                attention_mask=torch.ones(2, 5, dtype=torch.long))
    assert torch.equal(ours.generate(idx[:, :5], 15, temperature=0), their_text)


@pytest.mark.parametrize('key, value', [('scale_attn_by_inverse_layer_idx', True), ('n_inner', 48), ('n_embd', None),
                                        ('activation_function', 'relu'), ('model_type', 'gpt_neo')])
def test_foreign_models_are_refused_by_name(tmp_path, key, value):
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    config = tmp_path / 'config.json'
    import json
    config.write_text(json.dumps({k: v for k, v in (json.loads(config.read_text()) | {key: value}).items()
                                  if v is not None}))
    with pytest.raises(InputError, match=key):
        GPT.from_pretrained(str(tmp_path))


def test_names_are_nanogpts():
    names = [name for name, _ in tiny(n_layer=1, bias=True).named_parameters()]
    block = [f'transformer.h.0.{part}.{kind}' for part in ('ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc',
                                                           'mlp.c_proj') for kind in ('weight', 'bias')]
    assert names == ['transformer.wte.weight', 'transformer.wpe.weight', *block,
                     'transformer.ln_f.weight', 'transformer.ln_f.bias']


@pytest.mark.parametrize('arch, within', [('gpt2', 0.1), ('modern', 1e-5)])  # which begins with all logits 0
def test_initial_loss_is_that_of_a_uniform_guess(arch, within):
    torch.manual_seed(0)
    m = GPT(GPTConfig(block_size=32, vocab_size=100, n_layer=2, n_head=2, n_embd=64, arch=arch))
    idx, targets = torch.randint(100, (2, 8, 32))
    assert m.loss(idx, targets).item() == pytest.approx(math.log(100), abs=within)


PARTS = [dict(norm='rmsnorm'), dict(positions='rotary'), dict(qk_norm=True), dict(activation='relu2'),
         dict(embd_norm=True), dict(tied=False), dict(zero_init=True), dict(bias=False), dict(smear=True)]
KINDS = [dict(), dict(arch='modern'), dict(arch='modern', smear=True),
         dict(arch='llama', n_kv_head=1, head_dim=16, bias='qkv', qk_norm='gain', window=5, windowed=[1])]


@pytest.mark.parametrize('part', PARTS)
def test_each_part_can_be_changed_alone_and_changes_the_model(part):
    plain, changed = tiny(), tiny(**part)
    idx = torch.randint(33, (2, 16))
    logits, loss = changed(idx, idx)
    assert not torch.equal(plain(idx, idx)[0], logits)
    loss.backward()
    assert sum(p.grad.abs().sum() > 0 for p in changed.parameters()) > 1
    saved = changed.config.to_save()
    assert GPTConfig.from_saved(saved) == changed.config
    if part != {'bias': False}:  # a key of nanoGPT's
        assert saved.keys() - plain.config.to_save().keys() == part.keys()


@pytest.mark.parametrize('kind', KINDS)
def test_position_t_sees_nothing_after_it(kind):
    m = varied(**kind)
    idx = torch.randint(33, (1, 16))
    changed = idx.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 33
    with torch.no_grad():
        difference = (m(idx, idx)[0] - m(changed, changed)[0]).abs().amax(-1)[0]
    assert (difference[:10] == 0).all() and difference[10] > 0 and difference[11:].max() > 0


def packed(seed=0):
    """(2, 16) ids of several documents, each but a row's first begins with 0; targets; [(row, start, end), ...]"""
    idx, targets = torch.randint(1, 33, (2, 2, 16), generator=torch.Generator().manual_seed(seed))
    idx[0, [5, 6, 12]] = idx[1, [0, 9]] = 0
    return idx, targets, [(0, 0, 5), (0, 5, 6), (0, 6, 12), (0, 12, 16), (1, 0, 9), (1, 9, 16)]


def logits_and_grads(m, pieces):
    """Of the sum of the losses of [(idx, targets), ...]."""
    logits = [m(idx, targets)[0].flatten(0, 1) for idx, targets in pieces]
    loss = F.cross_entropy(torch.cat(logits), torch.cat([targets.flatten() for _, targets in pieces]), reduction='sum')
    return torch.cat(logits), *torch.autograd.grad(loss, list(m.parameters()))


@pytest.mark.parametrize('smear', [False, True])
@pytest.mark.parametrize('attention', ['sdpa', 'math'])
def test_a_packed_document_is_as_one_in_a_row_of_its_own(attention, smear):
    m, alone = (varied(attention, arch='modern', smear=smear) for _ in range(2))
    idx, targets, documents = packed()
    expected = logits_and_grads(alone, [(idx[row:row + 1, start:end], targets[row:row + 1, start:end])
                                        for row, start, end in documents])
    assert (m(idx, targets)[0].flatten(0, 1) - expected[0]).abs().max() > 0.1
    m.config.document_eot = 0
    for ours, theirs in zip(logits_and_grads(m, [(idx, targets)]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('attention', ['sdpa', 'math'])
def test_learned_positions_stay_those_of_the_row(attention):
    m, reference = varied(attention), varied()
    idx, targets, _ = packed()
    allowed = torch.tensor([[[j <= i and 0 not in row[j + 1:i + 1] for j in range(16)] for i in range(16)]
                            for row in idx.tolist()])

    def attend(q, k, v, dropout, mask):
        scores = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(~allowed[:, None], -math.inf)
        return scores.softmax(-1) @ v
    for block in reference.transformer.h:
        block.attn.attend = attend
    m.config.document_eot = 0
    for ours, theirs in zip(*(logits_and_grads(each, [(idx, targets)]) for each in (m, reference)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('attention', ['sdpa', 'math'])
def test_a_document_does_not_depend_on_the_one_before(attention, kind):
    m, plain = varied(attention, **kind), varied(attention, **kind)
    m.config.document_eot = 0
    idx, targets, _ = packed()
    changed = idx.clone()
    changed[0, 8] += 1 if idx[0, 8] < 32 else -1
    with torch.no_grad():
        difference = (m(idx, targets)[0] - m(changed, targets)[0]).abs().amax(-1)
        assert (difference[0, 8:12] > 0).all() and difference.count_nonzero() == 4
        whole = idx + (idx == 0)  # a single document in each row
        torch.testing.assert_close(m(whole, targets)[0], plain(whole, targets)[0])
        # a text that is continued is one document
        assert torch.equal(m.generate(idx, 20, temperature=0), plain.generate(idx, 20, temperature=0))


@pytest.mark.parametrize('kind', KINDS[2:])
def test_documents_compile_whole_and_in_checkpointed_blocks(kind):
    idx, targets, _ = packed()
    grads = []
    for compiled, checkpointed in itertools.product((False, True), (False, True, 'selective')):
        m = varied(document_eot=0, checkpoint_activations=checkpointed, **kind).train()
        loss = TrainingLoss(m, compiled, backend='aot_eager', fullgraph=True)(idx, targets)
        grads.append([loss, *torch.autograd.grad(loss, list(m.parameters()))])
    assert grads[0][0] != varied(**kind).loss(idx, targets)
    for plain, *others in zip(*grads, strict=True):
        for other in others:
            assert (other - plain).norm() <= 1e-5 * plain.norm()


def uncached(m, idx, n):
    """nanoGPT's loop, greedy."""
    for _ in range(n):
        logits, _ = m(idx[:, -m.config.block_size:])
        idx = torch.cat([idx, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return idx


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('attention', ['sdpa', 'math'])
@pytest.mark.parametrize('prompt', [1, 7, 16, 20])
def test_greedy_with_cache_equals_without_also_past_block_size(prompt, attention, kind):
    m = varied(attention, **kind)
    idx = torch.randint(33, (3, prompt))
    with torch.no_grad():
        assert torch.equal(m.generate(idx, 40, temperature=0), uncached(m, idx, 40))


def test_a_moving_window_holds_the_last_tokens(monkeypatch):
    m, seen = tiny(), []
    hidden = m.hidden

    def record(idx, cache=None):
        seen.append((cache.length, idx.clone()))
        return hidden(idx, cache)
    monkeypatch.setattr(m, 'hidden', record)
    out = m.generate(torch.zeros(1, 1, dtype=torch.long), 50, temperature=0, window_step=5)
    end, moves = 0, 0
    for length, idx in seen:
        end += 1
        if length == 0 and end > 1:
            moves += 1
            assert idx.shape == (1, 12) and torch.equal(idx, out[:, end - 12:end])  # 16 - 5 + 1 tokens
        elif length:
            assert idx.shape == (1, 1) and torch.equal(idx, out[:, end - 1:end]) and length < 16
    assert moves == 7  # at 16 tokens, and then every 5 of 34


def test_padding_is_never_drawn_and_text_ends():
    m = tiny(n_ids=5)
    with torch.no_grad():
        m.lm_head.weight[5:] += 100  # padding that would win
    ids = m.generate(torch.zeros(4, 1, dtype=torch.long), 60, temperature=5.0)
    assert ids.max() < 5
    out = m.generate(torch.zeros(4, 1, dtype=torch.long), 300, temperature=5.0, ends=[3], window_step=4)
    for row in out[:, 1:].tolist():
        assert 3 in row and set(row[row.index(3):]) == {3}
    assert out.size(1) < 301


def test_sampling_follows_the_probabilities():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(20000, -1)
    generator = torch.Generator().manual_seed(0)

    def drawn(**options):
        return (sample(logits, generator=generator, **options).bincount(minlength=4) / 20000).tolist()
    assert drawn() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.02)
    assert drawn(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.02)
    assert drawn(top_p=0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=0.02)  # 0.5 is not enough, 0.8 is
    assert drawn(top_p=0.4) == [1, 0, 0, 0]
    assert drawn(temperature=0.5) == pytest.approx([0.685, 0.247, 0.062, 0.007], abs=0.02)
    assert drawn(temperature=0) == [1, 0, 0, 0]


def test_same_seed_same_text():
    m, idx = tiny(), torch.zeros(2, 1, dtype=torch.long)
    a, b, c = (m.generate(idx, 20, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_rotary_scores_depend_on_the_distance_alone():
    rotary = Rotary(GPTConfig(block_size=12, n_layer=1, n_head=1, n_embd=8))
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 12, 1, 8)  # the same at every position
    by = rotary(torch.zeros(1, 12, 8), Context())
    turned_q, turned_k = (rotate(x, by) for x in (q, k))
    scores = turned_q[0, :, 0] @ turned_k[0, :, 0].T
    for distance in range(12):
        torch.testing.assert_close(scores.diagonal(distance), scores[0, distance].expand(12 - distance))
    assert scores[0].std() > 0.1
    later = Context()
    later.length = 5
    torch.testing.assert_close(rotate(q[:, 5:], rotary(torch.zeros(1, 7, 8), later)), turned_q[:, 5:])
    with pytest.raises(ValueError, match='13 tokens, but block_size is 12'):
        rotary(torch.zeros(1, 8, 8), later)


@pytest.mark.parametrize('function, reference', [
    (elementwise.rms_norm.apply, lambda x: F.rms_norm(x, (6,), eps=1e-6)),
    (elementwise.relu_squared.apply, lambda x: F.relu(x).square())])
def test_functions_and_their_gradients(function, reference):
    x = torch.randn(3, 5, 6, requires_grad=True)
    g = torch.randn(3, 5, 6)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 4e-2)):
        (ours, ours_grad), (expected, expected_grad) = (
            (y, torch.autograd.grad(y, x, g.to(y.dtype))[0]) for y in (function(x.to(dtype)), reference(x)))
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.float(), expected, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(ours_grad, expected_grad, atol=tolerance, rtol=tolerance)
    assert function(torch.zeros(2, 6)).isfinite().all()


def test_math_attention_equals_sdpa():
    q, k, v = (torch.randn(2, 3, 9, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    grads = []
    for attend in (attention.sdpa, attention.math_attention):
        y = attend(q, k, v, 0.0)
        grads.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    one = q[:, :, -1:]  # a single query sees all keys
    torch.testing.assert_close(attention.math_attention(one, k, v, 0.0), grads[0][0][:, :, -1:])


def test_dropout_only_in_training():
    m = tiny('math', dropout=0.5)
    idx = torch.randint(33, (2, 16))
    assert m.loss(idx, idx) == m.loss(idx, idx) == tiny('math').loss(idx, idx)
    m.train()
    assert m.loss(idx, idx) != m.loss(idx, idx)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_chunked_loss_is_the_whole_one(dtype, tolerance):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(50, 8, generator=g), torch.randn(30, 8, generator=g)
    targets = torch.randint(30, (50,), generator=g)
    targets[[3, 7, 40]] = -1
    a, b = x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
    chunked = ChunkedCrossEntropy.apply(a, b, targets, 16, loss_of_logits, True)
    p, q = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
    whole = F.cross_entropy((p @ q.T).float(), targets, ignore_index=-1)
    (chunked * 3).backward()
    (whole * 3).backward()
    assert chunked.item() == pytest.approx(whole.item(), rel=tolerance)
    for ours, theirs in ((a.grad, p.grad), (b.grad, q.grad)):
        assert (ours - theirs).float().norm() <= tolerance * theirs.float().norm()
    assert ChunkedCrossEntropy.apply(a, b, targets, 16, loss_of_logits, False).item() == chunked.item()
    again = ChunkedCrossEntropy.apply(a, b, targets, 16, loss_of_logits, True)
    again.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):  # rather than gradients scaled twice
        again.backward()


def test_on_a_gpu_no_pass_over_the_weights_gradient_follows_a_chunk():
    """Its matmul adds to the sum in float32. Of the sum itself there are only zeros, and the backward's scaling."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    vocab, d, aten, passes = 300, 8, torch.ops.aten, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            # a fake GPU has shapes for all operations but this one
            out = kwargs['out'] if func is aten.addmm.dtype_out else func(*args, **kwargs or {})
            if isinstance(out, torch.Tensor) and out.shape == (vocab, d) and not func.is_view:
                passes.append((func, out.dtype))
            return out
    # autograd cannot run for a GPU that is not there, so forward and backward are called by hand
    ctx = SimpleNamespace(needs_input_grad=(True, True))
    ctx.save_for_backward = lambda *tensors: setattr(ctx, 'saved_tensors', tensors)
    with FakeTensorMode():
        x, weight = torch.ones(50, d, device='cuda', dtype=torch.bfloat16), torch.ones(vocab, d, device='cuda')
        targets = torch.ones(50, device='cuda', dtype=torch.int64)
        with Watch():
            loss = ChunkedCrossEntropy.forward(ctx, x, weight, targets, 16, loss_of_logits, True)
            dx, dweight, *_ = ChunkedCrossEntropy.backward(ctx, torch.ones_like(loss))
    assert passes == [(aten._to_copy.default, torch.bfloat16), (aten.zeros_like.default, torch.float32),
                      *[(aten.addmm.dtype_out, torch.float32)] * 4, (aten.mul_.Tensor, torch.float32)]
    assert dweight.dtype == torch.float32 and dx.dtype == torch.bfloat16


def test_chunked_loss_holds_no_full_logits():
    """No tensor of (tokens, vocabulary) is made, in the forward or the backward."""
    from torch.utils._python_dispatch import TorchDispatchMode
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **kwargs or {})
            for t in (out if isinstance(out, (tuple, list)) else [out]):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out
    m = tiny(vocab_size=500, loss_chunk=8).train()
    idx = torch.randint(500, (4, 16))
    with Watch():
        m.loss(idx, idx).backward()
    assert largest <= max(500 * 16, 8 * 500) < 64 * 500  # the embedding table is the largest


def test_a_cpu_computes_the_loss_of_a_few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(chunked_loss, 'PIECE', 100)  # of 33 ids: 3 rows
    logits, targets = torch.randn(16, 33).bfloat16(), torch.randint(-1, 33, (16, 1))
    expected, dlogits = chunked_loss.loss_at_once(logits, targets, True)
    for with_grad in (False, True):
        loss, found = loss_of_logits(logits, targets, with_grad)
        torch.testing.assert_close(loss, expected)
    assert torch.equal(found, dlogits) and found.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize('kind', KINDS[2:])
@pytest.mark.parametrize('dtype, tolerance', [('float32', 1e-5), ('bfloat16', 3e-2)])
def test_chunked_model_compiles_whole_and_trains_as_the_plain_one(dtype, tolerance, kind):
    idx = torch.randint(33, (2, 16))
    grads = []
    for chunk, compiled in ((0, False), (5, False), (5, True)):
        m = varied(loss_chunk=chunk, **kind).train()
        with autocast(torch.device('cpu'), dtype):
            loss = TrainingLoss(m, compiled, backend='aot_eager', fullgraph=True)(idx, idx)
        loss.backward()
        grads.append([loss, *(p.grad for p in m.parameters())])
    for plain, *others in zip(*grads, strict=True):
        for other in others:
            assert (other - plain).norm() <= tolerance * plain.norm()


@pytest.mark.parametrize('kind', KINDS)
def test_in_bfloat16_the_residual_stream_is_too(kind):
    seen = []
    m = varied(**kind)
    m.transformer.h[1].register_forward_pre_hook(lambda block, args: seen.append(args[0].dtype))
    for dtype in ('float32', 'bfloat16', None):
        with autocast(torch.device('cpu'), dtype) if dtype else torch.autocast('cpu', torch.float16):
            m.hidden(torch.randint(33, (2, 16)))
    assert seen == [torch.float32, torch.bfloat16, torch.float32]


def test_large_vocabularies_are_chunked_and_small_ones_are_not():
    assert GPTConfig(vocab_size=50304).loss_chunk > 0 and GPTConfig(vocab_size=256).loss_chunk == 0


def test_surface_of_nanogpt():
    m = tiny()
    idx = torch.randint(33, (2, 10))
    logits, loss = m(idx)
    assert logits.shape == (2, 1, 33) and loss is None
    logits, loss = m(idx, idx)
    assert logits.shape == (2, 10, 33)
    targets = idx.clone()
    targets[:, :5] = -1
    assert m(idx, targets)[1].item() == pytest.approx(
        F.cross_entropy(logits[:, 5:].flatten(0, 1), idx[:, 5:].flatten()).item(), rel=1e-5)
    assert m.generate(idx, 7, temperature=0.8, top_k=5).shape == (2, 17)


@pytest.mark.parametrize('kind', KINDS)
def test_crop_keeps_the_first_positions(kind):
    m = varied(**kind)
    idx = torch.randint(33, (2, 8))
    before = m(idx, idx)[0]
    m.crop_block_size(8)
    assert torch.equal(m(idx, idx)[0], before) and all(p.requires_grad for p in m.parameters())
    with pytest.raises(ValueError, match='block_size is 8'):
        m(torch.zeros(1, 9, dtype=torch.long))


def test_flops_of_gpt2_124m():
    with torch.device('meta'):
        m = GPT(GPTConfig(vocab_size=50257, bias=False))
    # 6 x (12 x 12 x 768^2 + 50257 x 768) + 12 x 12 x 768 x 1024
    assert m.flops_per_token() == 6 * (84934656 + 38597376) + 113246208
    assert m.flops_per_token(512) == m.flops_per_token() - 113246208 // 2
    with torch.device('meta'):
        assert GPT(GPTConfig(vocab_size=50257, bias=False, tied=False)).flops_per_token() == m.flops_per_token()


@pytest.mark.parametrize('changes, message', [(dict(n_embd=30, n_head=4), 'n_embd=30 is not divisible by n_head=4'),
                                              (dict(n_layer=0), 'n_layer=0'), (dict(dropout=1.0), 'dropout'),
                                              (dict(activation='relu'), 'activation'), (dict(arch='llamas'), 'arch'),
                                              (dict(norm='batch'), 'norm'), (dict(positions='none'), 'positions'),
                                              (dict(arch='modern', n_embd=6, n_head=2), 'head_dim of 3 is odd')])
def test_config_refused(changes, message):
    with pytest.raises(InputError, match=message):
        GPTConfig(**changes)


def test_checkpoint_of_another_kind_of_model():
    with pytest.raises(InputError, match='another kind of model: it has rope'):
        GPTConfig.from_saved({'n_layer': 2, 'rope': True})
