import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from sologpt.machine import choices
from sologpt.matmuls import attention
from sologpt.matmuls.attention import ATTENTION

FLASH, EFFICIENT, MATH, CUDNN = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
                                 SDPBackend.CUDNN_ATTENTION)


def backends_tried(monkeypatch, kernel, T, S, masked, device='cuda'):
    """What torch may take for one call of a kernel, the first choice first."""
    tried = []

    def fused(q, *args, **options):
        tried.extend(_cur_sdpa_kernel_backends(with_priority=True))
        return q
    monkeypatch.setattr(F, 'scaled_dot_product_attention', fused)
    with FakeTensorMode():
        q, k = (torch.empty(1, 2, n, 16, device=device, dtype=torch.bfloat16) for n in (T, S))
        mask = torch.ones(T, S, dtype=torch.bool, device=device) if masked else None
        ATTENTION[kernel](q, k, k, 0.0, mask)
    return tried


@pytest.mark.parametrize('kernel', ['sdpa', 'flash', 'cudnn', 'flex'])
def test_cudnn_gets_no_single_query_and_no_mask(monkeypatch, kernel):
    for T, S, masked in ((1, 1, False), (1, 9, False), (8, 8, True), (4, 8, True)):
        assert backends_tried(monkeypatch, kernel, T, S, masked) == [FLASH, EFFICIENT, MATH]


def test_what_cudnn_does_not_take_goes_to_flash(monkeypatch):
    assert backends_tried(monkeypatch, 'cudnn', 8, 8, False) == [CUDNN, FLASH, EFFICIENT, MATH]
    # sdpa draws text, whose length varies
    assert backends_tried(monkeypatch, 'sdpa', 8, 8, False) == [FLASH, EFFICIENT, MATH]


def test_on_a_cpu_the_choice_stays_torchs(monkeypatch):
    before = _cur_sdpa_kernel_backends(with_priority=True)
    for T, masked in itertools.product((1, 8), (False, True)):
        if not (T == 1 and masked):  # which is written out
            assert backends_tried(monkeypatch, 'sdpa', T, 8, masked, 'cpu') == before


def test_flex_without_blocks_is_sdpa():
    q, k, v = torch.randn(3, 2, 3, 7, 16)
    for mask in (None, attention.causal_mask(7, 7, q.device)):
        assert torch.equal(ATTENTION['flex'](q, k, v, 0.0, mask), ATTENTION['sdpa'](q, k, v, 0.0, mask))


def test_probing_hides_torchs_reasons_alone(monkeypatch):
    def refuse(q, *args, dropout_p, **options):
        warnings.warn('Flash attention only supports gpu architectures in the range [sm80, sm121]. (Triggered '
                      'internally at /aten/src/ATen/native/transformers/cuda/sdp_utils.cpp:350.)', stacklevel=1)
        if dropout_p == 0.5:
            warnings.warn('another', stacklevel=1)
        raise RuntimeError('No available kernel. Aborting execution.')
    monkeypatch.setattr(F, 'scaled_dot_product_attention', refuse)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter('always')
        for dropout in (0.0, 0.5):
            with pytest.raises(RuntimeError, match='No available kernel'):
                choices._attention_seconds('flash', torch.device('cpu'), torch.float32, (1, 1, 1, 4, 8), dropout)
    assert [str(w.message) for w in shown] == ['another']
