"""Reports: from a run folder to one page that needs nothing else."""

import base64
import io
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from lexel import report, run_log
from lexel.errors import UsageError
from lexel.report.reference import FOLDER, LARGEST, same_network, settings_of, thinned
from lexel.run_folder import RunFolder
from lexel.train import load_recipe

RECIPE = '[model.quantizer]\nkind = "vq"\ncodebook_size = 32\ncodebook_dim = 4\n'


def written_run(folder):
    """A run folder as training leaves it: 60 steps, two validations, two snapshots."""
    random = np.random.default_rng(0)
    lines = [
        {"step": step, "kind": "train", "seconds": step * 0.5, "loss": 1 / step, "l1": 0.5 / step, "lr": 1e-3}
        | {"images_per_second": 20.0}
        for step in range(10, 61, 10)
    ]
    for step in (30, 60):
        lines.append(
            {"step": step, "kind": "validation", "seconds": step * 0.5, "psnr": 15.25, "usage": 0.125}
            | {"perplexity": 3.5, "dead_codes": 28, "softmax_perplexity": 20.0, "gradient_ratio": 1.0}
            | {"gradient_cosine": 1.0, "code_norm": 1.0, "latent_norm": 1.0, "quantization_error": 0.5}
        )
    (folder / "snapshots").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "recipe.toml").write_text(RECIPE)
    for step in (30, 60):
        pictures = random.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
        snapshot = {"originals": pictures, "reconstructions": pictures // 2}
        snapshot |= {
            "indices": random.integers(0, 2, (3, 4, 4)),
            "histogram": np.r_[[40, 8], np.zeros(30)].astype("int64"),
        }
        snapshot |= {name: random.normal(size=(20, 4)).astype("float32") for name in ("latents", "codes")}
        save_file(snapshot, folder / "snapshots" / f"{step:08d}.safetensors")
    return folder


@pytest.fixture
def run(tmp_path):
    return written_run(tmp_path / "a <b> run")


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Charts stay empty, which saves most of a page's time."""
    monkeypatch.setattr("lexel.report.figures._svg", lambda *_, **__: "<svg></svg>")


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    return report.write_report(written_run(tmp_path_factory.mktemp("run") / "a <b> run")).read_text()


def test_the_page_holds_all_it_needs(html):
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:|#)""", html)
    assert "url(http" not in html
    assert "<script" not in html


def test_names_are_escaped(html):
    assert "a &lt;b&gt; run" in html
    assert "a <b> run" not in html


def test_the_page_says_what_was_measured_and_what_it_means(html):
    for text in (
        "15.25 dB",
        "12.5%",
        "most codes are dead",
        "only chosen codes learn",
        "60 steps",
        "codebook_size = 32",
    ):
        assert text in html, text


def test_the_same_run_gives_the_same_page(run, html):
    assert report.write_report(run).read_text() == html


def test_a_run_that_has_just_begun_has_a_page(run):
    (run / "metrics.jsonl").write_text("")
    for path in (run / "snapshots").iterdir():
        path.unlink()
    assert "0 steps" in report.write_report(run).read_text()


def test_one_dimensional_codes_have_a_map():
    assert "svg" in report.latent_map(np.zeros((3, 1), dtype="float32"), np.ones((2, 1), dtype="float32")).html


def test_small_pictures_are_enlarged_without_smoothing():
    row = np.array([[[[0, 0, 0], [255, 0, 0]], [[0, 255, 0], [0, 0, 255]]]], dtype=np.uint8)
    data = re.search(r"base64,([^\"]+)", report.picture_rows([row, row], smallest=4).html)[1]
    grid = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert grid.shape == (10, 4, 3)
    assert (grid[:2, 2:] == [255, 0, 0]).all()
    assert (grid[4:6] == 255).all()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"is no run folder: it has no metrics.jsonl"):
        report.write_report(tmp_path)


def test_a_snapshot_is_read_when_it_is_looked_at(run):
    later = RunFolder.read(run).contents()
    (run / "snapshots" / "00000030.safetensors").write_bytes(b"damaged")
    assert later.last["histogram"].sum() == 48  # the newest; the damaged one is not opened
    assert {"originals", "codes"} <= {*later.last}


