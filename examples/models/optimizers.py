"""The optimizers of one pretraining run and their learning rates.  Knows nothing about text.

With `muon_lr`, the layers' matrices are moved by Muon (torch.optim.Muon) and all else by AdamW.
"""

from typing import Any

import torch

from examples.models.recipes import Recipe

Groups = list[dict[str, Any]]


def rate_share(recipe: Recipe, step: int) -> float:
    """Warm-up, constant, then linear to zero; only that last part depends on `steps`."""
    decay_steps = max(1, round(recipe.steps * recipe.decay))
    return min(1.0, (step + 1) / recipe.warm_up, (recipe.steps - step) / decay_steps)


class Optimizers:
    """AdamW, or Muon beside AdamW, stepped and saved as one."""

    def __init__(self, model: torch.nn.Module, recipe: Recipe) -> None:
        self.recipe = recipe
        named = list(model.named_parameters())
        inner = [p for name, p in named if p.dim() == 2 and ".layers." in name]
        by_muon = {id(p) for p in inner} if recipe.muon_lr is not None else set()
        left = [p for _, p in named if id(p) not in by_muon]
        groups: Groups = [
            {"params": [p for p in left if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in left if p.dim() <= 1], "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), fused=True)
        self.parts: list[tuple[torch.optim.Optimizer, float]] = [(adamw, recipe.lr)]
        if recipe.muon_lr is not None:
            muon = torch.optim.Muon(inner, lr=recipe.muon_lr, momentum=0.95, weight_decay=0.1)
            self.parts.append((muon, recipe.muon_lr))

    def step(self, number: int) -> None:
        """Step `number` of the run, from the gradients as they are; then forget them."""
        share = rate_share(self.recipe, number)
        for optimizer, rate in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad()

    def state(self) -> list[dict[str, Any]]:
        """For load_state, through torch.save."""
        return [optimizer.state_dict() for optimizer, _ in self.parts]

    def load_state(self, states: list[dict[str, Any]]) -> None:
        """Continue from another instance's state."""
        for (optimizer, _), state in zip(self.parts, states, strict=True):
            optimizer.load_state_dict(state)
