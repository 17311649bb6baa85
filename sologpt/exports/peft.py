"""Adapters as one adapter in peft's files: a single one as it is, several low-rank ones as a LoRA of their sum."""

from sologpt.adapters.adapter import model_class, put_adapter
from sologpt.adapters.arithmetic import stack
from sologpt.adapters.peft_files import write_adapter
from sologpt.exports.source import ExportedModel


def write_peft(exported: ExportedModel, folder: str) -> str:
    """Write adapter_config.json and adapter_model.safetensors. Returns what it is, in words. Raises InputError."""
    adapters, folders, factors = zip(*((given.adapter, given.folder, given.factor) for given in exported.beside),
                                     strict=True)
    adapter = adapters[0]
    if factors == (1.0,):
        skeleton = model_class(adapter.config).skeleton(exported.config)
        put_adapter(skeleton, adapter, folders[0])  # to see whether it fits
    else:
        adapter = stack(exported.config, adapters, factors, folders)
    write_adapter(folder, adapter, exported.config)
    return f'{adapter.config.describe()}, {sum(tensor.numel() for tensor in adapter.tensors.values()):,} numbers'
