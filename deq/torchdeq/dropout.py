"""torchdeq's variational dropouts: :class:`deq.nn.VariationalDropout` by the shape of what they take."""

from ..nn.dropout import VariationalDropout as _Dropout
from ..nn.dropout import reset_dropout


class VariationalDropout(_Dropout):
    """A mask of the shape of x."""

    def __init__(self, dropout: float = 0.5):
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must lie in [0, 1]; got {dropout!r}")
        super().__init__(dropout)

    @property
    def dropout(self) -> float:
        return self.p

    @dropout.setter
    def dropout(self, dropout: float) -> None:
        self.p = dropout


def _make(name: str, spatial: int, drops: str) -> type[_Dropout]:
    """The class for x (B, *spatial, D), or (B, D, *spatial) with token_first=False, that drops features or tokens."""

    class Dropout(VariationalDropout):
        def __init__(self, dropout: float = 0.5, token_first: bool = True):
            super().__init__(dropout)
            self.token_first = token_first
            places = range(1, spatial + 1) if token_first else range(2, spatial + 2)
            feature = spatial + 1 if token_first else 1
            self.shared = tuple(places) if drops == "features" else (feature,)

    Dropout.__name__ = Dropout.__qualname__ = name
    Dropout.__doc__ = (
        f"Drops whole {drops} of x (B, {', '.join('THW'[-spatial:])}, D), or with token_first=False of "
        f"(B, D, {', '.join('THW'[-spatial:])})."
    )
    return Dropout


VariationalDropout1d = _make("VariationalDropout1d", 1, "features")
VariationalDropout2d = _make("VariationalDropout2d", 2, "features")
VariationalDropout3d = _make("VariationalDropout3d", 3, "features")
VariationalDropToken1d = _make("VariationalDropToken1d", 1, "tokens")
VariationalDropToken2d = _make("VariationalDropToken2d", 2, "tokens")
VariationalDropToken3d = _make("VariationalDropToken3d", 3, "tokens")

__all__ = [
    "VariationalDropToken1d",
    "VariationalDropToken2d",
    "VariationalDropToken3d",
    "VariationalDropout",
    "VariationalDropout1d",
    "VariationalDropout2d",
    "VariationalDropout3d",
    "reset_dropout",
]
