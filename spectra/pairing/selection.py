"""Which matrices a user asked for: globs on their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from spectra.matrices import Matrix
from spectra.pairing.refusals import matches_nothing


@dataclass(frozen=True)
class Selection:
    """Globs on matrix names, as the command line takes them. Nothing to include means everything."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def why_not(self, matrix: Matrix) -> str | None:
        """Why a matrix was not asked for; None where it was."""
        excluding = next((pattern for pattern in self.exclude if matches(matrix, pattern)), None)
        if excluding is not None:
            return f"excluded by '{excluding}'"
        if self.include and not any(matches(matrix, pattern) for pattern in self.include):
            return f"not included by {' or '.join(repr(pattern) for pattern in self.include)}"
        return None

    def require_sense(self, matrices: Sequence[Matrix], source: str) -> None:
        """Raise `SpectraError` for a pattern that matches nothing, which is always a slip."""
        for kind, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(matches(matrix, pattern) for matrix in matrices):
                    raise matches_nothing(kind, pattern, [matrix.name for matrix in matrices], source)


def matches(matrix: Matrix, pattern: str) -> bool:
    """Whether a glob names a matrix, by its own name or by its tensor's.

    The brackets of a part stand for themselves as well: `*.c_attn.weight[q]` names the part, as it is printed.
    """
    literal = pattern.replace("[", "[[]")
    return any(fnmatchcase(name, glob) for name in (matrix.name, matrix.tensor) for glob in (pattern, literal))
