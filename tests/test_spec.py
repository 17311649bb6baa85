import pytest

from configurator import InputError
from sologpt.matmuls.recipes import GEMMS, NAMES, RECIPES
from sologpt.matmuls.spec import MatmulSpec, former_matmul, options_of, parse_matmul


@pytest.mark.parametrize('text, spec', [
    ('int8', MatmulSpec('int8')),
    ('mxfp4:gemms=dgrad+wgrad', MatmulSpec('mxfp4', gemms=('dgrad', 'wgrad'))),
    ('nvfp4:keep_last=2', MatmulSpec('nvfp4', keep_last=2)),
    ('sparse24:until=0.5', MatmulSpec('sparse24', until=0.5)),
    ('fp8:fast_accum=False', MatmulSpec('fp8', fast_accum=False)),
    ('int8:gemms=fwd,keep_last=0,until=1.0', MatmulSpec('int8', gemms=('fwd',), keep_last=0, until=1.0)),
    ('strassen:2', MatmulSpec('strassen', levels=2)),
    ('strassen:2,keep_last=1', MatmulSpec('strassen', levels=2, keep_last=1)),
    ('block_dropout:0.2,size=64', MatmulSpec('block_dropout', rate=0.2, size=64))])
def test_a_text_is_a_spec_and_the_spec_that_text(text, spec):
    assert parse_matmul(text) == spec and str(spec) == text


@pytest.mark.parametrize('text, shortest', [
    ('strassen:levels=3', 'strassen:3'), ('block_dropout:size=64,rate=0.3', 'block_dropout:0.3,size=64'),
    ('block_dropout:0.1', 'block_dropout'), ('int8: keep_last = 1', 'int8:keep_last=1'),
    ('int8:gemms=wgrad+fwd', 'int8:gemms=fwd+wgrad'), ('fp8:fast_accum=false', 'fp8:fast_accum=False'),
    ('int8:gemms=wgrad+dgrad+fwd', 'int8')])
def test_other_ways_to_write_it(text, shortest):
    assert str(parse_matmul(text)) == shortest


def test_no_text_is_no_spec():
    assert parse_matmul('') is None


@pytest.mark.parametrize('text, message', [
    ('int9', "matmul='int9' is not known: use int8, or another of fp8,"),
    ('int9:levels=2', "matmul='int9' is not known"),
    ('int8:levels=2', "int8 has no option 'levels'; it takes gemms, keep_last, until"),
    ('strassen:rate=2', "strassen has no option 'rate'; it takes levels, keep_last, until"),
    ('mxfp8:fast_accum=False', "mxfp8 has no option 'fast_accum'"),
    ('int8:2', "'2' must be OPTION=VALUE; int8 takes gemms, keep_last, until"),
    ('int8:', "'' must be OPTION=VALUE"),
    ('strassen:keep_last=1,2', "'2' must be OPTION=VALUE; strassen takes levels"),
    ('strassen:', "levels='' must be a whole number"),
    ('strassen:2,levels=3', 'gives levels twice'), ('int8:until=0.5,until=0.6', 'gives until twice'),
    ('int8:keep_last=x', "keep_last='x' must be a whole number"), ('int8:until=x', "until='x' must be a number"),
    ('fp8:fast_accum=2', "fast_accum='2' must be True or False"),
    ('int8:gemms=all', 'gemms=all must be some of fwd+dgrad+wgrad'), ('int8:gemms=', 'must be some of fwd+dgrad+wgrad'),
    ('int8:keep_last=-1', 'keep_last=-1 must be at least 0'), ('int8:until=1.5', 'until=1.5 must be from 0 to 1'),
    ('int8:until=nan', 'until=nan must be from 0 to 1'),
    ('strassen:0', 'levels=0 must be at least 1'), ('block_dropout:1', 'rate=1.0 must be at least 0 and below 1'),
    ('block_dropout:size=0', 'size=0 must be at least 1'),
    ('ternary:gemms=fwd', 'the three matmuls of ternary belong together: leave gemms out'),
    ('strassen:gemms=fwd', 'belong together'), ('fp4_dge:gemms=wgrad', 'belong together'),
    ('ternary:until=0.5', 'ternary weights are the model'),
])
def test_what_cannot_be_is_refused(text, message):
    with pytest.raises(InputError) as e:
        parse_matmul(text)
    assert message in str(e.value)


