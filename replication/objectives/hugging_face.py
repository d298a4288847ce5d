"""transformers' Trainer with Gains. Needs transformers; `from replication import GainsTrainer`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from replication.errors import UserError
from replication.objectives.library import Gains


class GainsTrainer(Trainer):
    """transformers.Trainer whose loss is `gains.loss`, and whose gradients are scaled before they are clipped.

    Works with its subclasses too: `class Mine(GainsTrainer, SFTTrainer)`. The logged `loss` is the objective; every
    log line of training has `gains.metrics()` beside it. A mixture's load-balancing loss, where the model's config has
    it returned (`output_router_logits`), is added as the model adds it: over the micro-batch, unweighted.
    """

    def __init__(self, *args: Any, gains: Gains, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is not None or self.args.label_smoothing_factor:
            raise UserError("GainsTrainer: the loss is Gains's; drop compute_loss_func, give label_smoothing to Gains")
        self.gains = gains
        # gains.loss is a mean over the micro-batch, and takes no num_items_in_batch: so the Trainer divides it by the
        # micro-batches of the step, which it does not where it counts the step's tokens for the model's own loss
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        extra: Tensor | float = 0.0
        if (auxiliary := getattr(outputs, "aux_loss", None)) is not None:
            extra = self.accelerator.unwrap_model(model).config.router_aux_loss_coef * auxiliary
        loss = self.gains.loss(outputs.logits, inputs["labels"], extra=extra)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch's backward; the step's last is followed by clipping, and `on_pre_optimizer_step` by then."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self.gains.scale()
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs | self.gains.metrics() if "loss" in logs else logs, *args, **kwargs)
