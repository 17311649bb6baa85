"""
The configuration of a script, as in nanoGPT: its keys are the block of commented module globals at its top.

    count = 10  # how many
    rate = 0.5  # how fast
    config, given = configure(globals())

configure() applies config files and --key=value arguments over these defaults, in the order given. A config file is
Python that assigns to the same names. Unlike nanoGPT's configurator, this one is strict. It refuses an unknown name and
suggests the nearest one. It refuses a value of another type, unless the value converts without loss (0 -> 0.0,
1e5 -> 100000, 'true' -> True). A key whose default is None names its type in an annotation (steps: int | None = None).

configure() also decides how bad input ends: an InputError, raised anywhere below, prints as one `error:` line, and the
exit status is 2. There is no traceback.
"""

import ast
import difflib
import io
import os
import shutil
import sys
import textwrap
import tokenize
from dataclasses import dataclass

PLAIN_TYPES = {'bool': bool, 'int': int, 'float': float, 'str': str}  # bool first, because a bool is an int too

# what people write who know another tool: the keys here that they may mean, in the order of preference
SYNONYMS = {
    'lr': ('learning_rate',), 'wd': ('weight_decay',), 'max_grad_norm': ('grad_clip',), 'bs': ('batch_size',),
    'steps': ('max_iters',), 'max_steps': ('max_iters',), 'num_steps': ('max_iters',), 'iters': ('max_iters',),
    'warmup': ('warmup_iters',), 'warmup_steps': ('warmup_iters',), 'grad_accum': ('gradient_accumulation_steps',),
    'layers': ('n_layer',), 'num_layers': ('n_layer',), 'heads': ('n_head',), 'num_heads': ('n_head',),
    'hidden_size': ('n_embd',), 'd_model': ('n_embd',), 'context': ('block_size',), 'context_length': ('block_size',),
    'seq_len': ('block_size',), 'max_seq_len': ('block_size',), 'precision': ('dtype',), 'data': ('dataset',),
    'rank': ('adapter_r',), 'lora_r': ('adapter_r',), 'r': ('adapter_r',), 'wandb': ('wandb_log',),
    'model': ('init_from', 'out_dir'), 'checkpoint': ('init_from', 'out_dir'), 'resume': ('init_from',),
    'prompt': ('start',), 'text': ('start',), 'temp': ('temperature',), 'max_tokens': ('max_new_tokens', 'tokens'),
    'n': ('num_samples',), 'samples': ('num_samples',), 'num_return_sequences': ('num_samples',),
    'output': ('out_dir', 'dest'), 'output_dir': ('out_dir', 'dest'), 'out': ('out_dir', 'dest'), 'format': ('to',),
    'column': ('field',), 'key': ('field',), 'encoding': ('tokenizer',), 'vocab': ('vocab_size',),
    'val_split': ('val', 'val_tokens'), 'overwrite': ('restart',), 'force': ('restart',)}


class InputError(ValueError):
    """What was wrong, where, and what to do about it, in one or two lines."""


def configure(namespace: dict, argv: list[str] | None = None, pass_on: list | None = None, files: list | None = None,
              former: dict[str, str] | None = None) -> tuple[dict, list[str]]:
    """
    Apply the command line to `namespace`, a script's globals().

    Returns (config, given). config: every key with its final value. given: the keys that a config file or the command
    line has set, in that order. A key that can be True may be given without a value: --restart means --restart=True.
    `--help` prints every key with its default and its comment, and exits. Raises InputError.

    argv: the arguments; None: those of this process.
    pass_on: a list that takes the arguments for another script: config files, and keys that this script does not have.
    files: a list that takes every argument that is not --key=value. Without it, these arguments are config files.
    former: key of an earlier version -> what to write now, such as "write optimizer='muon:4'". A former key is refused
    with that advice.
    """
    report_errors()
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        print(_help(namespace.get('__doc__'), _read_keys(namespace['__file__']), config_files=files is None))
        raise SystemExit(0)
    config, given = resolve(namespace['__file__'], argv, pass_on, files, former)
    namespace.update(config)
    return config, given


