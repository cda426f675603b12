"""Controls: other ways to train a model from fewer numbers, which sharing must be held against at equal parameters.

    model = control(model, "hashed", 0.1)        # before the optimizer, as share(model, 0.1)

Each replaces the weights of any module in place; in a recipe it is `share.control`, beside `share.budget`.
"""

from dist_ssn.baselines.attach import CONTROLS, control

__all__ = ["CONTROLS", "control"]
