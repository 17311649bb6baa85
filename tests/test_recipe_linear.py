import pytest
import torch
from linears import CPU, apart, linear, small, tensors, through

from configurator import InputError
from sologpt.machine import choices, devices
from sologpt.matmuls import recipes
from sologpt.matmuls.products import bfloat16_product
from sologpt.matmuls.recipe_linear import RecipeLinear, convert, find_product, find_strategy, restore
from sologpt.matmuls.recipes import RECIPES
from sologpt.matmuls.spec import MatmulSpec, parse_matmul


def test_the_parameters_stay_what_and_where_they_are():
    model = small()
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    order = list(before)
    keys, ids = model.state_dict().keys(), torch.randint(0, 11, (2, 8))
    plain = model(ids, ids)[1]
    assert convert(model, MatmulSpec('int8'), 'float32', 16, CPU).startswith('int8, ')
    assert model.state_dict().keys() == keys
    assert all(id(p) == before[name][0] and torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    changed = {name for name, m in model.named_modules() if isinstance(m, RecipeLinear)}
    assert len(changed) == 16 and 'lm_head' not in changed
    low = model(ids, ids)[1]
    assert low != plain and abs(low - plain) < 0.05
    modules = list(model.modules())
    assert [name for name, _ in model.named_parameters()] == order
    restore(model)
    assert list(model.modules()) == modules  # others may hold them by now: DDP, FSDP, what is compiled
    assert torch.equal(model(ids, ids)[1], plain)


def test_a_compiled_model_goes_back_to_its_dtype():
    model, ids = small(), torch.randint(0, 11, (2, 8))
    plain = model(ids, ids)[1]
    convert(model, MatmulSpec('sparse24'), 'float32', 16, CPU)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    assert compiled(ids, ids)[1] == model(ids, ids)[1] != plain
    restore(model)
    assert compiled(ids, ids)[1] == plain


def test_the_last_blocks_stay_in_high_precision():
    def converted(name, keep_last=None):
        model = small()
        how = convert(model, MatmulSpec(name, keep_last=keep_last), 'float32', 16, CPU)
        return [isinstance(block.mlp.c_fc, RecipeLinear) for block in model.transformer.h], how
    assert converted('nvfp4') == ([True] * 3 + [False], 'nvfp4, all but 1 of 4 blocks, emulated')
    assert converted('int8', 3)[0] == [True] + [False] * 3
    with pytest.raises(InputError, match='keep_last=4 must be from 0 to 3'):
        converted('int8', 4)


def paths(device='cpu', dims=(64, 128), tokens=32):
    return {name: find_strategy(MatmulSpec(name), torch.device(device), 'bfloat16', dims, tokens).how
            for name in ('fp8', 'fp8_row', 'int8')}


def test_native_is_what_the_hardware_has(monkeypatch):
    """Of a GPU by what torch says of it, for want of one."""
    monkeypatch.setattr(choices, 'cpu_has_int8', lambda: False)
    assert paths() == {'fp8': 'emulated', 'fp8_row': 'emulated', 'int8': 'emulated'}
    for capability, native in ((8, 0), {'int8'}), ((8, 9), {'int8', 'fp8', 'fp8_row'}):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device, capability=capability: capability)
        monkeypatch.setattr(devices, 'device_name', lambda device: 'a GPU')
        if capability == (8, 0) and torch.__version__ < '2.13':
            with pytest.raises(InputError, match='no 8-bit floats on a GPU'):
                paths('cuda')
            continue
        assert {name for name, path in paths('cuda').items() if path == 'native'} == native
        assert paths('cuda', tokens=24)['fp8'] == paths('cuda', dims=(72, 64))['fp8_row'] == 'emulated'
    monkeypatch.setattr(torch.version, 'hip', '6.0')
    assert set(paths('cuda').values()) == {'emulated'}
    with pytest.raises(InputError, match='no 8-bit floats'):
        find_strategy(MatmulSpec('fp8'), torch.device('mps'), 'float32', (64,), 32)


