"""NVLAMB in float64 on the CPU, parameter by parameter: the reference for panda's.

Written from its definition (arXiv 1904.00962; NVIDIA's apex, FusedLAMB with use_nvlamb), in numpy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray


class ReferenceLamb:
    """Steps ``weights``, float64 arrays by name, in place."""

    def __init__(
        self,
        weights: dict[str, Array],
        *,
        betas: tuple[float, float],
        epsilon: float,
        decay: dict[str, float],
        rates: dict[str, float] | None = None,
        max_grad_norm: float = 0.0,
        only_decayed: bool = False,
        naive: Sequence[Sequence[str]] = (),
    ) -> None:
        """``rates``: factors of the rate that ``step`` is given, by name.

        ``naive``: names of parameters that are taken for one layer, as LAMB on flat tensors does, which is wrong.
        """
        self.weights, self.betas, self.epsilon, self.decay = weights, betas, epsilon, decay
        self.rates = rates or dict.fromkeys(weights, 1.0)
        self.max_grad_norm, self.only_decayed = max_grad_norm, only_decayed
        self.layers = naive or [[name] for name in weights]
        self.mean = {name: np.zeros_like(weight) for name, weight in weights.items()}
        self.square = {name: np.zeros_like(weight) for name, weight in weights.items()}
        self.time = 0
        self.ratios: dict[str, float] = {}

    def step(self, gradients: dict[str, Array], rate: float) -> None:
        self.time += 1
        norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
        clip = norm / self.max_grad_norm if 0 < self.max_grad_norm < norm else 1.0
        beta1, beta2 = self.betas
        updates = {}
        for name, weight in self.weights.items():
            gradient = gradients[name] / clip
            self.mean[name] = beta1 * self.mean[name] + (1 - beta1) * gradient
            self.square[name] = beta2 * self.square[name] + (1 - beta2) * gradient**2
            mean = self.mean[name] / (1 - beta1**self.time)
            square = self.square[name] / (1 - beta2**self.time)
            updates[name] = mean / (np.sqrt(square) + self.epsilon) + self.decay[name] * weight
        for layer in self.layers:
            weight_norm = np.sqrt(sum((self.weights[name] ** 2).sum() for name in layer))
            update_norm = np.sqrt(sum((updates[name] ** 2).sum() for name in layer))
            for name in layer:
                ratio = weight_norm / update_norm if weight_norm > 0 and update_norm > 0 else 1.0
                if self.only_decayed and self.decay[name] == 0:
                    ratio = 1.0
                self.ratios[name] = ratio
                self.weights[name] -= rate * self.rates[name] * ratio * updates[name]
