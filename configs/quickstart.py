"""A small DARKFormer on the Python standard library's own text, in a few minutes on two CPU cores.

python train.py
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """See above."""
    c = base.get_config()
    c.model.dtype = "float32"  # CPUs have no bfloat16 units
    return c
