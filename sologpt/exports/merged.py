"""A checkpoint of a model into which adapters were merged, for sample.py, and for train.py as init_from."""

from model import GPT
from sologpt.exports.source import ExportedModel
from sologpt.files.checkpoint import save_checkpoint
from sologpt.files.safetensors_files import cast_weights
from sologpt.machine.devices import DTYPES

PASSED_ON = ('config', 'tokenizer', 'data', 'hf_files', 'merged_from')  # what holds for the merged model as well


def write_merged(exported: ExportedModel, folder: str, dtype: str) -> str:
    """Write ckpt.pt with the weights in dtype. Returns what it is, in words. Raises InputError."""
    saved = exported.saved
    save_checkpoint(folder, {
        **{key: value for key, value in saved.items() if key in PASSED_ON},
        'merged': saved.get('merged', []) + [given.describe_merge() for given in exported.merged],
        'model': cast_weights(exported.weights, DTYPES[dtype]), 'model_args': exported.config.to_save(), 'iter_num': 0},
        best=False)
    return f'{GPT.skeleton(exported.config).n_params():,} parameters in {dtype}'
