import numpy as np
import pytest
import torch
from conftest import write_tokens

from configurator import InputError
from sologpt.tokens import data_folder
from sologpt.tokens.loader import Tokens, TrainBatches, eval_batches

CPU = torch.device('cpu')


def tokens(folder, lengths, block_size, **meta):
    """Shards whose token at position p of the whole is p, so that a window shows where it lies."""
    start = 0
    folder.mkdir(exist_ok=True)
    for i, n in enumerate(lengths):
        np.arange(start, start + n).astype('<u2').tofile(folder / f'train_{i:03d}.bin')
        start += n
    return Tokens(str(folder), 'train', {'vocab_size': start, 'dtype': 'uint16'} | meta, block_size)


@pytest.mark.parametrize('lengths', [[1003], [500, 7, 300, 17]])
def test_an_epoch_draws_every_window_once(tmp_path, lengths):
    t = tokens(tmp_path, lengths, block_size=10)
    batches = TrainBatches(t, batch_size=1, micro_steps=1, seed=3)
    epochs = []
    for epoch in range(3):
        rows = [batches.get(epoch * t.n_windows + i, 0, CPU) for i in range(t.n_windows)]
        starts = [int(x[0, 0]) for x, _ in rows]
        for x, y in rows:
            assert torch.equal(x[0], torch.arange(10) + x[0, 0]) and torch.equal(y[0], x[0] + 1)
        gaps = np.diff(sorted(starts))
        assert (gaps >= 10).all()  # no token twice
        assert t.n_windows * 10 >= sum(max(0, n - 20) for n in lengths)  # and hardly one left out
        edges = np.cumsum([0, *lengths])
        assert all(np.searchsorted(edges, s, 'right') == np.searchsorted(edges, s + 10, 'right') for s in starts)
        epochs.append(starts)
    assert epochs[0] != epochs[1] and sorted(epochs[0]) != sorted(epochs[1])  # another order and another offset


def test_a_batch_follows_from_seed_and_step(tmp_path):
    t = tokens(tmp_path, [5000], block_size=8)
    a, b = TrainBatches(t, 4, 2, seed=1), TrainBatches(t, 4, 2, seed=1)
    for step in range(500):
        a.get(step, 1, CPU)
    late = a.get(500, 1, CPU)[0]
    assert torch.equal(late, b.get(500, 1, CPU)[0])
    assert not torch.equal(late, TrainBatches(t, 4, 2, seed=2).get(500, 1, CPU)[0])


def test_processes_share_a_step(tmp_path):
    t = tokens(tmp_path, [5000], block_size=8)
    one = TrainBatches(t, 4, micro_steps=4, seed=1)
    two = [TrainBatches(t, 4, micro_steps=2, seed=1, rank=r, world_size=2) for r in (0, 1)]
    for step in (0, 38, 77):  # an epoch is 623 windows, just under 39 steps of 16: the later ones cross its end
        together = torch.cat([one.get(step, m, CPU)[0] for m in range(4)])
        divided = torch.cat([b.get(step, m, CPU)[0] for m in range(2) for b in two])
        assert torch.equal(together, divided)
    assert one.epoch(78) == two[0].epoch(78) == 78 * 16 / t.n_windows


@pytest.mark.parametrize('processes', [1, 3])
def test_every_window_once_over_shards_and_processes(tmp_path, processes):
    t = tokens(tmp_path, [700, 8, 300, 450, 21], block_size=10)
    batches = [TrainBatches(t, 2, micro_steps=3, seed=5, rank=r, world_size=processes) for r in range(processes)]
    starts = []
    for step in range(-(-t.n_windows // (6 * processes))):
        for micro_step in range(3):
            starts += [int(s) for b in batches for s in b.get(step, micro_step, CPU)[0][:, 0]]
    first_epoch = starts[:t.n_windows]
    assert len(set(first_epoch)) == t.n_windows and (np.diff(sorted(first_epoch)) >= 10).all()


def test_files_that_meta_json_does_not_count_yet(tmp_path):
    with pytest.raises(InputError, match='140 tokens but meta.json says 100'):
        tokens(tmp_path, [50, 50, 40], block_size=10, tokens={'train': 100})
    (tmp_path / 'progress.json').write_text('{}')
    t = tokens(tmp_path, [50, 50, 40], block_size=10, tokens={'train': 100})
    assert t.n_tokens == 100 and len(t.paths) == 2 and t.n_windows == 8
    t = tokens(tmp_path, [50, 50, 40], block_size=10, tokens={'train': 75})
    assert t.lengths == [50, 25] and t.n_windows == 5
    with pytest.raises(InputError, match='140 tokens but meta.json says 150'):
        tokens(tmp_path, [50, 50, 40], block_size=10, tokens={'train': 150})


def test_batches_asked_for_in_any_order(tmp_path):
    """A thread reads the next one ahead, which may not be what is asked for then."""
    t = tokens(tmp_path, [5000], block_size=8)
    b = TrainBatches(t, 4, 2, seed=1)
    steps = [(0, 0), (0, 1), (3, 0), (3, 0), (2, 1), (3, 0), (3, 1), (0, 0)]
    seen = {}
    for step in steps:
        x, _ = b.get(*step, CPU)
        assert torch.equal(seen.setdefault(step, x), x)
        assert torch.equal(x, TrainBatches(t, 4, 2, seed=1).get(*step, CPU)[0])


def test_evaluation_reads_the_same_and_no_random_state(tmp_path):
    t = tokens(tmp_path, [1000], block_size=10)
    before = torch.get_rng_state()
    first, again = (list(eval_batches(t, 4, 5, CPU)) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert len(first) == 5 and all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    starts = torch.cat([x[:, 0] for x, _ in first])
    assert len(set(starts.tolist())) == 20 and starts.max() > 900  # spread over the whole split
    assert sum(len(x) for x, _ in eval_batches(t, 4, 1000, CPU)) == t.n_windows - t.n_windows % 4


@pytest.mark.parametrize('change, message', [
    (lambda d: (d / 'val.bin').unlink(), 'no val.bin'),
    (lambda d: (d / 'val.bin').write_bytes(b''), 'has 0 tokens but meta.json says 100'),
    (lambda d: (d / 'val.bin').write_bytes(b'abc'), 'not a multiple of 2'),
    (lambda d: (d / 'val.bin').write_bytes(b'ab' * 60), 'run the same preparation again'),
    (lambda d: np.full(100, 300, '<u2').tofile(d / 'val.bin'), 'token id 300, but the vocabulary has 256'),
    (lambda d: None, 'too few for block_size=200'),
])
def test_refused(tmp_path, change, message):
    folder = write_tokens(tmp_path / 'd', range(100), range(100))
    change(folder)
    with pytest.raises(InputError, match=message):
        Tokens(str(folder), 'val', data_folder.read_meta(folder), 200 if 'too few' in message else 10)


def test_empty_file_of_a_folder_without_counts(tmp_path):
    (tmp_path / 'train.bin').write_bytes(b'')
    with pytest.raises(InputError, match='has 0 tokens, too few'):
        Tokens(str(tmp_path), 'train', data_folder.read_meta(tmp_path), 10)


def test_an_id_too_large_is_seen_in_large_data_too(tmp_path, monkeypatch):
    folder = write_tokens(tmp_path / 'd', [1] * 99 + [999], [1] * 50)
    monkeypatch.setattr(Tokens, '_check_ids', lambda self: None)
    t = Tokens(str(folder), 'train', data_folder.read_meta(folder), 99)
    with pytest.raises(InputError, match='token id 999'):
        TrainBatches(t, 1, 1, 0).get(0, 0, CPU)
