"""Both interventions under transformers' Trainer: a small mixture of experts, random weights, random tokens."""

import tempfile

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainingArguments

from replication import Gains, GainsTrainer

size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "output_router_logits": True}
model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**size, **experts, head_dim=8, intermediate_size=64))
gains = Gains(model.model.layers, group_sequences=2, token={"s": 1.0}, layer={"t": 0.5})
examples = [{"input_ids": row, "labels": row} for row in torch.randint(64, (32, 16))]
batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4}
more = {"logging_steps": 2, "save_strategy": "no", "report_to": "none", "use_cpu": True}
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(folder, **batch, **more)
    GainsTrainer(model, arguments, train_dataset=examples, gains=gains).train()
