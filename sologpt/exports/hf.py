"""
A model for transformers and for software that reads its files, with the tokenizer and a model card. Adapters stay
adapters: each is written as one of peft in a folder of its own beside the model.
"""

import json
import os
from dataclasses import dataclass

from configurator import InputError
from model import GPT
from sologpt.adapters.arithmetic import for_family
from sologpt.adapters.base import fingerprint
from sologpt.adapters.peft_files import write_adapter
from sologpt.exports.source import ExportedModel
from sologpt.files.companions import with_dtype, write_companions
from sologpt.files.families import FAMILIES
from sologpt.files.family import Family
from sologpt.files.hf_models import write_hf_config, write_hf_weights
from sologpt.machine.devices import DTYPES
from sologpt.tokens import tokenizer_files
from sologpt.tokens.tokenizer import Tokenizer


def write_hf(exported: ExportedModel, folder: str, to: str, dest: str, dtype: str, dataset: str) -> str:
    """
    Write a model, its tokenizer, README.md, and the adapters beside it. Returns what they are, in words.

    to: 'hf' or 'opt'. dest: where `folder` will lie, which the adapters name as their base. dtype:
    of the weights. dataset: see find_tokenizer(). Raises InputError.
    """
    config = exported.config
    name = exported.find_family(to)
    family = FAMILIES[name]
    names = [given.name for given in exported.beside]
    if len(set(names)) < len(names):
        folders = ','.join(given.folder for given in exported.beside)
        raise InputError(f'adapters={folders}: each is written to a folder of the same name as its own, and two have '
                         f'one name')
    text = None if exported.kept else exported.find_tokenizer(dataset)
    beside = [for_family(config, given.adapter, family, given.folder) for given in exported.beside]
    if exported.kept:
        write_companions(folder, with_dtype(exported.kept, dtype))
    else:
        write_hf_config(folder, name, config, DTYPES[dtype], text.eot)
        tokenizer_files.write_tokenizer(folder, text, config.block_size)
    # files that come along describe the whole table, others leave its padding out
    rows = config.vocab_size if exported.kept else config.n_ids
    write_hf_weights(folder, name, config, exported.weights, DTYPES[dtype], rows)
    with open(os.path.join(folder, 'README.md'), 'w', encoding='utf-8') as f:
        f.write(ModelCard(exported, family, text, os.path.basename(os.path.abspath(dest)), dtype).to_text())
    # The base of the adapters is now another one. If it has other names or shapes, it is not read here again.
    is_read_again = family.transposed or family.arch == 'llama'
    base_hash = fingerprint(GPT.from_pretrained(folder)) if beside and is_read_again else ''
    words = f'{family.cls} in {dtype}, {rows:,} ids'
    for adapter, own_name in zip(beside, names, strict=True):
        adapter.base, adapter.base_hash, adapter.base_format = dest, base_hash, 'float32'
        write_adapter(os.path.join(folder, own_name), adapter, config, family.transposed)
        words += f'\n{os.path.join(dest, own_name)}: {adapter.config.describe()}'
    return words


@dataclass
class ModelCard:
    """README.md of an exported model: what its checkpoint says. Facts that are not known are left out."""
    exported: ExportedModel
    family: Family
    text: Tokenizer | None  # None: that of the files that came along
    name: str  # of the folder
    dtype: str  # of the weights

    def facts(self) -> dict[str, str | None]:
        """The rows of the table."""
        gpt, saved = self.exported.config, self.exported.saved
        keys, data = saved.get('config', {}), saved.get('data', {})
        began = keys.get('init_from')
        facts = {
            'architecture': f'{self.family.cls}: {gpt.n_layer} layers, {gpt.n_head} heads, {gpt.n_embd} wide, '
                            f'{gpt.block_size} positions, {gpt.activation}; weights in {self.dtype}',
            'tokenizer': f'{self.kind_of_tokenizer()}, {gpt.n_ids:,} ids',
            'began as': began if began not in ('scratch', 'resume') else None,
            'data': ': '.join(filter(None, (data.get('name') or keys.get('dataset'), data.get('source')))),
            'trained on': 'tokens' in saved and f'{saved["tokens"]:,} tokens in {saved["iter_num"]:,} iterations',
            'validation loss': saved.get('best_iter') and f'{saved["best_val_loss"]:.4f} nats per token, at iteration '
                                                          f'{saved["best_iter"]:,}',
            'merged in': ', '.join(saved.get('merged', [])),
            'adapters beside it': ', '.join(given.name for given in self.exported.beside),
        }
        if self.family.activations.get(gpt.activation) == 'xielu':
            facts['activation'] = 'ReLU squared, as xIELU with beta = 0; the optional package `xielu` ignores that beta'
        return facts

    def kind_of_tokenizer(self) -> str:
        kind = self.text.to_dict()['kind'] if self.text else 'json'
        return 'tokenizer.json' if kind == 'json' else kind

    def to_text(self) -> str:
        keys = self.exported.saved.get('config', {})
        of_training = f"""
The config of its training:

```json
{json.dumps(keys, indent=1)}
```
""" if keys else ''
        table = '\n'.join(f'| {key} | {value} |' for key, value in self.facts().items() if value)
        return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [soloGPT]
---
# {self.name}

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({self.name!r})
model = AutoModelForCausalLM.from_pretrained({self.name!r})
ids = tokenizer('The ', return_tensors='pt')
print(tokenizer.decode(model.generate(**ids, max_new_tokens={min(100, self.exported.config.block_size // 2)})[0]))
```
{of_training}"""
