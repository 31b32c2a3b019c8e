"""Privacy accounting: epsilon of a DP-SGD run, recomputed from what its checkpoint states."""

import warnings

from kn_zoo.checkpoints.manifest import Privacy
from kn_zoo.evaluation.result import Skipped

TOLERANCE = 1e-6  # of floating-point arithmetic on another machine


def spent_epsilon(
    accountant: str, noise_multiplier: float, sample_rate: float, steps: int, delta: float
) -> float:
    """Return epsilon of `steps` Poisson-subsampled Gaussian mechanisms.

    Args:
        accountant: one of Opacus', "prv" or "rdp".

    Raises:
        Skipped: Opacus is not installed.
    """
    try:
        from opacus.accountants import create_accountant
    except ImportError:
        raise Skipped(
            "epsilon was not recomputed, which requires Opacus: pip install 'kn_zoo[privacy]'"
        ) from None
    counted = create_accountant(accountant)
    counted.history = [(noise_multiplier, sample_rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "rdp" warns where its optimal order is the last one
        return float(counted.get_epsilon(delta))


def understated(privacy: Privacy) -> list[str]:
    """Recompute epsilon by both accountants; return a sentence for each that states less.

    Raises:
        Skipped: Opacus is not installed.
    """
    reasons = []
    for accountant, stated in (("prv", privacy.epsilon), ("rdp", privacy.epsilon_rdp)):
        recomputed = spent_epsilon(
            accountant,
            privacy.noise_multiplier,
            privacy.sample_rate,
            privacy.steps,
            privacy.delta,
        )
        if stated < recomputed - TOLERANCE:
            reasons.append(
                f"epsilon by {accountant}: the steps spent {recomputed:.4f}, the manifest says "
                f"{stated:.4f}"
            )
    return reasons
