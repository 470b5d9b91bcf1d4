"""Base matrices <-> tuned matrices: by name, through the usual prefixes; and what was not matched, with the reason."""

from spectra.pairing.pairing import pair
from spectra.pairing.pairs import Pair, Pairing, Unmatched

__all__ = ["Pair", "Pairing", "Unmatched", "pair"]
