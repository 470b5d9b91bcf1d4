"""One stored tensor -> the weight matrices (out x in) that it holds, each with its role and layer."""

from spectra.matrices.finding import find_matrices, in_reading_order
from spectra.matrices.matrix import Matrix, RowBlocks
from spectra.matrices.orientation import TensorLike, transposed_tensors
from spectra.matrices.roles import ROLES

__all__ = ["ROLES", "Matrix", "RowBlocks", "TensorLike", "find_matrices", "in_reading_order", "transposed_tensors"]
