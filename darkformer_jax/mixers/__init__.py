"""The mixers, one file each, by the name that `model.attention.kind` gives them. A new one is one row here."""

from darkformer_jax.mixers.constant import Constant
from darkformer_jax.mixers.cosformer import CosFormer
from darkformer_jax.mixers.dark import Dark
from darkformer_jax.mixers.gated_deltanet import GatedDeltaNet
from darkformer_jax.mixers.hedgehog import Hedgehog
from darkformer_jax.mixers.lfk import LearnedFeatures
from darkformer_jax.mixers.linear_transformer import LinearTransformer
from darkformer_jax.mixers.linformer import Linformer
from darkformer_jax.mixers.mamba2 import Mamba2
from darkformer_jax.mixers.mixer import MixerKind
from darkformer_jax.mixers.nystromformer import Nystromformer
from darkformer_jax.mixers.performer import Performer
from darkformer_jax.mixers.random import Random
from darkformer_jax.mixers.reformer import Reformer
from darkformer_jax.mixers.rfa_gate import RFAGate
from darkformer_jax.mixers.softmax import Softmax
from darkformer_jax.mixers.softmax_local import LocalSoftmax
from darkformer_jax.mixers.window_only import WindowOnly

MIXERS: dict[str, type[MixerKind]] = {
    "softmax": Softmax,
    "softmax_local": LocalSoftmax,
    "performer": Performer,
    "dark": Dark,
    "lfk": LearnedFeatures,
    "linear_transformer": LinearTransformer,
    "hedgehog": Hedgehog,
    "cosformer": CosFormer,
    "rfa_gate": RFAGate,
    "mamba2": Mamba2,
    "gated_deltanet": GatedDeltaNet,
    "linformer": Linformer,
    "nystromformer": Nystromformer,
    "reformer": Reformer,
    "random": Random,
    "constant": Constant,
    "window_only": WindowOnly,
}
