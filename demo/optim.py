"""Muon for the matrices inside the blocks, AdamW for the rest, one schedule for both.

Muon (Keller Jordan, 2024) replaces the momentum of a matrix by the nearest orthogonal matrix.
On these small models it needs about half as many steps as AdamW alone.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import distributed

MATRIX_LR = 0.02
OTHER_LR = 3e-3
MOMENTUM = 0.95


def orthogonalise(stack: torch.Tensor, rounds: int = 4) -> torch.Tensor:
    """Push the singular values of every matrix of `stack` [n, rows, cols] towards one."""
    tall = stack.shape[1] > stack.shape[2]
    x: torch.Tensor = stack.mT if tall else stack
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon, orthogonalising matrices of one shape together, which makes it cheap on a CPU.

    With several workers, each updates its share of the layers and the updates are summed; every
    worker must have the same gradients.
    """

    def __init__(
        self, layers: Sequence[Iterable[torch.nn.Parameter]], rank: int = 0, workers: int = 1
    ) -> None:
        groups = [
            {"params": list(layer), "mine": i % workers == rank} for i, layer in enumerate(layers)
        ]
        super().__init__(groups, {"lr": MATRIX_LR})
        self.workers = workers

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure form
        """Apply one update from the current gradients."""
        del closure
        stacks: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
        places: dict[torch.nn.Parameter, tuple[torch.Size, int]] = {}
        for group in self.param_groups:
            for param in group["params"]:
                # All workers keep the momentum, so that any of them can save the whole state.
                direction = self._momentum(param)
                if group["mine"]:
                    places[param] = (param.shape, len(stacks[param.shape]))
                    stacks[param.shape].append(direction)
        solved = {shape: orthogonalise(torch.stack(stack)) for shape, stack in stacks.items()}
        every = [param for group in self.param_groups for param in group["params"]]
        updates = [
            solved[places[p][0]][places[p][1]] if p in places else torch.zeros_like(p)
            for p in every
        ]
        lr = self.param_groups[0]["lr"]
        for param, update in zip(every, self._summed(updates), strict=True):
            rows, columns = param.shape
            param.add_(update, alpha=-lr * max(1.0, rows / columns) ** 0.5)

    def _summed(self, updates: list[torch.Tensor]) -> list[torch.Tensor]:
        if self.workers == 1:
            return updates
        flat = torch.cat([update.flatten() for update in updates])
        distributed.all_reduce(flat)
        pieces = torch.split_with_sizes(flat, [update.numel() for update in updates])
        return [piece.view_as(u) for piece, u in zip(pieces, updates, strict=True)]

    def _momentum(self, param: torch.nn.Parameter) -> torch.Tensor:
        grad = param.grad
        assert grad is not None
        state = self.state[param]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(param)
        buffer: torch.Tensor = state["momentum"]
        buffer.lerp_(grad, 1 - MOMENTUM)
        return grad.lerp(buffer, MOMENTUM)


def optimisers(
    model: torch.nn.Module, rank: int = 0, workers: int = 1
) -> list[torch.optim.Optimizer]:
    """Muon for block matrices, AdamW for embeddings, head, norms and biases."""
    layers: dict[str, list[torch.nn.Parameter]] = defaultdict(list)
    others = []
    for name, param in model.named_parameters():
        if param.ndim == 2 and ".layers." in name:
            layers[name.split(".")[2]].append(param)
        else:
            others.append(param)
    return [
        Muon(list(layers.values()), rank, workers),
        torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int, steps: int, warmup: int = 100, decay_share: float = 0.3) -> float:
    """Share of the peak rate: a short rise, a plateau, a linear fall to zero."""
    fall = (steps - step) / max(1.0, decay_share * steps)
    return max(0.0, min(1.0, (step + 1) / warmup, fall))


def set_rate(optims: list[torch.optim.Optimizer], share: float) -> None:
    """Set every learning rate to `share` of its peak."""
    for optim in optims:
        for group in optim.param_groups:
            group["lr"] = group.setdefault("peak_lr", group["lr"]) * share