def resolve(script: str, argv: list[str], pass_on: list | None = None, files: list | None = None,
            former: dict[str, str] | None = None) -> tuple[dict, list[str]]:
    """What configure() would return in `script`, a path, for this command line. Raises InputError."""
    keys = _read_keys(script)
    config = {name: key.default for name, key in keys.items()}
    given = {}  # used as an ordered set
    for arg in argv:
        is_option = arg.startswith('--')
        key, equals, text = arg[2:].partition('=')
        if pass_on is not None and not (is_option and key in keys):
            pass_on.append(arg)
            continue
        if not is_option and files is not None:
            files.append(arg)
            continue
        if not is_option:
            overrides, source = _run_config_file(arg, config), arg
        elif equals:
            overrides, source = {key: text}, 'command line'
        else:
            overrides, source = _option_without_value(key, keys, former), 'command line'
        apply(config, keys, overrides, source, from_text=is_option, former=former)
        given = {k: None for k in given if k not in overrides} | dict.fromkeys(overrides)
    return config, list(given)


def report_errors() -> None:
    """From here on, an InputError ends the process with one line and status 2 instead of a traceback."""
    sys.excepthook = _report


def apply(config: dict, keys: dict, overrides: dict, source: str, from_text: bool = False,
          former: dict[str, str] | None = None) -> None:
    """
    Set config[name] for each override, converted to the type of the key. Raises InputError.

    keys: name -> Key. source: the file, or 'command line', that an error names. from_text: the values are text.
    """
    for name, value in overrides.items():
        if name not in keys:
            raise InputError(f'{source}: {_unknown_key(name, keys, former)}')
        config[name] = _convert(name, value, keys[name].types, from_text, source)


def inherit(namespace: dict, config: dict, given: list[str], saved: dict, source: str, except_keys=()) -> None:
    """
    Continue with the config of an earlier run: each key that was not given now takes the value saved then.

    saved: that config. except_keys: keys that are never taken from it. Raises InputError.
    """
    keys = _read_keys(namespace['__file__'])
    kept = {k: v for k, v in saved.items() if k in keys and k not in given and k not in except_keys}
    apply(config, keys, kept, source)
    namespace.update(config)


def describe(config: dict, given: list[str]) -> str:
    """The whole config in a few lines. The keys that were set come first."""
    shown = {k: f'{k}={v:.6g}' if isinstance(v, float) else f'{k}={v!r}' for k, v in config.items()}
    parts = [shown[k] for k in given] + ['|'] + [shown[k] for k in config if k not in given]
    return textwrap.fill('config: ' + ' '.join(parts), 118, subsequent_indent='  ', break_long_words=False,
                         break_on_hyphens=False)


# ---- errors ----------------------------------------------------------------------------------------------------------

def _option_without_value(name, keys, former):
    """The overrides for `--name` alone, which is True for a key that can be True."""
    if name in keys and 'bool' in keys[name].types:
        return {name: 'True'}
    if name not in keys:
        raise InputError(f'command line: {_unknown_key(name, keys, former)}')
    raise InputError(f'--{name} has no value: write --{name}=VALUE (or --help for every key)')


def _unknown_key(name, keys, former):
    if name in (former or {}):
        return f'there is no config key {name!r} any more; {former[name]}'
    near = [key for key in SYNONYMS.get(name, ()) if key in keys]
    near = near or difflib.get_close_matches(name, keys, n=1, cutoff=0.5)
    hint = f'did you mean {near[0]!r}?' if near else '--help lists every key' if keys else 'this script has no keys'
    return f'there is no config key {name!r}; {hint}'


def _report(kind, error, traceback):
    if issubclass(kind, KeyboardInterrupt):
        print('\nstopped', file=sys.stderr)
        raise SystemExit(130)
    if not issubclass(kind, InputError):
        return sys.__excepthook__(kind, error, traceback)
    sys.stdout.flush()
    print(f'error: {error}', file=sys.stderr, flush=True)
    raise SystemExit(2)


# ---- the keys of a script --------------------------------------------------------------------------------------------

@dataclass
class Key:
    """One key of a script's config block."""
    default: object
    types: set[str]  # names of types: 'bool', 'int', 'float', 'str', 'None'
    comment: str
    heading: str  # the comment line that it stands under


def _read_keys(path):
    """Name -> Key, for each assignment of a plain value before the script calls configure()."""
    with open(path, encoding='utf-8') as f:
        source = f.read()
    comments, own_line = _read_comments(source)
    keys, heading = {}, ''
    for node in ast.parse(source).body:
        if any(isinstance(n, ast.Name) and n.id == 'configure' for n in ast.walk(node)):
            break
        found = _plain_assignment(node, path)
        if not found:
            continue
        above = comments[node.lineno - 1] if node.lineno - 1 in own_line else ''
        if above.strip('-') and not above.startswith('...'):
            heading = above
        comment = comments.get(node.end_lineno, '')
        line = node.end_lineno + 1
        while line in own_line and comments[line].startswith('...'):  # a comment that goes on below the key
            comment += ' ' + comments[line][3:].strip()
            line += 1
        name, default, kinds = found
        keys[name] = Key(default, kinds, comment, heading)
    return keys


