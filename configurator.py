"""
Configuration as nanoGPT's users know it: a script's config is its block of commented module globals.

    config, given = configure(globals())

applies config files and --key=value, in the order given, over the script's defaults. A config file is Python that
assigns to the same names. Unlike nanoGPT's, it is strict: a name the script does not have is refused with the nearest
one, and a value of another type is refused unless it converts without loss (0 -> 0.0, 1e5 -> 100000, 'true' -> True).
A key whose default is None names its type in an annotation and is derived by the script after the overrides.

This is also where bad input ends: InputError, raised anywhere below a script that called configure(), prints as one
`error:` line with exit status 2 instead of a traceback.
"""

import ast
import difflib
import io
import os
import sys
import textwrap
import tokenize


class InputError(ValueError):
    """What was wrong, where, and what to do about it, in one or two lines."""


def configure(namespace, argv=None, pass_on=None):
    """
    Apply the command line to `namespace`, a script's globals().

    Returns (config, given): every key with its final value, and the keys that a config file or the command line has
    set, in that order. pass_on: a list that takes the arguments that are for another script, which are the config files
    and the keys that this one does not have. `--help` prints every key with its default and its comment, and exits.
    Raises InputError.
    """
    report_errors()
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        print(_help(namespace.get('__doc__'), _read_keys(namespace['__file__'])))
        raise SystemExit(0)
    config, given = resolve(namespace['__file__'], argv, pass_on)
    namespace.update(config)
    return config, given


def resolve(script, argv, pass_on=None):
    """What configure() would return in `script`, a path, for that command line. Raises InputError."""
    keys = _read_keys(script)
    config = {name: key.default for name, key in keys.items()}
    given = {}  # used as an ordered set
    for arg in argv:
        if pass_on is not None and not (arg.startswith('--') and arg[2:].partition('=')[0] in keys):
            pass_on.append(arg)
            continue
        if arg.startswith('--'):
            key, equals, text = arg[2:].partition('=')
            if not equals:
                raise InputError(f'{arg} has no value: write --{key}=VALUE (or --help for every key)')
            overrides, source = {key: text}, 'command line'
        else:
            overrides, source = _run_config_file(arg, config), arg
        apply(config, keys, overrides, source, from_text=arg.startswith('--'))
        given = {k: None for k in given if k not in overrides} | dict.fromkeys(overrides)
    return config, list(given)


def report_errors():
    """From here on an InputError ends the process with one line and status 2, not with a traceback."""
    sys.excepthook = _report


def apply(config, keys, overrides, source, from_text=False):
    """Set config[key] for each override, converted to the key's type. keys: name -> Key. Raises InputError."""
    for name, value in overrides.items():
        if name not in keys:
            near = difflib.get_close_matches(name, keys, n=1, cutoff=0.5)
            hint = f'did you mean {near[0]!r}?' if near else '--help lists every key'
            raise InputError(f'{source}: there is no config key {name!r}; {hint}')
        config[name] = _convert(name, value, keys[name].types, from_text, source)


def inherit(namespace, config, given, saved, source, except_keys=()):
    """A resumed run goes on with its saved config: every key that was not given now takes the value saved then."""
    keys = _read_keys(namespace['__file__'])
    kept = {k: v for k, v in saved.items() if k in keys and k not in given and k not in except_keys}
    apply(config, keys, kept, source)
    namespace.update(config)


def describe(config, given):
    """The whole config in a few lines, those keys first that were set."""
    shown = {k: f'{k}={v:.6g}' if isinstance(v, float) else f'{k}={v!r}' for k, v in config.items()}
    parts = [shown[k] for k in given] + ['|'] + [shown[k] for k in config if k not in given]
    return textwrap.fill('config: ' + ' '.join(parts), 118, subsequent_indent='  ', break_long_words=False,
                         break_on_hyphens=False)


class Key:
    """One key of a script's config block: its default and types, its comment, and the heading it stands under."""

    def __init__(self, default, types, comment, heading):
        self.default, self.types, self.comment, self.heading = default, types, comment, heading


