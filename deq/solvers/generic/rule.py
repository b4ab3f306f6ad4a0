"""When is a sample of any function done? The rule of deq/reference.py (iterate), with room for other criteria."""

from dataclasses import dataclass

from ...reference import leaves_at

CRITERIA = ("residual", "error", "absolute")
METHODS = ("plain", "anderson", "broyden", "newton_krylov", "auto")
_MEASURES = {
    "residual": "||f(y) - y|| / ||f(y)||",
    "error": "||f(y) - y|| / ||f(y)|| q / (1 - q), q its measured contraction,",
    "absolute": "||f(y) - y||",
}
# Evaluations without a better residual until STALLED, and the same at the floor of the precision. Unlike the rows of
# deq.solve the states here may have 10^6 elements, so that the patience does not grow with them.
PATIENCE, PATIENCE_AT_FLOOR = 128, 32
# A sample whose patience ends so many times larger than it began did not stall, it diverges slowly.
GROWN = 1e3
# An accelerated iterate whose residual is so many times the best one starts the history afresh from the best iterate.
SAFEGUARD = 10.0


@dataclass(frozen=True)
class Rule:
    """How a solve is run and judged.

    method: of METHODS; "auto" is plain, and Anderson for samples that are seen to contract slowly.
    depth: pairs of Anderson's history, steps of Broyden's, Krylov vectors of Newton-Krylov.
    damping: beta of ``y + beta (f(y) - y)``, plain or Anderson; Broyden's first step.
    criterion: "residual" stops a sample at ``r = ||f(y) - y|| / ||f(y)|| <= tol``, "error" at ``r q / (1 - q) <= tol``
        with its measured contraction q, "absolute" at ``||f(y) - y|| <= tol``.
    affine: whether f is known to be affine, as the equations of derivatives are. Anderson then stops a sample where
        the residual of the next point, a mix of those that it has, is within the tolerance: one evaluation saved.
    margin: whether a sample that contracts fast is taken to ``tol^1.1`` (deq/reference.py says why).
    """

    method: str
    tol: float
    max_iter: int
    depth: int = 5
    damping: float = 1.0
    criterion: str = "residual"
    margin: bool = True
    affine: bool = False

    def __str__(self) -> str:
        methods = {
            "plain": "plain",
            "anderson": f"Anderson({self.depth})",
            "broyden": f"Broyden({self.depth})",
            "newton_krylov": f"Newton-Krylov({self.depth})",
            "auto": f"plain, Anderson({self.depth}) on demand",
        }
        parts = [methods[self.method], f"tol {self.tol:g}"]
        if self.criterion != "residual":
            parts.append(f"{self.criterion} criterion")
        if self.damping != 1.0:
            parts.append(f"damping {self.damping:g}")
        return ", ".join(parts)

    def explain(self) -> str:
        """The rule and its reasons, one line each."""
        reasons = [
            f"a sample is done at {_MEASURES[self.criterion]} <= {self.tol:g}, after {self.max_iter} evaluations"
        ]
        if self.method == "auto":
            reasons.append("on demand: plain iteration, Anderson per sample where the measured contraction is slow")
        return "\n".join((str(self), *(f"  {reason}" for reason in reasons)))

    @property
    def leave(self) -> float:
        """The residual at which a sample leaves."""
        return leaves_at(self.tol) if self.margin else self.tol
