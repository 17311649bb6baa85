import itertools

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.nn.attention import flex_attention as torchs

from configurator import InputError
from model import GPT, GPTConfig
from sologpt.machine import choices
from sologpt.matmuls import document_attention
from sologpt.matmuls.document_attention import BLOCK, block_mask, dense_mask
from sologpt.training import machine
from sologpt.training.adamw import adamw
from sologpt.training.forecast import Forecast
from sologpt.training.loss import TrainingLoss

KINDS = [dict(arch='gpt2'), dict(arch='modern', smear=True)]
FLEX = torch.ops.higher_order.flex_attention


def random_starts(T, share, rows=3):
    """(rows, T) int: where each token's document begins, if each token begins one with probability `share`."""
    begins = torch.rand(rows, T, generator=torch.Generator().manual_seed(T)) < share
    return torch.where(begins, torch.arange(T), 0).cummax(dim=1).values


def test_a_dense_mask_shows_the_tokens_before_in_the_same_document():
    starts = torch.tensor([[0, 0, 2, 2, 4]])
    assert dense_mask(starts)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]


@pytest.mark.parametrize('T', [1, 64, 128, 200, 384, 1000, 1024])
@pytest.mark.parametrize('share', [0.0, 0.003, 0.01, 0.1, 1.0])
def test_the_blocks_hold_each_pair_once_and_full_ones_no_forbidden_pair(T, share):
    starts, n = random_starts(T, share), -(-T // BLOCK)
    padded = torch.zeros(3, 1, n * BLOCK, n * BLOCK, dtype=torch.bool)
    padded[..., :T, :T] = dense_mask(starts)
    blocks = padded.view(3, 1, n, BLOCK, n, BLOCK).permute(0, 1, 2, 4, 3, 5).flatten(-2)
    wholly, some = blocks.all(-1), blocks.any(-1)
    mask = block_mask(starts)
    assert mask.shape == (3, 1, T, T)
    for part, expected in (('', some & ~wholly), ('full_', wholly)):
        for side, seen in (('kv', expected), ('q', expected.mT)):
            counts, indices = (getattr(mask, f'{part}{side}_{what}') for what in ('num_blocks', 'indices'))
            assert counts.dtype == indices.dtype == torch.int32 and counts.is_contiguous() and indices.is_contiguous()
            assert indices.min() >= 0 and indices.max() < n
            for b, i in itertools.product(range(3), range(n)):
                assert indices[b, 0, i, :counts[b, 0, i]].tolist() == seen[b, 0, i].nonzero().flatten().tolist()
    b, query, key = torch.meshgrid(torch.arange(3), torch.arange(T), torch.arange(T), indexing='ij')
    assert torch.equal(mask.mask_mod(b, 0, query, key), dense_mask(starts)[:, 0])


@pytest.fixture
def flex_on_a_cpu(monkeypatch):
    """FlexAttention written out in matmuls, which torch refuses to differentiate on a CPU though it can."""
    monkeypatch.setattr(torchs, '_validate_device', lambda *_: None)
    monkeypatch.setattr(torchs, '_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG', True)


def model_of(attn_backend, **changes):
    torch.manual_seed(0)
    config = dict(block_size=160, vocab_size=33, n_layer=2, n_head=2, n_embd=32, document_eot=0)
    m = GPT(GPTConfig(**config | changes, attn_backend=attn_backend))
    with torch.no_grad():
        for p in m.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return m


def packed():
    """(2, 160) ids with a few documents in each row, which begin with 0, and targets."""
    idx, targets = torch.randint(1, 33, (2, 2, 160), generator=torch.Generator().manual_seed(0))
    idx[0, [5, 6, 140]] = idx[1, [0, 90]] = 0
    return idx, targets


def loss_and_grads(m, loss):
    return [loss.detach(), *torch.autograd.grad(loss, list(m.parameters()))]


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('checkpointed', [False, True, 'selective'])
def test_flex_computes_what_the_dense_mask_computes(flex_on_a_cpu, kind, checkpointed):
    idx, targets = packed()
    dense, flex = (model_of(name, checkpoint_activations=checkpointed, **kind) for name in ('sdpa', 'flex'))
    with torch.no_grad():
        assert_close(*([m.eval()(idx, targets)[0]] for m in (flex, dense)))
    assert_close(*(loss_and_grads(m, m.train().loss(idx, targets)) for m in (flex, dense)))


@pytest.mark.parametrize('checkpointed, computed_again', [(False, 0), (True, 1), ('selective', 0)])
def test_flex_compiles_whole_and_a_selective_block_keeps_it(flex_on_a_cpu, checkpointed, computed_again):
    graphs = []

    def keep(module, inputs):
        graphs.append([node.target for node in module.graph.nodes])
        return make_boxed_func(module.forward)
    m = model_of('flex', n_layer=1, checkpoint_activations=checkpointed, arch='modern', smear=True).train()
    compiled = TrainingLoss(m, True, fullgraph=True, backend=aot_autograd(
        fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition))
    assert_close(*(loss_and_grads(m, loss_of(*packed())) for loss_of in (compiled, m.loss)))
    forward, backward = graphs
    assert forward.count(FLEX) == 1 and backward.count(FLEX) == computed_again


def test_text_is_drawn_without_blocks():
    plain, flex = (model_of(attn_backend).eval() for attn_backend in ('sdpa', 'flex'))
    idx = packed()[0][:, :20]
    assert torch.equal(plain.generate(idx, 30, temperature=0), flex.generate(idx, 30, temperature=0))


def test_flex_has_no_dropout(flex_on_a_cpu):
    with pytest.raises(ValueError, match='FlexAttention has no dropout'):
        model_of('flex', dropout=0.1).train().loss(*packed())


def test_flex_is_foreseen_as_causal_attention():
    def peak(attn_backend, document_eot):
        m = model_of(attn_backend, block_size=512, n_layer=1, document_eot=document_eot).train()
        return Forecast(m, lambda m: adamw(m, 0.0, 0.1, (0.9, 0.95)), 512, 'bfloat16').at(16).peak
    causal, dense, flex = peak('sdpa', None), peak('sdpa', 0), peak('flex', 0)
    assert flex == pytest.approx(causal, rel=0.01) and dense > 1.1 * flex


# ---- which kernel a run takes ----------------------------------------------------------------------------------------

class Gpu(machine.Machine):
    """A machine with a GPU, whose set-up is left out."""

    def __init__(self, dtype='bfloat16', compile=True):
        self.device, self.dtype, self.compile = torch.device('cuda'), dtype, compile

    def find(self, attn_backend='auto', before=None, dropout=0.0, documents=True):
        run = {'chosen': {'a GPU': {'attn_backend': before}}} if before else {}
        config = dict(attn_backend=attn_backend, block_size=64, document_mask=documents, dropout=dropout)
        return self._find_attention(config, GPTConfig(n_head=2, n_embd=32), run, documents)


@pytest.fixture(autouse=True)
def seconds(monkeypatch):
    """The seconds that the kernels are said to take."""
    found = {'flex': 1e-3, 'sdpa': 2e-3, 'cudnn': 1e-3, 'flash': 2e-3}

    def of_causal(kernel, device, dtype, shape, dropout):
        if kernel not in found or kernel == 'cudnn' and 16 * dropout % 1:
            raise RuntimeError('No available kernel')
        return found[kernel]
    monkeypatch.setattr(document_attention, '_attention_seconds', lambda name, *_: found[name])
    monkeypatch.setattr(choices, '_attention_seconds', of_causal)
    monkeypatch.setattr(machine.devices, 'device_name', lambda device: 'a GPU')
    return found


def test_documents_take_the_faster_kernel(seconds):
    assert Gpu().find() == ('flex', 'flex 1.00 ms, sdpa 2.00 ms')
    seconds['sdpa'] = 0.5e-3
    assert Gpu().find()[0] == 'sdpa' and Gpu().find(before='flex') == ('flex', 'as asked')
    assert Gpu().find('flex') == ('flex', 'as asked')


def test_the_header_says_why_flex_is_not_taken(monkeypatch):
    assert Gpu().find(dropout=0.1) == ('sdpa', 'flex has no dropout')
    assert Gpu(compile=False).find() == ('sdpa', 'flex is for a model that is compiled')
    assert Gpu('float32').find() == ('sdpa', 'flex is for a GPU, in bfloat16 or float16')

    def refuse(*_):
        raise RuntimeError('out of resource: shared memory, Required: 81920, Hardware limit: 65536\nmore')
    monkeypatch.setattr(document_attention, '_attention_seconds', refuse)
    assert Gpu().find() == ('sdpa', 'flex: RuntimeError: out of resource: shared memory, Required: 81920, Hardware '
                            'limit: 65536')


def test_dropout_decides_what_is_measured_and_what_stays_chosen():
    assert Gpu().find(documents=False) == ('cudnn', 'cudnn 1.00 ms, flash 2.00 ms')
    assert Gpu().find(documents=False, dropout=0.125)[0] == 'cudnn'
    assert Gpu().find(documents=False, dropout=0.1) == ('flash', 'flash 2.00 ms')
    assert Gpu().find(documents=False, dropout=0.1, before='cudnn') == ('flash', 'flash 2.00 ms')
    assert Gpu().find(documents=False, before='flex')[0] == 'cudnn'  # document_mask was left out since


@pytest.mark.parametrize('keys, message', [
    (dict(attn_backend='cudnn', documents=False, dropout=0.1), 'attn_backend=cudnn takes dropout in sixteenths, and'),
    (dict(attn_backend='cudnn'), 'attn_backend=cudnn has no document_mask: use auto'),
    (dict(attn_backend='flex', documents=False), 'attn_backend=flex is for document_mask=True: use auto'),
    (dict(attn_backend='flex', dropout=0.5), 'attn_backend=flex has no dropout: use auto')])
def test_a_kernel_that_cannot_do_what_is_asked_is_refused(keys, message):
    with pytest.raises(InputError, match=message):
        Gpu().find(**keys)


def test_a_kernel_that_the_gpu_does_not_have_is_refused(seconds):
    del seconds['flash']
    with pytest.raises(InputError, match='attn_backend=flash: torch does not have it on a GPU for heads of 16 dim'):
        Gpu().find('flash', documents=False)