def _read_keys(path):
    """Name -> Key for the assignments of plain values before the script's call of configure()."""
    with open(path, encoding='utf-8') as f:
        source = f.read()
    comments, own_line = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip('#').strip()
            if not token.line[:token.start[1]].strip():
                own_line.add(token.start[0])
    keys, heading = {}, ''
    for node in ast.parse(source).body:
        if any(isinstance(n, ast.Name) and n.id == 'configure' for n in ast.walk(node)):
            break
        target = node.target if isinstance(node, ast.AnnAssign) else \
            node.targets[0] if isinstance(node, ast.Assign) else None
        if not isinstance(target, ast.Name):
            continue
        try:
            default = eval(compile(ast.Expression(node.value), path, 'eval'), {'__builtins__': {}})
        except Exception:
            continue  # computed from something else: not a plain value, so not a key
        name, kinds = target.id, {type(default).__name__}
        if isinstance(node, ast.AnnAssign):
            kinds = {t.strip() for t in ast.unparse(node.annotation).split('|')}
        if name.startswith('_') or not kinds <= {'bool', 'int', 'float', 'str', 'None'}:
            continue
        above = comments[node.lineno - 1] if node.lineno - 1 in own_line else ''
        if above.strip('-') and not above.startswith('...'):
            heading = above
        comment = comments.get(node.end_lineno, '')
        line = node.end_lineno + 1
        while line in own_line and comments[line].startswith('...'):  # a comment that goes on below the key
            comment += ' ' + comments[line][3:].strip()
            line += 1
        keys[name] = Key(default, kinds, comment, heading)
    return keys


def _run_config_file(path, config):
    """The plain values that a config file assigns; it sees the config so far."""
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
    tb, line = error.__traceback__, '?'
    while tb:
        if tb.tb_frame.f_code.co_filename == path:
            line = tb.tb_lineno
        tb = tb.tb_next
    return line


def _convert(name, value, kinds, from_text, source):
    """`value` as the first of the key's types that holds it without loss."""
    if from_text:
        text = value
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
            value = {'true': True, 'false': False, 'none': None}.get(text.lower(), text)
        if value is None and 'None' in kinds:
            return None
        if 'str' in kinds and type(value).__name__ not in kinds:
            value = text
        if kinds == {'str'} and not isinstance(value, str):
            value = text
    if value is None and 'None' in kinds:
        return None
    if isinstance(value, bool):
        if 'bool' in kinds:
            return value
    elif isinstance(value, int):
        if 'int' in kinds:
            return value
        if 'float' in kinds:
            return float(value)
        if 'bool' in kinds and value in (0, 1):
            return bool(value)
    elif isinstance(value, float):
        if 'float' in kinds:
            return value
        if 'int' in kinds and value.is_integer():
            return int(value)
    elif isinstance(value, str) and 'str' in kinds:
        return value
    wanted = ' or '.join(sorted(kinds))
    raise InputError(f'{source}: {name} must be {wanted}, not {value!r}')


def _help(doc, keys):
    lines = [(doc or '').strip(), '', 'Keys (set in a config file, or as --key=value):']
    heading = ''
    for name, key in keys.items():
        if key.heading != heading:
            heading = key.heading
            lines += ['', f'  {heading}']
        shown = f'{name} = {key.default!r}'
        comment = textwrap.wrap(key.comment, 78, initial_indent=' ' * 40, subsequent_indent=' ' * 40)
        if comment and len(shown) < 40:
            comment[0] = f'{shown:<40}{comment[0][40:]}'
        else:
            lines.append(shown)
        lines += comment
    return '\n'.join(lines)


def _report(kind, error, traceback):
    if issubclass(kind, KeyboardInterrupt):
        print('\nstopped', file=sys.stderr)
        raise SystemExit(130)
    if not issubclass(kind, InputError):
        return sys.__excepthook__(kind, error, traceback)
    sys.stdout.flush()
    print(f'error: {error}', file=sys.stderr, flush=True)
    raise SystemExit(2)
