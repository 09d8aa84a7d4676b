"""How to optimise."""

from dataclasses import dataclass
from typing import Literal

MixedPrecision = Literal["no", "fp16", "bf16"]
OptimizerName = Literal["adamw", "adamw8bit", "prodigy"]


@dataclass(frozen=True)
class TrainConfig:
    """How to optimise; what to optimise is the Objective's."""

    max_train_steps: int
    train_batch_size: int
    """Of all processes together, as all sizes here."""
    learning_rate: float
    lr_warmup_steps: int = 0
    max_grad_norm: float = 1.0
    weight_decay: float = 0.01
    use_ema: bool = True
    ema_decay: float | None = None
    """Of the average at every step; None: what `optimisation.ema_decay` says of the run, warmed up."""
    random_flip: bool = False
    pair_batch_size: int = 10
    """Source samples a step, where the objective looks at them."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients are averaged before a step. Pairs are formed within each batch, so pairwise terms mean
    what they mean without accumulation."""
    optimizer: OptimizerName = "adamw"
    erase_steps: int = 0
    """Of the first steps, how many take out of the target prompt what its identifier meant (`erase_identifier`)."""
    binding_steps: int = 0
    """Of the last steps, how many tie what was learned to its identifier (`binding_loss`)."""
    noise_offset: float = 0.0
    """Size of a constant added to each channel's noise, which lets a model change a picture's overall brightness."""
    mixed_precision: MixedPrecision = "no"
    seed: int = 0

    @property
    def learning_steps(self) -> int:
        """Those before binding."""
        return self.max_train_steps - self.binding_steps

    @property
    def asks_source(self) -> bool:
        """Whether some steps look at the source and its samples, whatever the objective does."""
        return self.erase_steps > 0 or self.binding_steps > 0

    def batches(self, num_prior: int | None) -> dict[str, int]:
        """How many pictures a batch has, by its setting; `num_prior` source samples are there to choose from."""
        pairs = {} if num_prior is None else {"pair_batch_size": min(self.pair_batch_size, num_prior)}
        return {"train_batch_size": self.train_batch_size, **pairs}
