"""The loss of a micro-batch as training computes it: eager or compiled."""

import torch
import torch.nn as nn

from sologpt.matmuls.chunked_loss import loss_of_logits


class TrainingLoss(nn.Module):
    """
    (idx, targets), each (B, T) ids -> the model's loss in nats; a module, so that DistributedDataParallel can hold it.

    The model stays as it is: only this module's calls are compiled. A loss in chunks is compiled chunk by chunk. In one
    graph with the rest, their matmuls would be put together, and all logits would exist at once.
    """

    def __init__(self, model: nn.Module, compile: bool = False, sharded: bool = False, cuda_graphs: bool = False,
                 **options):
        """
        compile: by torch.compile with these options. sharded: the model's blocks are shards, which are compiled one by
        one where they are made; here only a chunk of the loss is. cuda_graphs: replay the graphs of the model.
        """
        super().__init__()
        self.model = model
        options = {'dynamic': False} | options  # every size of batch gets kernels of its own
        mode = {'mode': 'reduce-overhead'} if cuda_graphs else {}
        if not compile:
            self.compute = model.loss
        elif sharded:
            piece = torch.compile(loss_of_logits, **options)
            self.compute = lambda idx, targets: model.loss(idx, targets, piece)
        elif model.config.loss_chunk == 0:
            self.compute = torch.compile(model.loss, **options, **mode)
        else:
            piece = torch.compile(loss_of_logits, **options)
            hidden = torch.compile(model.hidden, **options, **mode)
            self.compute = lambda idx, targets: model.loss_of_hidden(hidden(idx), targets, piece)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.compute(idx, targets)
