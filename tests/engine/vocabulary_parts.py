"""The loss of a vocabulary of which each of two ranks has a part; test_tensor_parallel.py starts them."""

from __future__ import annotations

import torch
import torch.distributed as dist

from panda.models.forward import cross_entropy


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weight and labels. Logits up to a hundred, whose exponentials overflow in float32."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(10, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return hidden, 30 * weight, torch.randperm(10, generator=generator)


def compute(rank: int, folder: str) -> None:
    """Save to ``folder`` what ``rank`` gets: three times the loss's gradients, and the loss."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    cross_entropy.LOGITS_AT_ONCE = 3 * 5  # three tokens of this rank's five entries
    hidden, weight, labels = problem()
    hidden, part = hidden.requires_grad_(), weight.chunk(2)[rank].clone().requires_grad_()
    loss = cross_entropy.linear_cross_entropy(hidden, part, labels, dist.group.WORLD)
    (3 * loss).backward()
    torch.save((loss.detach(), hidden.grad, part.grad), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
