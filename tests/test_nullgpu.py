"""The null GPU, as far as it goes without the CUDA build of torch. tests/cuda_dry/ runs it."""

import pytest
import torch
import torch.nn.functional as F

from configurator import InputError
from sologpt.nullgpu import build
from sologpt.nullgpu.cards import CARDS, find_card
from sologpt.nullgpu.child import CountOps, attention_flops, nbytes, op_bytes
from sologpt.nullgpu.events import Gemm, Launch, Mark, Memcpy, Op, Refusal, Sync, parse_events, replay_graphs
from sologpt.nullgpu.run import DryRun, gemms, launches, split_steps, waits

aten = torch.ops.aten
LOG = '''\
{"event": "malloc", "bytes": 2097152, "granted": true}
{"event": "gemm", "layout": "TN", "m": 8, "n": 4, "k": 2, "batch": 1, \
"a": "bfloat16", "b": "bfloat16", "d": "float32", "tf32": false, "accumulates": false, "refused": ""}
{"event": "op", "kind": "aten", "name": "aten.mm.out", "bytes": 176, "flops": 0, "dtype": "", "covers": 1}
{"event": "mark", "what": "backward_begin", "peak": 100}
{"event": "launch", "kind": "triton", "name": "triton_poi_0", "grid": [96, 1, 1], "block": [128, 1, 1], "shared": 64, \
"registers": 32, "stack": 8, "graph": 0}
{"event": "mark", "what": "backward_end", "peak": 300}
{"event": "memcpy", "bytes": 4, "direction": "device_to_host", "is_async": true, "pinned": false}
{"event": "sync", "what": "stream"}
{"event": "mark", "what": "update_begin", "peak": 300}
{"event": "mark", "what": "update_end", "peak": 250}
{"event": "refusal", "call": "cudaMemcpy", "reason": "a stream is being captured"}
'''


def test_a_log_becomes_events():
    events = parse_events(LOG)
    assert events[1] == Gemm('TN', 8, 4, 2, 1, 'bfloat16', 'bfloat16', 'float32', False, False, '')
    assert events[4] == Launch('triton', 'triton_poi_0', (96, 1, 1), (128, 1, 1), 64, 32, 8)
    dry = DryRun(find_card('T4'), 0, '', '', events)
    assert dry.peak == 300 and dry.refusals == ['cudaMemcpy: a stream is being captured']
    step, = dry.training_steps()
    micro, = step.micro_steps
    assert gemms(micro) == [events[1]] and launches(micro, 'triton') == [events[4]] and not launches(micro, 'aten')
    assert waits(micro) == [] and waits(step.update) == [Memcpy(4, 'device_to_host', True, False), Sync('stream')]


def test_a_step_has_its_micro_steps_and_all_of_its_optimizers():
    def mark(what):
        return Mark(what, 0)
    micro = [mark('backward_begin'), mark('backward_end')]
    update = [mark('update_begin'), mark('update_end')]
    steps = split_steps([*micro, *micro, *update, *update, Sync('device'), *micro, *micro, *update, Refusal('', '')])
    assert [len(step.micro_steps) for step in steps] == [2, 2]
    assert steps[0].update == 2 * update and steps[1].micro_steps[0] == [Sync('device'), *micro]


def test_a_graph_is_replaced_by_what_was_captured():
    kernel, other = Launch('aten', 'a', graph=1), Launch('aten', 'b')
    log = ('{"event": "capture", "begins": true, "graph": 1}\n'
           '{"event": "launch", "kind": "aten", "name": "a", "graph": 1}\n'
           '{"event": "sync", "what": "stream"}\n'
           '{"event": "capture", "begins": false, "graph": 1}\n'
           '{"event": "launch", "kind": "aten", "name": "b"}\n'
           '{"event": "graph_launch", "graph": 1}\n{"event": "graph_launch", "graph": 1}\n')
    assert replay_graphs(parse_events(log)) == [Sync('stream'), other, kernel, kernel]


@pytest.mark.parametrize('name', ['RTX 4070', 'rtx 4070', 'GeForce RTX 4070', 'NVIDIA GeForce RTX 4070'])
def test_a_card_is_found_by_its_names(name):
    assert find_card(name).name == 'NVIDIA GeForce RTX 4070'


@pytest.mark.parametrize('name', ['RTX 407', 'RTX 4060', '', 'RTX 4070 Ti'])
def test_another_card_is_refused_with_a_list(name):
    with pytest.raises(InputError, match='use T4, RTX 3060') as error:
        find_card(name)
    assert '\n' not in str(error.value)


def test_every_card_has_peaks_and_an_environment():
    for card in CARDS:
        assert card.peak('float16') and card.peak('float32') and card.peak('int8') > card.peak('float16')
        assert (card.peak('bfloat16') is None) == (card.capability < 80)
        assert (card.peak('float8_e4m3fn') is None) == (card.capability < 89)
        assert 0 < int(card.environment()['NULLGPU_SHARED_PER_BLOCK']) < 228 * 1024
    h100, rtx = find_card('H100'), find_card('RTX 4090')
    assert h100.peak('int8') == 2 * 989.4e12 and h100.peak('float8_e5m2') == 2 * 989.4e12
    assert rtx.peak('int8') == 4 * 165.2e12 and rtx.peak('float8_e4m3fn') == 2 * 165.2e12
    assert h100.peak('float32', tf32=True) == 494.7e12 and h100.peak('float32', tf32=False) == 67e12


