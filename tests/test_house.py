"""The rules of the house: imports point down, scripts are imported by nobody, and what a reader meets stays short."""

import ast
import os
import subprocess

import pytest
from conftest import ROOT

from configurator import resolve

# a file may import what stands in its own line or in a line below
ORDER = ['bench', 'nullgpu', 'exports', 'training', 'adapters', 'model', 'inference', 'files', 'matmuls', 'tokens',
         'machine', 'configurator']
FLOOR = {(name if name in ('model', 'configurator') else f'sologpt.{name}'): floor
         for floor, name in enumerate(reversed(ORDER))}
SCRIPTS = ('train', 'sample', 'export', 'compare', 'bench')


def source_files():
    listed = subprocess.run(['git', 'ls-files', '*.py'], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip('not a checkout')
    return [path for path in listed.stdout.split() if not path.startswith('tests/')]


def parse(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        return ast.parse(f.read())


def imports(tree):
    """Names of modules, wherever in the file they are imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inside = node.module == 'sologpt'
            yield from [f'sologpt.{alias.name}' for alias in node.names] if inside else [node.module]


def floor(module):
    return next((n for name, n in FLOOR.items() if module == name or module.startswith(name + '.')), None)


def test_imports_point_down():
    upwards = []
    for path in source_files():
        module = path.removesuffix('.py').replace('/', '.')
        own = floor(module)
        for name in imports(parse(path)):
            above = floor(name)
            if name in SCRIPTS or own is not None and above is not None and above > own:
                upwards.append(f'{path} imports {name}')
    assert not upwards


def test_no_module_imports_itself_by_a_detour():
    graph = {}
    for path in source_files():
        module = path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')
        tree, found = parse(path), set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module} | {f'{node.module}.{alias.name}' for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph[module] = found - {module}
    done = set()

    def walk(module, path):
        assert module not in path, ' -> '.join([*path[path.index(module):], module])
        if module not in done:
            for name in sorted(graph[module] & graph.keys()):
                walk(name, [*path, module])
            done.add(module)
    for module in graph:
        walk(module, [])


def test_what_a_reader_meets_is_short():
    def lines(path):
        with open(os.path.join(ROOT, path), encoding='utf-8') as f:
            return len(f.read().splitlines())
    files = source_files()
    assert lines('train.py') <= 400 and lines('model.py') <= 450 and lines('README.md') <= 200
    assert sum('/' not in path for path in files) <= 9
    assert [path for path in files if path.startswith('sologpt/') and lines(path) > 400] == []
    long = [f'{path}: {node.name}' for path in files for node in ast.walk(parse(path))
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 60]
    assert not long
    assert len(resolve(os.path.join(ROOT, 'train.py'), [])[0]) <= 85


@pytest.mark.parametrize('script', [f'{name}.py' for name in SCRIPTS])
def test_no_key_is_bound_again(script):
    """A key keeps the user's value: what follows from it has a name of its own."""
    tree, keys = parse(script), resolve(os.path.join(ROOT, script), [])[0]
    after = next(node.end_lineno for node in tree.body if 'configure(' in ast.unparse(node))
    inside = {id(n) for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) for n in ast.walk(node)}
    again = [f'{node.id}, line {node.lineno}' for node in ast.walk(tree)
             if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in inside
             and node.id in keys and node.lineno > after]
    assert not again