@pytest.mark.parametrize('name', ['fp8', 'fp8_row'])
def test_fp8_operands_lie_as_tensor_cores_take_them(name, monkeypatch):
    calls = []

    def scaled_mm(a, b, scale_a, scale_b, out_dtype, use_fast_accum):
        assert a.stride(1) == 1 and b.stride(0) == 1 and scale_a.is_contiguous() and scale_b.is_contiguous()
        assert not a.dtype == b.dtype == torch.float8_e5m2 and all(n % 16 == 0 for n in (*a.shape, *b.shape))
        assert scale_a.shape == (() if name == 'fp8' else (len(a), 1)) and scale_a.dtype == torch.float32
        assert scale_b.shape == (() if name == 'fp8' else (1, b.size(1)))
        assert out_dtype == torch.bfloat16 or name == 'fp8'
        calls.append(use_fast_accum)
        return (a.float() * scale_a @ (b.float() * scale_b)).to(out_dtype)
    monkeypatch.setattr(torch, '_scaled_mm', scaled_mm)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    x, w, g = tensors(dtype=torch.bfloat16)
    function = find_strategy(MatmulSpec(name), torch.device('cuda'), 'bfloat16', (64, 128), 32).function
    expected = through(linear(name).strategy.function.apply, x, w, g)
    for mine, right in zip(through(function.apply, x, w, g), expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=0.02, atol=0.02)
    assert calls == [True, False, False]  # in the forward alone


@pytest.mark.parametrize('name, count', [
    ('fp8', 3), ('fp8_row', 3), ('fp8_block', 3), ('mxfp8', 3), ('mxfp6_e2m3', 3), ('mxfp6_e3m2', 3), ('mxfp4', 3),
    ('nvfp4', 3), ('nvfp4:gemms=fwd', 1), ('fp4_dge', 1)])  # fp4_dge keeps outliers in the other two
def test_emulation_on_a_gpu_multiplies_the_same_numbers_in_bfloat16(name, count, monkeypatch):
    calls = []

    def mm(a, b, out_dtype):
        assert a.dtype == b.dtype == torch.bfloat16 and out_dtype == torch.float32
        calls.append(a.shape)
        return a.float() @ b.float()
    monkeypatch.setattr(torch, 'mm', mm)
    monkeypatch.setattr(choices, 'has_float8', lambda device: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (8, 0))
    x, w, g = tensors(dtype=torch.bfloat16)
    spec, found = parse_matmul(name), []
    for device in ('cpu', 'cuda'):
        strategy = find_strategy(spec, torch.device(device), 'bfloat16', (64, 128), 32)
        torch.manual_seed(0)
        found.append(through(strategy.function.apply, x, w, g))
    assert 'emulated' in strategy.how and len(calls) == count
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_where_emulation_multiplies_in_bfloat16(monkeypatch):
    def in_bfloat16(device, capability=None):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
        return [name for name in ('mxfp4', 'nvfp4', 'fp4_dge', 'int8')
                if find_product(RECIPES[name].fwd, torch.device(device), (64, 128), 32, False)[0] is bfloat16_product]
    assert in_bfloat16('cuda', (8, 0)) == in_bfloat16('cuda', (9, 0)) == ['mxfp4', 'nvfp4']
    assert in_bfloat16('cuda', (7, 5)) == in_bfloat16('cpu') == in_bfloat16('mps') == []
    monkeypatch.setattr(torch.version, 'hip', '6.0')
    assert in_bfloat16('cuda', (9, 0)) == []


@pytest.mark.parametrize('name, options, message', [
    ('int9', {}, "matmul='int9' is not known: use int8"),
    ('int8', {'gemms': ('fwd', 'grad')}, r'gemms=fwd\+grad must be some of'),
    ('ternary', {'gemms': ('fwd',)}, 'belong together'),
    ('strassen', {'gemms': ('fwd',)}, 'belong together'),
    ('strassen', {'levels': 0}, 'levels=0'),
    ('block_dropout', {'rate': 1.0}, 'rate=1.0'),
])
def test_what_cannot_be_is_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        MatmulSpec(name, **options)


def test_which_matmuls_follow_the_recipe():
    x, w, g = tensors()
    exact = x @ w.T, g @ w, g.T @ x
    for chosen in ('fwd', 'dgrad', 'wgrad', 'dgrad,wgrad'):
        found = through(linear('int8', gemms=tuple(chosen.split(','))).strategy.function.apply, x, w, g)
        followed = [apart(mine, right) > 1e-4 for mine, right in zip(found, exact, strict=True)]
        assert followed == [gemm in chosen.split(',') for gemm in recipes.GEMMS], chosen