@pytest.mark.parametrize('version, missing, message', [
    (None, None, 'pip install torch==2.13.0'), ('12.8', None, 'pip install torch==2.13.0'),
    ('13.0', 'gcc', 'install gcc'), ('13.0', 'nm', 'binutils'), ('13.0', 'headers', 'cublasLt.h')])
def test_what_is_missing_is_one_line(monkeypatch, tmp_path, version, missing, message):
    monkeypatch.setattr(torch.version, 'cuda', version)
    monkeypatch.setattr(build.shutil, 'which', lambda tool: None if tool == missing else f'/usr/bin/{tool}')
    monkeypatch.setattr(torch, '__file__', str(tmp_path / 'torch' / '__init__.py'))
    with pytest.raises(InputError, match=message) as error:
        build.build_library()
    assert '\n' not in str(error.value)


def test_a_tensor_counts_with_the_elements_that_exist():
    assert nbytes(torch.empty(4, 3)) == 48 and nbytes(torch.empty(0, 3)) == 0
    assert nbytes(torch.empty(1, 3, dtype=torch.bfloat16).expand(4, 3)) == 6


def cost(op, *args, **kwargs):
    return op_bytes(op, args, kwargs, op(*args, **kwargs))


def test_bytes_of_eager_operations():
    x, y = torch.ones(10, 8), torch.ones(10, 8)
    n = 4 * 80
    assert cost(aten.add.Tensor, x, y) == 3 * n
    assert cost(aten.add_.Tensor, x, y) == 3 * n  # reads both, writes one
    assert cost(aten.copy_.default, x, y) == 2 * n
    assert cost(aten.zero_.default, x) == n
    assert cost(aten.mul.out, x, y, out=torch.empty(10, 8)) == 3 * n
    assert cost(aten._to_copy.default, x, dtype=torch.bfloat16) == n + n // 2
    assert cost(aten.sum.default, x) == n + 4
    assert cost(aten._foreach_mul_.Tensor, [x, y], torch.ones(())) == 4 * n + 4
    table, ids = torch.ones(1000, 8), torch.zeros(10, dtype=torch.long)
    assert cost(aten.embedding.default, table, ids) == 2 * n + 80  # not the whole table


def test_a_fused_optimizer_does_not_write_gradients_without_a_scaler():
    p, g, m, v = ([torch.ones(100)] for _ in range(4))
    rates = dict(lr=0.1, beta1=0.9, beta2=0.9, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False)
    written_and_read = cost(aten._fused_adamw_.default, p, g, m, v, [], [torch.ones(())], **rates)
    assert written_and_read == 400 * 7 + 4


def test_flops_of_attention():
    q, k, v = (torch.ones(2, 3, 16, 8) for _ in range(3))
    op = aten._scaled_dot_product_flash_attention_for_cpu.default
    full = 2 * 2 * 2 * 3 * 16 * 16 * 8  # two matmuls
    assert attention_flops(op, (q, k, v), {}) == full
    assert attention_flops(op, (q, k, v, 0.0, True), {}) == full / 2
    backward = aten._scaled_dot_product_flash_attention_backward.default
    empty = torch.empty(0)
    given = (q, q, k, v, q, empty, empty, empty, 16, 16, 0.0, True, empty, empty)
    assert attention_flops(backward, given, {}) == 2.5 * full / 2
    packed = torch.ones(32, 3, 8)  # 2 sequences of 16
    given = dict(query=packed, key=packed, value=packed, max_q=16, max_k=16, is_causal=True)
    assert attention_flops(aten._flash_attention_forward.default, (), given) == full / 2
    assert attention_flops(aten.mm.default, (q, k), {}) is None


class FakeLog:
    """Says that each operation has asked for one thing."""

    def __init__(self):
        self.n, self.lines = 0, []

    def written(self):
        self.n += 1
        return self.n

    def write(self, event, **fields):
        self.lines.append(Op(**fields))


def test_operations_are_counted_outside_and_inside_of_compiled_code():
    log, x = FakeLog(), torch.ones(2, 2)
    compiled = torch.compile(lambda t: (t @ t).relu(), backend='aot_eager', fullgraph=True)
    with CountOps(log):
        compiled(x)
        F.scaled_dot_product_attention(*(torch.ones(1, 1, 4, 8) for _ in range(3)))
    names = [line.name for line in log.lines]
    assert 'aten.mm.default' in names and 'aten.relu.default' in names
    attention = next(line for line in log.lines if line.kind == 'attention')
    assert (attention.flops, attention.dtype, attention.covers) == (4 * 16 * 8, 'float32', 1)
