"""Baselines: other methods to train a model with fewer parameters, for comparisons with sharing at equal parameters.

    model = control(model, "hashed", 0.1)        # before the optimizer, like share(model, 0.1)

Each replaces the weights of any module in place. In a recipe it is `share.control`, together with `share.budget`.
"""

from dist_ssn.baselines.attach import CONTROLS, control

__all__ = ["CONTROLS", "control"]
