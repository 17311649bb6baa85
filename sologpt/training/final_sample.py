"""The text that a run draws from its model at the end."""

import torch

from model import GPT
from sologpt.machine import devices
from sologpt.training.data import Data
from sologpt.training.machine import Machine


class FinalSample:
    def __init__(self, config: dict, data: Data):
        """What is needed for it, before the run: an error at its end would come too late. Raises InputError."""
        self.text, self.tokens, self.seed = data.tokenizer(), config['sample_tokens'], config['seed']
        self.start = self.text.encode_prompt(config['sample_start']) if config['sample_start'] else None

    def draw(self, model: GPT, data: Data, machine: Machine) -> str:
        """The text. Processes that share a model draw it together, all the same; others may draw alone."""
        model.eval()
        ids = self.start or data.val.read(0, 0.0)[:16].astype('int64').tolist()
        if machine.world_size > 1:
            devices.seed_device(machine.device, self.seed)
        with machine.autocast():
            drawn = model.generate(torch.tensor([ids], device=machine.device), self.tokens, temperature=0.8, top_k=200,
                                   ends=self.text.ends, window_step=max(1, model.config.block_size // 8))
        around = (self.text.bos, self.text.eot, *self.text.ends)  # what stands around texts is none of them
        return self.text.decode([i for i in drawn[0].tolist() if i not in around])