def _read_comments(source):
    """(line number -> comment, the numbers of the lines that hold nothing else)."""
    comments, own_line = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip('#').strip()
            if not token.line[:token.start[1]].strip():
                own_line.add(token.start[0])
    return comments, own_line


def _plain_assignment(node, path):
    """(name, value, names of types) of a statement that assigns a plain value to a public name, otherwise None."""
    target = node.target if isinstance(node, ast.AnnAssign) else \
        node.targets[0] if isinstance(node, ast.Assign) else None
    if not isinstance(target, ast.Name) or target.id.startswith('_'):
        return None
    try:
        value = eval(compile(ast.Expression(node.value), path, 'eval'), {'__builtins__': {}})
    except Exception:
        return None  # computed from something else
    kinds = {type(value).__name__}
    if isinstance(node, ast.AnnAssign):
        kinds = {t.strip() for t in ast.unparse(node.annotation).split('|')}
    return (target.id, value, kinds) if kinds <= {*PLAIN_TYPES, 'None'} else None


def _run_config_file(path, config):
    """Name -> value, for what a config file assigns. The file can read the config so far."""
    if not os.path.isfile(path):
        near = difflib.get_close_matches(os.path.basename(path), sorted(os.listdir('config')), n=1) \
            if os.path.isdir('config') else []
        hint = f'; did you mean config/{near[0]}?' if near else ': options are written --key=value'
        raise InputError(f'no config file {path!r}{hint}')
    names = dict(config)
    try:
        with open(path, encoding='utf-8') as f:
            tree = ast.parse(f.read(), path)
        exec(compile(tree, path, 'exec'), names)
    except Exception as e:
        line = getattr(e, 'lineno', None) or _line_in(e, path)
        raise InputError(f'{path}, line {line}: {type(e).__name__}: {e}') from None
    assigned = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    return {name: names[name] for name in assigned if name in names and not name.startswith('_')}


def _line_in(error, path):
    """The line of the file `path` at which an exception was raised."""
    tb, line = error.__traceback__, '?'
    while tb:
        if tb.tb_frame.f_code.co_filename == path:
            line = tb.tb_lineno
        tb = tb.tb_next
    return line


def _convert(name, value, kinds, from_text, source):
    """`value` as one of the types in `kinds`, if that loses nothing. Raises InputError."""
    if from_text:
        value = _parse(value, kinds)
    if value is None and 'None' in kinds:
        return None
    kind = next((name for name, one in PLAIN_TYPES.items() if isinstance(value, one)), '')
    if kind in kinds:
        return value
    if kind == 'int' and 'float' in kinds:
        return float(value)
    if kind == 'int' and 'bool' in kinds and value in (0, 1):
        return bool(value)
    if kind == 'float' and 'int' in kinds and value.is_integer():
        return int(value)
    wanted = ' or '.join(sorted(kinds))
    raise InputError(f'{source}: {name} must be {wanted}, not {value!r}')


def _parse(text, kinds):
    """The Python value that `text` writes, or `text` itself for a key that takes text."""
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        value = {'true': True, 'false': False, 'none': None}.get(text.lower(), text)
    if value is None and 'None' in kinds:
        return None
    if 'str' in kinds and type(value).__name__ not in kinds:
        return text
    return value


def _help(doc, keys, config_files=True):
    """The text of --help: the script's docstring, then its keys under their headings."""
    if not keys:
        return (doc or '').strip()
    how = 'set in a config file, or as --key=value' if config_files else 'set as --key=value'
    lines = [(doc or '').strip(), '', f'Keys ({how}):']
    width, column = max(72, min(110, shutil.get_terminal_size((100, 24)).columns)), 32
    heading = ''
    for name, key in keys.items():
        if key.heading != heading:
            heading = key.heading
            lines += ['', heading]
        shown = f'  {name} = {key.default!r}'
        comment = textwrap.wrap(key.comment, width, initial_indent=' ' * column, subsequent_indent=' ' * column)
        if comment and len(shown) < column:
            comment[0] = f'{shown:<{column}}{comment[0][column:]}'
        else:
            lines.append(shown)
        lines += comment
    return '\n'.join(lines)
