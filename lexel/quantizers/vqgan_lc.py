"""VQGAN-LC: a frozen bank of image features behind a trained projector (https://arxiv.org/abs/2406.11837)."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lexel.errors import UsageError
from lexel.quantizers import bounds
from lexel.quantizers.projected import ProjectedVQ


class VQGANLC(ProjectedVQ):
    """The codes are a projection of frozen features, so all codes move together, within the bank's shape.

    The published bank is CLIP features of ImageNet, 100 centres for each class (`build_bank` makes one from any
    features). Without a bank the features are N(0, 1): the method then is SimVQ with a wide table.

        save_bank(build_bank(features, size=1024), "bank.safetensors")
        VQGANLC(codebook_size=1024, codebook_dim=8, bank="bank.safetensors", feature_dim=768)

    Args:
        codebook_size: number of codes, K.
        codebook_dim: length of a code, D; 8 in the paper.
        bank: file written by `save_bank`, or features (K, F). A saved model carries its bank: a file that is gone
            is an error when the bank is first used, unless weights have been loaded by then.
        feature_dim: length of a feature, F.
        hidden: width of a layer with ReLU between features and codes; None projects at once.
        gradient: "straight_through" or "rotation".
    """

    # The released 1 and 0.33, times its rate of 0.1 for quantization.
    LOSS_WEIGHTS = {"codebook": 0.033, "commitment": 0.1}

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        bank: str | Path | Tensor | None = None,
        feature_dim: int = 768,
        hidden: int | None = None,
        gradient: str = "straight_through",
    ) -> None:
        super().__init__(codebook_size, codebook_dim, gradient)
        bounds.table(codebook_size, bounds.integer("feature_dim", feature_dim, 1, 2**20))
        if hidden is not None:
            bounds.integer("hidden", hidden, 1, 2**20)
        self._missing: str | None = None
        features = torch.empty(codebook_size, feature_dim)
        if bank is None:
            features.normal_()
        elif isinstance(bank, Tensor) or Path(bank).exists():
            given = bank if isinstance(bank, Tensor) else load_bank(bank)
            if given.shape != features.shape:
                raise UsageError(
                    f"the bank must be codebook_size x feature_dim = {codebook_size} x {feature_dim}, "
                    f"got {' x '.join(map(str, given.shape))}"
                )
            features.copy_(given)
        else:
            self._missing = str(bank)
        self.register_buffer("bank", features)
        self.bank: Tensor
        self.register_load_state_dict_post_hook(_bank_loaded)
        widths = [feature_dim, codebook_dim] if hidden is None else [feature_dim, hidden, codebook_dim]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.projector = nn.Sequential(*layers[:-1])
        if hidden is None:  # the released start of a single layer; two start as PyTorch starts them, as released
            nn.init.normal_(layers[0].weight, std=codebook_dim**-0.5)  # type: ignore[arg-type]

    def project(self) -> Tensor:
        if self._missing is not None:
            raise UsageError(f"the bank {self._missing} does not exist; make it with `build_bank` and `save_bank`")
        return self.projector(self.bank)


def _bank_loaded(module: nn.Module, incompatible_keys: object) -> None:
    """Weights bring the bank along. A function of the module, so that the quantizer can be pickled."""
    assert isinstance(module, VQGANLC)
    module._missing = None


def build_bank(
    features: Tensor | np.ndarray, size: int, labels: Sequence[int] | Tensor | np.ndarray | None = None, seed: int = 0
) -> Tensor:
    """A bank of features by k-means: the centres, float32 (size, F).

    Args:
        features: (N, F) from any encoder, at least one for each centre.
        size: number of centres, K.
        labels: a class for each feature; each class then gets an equal share of the centres (the first classes one
            more where size does not divide), as in the paper. None clusters all features together.
        seed: of the clustering.

    Raises:
        UsageError: there are fewer features, or in a class, than centres.
    """
    # Takes a second to import; only banks need it.
    from sklearn.cluster import MiniBatchKMeans  # type: ignore[import-untyped]

    rows = np.asarray(features, dtype=np.float32)
    if rows.ndim != 2:
        raise UsageError(f"features must be (N, F), got {rows.shape}")
    names = np.zeros(len(rows), dtype=np.int64) if labels is None else np.asarray(labels)
    if names.shape != (len(rows),):
        raise UsageError(f"labels must give one class for each of {len(rows)} features, got {names.shape}")
    classes = np.unique(names)
    centres = []
    for number, name in enumerate(classes):
        members = rows[names == name]
        share = size // len(classes) + (number < size % len(classes))
        if len(members) < share:
            place = "" if labels is None else f" of class {name}"
            raise UsageError(f"{share} centres need at least as many features, got {len(members)}{place}")
        if share == len(members):
            centres.append(members)
        elif share > 0:
            model = MiniBatchKMeans(share, random_state=seed, n_init=1, batch_size=max(1024, 2 * share))
            centres.append(model.fit(members).cluster_centers_)
    return torch.from_numpy(np.concatenate(centres).astype(np.float32))


def save_bank(bank: Tensor, path: str | Path) -> None:
    """Writes a bank (K, F) as a safetensors file."""
    save_file({"bank": bank.float().contiguous()}, str(path))


def load_bank(path: str | Path) -> Tensor:
    """Reads a bank (K, F) that `save_bank` wrote.

    Raises:
        UsageError: the file is missing or holds no bank.
    """
    try:
        with safe_open(str(path), "pt") as file:
            return file.get_tensor("bank")
    except FileNotFoundError:
        raise UsageError(f"the bank {path} does not exist; make it with `build_bank` and `save_bank`") from None
    except SafetensorError as error:
        raise UsageError(f"{path} holds no bank; make it with `build_bank` and `save_bank` ({error})") from None
