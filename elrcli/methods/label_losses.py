"""What a network pays for contradicting the given labels, sample by sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

LabelLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits [B, K], labels, index [B] -> [B]

GCE_Q = 0.7
LOG_OF_ZERO = -4.0  # A of the paper on symmetric cross-entropy
SMALLEST = 1e-4


def cross_entropy(logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    """Return -log p_y of each sample, logits [B, K], labels [B] -> [B] >= 0."""
    return functional.cross_entropy(logits.float(), labels, reduction="none")


def generalised_cross_entropy(logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    """Return (1 - p_y ** q) / q of each sample with q = 0.7, [B, K] and [B] -> [B] in [0, 1/q].

    Between cross-entropy (q -> 0) and the mean absolute error (q = 1): a label that the network
    finds unlikely pulls less. Zhang and Sabuncu, NeurIPS 2018, eq. 6.
    """
    return (1 - torch.exp(-GCE_Q * cross_entropy(logits, labels, index))) / GCE_Q


def symmetric_cross_entropy(
    logits: Tensor, labels: Tensor, index: Tensor, *, alpha: float, beta: float
) -> Tensor:
    """Return alpha * CE + beta * RCE of each sample, [B, K] and [B] -> [B] >= 0.

    RCE exchanges label and prediction, -sum_k p_k log y_k. With log 0 = A = -4 this is
    4 (1 - p_y). Wang et al., ICCV 2019, eqs. 6 and 7.
    """
    losses = cross_entropy(logits, labels, index)
    return alpha * losses - beta * LOG_OF_ZERO * (1 - torch.exp(-losses))


class OverParameterisation(nn.Module):
    """Cross-entropy after a correction s that each sample learns (Liu et al., ICML 2022, SOP).

    With y the given label as one-hot, s = u^2 y - v^2 (1 - y) is what the label has more than
    the image shows. u and v start near zero, normal with deviation `start`, and move by plain
    gradient descent with rates of their own, so s stays sparse: u by the cross-entropy, v by the
    squared error of the predicted class plus s. They are part of `state_dict`, not parameters of
    an optimiser.
    """

    per_sample = ("u", "v")
    u: Tensor  # [N] in [-1, 1]
    v: Tensor  # [N, K] in [-1, 1]; the entry of the given label has no effect

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        lr_u: float,
        lr_v: float,
        start: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.lr_u = lr_u
        self.lr_v = lr_v
        u = torch.randn(num_samples, generator=generator)
        v = torch.randn(num_samples, num_classes, generator=generator)
        self.register_buffer("u", (u * start).clamp(-1, 1))
        self.register_buffer("v", (v * start).clamp(-1, 1))

    def forward(self, logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        """Return the corrected cross-entropy of each sample and move its u and v.

        logits [B, K], labels [B], index [B] without repeats -> [B]. The gradients of u and v are
        those of means over the batch, as in the authors' experiments.
        """
        probs = logits.float().softmax(dim=1)
        given = functional.one_hot(labels, probs.shape[1]).float()
        u, v = self.u[index], self.v[index]
        self._move(probs.detach(), given, index, u.clone(), v.clone())
        return _corrected_cross_entropy(probs, given, _correction(u, v, given))

    @torch.enable_grad()
    def _move(self, probs: Tensor, given: Tensor, index: Tensor, u: Tensor, v: Tensor) -> None:
        predicted = functional.one_hot(probs.argmax(dim=1), probs.shape[1]).float()
        u.requires_grad_()
        loss = _corrected_cross_entropy(probs, given, _correction(u, v, given)).mean()
        (gradient,) = torch.autograd.grad(loss, u)
        self.u[index] = (u - self.lr_u * gradient).detach().clamp(-1, 1)
        u = u.detach()
        v.requires_grad_()
        error = (predicted + _correction(u, v, given) - given).square().sum(dim=1).mean()
        (gradient,) = torch.autograd.grad(error, v)
        self.v[index] = (v - self.lr_v * gradient).detach().clamp(-1, 1)


def _correction(u: Tensor, v: Tensor, given: Tensor) -> Tensor:
    """Return s [B, K] of u [B], v [B, K] and one-hot labels [B, K]."""
    return u[:, None].square() * given - v.square() * (1 - given)


def _corrected_cross_entropy(probs: Tensor, given: Tensor, correction: Tensor) -> Tensor:
    """Return -log q_y with q proportional to p + s, at least 1e-4; all [B, K] -> [B]."""
    corrected = (probs + correction).clamp_min(SMALLEST)
    corrected = (corrected / corrected.sum(dim=1, keepdim=True)).clamp_min(SMALLEST)
    return -(given * corrected.log()).sum(dim=1)
