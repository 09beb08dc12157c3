"""A table behind a projection that trains: what SimVQ, VQGAN-LC and FVQ share."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.kernels import nearest
from lexel.quantizers.base import GRADIENTS, Quantized, Quantizer, choose, full_precision, vq_terms
from lexel.quantizers.living import Recoded
from lexel.quantizers.running import transformed


class ProjectedVQ(Quantizer):
    """Plain vector quantization on the table that `project()` makes, so every code moves when one is chosen.

    In training the table is made anew at every use. In evaluation mode it is a constant: made once, kept while
    nothing it is made of changes, and no gradient reaches it.
    """

    LOSS_WEIGHTS = {"codebook": 1.0, "commitment": 0.25}
    straight_through = True
    code_tables: tuple[str, ...] = ()  # unless a subclass can say which row makes a code

    def __init__(self, codebook_size: int, codebook_dim: int, gradient: str) -> None:
        super().__init__(codebook_size, codebook_dim)
        self.gradient = choose("gradient", gradient, GRADIENTS)
        self._kept: tuple[tuple[object, ...], Tensor] | None = None

    def project(self) -> Tensor:
        """The table in force, made from the parameters: (K, D)."""
        raise NotImplementedError

    @property
    def codebook(self) -> Tensor:
        # Autocast would round the codes, and with them the indices.
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            if self.training or torch.compiler.is_compiling():
                self._kept = None
                return self.project()
            parts = (*self.parameters(), *self.buffers())
            if any(part.is_inference() or transformed(part) for part in parts):  # they do not count their changes
                with torch.no_grad():
                    return self.project()
            state = tuple((part.data_ptr(), part._version, part.dtype) for part in parts)
            if self._kept is None or self._kept[0] != state:
                # Outside inference mode, so that the table can be used in training code later.
                with torch.inference_mode(False), torch.no_grad():
                    self._kept = state, self.project()
            return self._kept[1]

    def prune(self, table: Mapping[str, Any], kept: Tensor) -> Recoded:
        """As `Quantizer.prune`; the result is plain `vq`: a projection of fewer rows rounds their codes differently."""
        options = {"kind": "vq", "codebook_size": len(kept), "codebook_dim": self.codebook_dim}
        with torch.no_grad():
            weight = self.codebook.detach()[kept].clone()
        gradient = self.gradient if self.gradient in GRADIENTS else "straight_through"
        return Recoded({**options, "gradient": gradient}, {"weight": weight})

    @full_precision
    def forward(self, z: Tensor) -> Quantized:
        self.restart_dead(z)
        table = self.codebook
        vectors = z.movedim(1, -1)  # (B, *grid, D)
        indices = nearest(vectors.flatten(0, -2), table).view(vectors.shape[:-1])
        self.count_chosen(z, indices)
        z_q = F.embedding(indices, table).movedim(-1, 1)
        return Quantized(GRADIENTS[self.gradient](z, z_q), indices, vq_terms(z, z_q))
