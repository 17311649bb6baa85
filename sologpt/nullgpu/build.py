"""
Builds the library of the null GPU, once for each version of torch and of its sources.

The library has to define every function that torch takes from the CUDA runtime and from cuBLAS, and every function of
the driver. Those that it does not implement are generated: each reports that it is not supported, and logs that it was
called. Their names come from torch's own libraries, and from the driver's header.
"""

import glob
import hashlib
import os
import re
import shutil
import subprocess
import tempfile

import torch

from configurator import InputError

SOURCES = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'library')
NOT_SUPPORTED = {'libcudart': 801, 'libcublas': 15, 'driver': 801}  # the library's own code for it


def cache_folder() -> str:
    """Where built libraries and the kernels of dry runs are kept. It can be deleted at any time."""
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
    return os.path.join(cache, 'sologpt', 'nullgpu')


def build_library() -> str:
    """
    The folder with libcuda.so.1, which is built if it is not there yet. Raises InputError if something is missing: the
    CUDA 13 build of torch, a C compiler, or nm.
    """
    includes = _check_tools()
    folder = os.path.join(cache_folder(), _fingerprint())
    if os.path.exists(os.path.join(folder, 'libcuda.so.1')):
        return folder
    os.makedirs(cache_folder(), exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as made:
        _compile(made, includes)
        try:
            os.rename(made, folder)
            os.mkdir(made)  # the context manager deletes it
        except OSError:  # another process was faster
            if not os.path.exists(os.path.join(folder, 'libcuda.so.1')):
                raise
    os.chmod(folder, 0o755)
    return folder


def _check_tools():
    """The folders of CUDA's headers. Raises InputError."""
    if not (torch.version.cuda or '').startswith('13.'):
        raise InputError(f'the null GPU runs the CUDA 13 build of torch, and this is torch {torch.__version__}: '
                         f'pip install torch==2.13.0 from PyPI is that build, best in an environment of its own')
    for tool in ('gcc', 'nm'):
        if not shutil.which(tool):
            raise InputError(f'the null GPU is built with {tool}, which is not installed: install gcc and binutils')
    packages = os.path.dirname(os.path.dirname(torch.__file__))
    includes = [os.path.join(packages, 'nvidia', 'cu13', 'include'),
                os.path.join(packages, 'triton', 'backends', 'nvidia', 'include')]
    for folder, header in zip(includes, ('cublasLt.h', 'cuda.h'), strict=True):
        if not os.path.exists(os.path.join(folder, header)):
            raise InputError(f'the null GPU is built with {header}, which is not in {folder}: install torch from PyPI '
                             f'with its dependencies')
    return includes


def _source_files():
    return sorted(glob.glob(os.path.join(SOURCES, '*.[ch]')))


def _fingerprint():
    digest = hashlib.sha256(torch.__version__.encode())
    for path in [*_source_files(), os.path.abspath(__file__)]:
        with open(path, 'rb') as f:
            digest.update(f.read())
    return digest.hexdigest()[:16]


def _run(command):
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise InputError(f'building the null GPU failed: {os.path.basename(command[-1])}: {ran.stderr.strip()[:300]}')
    return ran.stdout


def _compile(folder, includes):
    """Write libcuda.so.1 into the folder. Triton's compiler finds it as libcuda.so, and torch as NVML's library."""
    flags = ['-O1', '-fPIC', *(f'-I{path}' for path in [SOURCES, *includes])]
    objects = []
    for source in _source_files():
        if source.endswith('.c'):
            objects.append(os.path.join(folder, os.path.basename(source) + '.o'))
            _run(['gcc', *flags, '-o', objects[-1], '-c', source])
    defined = {line.split()[-1] for line in _run(['nm', '--defined-only', *objects]).splitlines() if line}
    rest = os.path.join(folder, 'not_supported.c')
    with open(rest, 'w', encoding='utf-8') as f:
        f.write(_not_supported(functions_needed(includes[1]), defined))
    _run(['gcc', '-shared', '-Wl,-soname,libcuda.so.1', *flags, '-o', os.path.join(folder, 'libcuda.so.1'), *objects,
          rest, '-ldl', '-lpthread'])
    for name in ('libcuda.so', 'libnvidia-ml.so.1'):
        os.symlink('libcuda.so.1', os.path.join(folder, name))


def functions_needed(driver_headers: str) -> dict[str, str]:
    """Function -> the library that torch expects it in. driver_headers: the folder of cuda.h."""
    needed = {}
    for library in glob.glob(os.path.join(os.path.dirname(torch.__file__), 'lib', '*.so')):
        # a line such as "                 U cudaMalloc@libcudart.so.13"
        for line in _run(['nm', '-D', '--undefined-only', library]).splitlines():
            found = re.search(r'\bU (\w+)@(libcudart|libcublas)', line)
            if found:
                needed[found[1]] = found[2]
    with open(os.path.join(driver_headers, 'cuda.h'), encoding='utf-8', errors='replace') as f:
        header = f.read()
    names = re.findall(r'\bCUDAAPI\s+(cu[A-Z]\w+)\s*\(', header)
    names += re.findall(r'#define\s+cu[A-Z]\w+\s+(cu[A-Z]\w+_v\d)\b', header)  # what some are called in the library
    return needed | dict.fromkeys(names, 'driver')


def _not_supported(needed, defined):
    """The source of the functions that are needed and not defined."""
    lines = ['void write_refusal(const char *call, const char *reason);']
    for name in sorted(needed.keys() - defined):
        lines.append(f'int {name}(void) {{ write_refusal("{name}", "the null GPU does not have it"); '
                     f'return {NOT_SUPPORTED[needed[name]]}; }}')
    return '\n'.join(lines) + '\n'