def test_the_recipes_defaults_are_filled_in():
    assert [(spec.keep_last, spec.until) for spec in (MatmulSpec(name).resolved(12) for name in (
        'int8', 'nvfp4', 'sparse24', 'strassen'))] == [(0, 1.0), (2, 1.0), (0, 0.7), (0, 1.0)]
    for name in NAMES:
        spec = MatmulSpec(name).resolved(12)
        assert parse_matmul(str(spec)) == spec == spec.resolved(12)
        assert 'keep_last=' in str(spec) and 'until=' in str(spec)  # a later default must not change this run
    assert MatmulSpec('nvfp4').resolved(1).keep_last == 0  # a block is left
    assert MatmulSpec('nvfp4', keep_last=3, until=0.4).resolved(4) == MatmulSpec('nvfp4', keep_last=3, until=0.4)
    with pytest.raises(InputError, match='keep_last=4 must be from 0 to 3, so that int8 has blocks left'):
        MatmulSpec('int8', keep_last=4).resolved(4)


def test_which_options_a_recipe_takes():
    for name in ('fp8', 'fp8_row', 'fp8_block', 'int8', 'fp4_dge'):
        assert ('fast_accum' in options_of(name)) == (name in ('fp8', 'fp8_row')), name
    for name in ('fp4_dge', 'ternary', 'sparse24', 'strassen', 'block_dropout'):
        assert 'gemms' not in options_of(name), name
    assert 'gemms' in options_of('int8') and 'gemms' in options_of('mxfp4')
    assert all({'keep_last', 'until'} <= set(options_of(name)) for name in NAMES)
    assert [MatmulSpec(name).recipe for name in NAMES] == [*RECIPES.values(), None, None]
    assert MatmulSpec('int8').gemms == GEMMS


FORMER = {'matmul_gemms': 'fwd,dgrad,wgrad', 'matmul_keep_last': None, 'matmul_until': None, 'block_dropout': 0.1,
          'block_dropout_size': 128, 'strassen_levels': 1, 'fp8_fast_accum': True}


@pytest.mark.parametrize('changed, text', [
    ({'matmul': ''}, ''), ({'matmul': '', 'matmul_until': 0.5}, ''), ({'matmul': 'int8'}, 'int8'),
    ({'matmul': 'int8', 'block_dropout': 0.3, 'strassen_levels': 2, 'fp8_fast_accum': False}, 'int8'),
    ({'matmul': 'fp8', 'fp8_fast_accum': False}, 'fp8:fast_accum=False'),
    ({'matmul': 'mxfp4', 'matmul_gemms': 'dgrad,wgrad'}, 'mxfp4:gemms=dgrad+wgrad'),
    ({'matmul': 'nvfp4', 'matmul_keep_last': 2, 'matmul_until': 1.0}, 'nvfp4:keep_last=2,until=1.0'),
    ({'matmul': 'strassen', 'strassen_levels': 2}, 'strassen:2'),
    ({'matmul': 'block_dropout', 'block_dropout': 0.3, 'block_dropout_size': 64}, 'block_dropout:0.3,size=64')])
def test_keys_of_earlier_configs_become_a_spec(changed, text):
    assert former_matmul(FORMER | changed) == text
    parse_matmul(text)


def test_a_new_config_is_read_as_it_is():
    assert former_matmul({}) == '' and former_matmul({'matmul': 'nvfp4:keep_last=2'}) == 'nvfp4:keep_last=2'
    assert former_matmul(FORMER | {'matmul': 'strassen:2'}) == 'strassen:2'
