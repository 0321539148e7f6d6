"""What a converted model's window shows of a passage: there, features fit nothing, and copying chooses nothing."""

from darkformer_jax.errors import UserError
from darkformer_jax.mixers.spec import MixerSpec


def check_sight(mixer: MixerSpec, context: int, *, fits: bool, chooses: bool) -> None:
    """Refuses passages that are too short to tell anything about a mechanism with a window.

    Args:
      mixer: of a layer that replaces an exact one.
      context: tokens of a passage.
      fits: whether the features are to be fitted.
      chooses: whether layers or heads are to be chosen, also by what copying costs.

    Raises:
      UserError: the window shows all of a passage that features are to be fitted on, or both copies of one that layers
        or heads are to be chosen by.
    """
    if not mixer.window:
        return
    shown = (1 + (mixer.window + mixer.num_sinks) // mixer.chunk_size) * mixer.chunk_size
    if fits and context <= shown:
        raise UserError(
            f"--context={context}: a window of {mixer.window} shows all of it, so there is nothing to fit; allowed: "
            f"--context above {shown}, a smaller --window, or 0 steps"
        )
    if chooses and copies_are_shown(mixer.window, context):
        raise UserError(
            f"--context={context}: its repeated half lies {context // 2} tokens back, where a window of {mixer.window} "
            f"shows it, so copying chooses nothing; allowed with auto: --context above {2 * mixer.window + 3}, or a "
            "smaller --window"
        )


def copies_are_shown(window: int, context: int) -> bool:
    """Whether each token of the second copy sees, in the window, the token after its like in the first copy.

    A copy is half a passage, so that token is context / 2 - 1 places back, and a query sees at least `window` tokens.
    """
    return bool(window) and context // 2 - 1 <= window
