"""
What a run reports.
"""

import json
import os

from configurator import InputError, report_errors
from sologpt.files import checkpoint
from sologpt.training.runs import read


class RunLog:
    def __init__(self, out_dir, header, resume_at=None, wandb_options=None):
        """
        A new log, with what an earlier run left in out_dir set aside; or, resumed at step resume_at, the old log
        without what will be done again. wandb_options: None, or what wandb.init takes; `wandb_id` is then the run's id.
        Raises InputError, before anything is moved.
        """
        self.wandb_run = wandb_options and _start_wandb(wandb_options)
        self.wandb_id = self.wandb_run and self.wandb_run.id
        path, kept = os.path.join(out_dir, 'log.jsonl'), []
        if resume_at is None:
            if found := checkpoint.set_aside(out_dir):
                print(f'kept the earlier {", ".join(found)} in {out_dir} as *.old')
        elif os.path.exists(path):
            kept = [record for record in read(path) if _precedes(record, resume_at)]
        with open(path + '.tmp', 'w', encoding='utf-8') as f:
            f.writelines(json.dumps(record) + '\n' for record in kept or [header])
        os.replace(path + '.tmp', path)
        self.file = open(path, 'a', encoding='utf-8')

    def write(self, record):
        self.file.write(json.dumps(record) + '\n')
        self.file.flush()
        if self.wandb_run:
            nanogpts = {'train_loss': 'train/loss', 'val_loss': 'val/loss'}  # its names in W&B
            self.wandb_run.log({nanogpts.get(k, k): v for k, v in record.items()})

    def close(self, failed=False):
        self.file.close()
        if self.wandb_run:
            self.wandb_run.finish(exit_code=int(failed))


def _precedes(record, step):
    """Whether a run that goes on before `step` has done this already. An evaluation comes before the step it names."""
    return 'iter' not in record or record['iter'] < step or record['iter'] == step and 'val_loss' in record


def _start_wandb(options):
    try:
        import wandb
        run = wandb.init(**options)
        report_errors()  # W&B puts a hook of its own in its place, which prints tracebacks
        return run
    except Exception as e:  # not installed, not logged in, no network
        raise InputError(f'wandb_log=True, but W&B does not start ({e}): pip install wandb and wandb login, or set '
                         f'WANDB_MODE=offline') from None
