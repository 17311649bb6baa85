import json
import os
import pathlib

import pytest
import torch
from test_tokenizer_hf import bytes_bpe, write_folder

from configurator import InputError
from sologpt.files import models
from sologpt.files.companions import COMPANIONS, TEMPLATES, chat_template, read_companions, write_companions


def fill(folder):
    """All files of a model's folder, with bytes that are no text. Returns name -> bytes of those that come along."""
    (folder / TEMPLATES).mkdir(parents=True)
    expected = {name: bytes([i, 255, 13, 10, 0]) * i for i, name in enumerate(COMPANIONS)}  # the first one is empty
    expected[f'{TEMPLATES}/tool_use.jinja'] = b'{{ tools }}'
    for name, content in (expected | {'README.md': b'x', 'model.safetensors': b'x', 'x.jinja': b'x', 'LICENSE': b'x',
                                      f'{TEMPLATES}/x.txt': b'x', f'{TEMPLATES}/.x.jinja': b'x'}).items():
        (folder / name).write_bytes(content)
    return expected


def test_files_come_back_byte_for_byte_through_a_checkpoint(tmp_path):
    expected = fill(tmp_path / 'model')
    torch.save({'hf_files': read_companions(str(tmp_path / 'model'))}, tmp_path / 'ckpt.pt')
    companions = torch.load(tmp_path / 'ckpt.pt', weights_only=True, mmap=True)['hf_files']
    assert all(content.dtype == torch.uint8 for content in companions.values())
    write_companions(str(tmp_path / 'again'), companions)
    found = {str(path.relative_to(tmp_path / 'again')): path.read_bytes()
             for path in pathlib.Path(tmp_path, 'again').rglob('*') if path.is_file()}
    assert found == expected and read_companions(str(tmp_path)) == {}


@pytest.mark.parametrize('name', ['../config.json', '/tmp/config.json', 'model.py', f'{TEMPLATES}/../x.jinja',
                                  f'{TEMPLATES}/a/b.jinja', f'{TEMPLATES}/..jinja', ''])
def test_nothing_else_is_written(tmp_path, name):
    """A checkpoint of others may name any file."""
    with pytest.raises(InputError, match='no file that comes along with a model'):
        write_companions(str(tmp_path), {name: torch.zeros(1, dtype=torch.uint8)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('settings, jinja, expected', [
    ({}, None, None), ({'chat_template': 'a'}, None, 'a'), ({'chat_template': 'a'}, 'é\n', 'é\n'), ({}, 'b', 'b'),
    ({'chat_template': [{'name': 'rag', 'template': 'r'}, {'name': 'default', 'template': 'd'}]}, None, 'd'),
    ({'chat_template': [{'name': 'rag', 'template': 'r'}]}, None, None)])
def test_the_chat_template_is_that_of_transformers(tmp_path, settings, jinja, expected):
    transformers = pytest.importorskip('transformers')
    folder = write_folder(tmp_path, bytes_bpe(True), settings)
    if jinja is not None:
        (tmp_path / 'chat_template.jinja').write_text(jinja, encoding='utf-8')
    theirs = transformers.AutoTokenizer.from_pretrained(folder).chat_template
    assert chat_template(read_companions(folder)) == expected
    assert (theirs.get('default') if isinstance(theirs, dict) else theirs) == expected


@pytest.mark.parametrize('content', ['{', '[]', '{"chat_template": 3}', '{"chat_template": [{"name": "default"}]}'])
def test_a_damaged_template_is_said(tmp_path, content):
    (tmp_path / 'tokenizer_config.json').write_text(content)
    with pytest.raises(InputError, match='tokenizer_config.json of the model is damaged'):
        chat_template(read_companions(str(tmp_path)))
    assert chat_template({}) is None


@pytest.mark.parametrize('family, vocab_size, n_ids', [
    ('llama', 600, 503), ('mistral', 503, 503), ('qwen2', 600, 503), ('qwen3', 400, 400), ('gpt2', 600, None)])
def test_a_model_brings_its_files_and_the_number_of_its_ids(tmp_path, monkeypatch, family, vocab_size, n_ids):
    folder = write_folder(tmp_path, bytes_bpe(True))
    monkeypatch.setattr(models, 'read_hf_model', lambda source: ({'vocab_size': vocab_size}, {}, family, source))
    model_args, _, saved = models.read_model(folder)
    assert model_args.get('n_ids') == n_ids and saved['tokenizer']['bos'] == 500
    if n_ids is None:
        assert saved.keys() == {'tokenizer'}
    else:
        assert {name: content.numpy().tobytes() for name, content in saved['hf_files'].items()} == {
            name: (tmp_path / name).read_bytes() for name in os.listdir(folder)}
        os.remove(tmp_path / 'tokenizer.json')  # then nothing says which ids there are
        model_args, _, saved = models.read_model(folder)
        assert model_args['n_ids'] == vocab_size and saved['tokenizer']['kind'] == 'unknown'


def test_the_files_that_a_repository_has_are_downloaded(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    from sologpt.files.safetensors_files import _find_on_hub
    (tmp_path / 'config.json').write_text(json.dumps({}))
    asked = []

    def get(repository, file):
        asked.append(file)
        if (tmp_path / file).exists():
            return str(tmp_path / file)
        raise (LocalEntryNotFoundError if error == 'offline' else EntryNotFoundError)(file)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', get)
    error = 'absent'
    assert _find_on_hub('owner/name')('config.json') == str(tmp_path / 'config.json')
    assert asked == [*COMPANIONS, 'config.json']
    asked.clear()
    error = 'offline'  # each further file would be waited for
    _find_on_hub('owner/name')
    assert asked == list(COMPANIONS[:2])
    asked.clear()
    _find_on_hub('gpt2')
    assert not asked
