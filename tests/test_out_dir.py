import json
import os
import re
import signal
import subprocess

import filelock
import pytest
from conftest import TINY, options

from configurator import InputError
from sologpt.training.out_dir import OutDir


def test_a_second_run_is_refused_and_told_who_owns_the_folder(project):
    endless = options(TINY | dict(max_iters=10 ** 6, eval_interval=10 ** 6))
    first = subprocess.Popen(project.command('train.py', *endless), stdout=subprocess.PIPE, text=True,
                             cwd=project.folder)
    try:
        for line in first.stdout:
            if line.startswith('iter 2:'):
                break
        before = {p.name: p.read_bytes() for p in (project.folder / 'out').iterdir() if p.name != 'log.jsonl'}
        for more in ([], ['--init_from=resume']):
            second = project.run('train.py', *options(TINY), *more)
            assert second.returncode == 2 and 'Traceback' not in second.stderr
            expected = rf"error: out_dir='out' belongs to a run that goes on \(process {first.pid} on \S+, since .*\)"
            assert re.search(expected, second.stderr) or more and 'no checkpoint' in second.stderr
        after = {p.name: p.read_bytes() for p in (project.folder / 'out').iterdir() if p.name != 'log.jsonl'}
        assert before == after and not list((project.folder / 'out').glob('*.old'))
        first.send_signal(signal.SIGKILL)  # however it ends, the folder is free then
    finally:
        first.kill()
        first.communicate()
    assert project.run('train.py', *options(TINY)).returncode == 0
    assert sorted(os.listdir('out')) == ['best.pt', 'ckpt.pt', 'log.jsonl', 'log.jsonl.old']


def test_a_folder_that_was_made_for_nothing_goes(tmp_path):
    path = str(tmp_path / 'new' / 'out')
    folder = OutDir(path)
    with open(os.path.join(path, '.run.json'), encoding='utf-8') as f:
        assert json.load(f)['pid'] == os.getpid()
    folder.release()
    folder.release()  # nothing is left to do
    assert not os.path.exists(path)


def test_what_an_earlier_run_left_is_set_aside(tmp_path):
    (tmp_path / 'ckpt.pt').write_text('one')
    (tmp_path / 'notes.txt').write_text('mine')
    folder = OutDir(str(tmp_path))
    assert folder.set_aside() == ['ckpt.pt']
    folder.release()
    assert sorted(os.listdir(tmp_path)) == ['ckpt.pt.old', 'notes.txt']


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match='cannot be written'):
        OutDir(str(tmp_path / 'file' / 'out'))


def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch, capsys):
    def acquire(*_, **__):
        raise NotImplementedError
    monkeypatch.setattr(filelock.BaseFileLock, 'acquire', acquire)
    OutDir(str(tmp_path / 'out')).release()
    assert 'has no locks' in capsys.readouterr().out
