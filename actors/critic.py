"""The critic: the value of the state before each token of a response."""

from typing import Any

from torch import Tensor

from actors.learner import Learner
from actors.model import ValueModel


class Critic(Learner):
    """Starts from a reward model's folder, or from a causal model's with a head that says 0 everywhere."""

    role = "critic"

    def load_model(self) -> ValueModel:
        return ValueModel.load(self.model)

    def figures(self, part: Any) -> Tensor:
        """[b, T] values."""
        return self.backend.forward(part.tokens, part.attention_mask, part.action_mask)