def test_a_page_reads_a_few_snapshots_however_many_a_run_kept(run, undrawn, monkeypatch):
    for step in range(61, 300):
        shutil.copy(run / "snapshots" / "00000060.safetensors", run / "snapshots" / f"{step:08d}.safetensors")
    opened, safe_open = [], run_log.safe_open
    monkeypatch.setattr(
        run_log, "safe_open", lambda path, **how: opened.append(int(path.stem)) or safe_open(path, **how)
    )
    report.write_report(run)
    assert len(set(opened)) <= 8
    assert max(opened) == 299


# Reference curves


def reference(run, tmp_path, name="healthy"):
    """The curves of a run as a file, whose rows are half those of the run."""
    curves = report.curves_of(run, name)
    halved = [{key: value / 2 if key == "l1" else value for key, value in row.items()} for row in curves.train]
    return report.write_curves(replace(curves, train=halved), tmp_path / "reference" / f"{name}.json")


def test_reference_curves_are_the_runs_own_thinned_and_small(run, tmp_path):
    path = reference(run, tmp_path)
    curves = report.read_curves(path)
    assert path.stat().st_size < 4096
    assert [row["step"] for row in curves.train] == [10, 20, 30, 40, 50, 60]
    assert curves.validation[-1]["perplexity"] == 3.5
    assert "seconds" not in curves.train[0]
    assert curves.settings["model.quantizer.kind"] == "vq"


def test_long_runs_keep_their_first_and_last_row_among_forty():
    rows = thinned([{"step": step} for step in range(1000)])
    assert len(rows) == 40
    assert (rows[0]["step"], rows[-1]["step"]) == (0, 999)


def test_a_run_of_a_known_recipe_is_drawn_before_its_reference(run, html, tmp_path, monkeypatch):
    monkeypatch.setattr("lexel.report.reference.FOLDER", reference(run, tmp_path).parent)
    after = report.write_report(run).read_text()
    assert after.count("stroke-dasharray") > html.count("stroke-dasharray")
    assert "Dashed, behind: a healthy run of the recipe healthy." in after
    assert "Dashed" not in html


def test_the_caption_says_where_the_run_differs_from_the_reference(run, undrawn, tmp_path, monkeypatch):
    path = reference(run, tmp_path)
    monkeypatch.setattr("lexel.report.reference.FOLDER", path.parent)
    table = json.loads(path.read_text())
    table["settings"]["train.lr"] = 0.002
    path.write_text(json.dumps(table))
    (run / "recipe.toml").write_text(RECIPE + "[train]\nlr = 0.001\nsteps = 7\n")
    assert "recipe healthy, with train.lr = 0.002, here 0.001." in report.write_report(run).read_text()


def test_a_run_of_another_network_has_no_reference_but_one_in_its_folder(run, tmp_path, monkeypatch):
    path = reference(run, tmp_path)
    monkeypatch.setattr("lexel.report.reference.FOLDER", path.parent)
    (run / "recipe.toml").write_text(RECIPE.replace("32", "64"))
    assert report.reference_for(run) is None
    (run / "curves.json").write_bytes(path.read_bytes())
    assert report.reference_for(run).recipe == "healthy"


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[1]",
        "no",
        '{"recipe": "a", "settings": {}, "train": {"step": [1], "l1": [1, 2]}, "validation": {}}',
        '{"recipe": "a", "settings": {}, "train": {"step": [1], "l1": ["x"]}, "validation": {}}',
    ],
)
def test_a_damaged_reference_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "curves.json").write_text(text)
    with pytest.raises(UsageError):
        report.read_curves(tmp_path / "curves.json")


def test_every_reference_that_is_shipped_is_small_and_of_a_recipe_of_its_name():
    paths = sorted(FOLDER.glob("*.json"))
    assert paths
    for path in paths:
        assert path.stat().st_size <= LARGEST
        curves = report.read_curves(path)
        shipped = settings_of(load_recipe(path.stem).model_dump(mode="json", exclude_none=True))
        assert same_network(curves.settings, shipped), path.stem


def test_an_option_that_came_later_has_its_default_in_older_references():
    older = {"model.autoencoder.width": 96, "model.quantizer.kind": "vq"}
    assert same_network(older, {**older, "model.autoencoder.fold": 1})
    assert not same_network(older, {**older, "model.autoencoder.fold": 2})
    assert not same_network(older, {**older, "model.autoencoder.kind": "of another package"})
    assert not same_network(older, {"generator.kind": "masked"})
