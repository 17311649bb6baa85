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
learning_rate = 0.1
steps: int | None = None  # None: derived
_private = 1
configure(globals())
later = 1
'''


@pytest.fixture
def run(tmp_path):
    (tmp_path / 'script.py').write_text(SCRIPT)

    def run(*argv, **options):
        namespace = dict(__file__=str(tmp_path / 'script.py'), __doc__='What the script does.', out_dir='out', count=10,
                         rate=6e-4, product=40, flag=False, mode='auto', learning_rate=0.1, steps=None, _private=1)
        config, given = configure(namespace, list(argv), **options)
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
    ('--flag', 'flag', True), ('--mode', 'mode', True),
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
    ('--flog', "no config key 'flog'; did you mean 'flag'"),
    ('--lr=1', "no config key 'lr'; did you mean 'learning_rate'"), ('--wd=1', "no config key 'wd'; --help lists"),
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


def test_former_keys_are_refused_with_what_to_write_now(run, tmp_path):
    former = {'speed': "write rate='fast'"}
    file = tmp_path / 'c.py'
    file.write_text('speed = 3')
    for argument in ('--speed=3', '--speed', str(file)):
        with pytest.raises(InputError, match="there is no config key 'speed' any more; write rate='fast'"):
            run(argument, former=former)
    with pytest.raises(InputError, match="no config key 'sped'; --help"):
        run('--sped=3', former=former)


def test_files_are_taken_from_between_the_options(run, tmp_path):
    file = tmp_path / 'c.py'
    file.write_text('count = 3')
    files = []
    config, given = run(str(file), '--count=4', 'b*.txt', '--flag', '-x', files=files)
    assert files == [str(file), 'b*.txt', '-x'] and given == ['count', 'flag'] and config['count'] == 4


def test_arguments_for_another_script_are_passed_on(run):
    others = []
    config, given = run('c.py', '--count=4', '--other=1', '--flag', '--more', pass_on=others)
    assert others == ['c.py', '--other=1', '--more'] and given == ['count', 'flag']


def test_a_value_of_numpy_in_a_config_file(run, tmp_path):
    file = tmp_path / 'c.py'
    file.write_text('import numpy\nrate = numpy.float64(0.5)\ncount = numpy.float64(3)')
    config, _ = run(str(file))
    assert config['rate'] == 0.5 and config['count'] == 3 and type(config['count']) is int


def test_help_lists_every_key_with_default_and_comment(run, capsys):
    with pytest.raises(SystemExit) as stop:
        run('--help')
    text = ' '.join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "output out_dir = 'out' where files go count = 10 how many, in all rate = 0.0006" in text
    assert "model mode = 'auto' learning_rate = 0.1 steps = None None: derived" in text
    assert '_private' not in text and 'later' not in text


def test_help_of_a_script_without_keys_is_its_docstring(tmp_path, capsys):
    (tmp_path / 'script.py').write_text('"""Does one thing."""\nconfigure(globals())\n')
    with pytest.raises(SystemExit):
        configure(dict(__file__=str(tmp_path / 'script.py'), __doc__='Does one thing.'), ['-h'])
    assert capsys.readouterr().out == 'Does one thing.\n'
    with pytest.raises(InputError, match="no config key 'x'; this script has no keys"):
        configure(dict(__file__=str(tmp_path / 'script.py')), ['--x=1'])
