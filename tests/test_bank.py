
import pytest
import torch
import torch._dynamo.testing
from test_adapters import IDX, KINDS, adapted, base

from configurator import InputError
from sologpt.adapters.adapter import merge, parts
from sologpt.adapters.bank import Bank

ADAPTERS = [('lora', dict(r=4, seed=1)), ('lora', dict(r=2, seed=2, target_modules=['attn.c_attn', 'mlp.c_fc'])),
            ('vera', dict(r=6, seed=3)), ('lora', dict(r=3, seed=4, use_rslora=True))]


def low_rank(kind, method, options):
    return {name: part.low_rank() for name, part in parts(adapted(base(**kind), method, **options))}


def alone(kind, number, idx):
    """The text of one row by a model into which its adapter is merged; number 0: by the base."""
    m = base(**kind)
    if number:
        method, options = ADAPTERS[number - 1]
        merge(adapted(m, method, **options))
    return m.generate(idx, 20, temperature=0)


@pytest.mark.parametrize('kind', KINDS[1:])
def test_rows_of_a_batch_are_continued_as_by_their_adapter_alone(kind):
    m = base(**kind)
    former = [(p, p.data_ptr(), p.clone()) for p in m.parameters()]
    bank = Bank(m, [low_rank(kind, *adapter) for adapter in (ADAPTERS[0], ADAPTERS[3], ADAPTERS[2])], torch.float32)
    prompts = torch.arange(5)[:, None] * 3 + torch.arange(4)

    def assert_continued(slots, numbers):
        bank.select(slots)
        texts = m.generate(prompts, 20, temperature=0)
        for row, number, prompt in zip(texts, numbers, prompts, strict=True):
            assert torch.equal(row, alone(kind, number, prompt[None])[0])
        return texts
    first = assert_continued([1, 0, 2, 3, 1], [1, 0, 4, 3, 1])
    bank.load(2, low_rank(kind, *ADAPTERS[1]))  # of a lower rank, and for fewer Linears
    second = assert_continued([2, 2, 0, 3, 1], [2, 2, 0, 3, 1])
    assert not torch.equal(first[2], second[2])
    assert all(p.data_ptr() == where and torch.equal(p, value) for p, where, value in former)


def test_adapters_are_changed_without_compiling_again():
    m, idx = base(), IDX[:2]
    bank = Bank(m, [low_rank({}, *adapter) for adapter in ADAPTERS[:2]], torch.float32)
    bank.select([1, 2])
    where, counter = {part.A.data_ptr() for part in bank.parts.values()}, torch._dynamo.testing.CompileCounter()
    compiled, seen = torch.compile(m.hidden, backend=counter, fullgraph=True), []
    with torch.no_grad():
        for change in (lambda: None, lambda: bank.load(1, low_rank({}, *ADAPTERS[3])), lambda: None):
            change()
            bank.select([1, 2] if len(seen) < 2 else [0, 1])
            seen.append(compiled(idx))
            torch.testing.assert_close(seen[-1], m.hidden(idx))
    assert {part.A.data_ptr() for part in bank.parts.values()} == where
    assert counter.frame_count == 1 and not torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1]) and torch.equal(seen[2][0], base().hidden(idx)[0])


def test_a_bank_refuses_what_it_has_no_room_for():
    held = low_rank({}, *ADAPTERS[1])
    bank = Bank(base(), [held], torch.float32)
    with pytest.raises(InputError, match='transformer.h.0.attn.c_proj'):
        bank.load(1, low_rank({}, 'lora', dict(r=2)))
    with pytest.raises(InputError, match='rank 4 at .*c_attn, but the bank has room for 2'):
        bank.load(1, low_rank({}, 'lora', dict(r=4, target_modules=['attn.c_attn', 'mlp.c_fc'])))
    for name, (A, _) in held.items():  # what was refused has changed nothing
        assert torch.equal(bank.parts[name].slots_A[1].mT, A)
