"""A head that is fitted, with no gradient: a Gaussian of vectors (as PaDiM has one for each place)."""

import torch
from torch import distributed, nn
from torch.nn import functional as F


class Gaussian(nn.Linear):
    """Squared Mahalanobis distances; its weights, on which nothing depends, are what optimizers and DDP ask for."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.register_buffer("sums", 1e-3 * torch.eye(in_features + 1, dtype=torch.double))

    def learn(self, x):
        """Adds exact sums of 1, x and x x^T over the vectors (N, D) of all processes."""
        one = F.pad(x.detach().double(), (1, 0), value=1.0)
        new = one.T @ one
        if distributed.is_initialized():
            distributed.all_reduce(new)
        self.sums += new

    def forward(self, x):
        """(..., D) -> (...)."""
        sums = self.sums / self.sums[0, 0]
        mean = sums[0, 1:]
        covariance = sums[1:, 1:] - mean[:, None] * mean + 1e-3 * torch.eye(len(mean)).to(sums)
        return ((x - mean) @ torch.linalg.inv(covariance) * (x - mean)).sum(-1)
