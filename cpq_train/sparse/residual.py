"""The sum of a residual block, as a module of its own so that quantization can swap it."""

from torch import Tensor, nn


class ResidualAdd(nn.Module):
    """Plain sum of a branch and its identity; a module so that quantization can swap it."""

    def forward(self, branch: Tensor, identity: Tensor) -> Tensor:
        """Adds two tensors of one shape, or of shapes that broadcast.

        Args:
            branch: output of the block's last normalisation, shape (V, C).
            identity: input of the block, shape (V, C).

        Returns:
            The sum, shape (V, C).
        """
        return branch + identity
