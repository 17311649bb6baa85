"""
What a run reports: every line of the console also as a line of JSON in out_dir/log.jsonl, and to W&B when asked.

The first line holds what stays the same (config, device, parameters, FLOPs, peak); the others have `iter` and, after a
step, `loss, lr, time_ms, tokens_per_s, mfu, grad_norm, memory_gb, tokens`, or, after an evaluation, `train_loss,
val_loss, lr, tokens, seconds`: MFU as a fraction, seconds those spent in training steps so far.
"""

import json
import os

from configurator import InputError


class RunLog:
    def __init__(self, out_dir, header, resume_at=None, wandb_options=None):
        """
        A new log; or, resumed at step resume_at, the old one without what will be done again. wandb_options: None, or
        what wandb.init takes. `wandb_id` is then the run's id. Raises InputError, before anything is overwritten.
        """
        self.wandb_run = wandb_options and _start_wandb(wandb_options)
        self.wandb_id = self.wandb_run and self.wandb_run.id
        path, kept = os.path.join(out_dir, 'log.jsonl'), []
        if resume_at is not None and os.path.exists(path):
            with open(path, encoding='utf-8') as f:
                kept = [line for line in f if _precedes(json.loads(line), resume_at)]
        self.file = open(path, 'w', encoding='utf-8')
        self.file.writelines(kept or [json.dumps(header) + '\n'])

    def write(self, record):
        self.file.write(json.dumps(record) + '\n')
        self.file.flush()
        if self.wandb_run:
            nanogpts = {'train_loss': 'train/loss', 'val_loss': 'val/loss'}  # its names in W&B
            self.wandb_run.log({nanogpts.get(k, k): v for k, v in record.items()})

    def close(self):
        self.file.close()
        if self.wandb_run:
            self.wandb_run.finish()


def _precedes(record, step):
    """Whether a run that goes on before `step` has done this already. An evaluation comes before the step it names."""
    return 'iter' not in record or record['iter'] < step or record['iter'] == step and 'val_loss' in record


def _start_wandb(options):
    try:
        import wandb
        return wandb.init(**options)
    except Exception as e:  # not installed, not logged in, no network
        raise InputError(f'wandb_log=True, but W&B does not start ({e}): pip install wandb and wandb login, or set '
                         f'WANDB_MODE=offline') from None
