"""Both interventions in a LightningModule of your own: GPT-2 by the path of its blocks, random weights and tokens."""

import torch
from lightning import LightningModule, Trainer
from transformers import GPT2Config, GPT2LMHeadModel

from replication import Gains, GainsCallback


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        size = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}
        self.net = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))
        self.gains = Gains("transformer.h", self.net, group_sequences=2, token={"s": 1.0}, layer={"t": 0.5})

    def training_step(self, tokens, index):
        return self.gains.loss(self.net(tokens).logits, tokens)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


model, tokens = Model(), torch.randint(64, (32, 16))
step = {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "max_epochs": 1, "accelerator": "cpu"}
nothing_kept = {"logger": False, "enable_checkpointing": False}
trainer = Trainer(**step, **nothing_kept, callbacks=[GainsCallback(model.gains)], log_every_n_steps=2)
trainer.fit(model, torch.utils.data.DataLoader(tokens, batch_size=4))
