"""How far a run has come: what a checkpoint holds beyond weights and the optimizer's state."""

import math
from dataclasses import asdict, dataclass, fields


@dataclass
class Progress:
    iter_num: int = 0  # steps done
    best_val_loss: float = math.inf
    best_iter: int = 0  # the step of the best validation loss
    last_eval: int = -1  # the step of the last evaluation
    evals_since_best: int = 0
    train_seconds: float = 0.0  # in training steps, in all sessions before this one
    wandb_id: str | None = None

    @classmethod
    def from_saved(cls, saved: dict, patience: int) -> 'Progress':
        """Of a checkpoint, nanoGPT's included; {} for a new run. patience: see train.py."""
        values = {f.name: saved[f.name] for f in fields(cls) if f.name in saved}
        progress = cls(**values)
        progress.best_val_loss = float(progress.best_val_loss)  # nanoGPT saves a tensor
        if 'best_iter' not in values:
            progress.best_iter = progress.iter_num
        if patience and progress.evals_since_best >= patience:  # it had ended so, and is asked to go on
            progress.evals_since_best = 0
        return progress

    def to_save(self, seconds: float) -> dict:
        """Plain values for a checkpoint. seconds: in training steps, in this session."""
        return asdict(self) | {'train_seconds': self.train_seconds + seconds}

    def add_evaluation(self, val_loss: float) -> bool:
        """Take in the validation loss of now. Returns whether it is the lowest so far."""
        best = val_loss < self.best_val_loss
        if best:
            self.best_val_loss, self.best_iter = val_loss, self.iter_num
        self.evals_since_best = 0 if best else self.evals_since_best + 1
        return best
