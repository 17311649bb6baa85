import numpy as np
import pytest
import torch
from conftest import options, write_tokens

from configurator import InputError
from model import GPT
from sologpt.adapters.adapter import put_adapter
from sologpt.adapters.base import load_base
from sologpt.adapters.peft_files import read_adapter
from sologpt.files.checkpoint import read_checkpoint


@pytest.fixture
def tuned(project):
    """A project with a base and three low-rank adapters, a dora and a bottleneck, trained on other bytes than it."""
    ids = np.arange(3000) * 11 % 40 + 60
    write_tokens(project.folder / 'data' / 'new', ids[:2500], ids[2500:])
    project.train(out_dir='base', max_iters=10)
    for name, method, more in (('a', 'lora', {}), ('b', 'lora', dict(seed=1)), ('v', 'vera', {}), ('d', 'dora', {}),
                               ('q', 'lora', dict(base_format='nf4')), ('w', 'bottleneck', {})):
        project.train(out_dir=name, adapter=method, adapter_r=3, init_from='base', dataset='new', learning_rate=0.1,
                      max_iters=4, **more)
    project.export = lambda **keys: project._in_process('export.py', options(keys))[1]
    return project


IDS = torch.randint(60, 100, (2, 16), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS, IDS)[0]


def with_adapter(*folders):
    """Logits of the base with an adapter as it was trained, or the base alone."""
    loaded = [read_adapter(folder) for folder in folders]
    model = load_base(loaded)[0] if folders else GPT.from_checkpoint('base')[0]
    for adapter, folder in zip(loaded, folders, strict=True):
        put_adapter(model, adapter, folder)
    return logits(model)


@pytest.mark.parametrize('name', ['a', 'v', 'd', 'q'])
def test_merged(tuned, name):
    out = tuned.export(to='merged', adapters=name, dest='merged')
    model, saved = GPT.from_checkpoint('merged')
    torch.testing.assert_close(logits(model), with_adapter(name), atol=1e-5, rtol=1e-5)
    assert f'{model.n_params():,} parameters' in out and (with_adapter(name) - with_adapter()).abs().max() > 0.1
    greedy = dict(start='FMT', temperature=0)
    assert tuned.sample(out_dir='merged', **greedy) == tuned.sample(adapter=name, init_from='base', **greedy)
    # it is a base as others are
    tuned.train(init_from='merged', dataset='new', max_iters=1, out_dir='further')
    tuned.train(init_from='merged', dataset='new', max_iters=1, adapter='lora', out_dir='beside')
    assert len(tuned.sample(out_dir='beside', **greedy)) > 20
    with pytest.raises(InputError, match='another base than merged'):
        tuned.sample(adapter=name, out_dir='merged')
    tuned.export(to='merged', adapters=name, dest='half', dtype='bfloat16')
    assert all(w.dtype == torch.bfloat16 for w in read_checkpoint('half/ckpt.pt')['model'].values())


def test_added_and_subtracted(tuned):
    tuned.export(to='merged', adapters='a,v', weights='1,0.5', dest='both')
    tuned.export(to='merged', adapters='v', weights='-0.5', out_dir='both', dest='a-alone')
    torch.testing.assert_close(logits(GPT.from_checkpoint('a-alone')[0]), with_adapter('a'), atol=1e-5, rtol=1e-5)
    tuned.export(to='merged', adapters='q', dest='q-merged')  # into NF4's decoded weights, which stay as they are
    tuned.export(to='merged', adapters='q', weights='-1', out_dir='q-merged', dest='q-base')
    q_base = load_base([read_adapter('q')])[0]
    torch.testing.assert_close(logits(GPT.from_checkpoint('q-base')[0]), logits(q_base), atol=1e-5, rtol=1e-5)
    tuned.export(to='peft', adapters='a,v,b', weights='1,0.5,-2', dest='stacked')
    tuned.export(to='merged', adapters='a,v,b', weights='1,0.5,-2', dest='merged')
    stacked, merged = with_adapter('stacked'), logits(GPT.from_checkpoint('merged')[0])
    torch.testing.assert_close(stacked, merged, atol=1e-5, rtol=1e-5)
    assert read_adapter('stacked').config.r == 9
    tuned.train(init_from='base', adapter_from='stacked', dataset='new', max_iters=1, out_dir='further')
    tuned.export(to='peft', adapters='d', dest='d-again')
    assert torch.equal(with_adapter('d-again'), with_adapter('d'))


@pytest.mark.parametrize('method', ['prompt', 'prefix'])
def test_virtual_tokens(tuned, method):
    tuned.train(out_dir='p', adapter=method, adapter_r=3, init_from='base', dataset='new', block_size=12, max_iters=2)
    assert f'{method}, 3 virtual tokens' in tuned.export(to='peft', adapters='p', dest='again')
    found, expected = (read_adapter(folder) for folder in ('again', 'p'))
    assert found.config == expected.config and found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in found.tensors.items())
    for keys in (dict(to='merged', adapters='p'), dict(to='merged', adapters='a,p'), dict(to='merged', adapters='p,a'),
                 dict(to='peft', adapters='a,p', weights='1,1')):
        with pytest.raises(InputError, match='virtual tokens'):
            tuned.export(dest='dest', **keys)


def test_what_cannot_be_exported(tuned):
    tuned.train(out_dir='other', max_iters=1, seed=5)
    tuned.export(to='peft', adapters='a', dest='only')
    for keys, message in (
            (dict(to='exe'), "to='exe' is not known"), (dict(adapters=''), 'adapters is empty'),
            (dict(dest=''), 'dest is empty'), (dict(weights='1,2'), 'has 2 of them, and adapters 1'),
            (dict(weights='x'), 'must be numbers'),
            (dict(weights='nan'), 'must be numbers'), (dict(dtype='int8'), "dtype='int8' is not known"),
            (dict(dest='base'), 'dest=base is there already'), (dict(to='peft', dest='only'), 'dest=only is there'),
            (dict(dest='base/ckpt.pt'), 'dest=base/ckpt.pt is there already'),
            (dict(adapters='nothere'), "no folder 'nothere'"), (dict(adapters='a, '), "no folder ''"),
            (dict(adapters='base'), 'base is no adapter'),
            (dict(adapters='w'), 'bottleneck is not linear: it cannot be merged'),
            (dict(adapters='d', weights='-1'), 'd is a dora, which is no sum'),
            (dict(adapters='a,q'), 'in float32, another'),
            (dict(to='peft', adapters='a,d'), 'dora is no product of two small matrices'),
            (dict(out_dir='other'), 'another base than other')):
        with pytest.raises(InputError, match=message):
            tuned.export(**dict(to='merged', adapters='a', dest='dest') | keys)
        assert not (tuned.folder / 'dest').exists()
