"""
What a method of finetuning is: a class in a file of its own in methods/, which says all about itself.

There are two kinds, with a base class each:

  BesideLinear    stands in the place of a Linear and adds something to what it computes. The class has an __init__(),
                  a forward() and `file_ends`; deltas() if it can be merged, low_ranks() if it can be stacked.
  VirtualTokens   a GPT with tokens before every text. The class has new_virtual(), begin_from(), and overrides of the
                  GPT's hidden(), context() or new_cache().

The attributes of Method say the rest: scripts ask them and never compare a method's name with a string. So a new method
is one file. For example, methods/bitfit.py could train one more bias in each Linear, as BitFit does
(https://arxiv.org/abs/2106.10199):

    class BitFit(BesideLinear):
        name, peft_type, known_to_peft = 'bitfit', 'BITFIT', False
        peft_fields = {'target_modules': 'target_modules'}
        file_ends = {'b': 'bitfit_bias'}

        def __init__(self, base, targets, dropout):
            super().__init__(base, targets)
            self.b = self.new(lambda target: target.n_out)

        def forward(self, x):
            return self.changed(self.base(x), lambda i, y: y + self.b[i].to(y.dtype))
"""

from collections.abc import Callable

import torch
import torch.nn as nn

from configurator import InputError
from model import GPT, GPTConfig
from sologpt.adapters.targets import Target
from sologpt.files.family import LINEARS

Tensor = torch.Tensor
PREFIX = 'base_model.model.'  # what peft puts before the names of a model's modules


class Method:
    """What the project knows of a method without using it."""
    name: str  # train.py's adapter=...
    default_r: int = 16  # train.py's adapter_r, if none is given
    size_field: str = 'r'  # the field of AdapterConfig that adapter_r is
    default_targets: tuple[str, ...] = LINEARS  # ends of our names of the Linears that it stands beside

    adds_tokens: bool = False  # it adds virtual tokens before the text, and changes no Linear
    begins_from_text: bool = False  # its tensors begin as what the whole model makes of a text, by begin_from()
    needs_mask: bool = False  # attention needs an explicit mask in training
    mergeable: bool = False  # its change can be added to the weights: deltas() tells it
    depends_on_base: bool = False  # that change follows from the base's weights, so that it cannot be scaled or summed
    stackable: bool = False  # that change is a product of two small matrices, low_ranks(): adapters of such methods can
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

    @classmethod
    def heads(cls, config: GPTConfig) -> int | None:
        """What files have as num_attention_heads. config: the base's."""
        return None

    def file_tensors(self) -> dict[str, tuple[nn.Module, str]]:
        """
        Names in adapter_model.safetensors -> (module, its attribute) with the tensor. A buffer follows from the
        AdapterConfig, so that a file may leave it out.
        """
        raise NotImplementedError


