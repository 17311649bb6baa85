import copy
import re
from dataclasses import replace

import pytest
import torch
from test_peft_files import adapter, base, logits

from configurator import InputError
from model import GPT
from sologpt.adapters.adapter import parts, put_adapter
from sologpt.adapters.base import check_base, fingerprint, load_base
from sologpt.adapters.config import AdapterConfig
from sologpt.files.checkpoint import save_checkpoint
from sologpt.matmuls.nf4 import NF4Linear


def test_the_fingerprint_is_of_every_weight_and_of_nothing_else():
    model = base()
    first = fingerprint(model)
    assert fingerprint(copy.deepcopy(model).requires_grad_(False).train()) == first == fingerprint(base())
    for p in model.parameters():
        with torch.no_grad():
            value = p.flatten()[-1].clone()
            p.view(-1)[-1] += 1e-3
            assert fingerprint(model) != first
            p.view(-1)[-1] = value
    assert fingerprint(model) == first != fingerprint(base(n_layer=1))
    for held in (model.bfloat16(), copy.deepcopy(model).float()):
        assert fingerprint(held) == fingerprint(model) != first


def test_another_base_is_refused(hf, tmp_path):
    model = base(1)
    made = replace(adapter('lora', model=copy.deepcopy(model)), base=str(tmp_path))
    state = {'model': model.state_dict(), 'model_args': model.config.to_save(), 'iter_num': 0}
    save_checkpoint(str(tmp_path), state, best=False)
    found, _ = load_base([made])
    assert torch.equal(logits(found.eval()), logits(model)) and fingerprint(found) == made.base_hash
    for source, refused in ((hf, True), (str(tmp_path), False)):
        for one in (made, replace(made, base_hash='')):
            if refused and one.base_hash:
                with pytest.raises(InputError, match=f'another base than {re.escape(hf)}.*{made.base_hash[:12]}'):
                    load_base([made], source)
            else:
                load_base([one], source)
    save_checkpoint(str(tmp_path), state | {'model': base(2).state_dict()}, best=False)
    with pytest.raises(InputError, match='another base'):
        load_base([replace(made, base_hash=''), made])
    save_checkpoint(str(tmp_path), state | {'model': base(2).state_dict(), 'merged_from': made.base_hash}, best=False)
    assert load_base([made], or_merged=True)[1]['merged_from'] == made.base_hash
    for one, either in ((made, False), (replace(made, config=AdapterConfig('dora')), True)):
        with pytest.raises(InputError, match='another base|a dora needs the rows'):
            load_base([one], or_merged=either)
    with pytest.raises(InputError, match='another base'):
        check_base(made, fingerprint(base(2)), 'it')
    with pytest.raises(InputError, match='init_from'):
        load_base([replace(made, base='')])


def test_the_base_is_held_as_it_was_in_training(hf):
    made = replace(adapter('lora', model=GPT.from_pretrained(hf)), base=hf, base_format='nf4')
    model, _ = load_base([made])
    put_adapter(model, made, 'it')
    assert parts(model) and all(isinstance(part.base, NF4Linear) for _, part in parts(model))
    with pytest.raises(InputError, match='in nf4, another for one in float32'):
        load_base([made, replace(made, base_format='float32')])
