"""The architecture of nanoGPT's `model.py` (karpathy/nanoGPT, MIT), in our own lines, at its own CPU configuration:
a peer whose work is not ours, held against ours by FLOP/s of the model.

README of nanoGPT: `train.py config/train_shakespeare_char.py --device=cpu --compile=False --block_size=64
--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0`, 65 characters, fp32, AdamW not fused.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, LENGTH, BATCH, LAYERS, HEADS, WIDTH = 65, 64, 12, 4, 4, 128


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = (nn.LayerNorm(WIDTH, bias=False) for _ in range(2))
        self.c_attn, self.c_proj = (
            nn.Linear(WIDTH, 3 * WIDTH, bias=False),
            nn.Linear(WIDTH, WIDTH, bias=False),
        )
        self.c_fc, self.c_out = (
            nn.Linear(a, b, bias=False) for a, b in ((WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.c_attn(self.ln_1(x)).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).reshape(x.shape))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x))))


class NanoGPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.ln_f = nn.LayerNorm(WIDTH, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def loss(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.ln_f(self.blocks(self.wte(ids) + self.wpe.weight[: ids.shape[1]]))
        return F.cross_entropy((x @ self.wte.weight.T).flatten(0, 1), targets.flatten(), ignore_index=-100)

    def flops_per_token(self) -> float:
        """As `smollm2.parameters.flops_per_token`: 6 a matrix parameter, and causal attention."""
        matrices = sum(p.numel() for p in self.parameters() if p.dim() == 2) - self.wpe.weight.numel()
        return 6.0 * (matrices + LAYERS * WIDTH * LENGTH)
