"""A tall matrix as a small core and what turns the core's directions back."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_DEPENDENT = 3e4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Side:
    """A matrix [d, r] = basis @ turn @ core @ diag(lengths), basis @ turn orthonormal.

    Where basis and turn are None they are the identity.
    """

    core: Tensor
    lengths: Tensor
    basis: Tensor | None
    turn: Tensor | None

    def turned(self, directions: Tensor) -> Tensor:
        """Return basis @ turn @ directions, on the device of the basis."""
        directions = directions.to(self.lengths.device)
        if self.turn is not None:
            directions = self.turn @ directions
        return directions if self.basis is None else self.basis @ directions


def reduced(side: Tensor, products: Tensor | None = None) -> Side:
    """Reduce a matrix [d, r] in fp64 to a core, and what turns the core's directions back.

    Args:
        side: [d, r].
        products: side.T @ side, where it is known already.
    """
    (found,) = reduced_together(side[None], None if products is None else products[None])
    return found


def reduced_together(sides: Tensor, products: Tensor | None = None) -> list[Side]:
    """Reduce b matrices in fp64 by the Cholesky factor of the Gram matrix, by QR where that fails.

    Args:
        sides: [b, d, r].
        products: sides.mT @ sides, where it is known already.
    """
    rows, rank = sides.shape[1:]
    if rows <= rank:
        lengths = torch.ones(rank, dtype=sides.dtype, device=sides.device)
        return [Side(core=side, lengths=lengths, basis=None, turn=None) for side in sides]
    products = sides.mT @ sides if products is None else products
    lengths = products.diagonal(dim1=-2, dim2=-1).sqrt()
    # A zero column fails as it should: its row of the Gram matrix stays zero.
    safe = torch.where(lengths > 0, lengths, 1.0)
    lower, failed = torch.linalg.cholesky_ex(products / safe[:, None] / safe[:, :, None])
    one = torch.eye(rank, dtype=sides.dtype, device=sides.device).expand_as(lower)
    inverse = torch.linalg.solve_triangular(lower, one, upper=False)
    # Columns of length one: this is at least the condition, whose square times eps is the error.
    condition = math.sqrt(rank) * torch.linalg.vector_norm(inverse, dim=(1, 2))
    accurate = ((failed == 0) & (condition < _DEPENDENT)).tolist()
    turns = inverse.mT / safe[:, :, None]
    return [
        Side(core=lower[place].T, lengths=lengths[place], basis=side, turn=turns[place])
        if accurate[place]
        else by_qr(side, lengths[place])
        for place, side in enumerate(sides)
    ]


def by_qr(side: Tensor, lengths: Tensor) -> Side:
    """Reduce a matrix [d, r] by Householder QR, its columns divided by their lengths [r] first."""
    # Lengths of one in place of zero: a zero column stays zero.
    safe = torch.where(lengths > 0, lengths, 1.0)
    basis, core = torch.linalg.qr(side / safe)
    return Side(core=core, lengths=safe, basis=basis, turn=None)
