"""A model as model.onnx, which onnxruntime and TensorRT run: input_ids, (batch, length) int64 -> logits."""

import logging
import os
import warnings

import torch

from configurator import InputError
from sologpt.exports.source import ExportedModel
from sologpt.exports.torch_program import Logits, build_logits, export_arguments
from sologpt.tokens import tokenizer_files

IN_ONE_FILE = 2.5e7  # parameters; the weights of larger models are written to model.onnx.data


def write_onnx_program(exported: ExportedModel, folder: str, dtype: str, dataset: str) -> str:
    """
    Write model.onnx and the tokenizer, and compare its logits if onnxruntime is there. Returns what they are, in words.
    Raises InputError.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise InputError('to=onnx needs pip install onnx onnxscript (and onnxruntime, to check it)') from None
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)  # otherwise it lists what it need not translate
    config = exported.config
    example, varies = export_arguments(config, exported.source)
    text = exported.find_tokenizer(dataset)
    logits = build_logits(config, exported.weights, dtype)
    tokenizer_files.write_tokenizer(folder, text, config.block_size)
    path = os.path.join(folder, 'model.onnx')
    with warnings.catch_warnings(action='ignore'):  # torch's warnings about its own exporter
        translated = torch.onnx.export(logits, example, dynamic_shapes=varies, input_names=['input_ids'],
                                       output_names=['logits'], dynamo=True, verbose=False)
    translated.save(path, external_data=logits.gpt.n_params() > IN_ONE_FILE)
    try:
        difference = largest_difference(path, logits, config.n_ids, min(config.block_size, 128))
    except ImportError:
        return f'model.onnx in {dtype}; not checked, because onnxruntime is not installed'
    except Exception as e:  # onnxruntime has many classes of errors, and no bfloat16 on a CPU
        return f'model.onnx in {dtype}; not checked, because onnxruntime cannot run it here: {str(e)[:100]}'
    return f"model.onnx in {dtype}; onnxruntime's logits differ by at most {difference:.1e}"


def largest_difference(path: str, logits: Logits, n_ids: int, length: int) -> float:
    """The largest difference of the file's logits from the model's, for random ids in rows of up to `length`."""
    import onnxruntime
    session, largest = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider']), 0.0
    for shape in ((1, 1), (1, length), (3, 2)):
        ids = torch.randint(n_ids, shape, generator=torch.Generator().manual_seed(0))
        found, = session.run(['logits'], {'input_ids': ids.numpy()})
        largest = max(largest, (torch.from_numpy(found).float() - logits(ids).float()).abs().max().item())
    return largest
