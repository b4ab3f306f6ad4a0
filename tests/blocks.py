"""Blocks that several files of tests make equilibria of."""

import torch
from torch import nn


class Dropped(nn.Module):
    def __init__(self, layer, drop):
        super().__init__()
        self.layer, self.drop = layer, drop

    def forward(self, z, x):
        return torch.tanh(0.3 * self.drop(self.layer(z)) + x)
