"""
What a method of finetuning is: a class in a file of its own in methods/, which says all about itself.

There are two kinds, with a base class each:

  BesideLinear    stands in the place of a Linear and adds something to what it computes. The class has an __init__(),
                  a forward() and `file_ends`; delta() if it can be merged, low_rank() if it can be stacked.
  VirtualTokens   a GPT with tokens before every text. The class has new_virtual(), begin_from(), and overrides of the
                  GPT's hidden(), context() or new_cache().

The attributes of Method say the rest: scripts ask them and never compare a method's name with a string. So a new method
is one file. For example, methods/bitfit.py could train one more bias in each Linear, as BitFit does
(https://arxiv.org/abs/2106.10199):

    class BitFit(BesideLinear):
        name, peft_type, known_to_peft = 'bitfit', 'BITFIT', False
        peft_fields = {'target_modules': 'target_modules'}
        file_ends = {'b': 'bitfit_bias'}

        def __init__(self, base, r, scale, dropout):
            super().__init__(base)
            self.b = self.new(len(base.weight))

        def forward(self, x):
            y = self.base(x)
            return y + self.b.to(y.dtype)
"""

import torch
import torch.nn as nn

from configurator import InputError
from model import GPT, GPTConfig
from sologpt.files.family import LINEARS

Tensor = torch.Tensor
PREFIX = 'base_model.model.'  # what peft puts before the names of a model's modules


class Method:
    """What the project knows of a method without using it."""
    name: str  # train.py's adapter=...
    default_r: int = 16  # train.py's adapter_r, if none is given
    size_field: str = 'r'  # the field of AdapterConfig that adapter_r is
    default_targets: tuple[str, ...] = LINEARS  # ends of the names of the Linears that it stands beside

    adds_tokens: bool = False  # it adds virtual tokens before the text, and changes no Linear
    begins_from_text: bool = False  # its tensors begin as what the whole model makes of a text, by begin_from()
    needs_mask: bool = False  # attention needs an explicit mask in training
    mergeable: bool = False  # its change can be added to the weights: delta() tells it
    depends_on_base: bool = False  # that change follows from the base's weights, so that it cannot be scaled or summed
    stackable: bool = False  # that change is a product of two small matrices, low_rank(): adapters of such methods can
    # ... be summed, and can serve one batch together
    lora_plus: tuple[str, ...] = ()  # parameters that LoRA+ (https://arxiv.org/abs/2402.12354) trains at a higher rate

    peft_type: str  # in adapter_config.json
    peft_fields: dict[str, str] = {}  # AdapterConfig's fields that mean something to the method -> peft's keys
    peft_marks: dict[str, bool] = {}  # keys by which methods of one peft_type differ, with this method's values
    peft_allowed: dict[str, tuple] = {}  # other keys -> the values that they may have; any other value is refused
    peft_ignored: tuple[str, ...] = ()  # other keys, which change nothing here
    known_to_peft: bool = True  # peft has this method
    exported_as: str = 'lora'  # the method that stands for it beside a base of another family: see family_tensors()

    @classmethod
    def peft_settings(cls, model_config: GPTConfig, transposed: bool) -> dict:
        """
        What adapter_config.json says beyond the fields. model_config: the base's. transposed: whether the base holds
        the transpose of a Linear's weight in transformers.
        """
        return {}

    def file_tensors(self, name: str) -> dict[str, tuple[nn.Module, str]]:
        """
        Names in adapter_model.safetensors -> (module, its attribute) with the tensor. name: the Linear's. A buffer
        follows from the AdapterConfig, so that a file may leave it out.
        """
        raise NotImplementedError


class BesideLinear(Method, nn.Module):
    """A module in the place of a Linear, which is its `base`: (..., in) -> (..., out)."""
    file_ends: dict[str, str] = {}  # parameter -> the end of its name in a file

    def __init__(self, base: nn.Module):
        """base: an nn.Linear or an NF4Linear, frozen. Subclasses are made with (base, r, scale, dropout)."""
        super().__init__()
        self.base = base

    @classmethod
    def beside(cls, linears: dict[str, nn.Module], sizes: dict[str, tuple[int, float]], dropout: float,
               seed: int) -> dict[str, 'BesideLinear']:
        """
        Untrained modules for the places of these Linears, by the same names. sizes: name -> (r, scale). seed: for
        random tensors that are not trained.
        """
        return {name: cls(linear, *sizes[name], dropout) for name, linear in linears.items()}

    def new(self, *shape: int, value: float = 0.0) -> nn.Parameter:
        """A parameter in float32 on the base's device."""
        return nn.Parameter(torch.full(shape, value, device=self.base.weight.device))

    def file_tensors(self, name):
        return {f'{PREFIX}{name}.{end}': (self, parameter) for parameter, end in self.file_ends.items()}

    def flops_per_token(self) -> int:
        """FLOPs of forward and backward per token, without those of the base."""
        return 6 * sum(p.numel() for p in self.parameters(recurse=False) if p.dim() == 2)

    def delta(self) -> Tensor:
        """What merging adds to the base's weight, (out, in), in float32. Raises InputError."""
        if not self.stackable:
            raise InputError(f'adapter={self.name} does more than change the weights: it cannot be merged into them')
        A, B = self.low_rank()
        return B @ A

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(A, B), (r, in) and (out, r), in float32, with delta = B A. Raises InputError."""
        raise InputError(f'adapter={self.name} is no product of two small matrices: it cannot be stacked, nor share a '
                         f'batch with other adapters')

    def family_tensors(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """
        (A, B, vectors) for files of another family: A is (r, in), B is (out, r), and a vector has a number for each of
        the `out` rows. The vectors' keys are ends of names in a file.
        """
        return *self.low_rank(), {}


class VirtualTokens(Method, GPT):
    """
    A GPT with virtual tokens before every text: `virtual`, one row for each. Without them, before attach(), it is an
    ordinary GPT. They take positions of the block, so that a text has block_size - n_virtual of them.
    """
    size_field = 'num_virtual_tokens'
    peft_fields = {'num_virtual_tokens': 'num_virtual_tokens'}
    peft_allowed = {'num_transformer_submodules': (None, 1)}
    peft_ignored = ('token_dim', 'num_layers', 'num_attention_heads')
    adds_tokens, begins_from_text = True, True

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.register_parameter('virtual', None)

    @property
    def n_virtual(self) -> int:
        """Positions that virtual tokens take."""
        return 0 if self.virtual is None else len(self.virtual)

    @classmethod
    def new_virtual(cls, config: GPTConfig, n: int) -> nn.Parameter:
        """`virtual` of n tokens, all zero, on the CPU."""
        raise NotImplementedError

    @torch.no_grad()
    def begin_from(self, idx: Tensor) -> None:
        """Let the virtual tokens be as these tokens: idx, (1, n_virtual) ids of a text."""
        raise NotImplementedError

    def file_tensors(self, name=''):
        return {'prompt_embeddings': (self, 'virtual')}

    @classmethod
    def tensors_for_family(cls, tensors: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
        """The tensors for files of another family. config: the base's."""
        return tensors

    @classmethod
    def peft_settings(cls, model_config, transposed):
        return {'token_dim': model_config.n_embd, 'num_layers': model_config.n_layer,
                'num_attention_heads': model_config.n_head, 'num_transformer_submodules': 1}
