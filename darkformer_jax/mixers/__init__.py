"""The mechanisms, by the name that `model.attention.kind` gives them."""

from darkformer_jax.mixers.features import Constant, Dark, LearnedFeatures, Performer, Random, WindowOnly
from darkformer_jax.mixers.softmax import LocalSoftmax, Softmax

MECHANISMS = {
    "softmax": Softmax,
    "softmax_local": LocalSoftmax,
    "performer": Performer,
    "dark": Dark,
    "lfk": LearnedFeatures,
    "random": Random,
    "constant": Constant,
    "window_only": WindowOnly,
}
