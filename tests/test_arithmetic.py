import copy
from dataclasses import replace

import pytest
from test_peft_files import adapter, base, close, loaded_by_peft, logits, logits_with, write

from configurator import InputError
from model import GPT
from sologpt.adapters.adapter import merge, put_adapter
from sologpt.adapters.arithmetic import stack
from sologpt.adapters.base import fingerprint
from sologpt.adapters.peft_files import read_adapter

STACKED = [('lora', dict(r=4, seed=1)), ('lora', dict(r=2, seed=2, target_modules=['attn.c_attn', 'mlp.c_fc'])),
           ('vera', dict(r=3, seed=3)), ('lora', dict(r=3, seed=4, use_rslora=True, rank_pattern={'c_fc': 5})),
           ('lora', dict(r=2, seed=5, target_modules=['c_proj'], layers_to_transform=[1]))]


@pytest.mark.parametrize('numbers, weights', [
    ([0], [-0.5]), ([0, 1], [1.0, 1.0]), ([1, 4], [0.7, -0.3]), ([0, 2, 3], [0.5, 2.0, -1.0]), ([2, 2], [1.0, 0.5])])
def test_a_stack_adds_up_the_changes(numbers, weights, hf, tmp_path):
    model = GPT.from_pretrained(hf).eval()
    adapters = [adapter(STACKED[n][0], model=copy.deepcopy(model), **STACKED[n][1]) for n in numbers]
    stacked = stack(model.config, adapters, weights, ['a'] * len(numbers))
    merged = copy.deepcopy(model)
    for one, weight in zip(adapters, weights, strict=True):
        put_adapter(merged, one, 'a test')
        merge(merged, weight)
    expected = logits(merged)
    assert stacked.config.method == 'lora' and stacked.base_hash == fingerprint(model)
    close(logits_with(stacked, copy.deepcopy(model)), expected)
    write(tmp_path, replace(stacked, base=hf), model.config)
    close(logits_with(read_adapter(tmp_path), copy.deepcopy(model)), expected)
    close(loaded_by_peft(pytest.importorskip('peft'), hf, tmp_path, 'lora'), expected)


@pytest.mark.parametrize('method', ['dora', 'bottleneck', 'prompt', 'prefix'])
def test_what_is_no_sum_cannot_be_stacked(method):
    with pytest.raises(InputError, match='stack|virtual'):
        stack(base().config, [adapter('lora'), adapter(method)], [1, 1], ['a', 'b'])
