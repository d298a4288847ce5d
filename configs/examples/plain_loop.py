"""Both interventions in a loop of your own: any torch model whose blocks are a list. Random weights, random tokens."""

import torch
from torch import nn

from replication import Gains

blocks = [nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True) for _ in range(3)]
model = nn.ModuleDict({"embed": nn.Embedding(64, 32), "blocks": nn.ModuleList(blocks), "head": nn.Linear(32, 64)})
gains = Gains(blocks, group_sequences=2, token={"s": 1.0}, layer={"t": 0.5})
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
mask = nn.Transformer.generate_square_subsequent_mask(16)
for step in range(5):
    for tokens in torch.randint(64, (2, 4, 16)):  # two micro-batches of four sequences
        x = model["embed"](tokens)
        for block in blocks:
            x = block(x, mask, is_causal=True)
        (gains.loss(model["head"](x), tokens) / 2).backward()
    gains.scale()  # after the step's last backward, before clipping
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(step, {name: round(value, 3) for name, value in gains.metrics().items()})
