"""What the head gives: everything needed for logits, and losses and scores that never hold all of them at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

from workers.models.causal_lm.network.balance import Routing
from workers.models.causal_lm.network.linear_loss import linear_cross_entropy, nll_sum
from workers.models.causal_lm.network.link import Link
from workers.models.causal_lm.network.pieces import chunk_rows


@dataclass(frozen=True)
class Readout:
    """Normed hidden states (N, D) at the positions that count, and the way from there to logits (N, V)."""

    hidden: Tensor
    lm_head: nn.Module
    link: Link
    #: Router logits of the trained layers on the way here; None: the model has no balance loss.
    routing: Routing | None = None

    def logits(self, rows: slice = slice(None)) -> Tensor:
        """Logits of some rows in the type the LM head computes in; ask for few rows at once."""
        return logits_of(self.hidden[rows], self.lm_head, self.link)

    @property
    def vocabulary(self) -> int:
        return int(cast("Tensor", self.lm_head.weight).shape[0])


# FSDP2 looks in what a module returns for tensors whose gradients will come; unregistered, a readout hides its own.
_pytree.register_pytree_node(
    Readout,
    lambda readout: ([readout.hidden], (readout.lm_head, readout.link, readout.routing)),
    lambda values, context: Readout(cast("Tensor", next(iter(values))), *context),
    serialized_type_name="workers.models.causal_lm.network.readout.Readout",
)


def logits_of(hidden: Tensor, lm_head: nn.Module, link: Link) -> Tensor:
    hidden = hidden if link.before == 1.0 else hidden * link.before
    if type(lm_head) is nn.Linear:
        # The module's own forward, past its hooks: ZeRO-3's send messages, and ranks have unequal numbers of pieces.
        logits = functional.linear(hidden, lm_head.weight, lm_head.bias)
    else:
        logits = cast("Tensor", lm_head(hidden))
    if link.scale != 1.0:
        logits = logits * link.scale
    return logits if link.cap is None else link.cap * torch.tanh(logits / link.cap)


def loss(readout: Readout, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of targets int64 (N,) as a float32 scalar, differentiable, in pieces of rows.

    A plain linear LM head computes its gradients along the way and recomputes nothing; any other (adapters,
    quantized weights) is run again, piece by piece, in the backward pass. No targets: zero, with zero gradients.
    """
    if targets.numel() == 0:
        return readout.hidden.float().sum() * 0.0
    head = readout.lm_head
    if type(head) is nn.Linear:
        return linear_cross_entropy(readout.hidden, head.weight, head.bias, targets, readout.link, smoothing)
    total = readout.hidden.new_zeros((), dtype=torch.float32)
    for rows in pieces(readout):
        total = total + checkpoint(
            _piece, readout.hidden[rows], head, readout.link, targets[rows], smoothing, use_reentrant=False
        )
    return total / targets.numel()


def with_balance(readout: Readout, loss: Tensor) -> Tensor:
    """The loss that is trained on: of models of experts `loss` and the balance loss of the routers that train, weighted
    as the model's configuration says; of others, and where all routers are frozen, `loss` itself. Once a batch."""
    balance = None if readout.routing is None else readout.routing.loss()
    return loss if balance is None else loss + balance.to(loss.device)


def _piece(hidden: Tensor, head: nn.Module, link: Link, targets: Tensor, smoothing: float) -> Tensor:
    return nll_sum(logits_of(hidden, head, link), targets, smoothing)


@torch.no_grad()
def token_scores(readout: Readout, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of targets int64 (N,): negative log-likelihood float32 (N,), and whether its logit is the largest (N,)."""
    nll = targets.new_empty(targets.shape, dtype=torch.float32)
    correct = targets.new_empty(targets.shape, dtype=torch.bool)
    for rows in pieces(readout):
        logits = readout.logits(rows).float()
        nll[rows] = logits.logsumexp(dim=-1) - logits.gather(1, targets[rows, None]).squeeze(1)
        correct[rows] = logits.argmax(dim=-1) == targets[rows]
    return nll, correct


def pieces(readout: Readout) -> list[slice]:
    rows, step = readout.hidden.shape[0], chunk_rows(readout.vocabulary)
    return [slice(start, start + step) for start in range(0, rows, step)]