class BesideLinear(Method, nn.Module):
    """
    A module in the place of a Linear, which is its `base`: (..., in) -> (..., out). It changes the rows of its targets
    and leaves the others alone. A parameter is a list, with one for each target.
    """
    file_ends: dict[str, str] = {}  # parameter -> the end of its name in a file

    def __init__(self, base: nn.Module, targets: list[Target]):
        """
        base: an nn.Linear or an NF4Linear, frozen. targets: in the order of their rows. Subclasses are made with (base,
        targets, dropout).
        """
        super().__init__()
        self.base, self.targets = base, targets
        self.n_out, self.n_in = base.weight.shape
        self.layout, begin = [], 0  # (number of rows, number of their target or None) of all rows, in their order
        for i, target in enumerate(targets):
            if target.rows.start > begin:
                self.layout.append((target.rows.start - begin, None))
            self.layout.append((target.n_out, i))
            begin = target.rows.stop
        if begin < self.n_out:
            self.layout.append((self.n_out - begin, None))

    @classmethod
    def beside(cls, linears: dict[str, nn.Module], targets: dict[str, list[Target]], dropout: float,
               seed: int) -> dict[str, 'BesideLinear']:
        """
        Untrained modules for the places of these Linears, by the same names. targets: by these names, too. seed: for
        random tensors that are not trained.
        """
        return {name: cls(linear, targets[name], dropout) for name, linear in linears.items()}

    def new(self, shape_of: Callable[[Target], int | tuple[int, ...]], value: float = 0.0) -> nn.ParameterList:
        """A parameter for each target, in float32 on the base's device. shape_of: its shape."""
        device = next(iter(self.base.state_dict().values())).device
        shapes = [size if isinstance(size, tuple) else (size,) for size in map(shape_of, self.targets)]
        return nn.ParameterList(nn.Parameter(torch.full(shape, value, device=device)) for shape in shapes)

    def in_rows(self, of_targets: list[Tensor], of_others: Callable[[int], Tensor]) -> list[Tensor]:
        """Tensors for all rows, in their order. of_targets: one for each target; of_others: of so many other rows."""
        return [of_others(n) if i is None else of_targets[i] for n, i in self.layout]

    def changed(self, y: Tensor, change: Callable[[int, Tensor], Tensor]) -> Tensor:
        """y, (..., out), where change(i, its rows) takes the place of the rows of target i, (..., n_out)."""
        pieces = y.split([n for n, _ in self.layout], dim=-1)
        return joined([piece if i is None else change(i, piece)
                       for piece, (_, i) in zip(pieces, self.layout, strict=True)], dim=-1)

    def file_tensors(self):
        return {f'{PREFIX}{target.name}.{end}': (getattr(self, parameter), str(i))
                for i, target in enumerate(self.targets) for parameter, end in self.file_ends.items()}

    def flops_per_token(self) -> int:
        """FLOPs of forward and backward per token, without those of the base."""
        return 6 * sum(p.numel() for name in self.file_ends for p in getattr(self, name) if p.dim() == 2)

    def delta(self) -> Tensor:
        """What merging adds to the base's weight, (out, in), in float32. Raises InputError."""
        deltas = self.deltas()
        return joined(self.in_rows(deltas, lambda n: deltas[0].new_zeros(n, self.n_in)))

    def deltas(self) -> list[Tensor]:
        """What merging adds to the rows of each target, (n_out, in), in float32. Raises InputError."""
        if not self.stackable:
            raise InputError(f'adapter={self.name} does more than change the weights: it cannot be merged into them')
        return [B @ A for A, B in self.low_ranks()]

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(A, B), (sum of the targets' r, in) and (out, that sum), in float32: delta is B A. Raises InputError."""
        As, Bs = zip(*self.low_ranks(), strict=True)
        return joined(As), self.block_diagonal(Bs)

    def block_diagonal(self, Bs: list[Tensor]) -> Tensor:
        """(out, sum of r): B of each target, (n_out, r), in its rows and in columns of its own. Elsewhere are zeros."""
        blocks = self.in_rows(Bs, lambda n: Bs[0].new_empty(n, 0))
        return blocks[0] if len(blocks) == 1 else torch.block_diag(*blocks)

    def low_ranks(self) -> list[tuple[Tensor, Tensor]]:
        """(A, B) of each target, (r, in) and (n_out, r), in float32: its delta is B A. Raises InputError."""
        raise InputError(f'adapter={self.name} is no product of two small matrices: it cannot be stacked, nor share a '
                         f'batch with other adapters')

    def family_tensors(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """
        (A, B, vectors) for files of another family: A is (r, in), B is (out, r), and a vector has a number for each of
        the `out` rows. The vectors' keys are ends of names in a file. Only a Linear that is one target has them.
        """
        [(A, B)] = self.low_ranks()
        return A, B, {}


def joined(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """The tensors side by side. One alone is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


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

    @classmethod
    def heads(cls, config):
        return config.n_head

    def file_tensors(self):
        return {'prompt_embeddings': (self, 'virtual')}

    @classmethod
    def tensors_for_family(cls, tensors: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
        """The tensors for files of another family. config: the base's."""
        return tensors

    @classmethod
    def peft_settings(cls, model_config, transposed):
        return {'token_dim': model_config.n_embd, 'num_layers': model_config.n_layer,
                'num_attention_heads': cls.heads(model_config), 'num_transformer_submodules': 1}
