import math

import pytest

from configurator import InputError
from sologpt.bench import dryrun, roofline
from sologpt.bench.roofline import Work, by_kind, by_name, list_work
from sologpt.nullgpu.build import build_library
from sologpt.nullgpu.cards import find_card
from sologpt.nullgpu.events import Gemm, Launch, Mark, Memcpy, Memset, Op, Sync
from sologpt.nullgpu.run import DryRun

RTX = find_card('RTX 4070')  # 58.3 TFLOP/s in 16 bits, 29.15 in TF32, 504 GB/s
LINEAR = Gemm('TN', 3072, 16384, 768, 1, 'bfloat16', 'bfloat16', 'bfloat16', False, False, '')


def op(kind, name, covers, bytes=0, flops=0, dtype=''):
    return Op(kind, name, bytes, flops, dtype, covers)


def test_a_linear_by_hand():
    """768 -> 3072 for 16 x 1024 tokens: 77 GFLOP, 131 MB; at 58.3 TFLOP/s and 504 GB/s the FLOPs take longer."""
    work, = list_work([LINEAR, op('aten', 'aten.mm.out', 1, bytes=1)])
    assert work.flops == 2 * 3072 * 16384 * 768 == 77_309_411_328
    assert work.bytes == 2 * (3072 * 768 + 768 * 16384 + 3072 * 16384) == 130_547_712
    assert math.isclose(work.seconds(RTX), 77_309_411_328 / 58.3e12) and work.seconds(RTX) > 130_547_712 / 504e9


@pytest.mark.parametrize('dtype, tf32, peak', [
    ('float32', True, 29.15e12), ('float32', False, 29.15e12), ('bfloat16', False, 58.3e12),
    ('float8_e4m3fn', False, 116.6e12), ('int8', False, 233.2e12)])
def test_the_peak_is_that_of_the_dtype(dtype, tf32, peak):
    assert math.isclose(Work('GEMM', '', 1, 10 ** 12, 0, dtype, tf32).seconds(RTX), 1e12 / peak)


def test_what_moves_bytes_alone_takes_the_time_of_the_memory():
    assert Work('Triton', '', 1, 0, 504e6).seconds(RTX) == pytest.approx(1e-3)


def test_a_matmul_that_accumulates_reads_its_result_too():
    added = Gemm('NT', 10, 20, 30, 2, 'bfloat16', 'bfloat16', 'float32', False, True, '')
    assert roofline.gemm_work(added).bytes == 2 * (2 * 10 * 30 + 2 * 30 * 20 + 8 * 10 * 20)
    assert roofline.gemm_work(added).flops == 2 * 2 * 10 * 20 * 30


def test_events_become_work():
    flash, cast, copy = Launch('aten', 'flash'), Launch('aten', 'cast'), Memcpy(4, 'device_to_device', True, True)
    work = list_work([
        Mark('backward_begin', 0), Launch('triton', 'relu'), op('triton', 'relu', 1, bytes=100),
        flash, Memset(8), flash, op('attention', 'sdpa', 3, bytes=50, flops=1000, dtype='bfloat16'),
        cast, LINEAR, op('aten', 'addmm', 2, bytes=7),  # its kernels are launches, its bytes those of the GEMM
        copy, op('aten', 'clone', 1, bytes=8), Memcpy(4, 'host_to_device', True, True), op('aten', 'to', 1, bytes=8),
        Sync('stream'), Launch('aten', 'loose')])
    assert [(w.kind, w.name, w.launches, w.flops, w.bytes) for w in work if w.kind != 'GEMM'] == [
        ('Triton', 'relu', 1, 0, 100), ('attention', 'sdpa', 2, 1000, 50), ('ATen', 'cast', 1, 0, 0),
        ('ATen', 'clone', 1, 0, 8), ('ATen', 'loose', 1, 0, 0)]
    assert sum(w.kind == 'GEMM' for w in work) == 1


def test_sums_are_those_of_their_parts():
    work = [Work('Triton', 'a', 1, 0, 504e6), Work('Triton', 'b', 2, 0, 504e6 * 3), Work('Triton', 'a', 1, 0, 504e6),
            Work('attention', 'c', 1, 58_300_000_000, 0, 'bfloat16')]
    sums = by_kind(work, RTX)
    assert sums['Triton'].launches == 4 and sums['Triton'].milliseconds == pytest.approx(5)
    assert sums['attention'].milliseconds == pytest.approx(1) and sums['GEMM'].launches == 0
    assert sums['all'].milliseconds == pytest.approx(6) and sums['all'].gigabytes == pytest.approx(5 * 0.504)
    assert [(name, round(total.milliseconds)) for _, name, total in by_name(work, RTX)] == [
        ('b', 3), ('a', 2), ('c', 1)]


def test_figures_of_a_run_are_called_modelled(capsys):
    micro = [Launch('triton', 'relu'), op('triton', 'relu', 1, bytes=504e6), Mark('backward_begin', 10 ** 9),
             Mark('backward_end', 3 * 10 ** 9)]
    update = [Launch('aten', 'adamw'), op('aten', 'aten._fused_adamw_.default', 1, bytes=1008e6), Sync('stream'),
              Mark('update_end', 2 * 10 ** 9)]
    figures = dryrun._describe_run('here', DryRun(RTX, 0, '', '', 5 * [*micro, *micro, *update]), RTX)
    assert figures['micro_step']['by_kind']['all']['modelled_ms'] == pytest.approx(1)
    assert figures['update']['by_kind']['ATen']['modelled_ms'] == pytest.approx(2)
    assert figures['peak_gb'] == 3 and figures['waits_in_step'] == 1 and figures['micro_step']['waits'] == 0
    assert figures['fits'] and figures['update']['by_name'][0]['name'] == 'aten._fused_adamw_.default'
    printed = capsys.readouterr().out
    assert 'here: micro-step, modelled' in printed and 'here: update, modelled' in printed


@pytest.mark.parametrize('keys, args, message', [
    ({'card': 'RTX 407'}, [], 'card='), ({'peer': '/nowhere'}, [], 'peer='),
    ({}, ['--batch_size=auto'], 'batch_size=auto'), ({}, ['--n_layers=2'], 'n_layer')])
def test_bad_input_of_the_suite_is_refused_before_anything_runs(keys, args, message):
    with pytest.raises(InputError, match=message):
        dryrun.measure({'card': 'RTX 4070', 'peer': ''} | keys, args, '')


def test_without_the_cuda_build_of_torch_the_suite_says_what_to_install():
    try:
        build_library()
    except InputError as error:
        with pytest.raises(InputError, match=str(error)[:40]):
            dryrun.measure({'card': 'RTX 4070', 'peer': ''}, [], '')
