"""Models for others: a model card filled from the run, and the Hugging Face hub."""

import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lexel import checkpoint, config, loading, provenance
from lexel.errors import UsageError
from lexel.run_folder import RunFolder
from lexel.tokenizer import Tokenizer

PICTURES = 8  # in a row of the sample strip
STRIPS = {  # rows of the strip, by what they show
    "originals above, reconstructions below": ("originals", "reconstructions"),
    "an image of each of the first classes, without guidance": ("samples",),
}
LIBRARY = "lexel"


def push_to_hub(
    run: str | Path,
    repository: str,
    *,
    results: Sequence[str | Path] = (),
    licence: str | None = None,
    weights: str | None = None,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Uploads a run's or folder's model with its card, recipe and sample pictures; returns the address.

    Args:
        run: a run folder or a model folder.
        repository: owner/name; made if it does not exist.
        results: files of `lexel evaluate --json`; their metrics go into the card.
        licence: the name of a licence, as the hub writes it (apache-2.0).
        weights: of a run; see `lexel.load`.
        private: of a new repository.
        token: of the hub; the one that `hf auth login` stored if not given.

    Raises:
        UsageError: the folder is no model, or the hub refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        stage(run, folder, results=results, licence=licence, weights=weights, repository=repository)
        from huggingface_hub import HfApi

        with checkpoint.from_hub(f"the hub does not take {repository}"):
            api = HfApi(token=token)
            api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message="A Lexel model")
    return f"https://huggingface.co/{repository}"


def stage(
    run: str | Path,
    folder: str | Path,
    *,
    results: Sequence[str | Path] = (),
    licence: str | None = None,
    weights: str | None = None,
    repository: str = "OWNER/NAME",
) -> None:
    """Writes what `push_to_hub` uploads: the model, its card, and the recipe and sample pictures of a run.

    Names of data and files lose their folders, which tell of the machine and its user.
    """
    folder = Path(folder)
    if folder.resolve() == Path(run).resolve():
        raise UsageError(f"{folder} is the run itself; give another folder to write to")
    model = loading.load(run, weights=weights)
    measured = _read(results)
    model.save_pretrained(folder, provenance=provenance.without_folders(model.provenance))
    files = RunFolder.read(run)
    recipe = config.to_toml(provenance.without_folders(files.read_recipe())) if files.recipe.is_file() else None
    if recipe is not None:
        (folder / files.recipe.name).write_text(recipe, encoding="utf-8")
    pictures = _sample_strip(files, folder / "samples.png")
    card = _card(model, recipe, repository, measured, licence, pictures)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _read(results: Sequence[str | Path]) -> list[dict[str, Any]]:
    if not results:
        return []
    from lexel.evaluate import read_result

    return [read_result(path) for path in results]


def _sample_strip(run: RunFolder, path: Path) -> str | None:
    """Writes pictures from the last snapshot and returns what they show; None if there are none."""
    tensors = run.last_snapshot()
    for caption, names in STRIPS.items():
        if set(names) <= tensors.keys():
            rows = [np.concatenate(list(tensors[name][:PICTURES]), 1) for name in names]
            Image.fromarray(np.concatenate(rows, 0)).save(path)
            return caption
    return None


def _card(
    model: Any,
    recipe: str | None,
    repository: str,
    results: Sequence[Mapping[str, Any]],
    licence: str | None,
    pictures: str | None,
) -> str:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    generates = not isinstance(model, Tokenizer)
    kind = "image generator over tokens" if generates else "image tokenizer"
    data = ModelCardData(
        license=licence,
        library_name=LIBRARY,
        tags=["image-generation" if generates else "image-tokenizer", "vector-quantization", LIBRARY],
        model_name=repository.split("/")[-1],
        eval_results=[
            EvalResult(
                task_type="unconditional-image-generation" if generates else "image-to-image",
                dataset_type="image-folder",
                dataset_name=f"{result['data']['images']} images, {result['protocol']['name']} protocol",
                metric_type=name,
                metric_value=value,
            )
            for result in results
            for name, value in result["metrics"].items()
            if isinstance(value, int | float)
        ]
        or None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repository.split('/')[-1]}",
        f"An {kind}, made with Lexel.",
        f"![{pictures}](samples.png)" if pictures else "",
        "## Use\n\n" + _use(repository, generates),
        "## What it is\n\n" + _table(_facts(model, generates)),
        *(_result_section(result) for result in results),
        _training_section(recipe),
        "## Where it comes from\n\n" + _table(provenance.without_folders(model.provenance)) if model.provenance else "",
    ]
    return ModelCard("\n\n".join(part for part in parts if part) + "\n").content


def _use(repository: str, generates: bool) -> str:
    lines = (
        ["indices = model.sample([0, 1, 2, 3], cfg_scale=2.0)  # class labels in, (B, h, w) out"]
        if generates
        else [
            "indices = model.encode(images)  # images: float (B, 3, H, W) in [-1, 1]",
            "images = model.decode(indices)",
        ]
    )
    return "\n".join(["```python", "import lexel", "", f'model = lexel.load("{repository}")', *lines, "```"])


def _facts(model: Any, generates: bool) -> dict[str, Any]:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts: dict[str, Any] = {"parameters": f"{parameters:,}", "fingerprint": model.fingerprint()[:16]}
    if generates:
        network = model.config.transformer
        return {
            **facts,
            "family": network.kind,
            "tokens": f"{' x '.join(map(str, network.shape))} of {network.codebook_size:,}",
            "condition": network.condition_in_words(),
        }
    return {
        **facts,
        "codes": f"{model.codebook_size:,}",
        "dimension of a code": model.quantizer.codebook_dim,
        "quantizer": model.config.quantizer["kind"],
        "downsampling": model.downsampling,
    }


def _result_section(result: Mapping[str, Any]) -> str:
    protocol, about = result["protocol"], result["data"]
    title = f"## Measured with the {protocol['name']} protocol\n\n{protocol.get('summary', '')}\n\n"
    note = f"\n\nOn {about['images']} images; evaluated with Lexel {result.get('versions', {}).get('lexel', '?')}."
    values = {name: f"{value:.4g}" for name, value in result["metrics"].items() if isinstance(value, int | float)}
    return title + _table(values) + note


def _training_section(recipe: str | None) -> str:
    if recipe is None:
        return ""
    train = tomllib.loads(recipe).get("train", {})
    steps = f" for {train['steps']:,} steps" if isinstance(train.get("steps"), int) else ""
    return (
        f"## Training\n\nTrained{steps} with this recipe (`lexel train recipe.toml`):\n\n```toml\n{recipe.strip()}\n```"
    )


def _table(values: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {_cell(value)} |" for name, value in values.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {inner}" for name, inner in value.items()) or "nothing"
    return str(value).replace("|", "\\|").replace("\n", " ")
