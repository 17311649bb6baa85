import pytest

from configurator import InputError, configure

SCRIPT = '''"""What the script does."""
# output
out_dir = 'out'  # where files go
count = 10  # how many,
# ... in all
rate = 6e-4
product = 5 * 8
flag = False
# model
mode: bool | str = 'auto'
steps: int | None = None  # None: derived
_private = 1
configure(globals())
later = 1
'''


@pytest.fixture
def run(tmp_path):
    (tmp_path / 'script.py').write_text(SCRIPT)

    def run(*argv):
        namespace = dict(__file__=str(tmp_path / 'script.py'), __doc__='What the script does.', out_dir='out', count=10,
                         rate=6e-4, product=40, flag=False, mode='auto', steps=None, _private=1)
        config, given = configure(namespace, list(argv))
        assert all(namespace[k] == v for k, v in config.items())
        return config, given
    return run


@pytest.mark.parametrize('arg, key, value', [
    ('--count=20', 'count', 20), ('--count=1e5', 'count', 100000), ('--count=1_000', 'count', 1000),
    ('--rate=0', 'rate', 0.0), ('--rate=3e-4', 'rate', 3e-4), ('--flag=true', 'flag', True),
    ('--flag=False', 'flag', False), ('--flag=1', 'flag', True), ('--mode=True', 'mode', True),
    ('--mode=auto', 'mode', 'auto'), ('--steps=7', 'steps', 7), ('--steps=None', 'steps', None),
    ('--out_dir=a=b', 'out_dir', 'a=b'), ('--out_dir=12', 'out_dir', '12'), ('--out_dir=True', 'out_dir', 'True'),
    ('--out_dir={[]:1}', 'out_dir', '{[]:1}'),
    ('--out_dir=', 'out_dir', ''), ('--out_dir="a\\n"', 'out_dir', 'a\n'),
])
def test_value_from_the_command_line(run, arg, key, value):
    config, given = run(arg)
    assert config[key] == value and type(config[key]) is type(value)
    assert given == [key]


@pytest.mark.parametrize('arg, message', [
    ('--conut=1', "no config key 'conut'; did you mean 'count'"), ('--later=1', 'no config key'),
    ('--_private=2', 'no config key'), ('--count=1.5', 'count must be int, not 1.5'),
    ('--count=true', 'count must be int, not True'), ('--count=many', "count must be int, not 'many'"),
    ('--rate=fast', 'rate must be float'), ('--flag=maybe', 'flag must be bool'), ('--count', 'write --count=VALUE'),
    ('--steps=x', 'steps must be None or int'), ('nothere.py', "no config file 'nothere.py'"),
])
def test_refused(run, arg, message):
    with pytest.raises(InputError, match=message):
        run(arg)


def test_later_arguments_win(run, tmp_path):
    file = tmp_path / 'c.py'
    file.write_text('import time\nout_dir = "ft-" + str(int(time.time() * 0))\ncount = 10\nrate = count * 2\n_x = 5\n')
    config, given = run(str(file), '--rate=1')
    assert (config['out_dir'], config['rate']) == ('ft-0', 1.0)
    assert given == ['out_dir', 'count', 'rate']  # count too, although the file sets it to its default
    config, given = run('--rate=1', str(file))
    assert config['rate'] == 20.0 and given[-1] == 'rate'


@pytest.mark.parametrize('content, message', [
    ('conut = 3', 'did you mean'), ('count = "3"', "count must be int, not '3'"), ('count = [3]', 'count must be int'),
    ('count = 3\nrate = 1 / 0', 'line 2: ZeroDivisionError'), ('count = = 3', 'line 1: SyntaxError'),
])
def test_config_file_refused(run, tmp_path, content, message):
    file = tmp_path / 'c.py'
    file.write_text(content)
    with pytest.raises(InputError, match=message):
        run(str(file))


def test_help_lists_every_key_with_default_and_comment(run, capsys):
    with pytest.raises(SystemExit) as stop:
        run('--help')
    text = ' '.join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "output out_dir = 'out' where files go count = 10 how many, in all rate = 0.0006" in text
    assert "model mode = 'auto' steps = None None: derived" in text and '_private' not in text and 'later' not in text
