"""VQGAN-LC: a frozen bank of image features behind a trained projector (https://arxiv.org/abs/2406.11837)."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lexel.checkpoint import atomic, read_safetensors
from lexel.errors import UsageError
from lexel.quantizers import bounds
from lexel.quantizers.projected import ProjectedVQ
from lexel.regular import expanded


class VQGANLC(ProjectedVQ):
    """The codes are a projection of frozen features, so all codes move together, within the bank's shape.

    The published bank is CLIP features of ImageNet, 100 centres for each class (`build_bank` makes one from any
    features). Without a bank the features are N(0, 1): the method then is SimVQ with a wide table.

        save_bank(build_bank(features, size=1024), "bank.safetensors")
        VQGANLC(codebook_size=1024, codebook_dim=8, bank="bank.safetensors", feature_dim=768)

    Args:
        codebook_size: number of codes, K.
        codebook_dim: length of a code, D; 8 in the paper.
        bank: file written by `save_bank`, or features (K, F). A saved model carries its bank: where weights follow
            (on the meta device) the file is not looked for.
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
        features = torch.empty(codebook_size, feature_dim)
        if bank is None:
            features.normal_()
        elif not features.is_meta:
            given = bank if isinstance(bank, Tensor) else load_bank(bank)
            if given.shape != features.shape:
                raise UsageError(
                    f"the bank must be codebook_size x feature_dim = {codebook_size} x {feature_dim}, "
                    f"got {' x '.join(map(str, given.shape))}"
                )
            features.copy_(given)
        self.bank = nn.Buffer(features)
        widths = [feature_dim, codebook_dim] if hidden is None else [feature_dim, hidden, codebook_dim]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.projector = nn.Sequential(*layers[:-1])
        if hidden is None:  # the released start of a single layer; two start as PyTorch starts them, as released
            nn.init.normal_(layers[0].weight, std=codebook_dim**-0.5)  # type: ignore[arg-type]

    def project(self) -> Tensor:
        return self.projector(self.bank)


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


def check_free(path: str | Path) -> None:
    """Refuses to write a bank over anything but an earlier one, such as a picture that it is made of.

    Raises:
        UsageError: `path` is a folder, or a file that is no bank.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give a file for the bank")
    if not path.exists():
        return
    try:
        load_bank(path)
    except UsageError:
        raise UsageError(f"{path} exists and is no bank, and would be overwritten; give another file") from None


def save_bank(bank: Tensor, path: str | Path) -> None:
    """Writes a bank (K, F) as a safetensors file, whole or not at all.

    Raises:
        UsageError: see `check_free`.
    """
    check_free(path)
    with atomic(path) as partial:
        save_file({"bank": bank.detach().float().contiguous()}, partial)


def load_bank(path: str | Path) -> Tensor:
    """Reads a bank float32 (K, F) that `save_bank` wrote.

    Raises:
        UsageError: the file is missing, damaged, or holds no bank.
    """
    path, advice = expanded(path), "make it with `build_bank` and `save_bank`"
    if not path.exists():
        raise UsageError(f"the bank {path} does not exist; {advice}")
    bank = read_safetensors(path).get("bank")
    if bank is None or bank.ndim != 2 or not bank.is_floating_point() or not bank.isfinite().all():
        raise UsageError(f"{path} holds no bank, finite numbers (K, F) named `bank`; {advice}")
    return bank.float()
