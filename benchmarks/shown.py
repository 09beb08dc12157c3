"""How many codes a run's held-out pictures can show: its own, and the best tables for the same latents.

A table whose codes are all equally likely, met by independent tokens, would show K (1 - (1 - 1 / K)^N) of N tokens.
Held-out tokens are not independent (pictures come in families), so two tables are made of the training latents and
asked too: Lloyd's, which has the least squared error, and one whose cells hold equally many training latents.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from lexel.data import TRANSFORMS, ordered_batches
from lexel.data.config import open_data
from lexel.data.images import ImageSet
from lexel.kernels import nearest
from lexel.kernels.clustering import kmeans
from lexel.loading import load_tokenizer
from lexel.quantizers.base import as_vectors
from lexel.run_folder import RunFolder
from lexel.tokenizer import Tokenizer
from lexel.train import load_recipe
from lexel.train.tokenizer import TokenizerRecipe

DIRECTIONS = 4  # in which the cells of equal mass are cut


def options(parser: argparse.ArgumentParser) -> None:
    """Arguments of the benchmark."""
    parser.add_argument("run", type=Path, help="folder of a finished training of a tokenizer with one table")


@torch.no_grad()
def run(arguments: argparse.Namespace) -> None:
    """Prints a line of JSON: distinct codes of the held-out tokens, and of as many training pictures."""
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(arguments.run)
    recipe = load_recipe(RunFolder.read(arguments.run).recipe)
    if not isinstance(recipe, TokenizerRecipe):
        raise SystemExit(f"{arguments.run} is the run of a generator; name that of a tokenizer")
    learnt, held = (
        latents(tokenizer, images, recipe.data.transform, recipe.data.size) for images in open_data(recipe.data)
    )
    codes = tokenizer.quantizer.codebook
    size, tokens = len(codes), held.shape[0] * held.shape[1]
    order = torch.randperm(len(learnt), generator=torch.Generator().manual_seed(0))
    rows, unseen, subset = (x.flatten(0, 1) for x in (learnt, held, learnt[order[: len(held)]]))
    lloyd, _ = kmeans(rows, size, 8)
    found = {
        "codes": size,
        "held_out_tokens": tokens,
        "distinct_latents": len(unseen.unique(dim=0)),
        "even": round(size * (1 - (1 - 1 / size) ** tokens)),
        "shown": len(nearest(unseen, codes).unique()),
        "shown_by_as_many_training_pictures": len(nearest(subset, codes).unique()),
        "shown_by_all_training_pictures": len(nearest(rows, codes).unique()),
        "lloyd": len(nearest(unseen, lloyd).unique()),
        "equal_mass": cells_met(rows, unseen, size),
        "twins": twins(held),
        "twins_among_training_pictures": twins(learnt[order[: len(held)]]),
    }
    print(json.dumps(found))


def latents(tokenizer: Tokenizer, images: ImageSet, transform: str, size: int) -> Tensor:
    """The latents of every picture: (pictures, tokens, D)."""
    batches = ordered_batches(images, TRANSFORMS[transform](size), 128)
    found = []
    for batch in batches:
        z = tokenizer.latents(batch.images)
        found.append(as_vectors(z).view(len(z), -1, z.shape[1]))
    return torch.cat(found)


def cells_met(learnt: Tensor, held: Tensor, count: int) -> int:
    """How many of `count` cells that hold equally many rows of `learnt` (N, D) have a row of `held` (M, D).

    Cells are halved at the median of their widest direction, of the DIRECTIONS in which `learnt` varies most.
    """
    _, vectors = torch.linalg.eigh(torch.cov(learnt.T.double()))
    axes = vectors[:, -DIRECTIONS:].to(learnt)
    cells = [(learnt @ axes, held @ axes)]
    while len(cells) < count:
        halves = []
        for inside, met in cells:
            axis = int((inside.amax(0) - inside.amin(0)).argmax()) if len(inside) else 0
            cut = inside[:, axis].median() if len(inside) else inside.new_zeros(())
            halves += [(inside[inside[:, axis] <= cut], met[met[:, axis] <= cut])]
            halves += [(inside[inside[:, axis] > cut], met[met[:, axis] > cut])]
        cells = halves
    return sum(len(met) > 0 for _, met in cells)


def twins(latents: Tensor, at_most: float = 0.01) -> int:
    """How many pictures have another whose latents (pictures, tokens, D) differ by `at_most` of the variance."""
    flat = latents.flatten(1)
    distances = torch.cdist(flat, flat).square().fill_diagonal_(torch.inf).amin(1) / flat.shape[1]
    return int((distances < at_most * latents.var()).sum())
