import json

import pytest
import torch
from safetensors import safe_open

from configurator import InputError
from model import GPT
from sologpt.files.safetensors_files import read_hf_folder, write_tensors


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_the_library_reads_what_is_written(tmp_path, dtype):
    weights = {'a': torch.randn(3, 5), 'b': torch.randn(7).double(), 'c': torch.randn(4, 6).t(), 'd': torch.tensor(2.5)}
    path = tmp_path / 'model.safetensors'
    write_tensors(str(path), dict.items, weights, dtype, {'base': 'here'})
    with safe_open(path, 'pt') as f:
        assert f.metadata() == {'format': 'pt', 'base': 'here'} and set(f.keys()) == set(weights)
        for name, tensor in weights.items():
            assert torch.equal(f.get_tensor(name), tensor.to(dtype)), name
    assert [file.name for file in tmp_path.iterdir()] == ['model.safetensors']


def test_one_tensor_exists_at_a_time(tmp_path):
    """A conversion is asked for the shapes first, without values, and then for each tensor once."""
    asked = []

    def convert(weights):
        for name, tensor in weights.items():
            asked.append((name, tensor.device.type))
            yield name, tensor * 2
    write_tensors(str(tmp_path / 'x'), convert, {'a': torch.ones(2), 'b': torch.ones(3)}, torch.float32)
    assert asked == [('a', 'meta'), ('b', 'meta'), ('a', 'cpu'), ('b', 'cpu')]


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match='a has numbers beyond 65504'):
        write_tensors(str(tmp_path / 'x'), dict.items, {'a': torch.tensor([1e5])}, torch.float16)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match='could not write'):
        write_tensors(str(tmp_path / 'nothere' / 'x'), dict.items, {'a': torch.ones(2)}, torch.float32)


def test_folder_that_is_no_model(tmp_path):
    with pytest.raises(InputError, match='has no config.json'):
        read_hf_folder(str(tmp_path))
    (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'gpt2'}))
    (tmp_path / 'model.safetensors').write_bytes(b'damaged')
    with pytest.raises(InputError, match='damaged'):
        read_hf_folder(str(tmp_path))


def test_hub_out_of_reach(monkeypatch):
    import huggingface_hub

    def get(repository, file):
        raise ConnectionError(f'{repository} {file}')
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', get)
    with pytest.raises(InputError, match='downloading config.json of openai-community/gpt2-xl failed'):
        GPT.from_pretrained('gpt2-xl')
