"""SimVQ: a frozen table behind one linear layer (https://arxiv.org/abs/2411.02038)."""

import torch
from torch import Tensor, nn

from lexel.quantizers.projected import ProjectedVQ


class SimVQ(ProjectedVQ):
    """The codes are a linear map of a frozen random table: training the map moves them all.

    The table starts at N(0, 1/D) and stays; the layer has a bias, as in the released code.

        SimVQ(codebook_size=65536, codebook_dim=128)

    Args:
        codebook_size: number of codes, K.
        codebook_dim: length of a code, D.
        bias: whether the layer has one.
        gradient: "straight_through" or "rotation" (users report a growing commitment term with the latter).
    """

    code_tables = ("table",)

    def __init__(
        self, codebook_size: int, codebook_dim: int, bias: bool = True, gradient: str = "straight_through"
    ) -> None:
        super().__init__(codebook_size, codebook_dim, gradient)
        self.table = nn.Buffer(torch.randn(codebook_size, codebook_dim).mul_(codebook_dim**-0.5))
        self.projection = nn.Linear(codebook_dim, codebook_dim, bias=bias)

    def rows_for(self, codes: Tensor) -> Tensor:
        weight, bias = self.projection.weight.double(), self.projection.bias
        centred = codes.double() - (0 if bias is None else bias.double())
        return torch.linalg.lstsq(weight, centred.T).solution.T.to(codes)

    def project(self) -> Tensor:
        return self.projection(self.table)
