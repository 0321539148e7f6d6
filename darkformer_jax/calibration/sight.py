"""What a converted model's window shows of a passage: there, features fit nothing, and copying chooses nothing."""

from darkformer_jax.errors import UserError
from darkformer_jax.mixers.spec import MixerSpec


def check_sight(mixer: MixerSpec, context: int, begin: int, *, fits: bool, chooses: bool) -> None:
    """Refuses passages that are too short to tell anything about a mechanism with a window.

    Args:
      mixer: of a layer that replaces an exact one.
      context: tokens of a passage.
      begin: how many of them come before its text.
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
    distance = copy_distance(context, begin)
    if chooses and copies_are_shown(mixer.window, distance):
        raise UserError(
            f"--context={context}: its repeated half lies {distance} tokens back, where a window of {mixer.window} "
            f"shows it, so copying chooses nothing; allowed with auto: --context above {2 * mixer.window + 3 + begin}, "
            "or a smaller --window"
        )


def copy_distance(context: int, begin: int) -> int:
    """From a token of a passage's repeated half to its like in the first copy, as in `hybrids.repeated_row`."""
    return (context - begin) // 2


def copies_are_shown(window: int, distance: int) -> bool:
    """Whether each token of the second copy sees, in the window, the token after its like in the first copy.

    That one is distance - 1 places back, and a query sees at least `window` tokens before it.
    """
    return bool(window) and distance - 1 <= window
