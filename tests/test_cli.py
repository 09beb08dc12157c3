"""The command line: what a user types, what they get, and one line for every mistake."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from published_layouts import random_state, vqgan_shapes
from safetensors.numpy import load_file

from lexel import cli
from lexel.cli.options import progress
from lexel.data.batches import look_up

FAST = [
    "--set",
    "train.steps=4",
    "--set",
    "train.validate_every=2",
    "--set",
    "train.log_every=1",
    "--set",
    "train.save_every=2",
]


pytestmark = pytest.mark.usefixtures("undrawn_charts")


def main(*arguments):
    """The exit code of a command, run in this process."""
    before = sys.argv
    sys.argv = ["lexel", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as exit_:
        return exit_.code or 0
    finally:
        sys.argv = before
    return 0


def lexel(capsys, *arguments):
    """Exit code, output and errors of a command, run in this process; the lines on its progress are left out."""
    code = main(*arguments)
    captured = capsys.readouterr()
    errors = "".join(
        line for line in captured.err.splitlines(True) if not re.match(r"[^:]+(: [^:]+)?: step [\d,]+ ", line)
    )
    return code, captured.out, errors


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder as a phone would fill it: two albums, large and small, upright and turned, one file cut short."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number in range(12):
        path = folder / ("holiday" if number % 2 else "garden") / f"IMG_{number:04d}.jpg"
        path.parent.mkdir(exist_ok=True)
        smooth = random.integers(0, 256, (4, 3, 3), dtype=np.uint8)
        image = Image.fromarray(smooth).resize((90, 60 + number), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 3 else 1
        image.save(path, exif=exif)
    whole = (folder / "garden" / "IMG_0000.jpg").read_bytes()
    (folder / "garden" / "IMG_0099.jpg").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """A tokenizer of four steps, trained by the command itself."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    source = f"data.source={json.dumps(str(pictures))}"
    main("train", "tiny", "--out", out, "--set", source, *FAST, "--device", "cpu")
    return out


def test_a_run_leaves_all_that_was_promised(run):
    names = {path.name for path in run.iterdir()}
    assert {"recipe.toml", "metrics.jsonl", "checkpoints", "config.json", "model.safetensors", "report.html"} <= names


def test_an_interrupted_command_is_no_success(capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lexel.loading.load_tokenizer", interrupted)
    assert lexel(capsys, "encode", "model", "pictures", "--out", "tokens") == (130, "", "lexel: interrupted\n")
    assert lexel(capsys, "--version")[0] == 0


def test_a_training_without_a_folder_is_refused_in_one_line(capsys):
    code, _, error = lexel(capsys, "train", "recipes/tiny.toml")
    assert (code, error) == (2, "lexel: give the run folder: lexel train recipes/tiny.toml --out runs/tiny\n")


def test_a_log_file_gets_the_first_and_the_last_step_of_a_training(capsys):
    with progress("train", "steps") as update:
        for step in range(1, 6):
            update(step, 5, "loss 1")
    told = capsys.readouterr().err.splitlines()
    assert [line.split(" ")[2] for line in told] == ["1", "5"]


def test_training_again_changes_nothing(run, pictures, capsys):
    before = (run / "model.safetensors").read_bytes()
    code, _, errors = lexel(
        capsys, "train", "tiny", "--out", run, "--set", f"data.source={json.dumps(str(pictures))}", *FAST
    )
    assert (code, errors) == (0, "")
    assert (run / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("what, frozen", [("all", ""), ("decoder", "encoder."), ("codebook", "")])
def test_a_model_is_fine_tuned(run, pictures, capsys, tmp_path, what, frozen):
    source = f"data.source={json.dumps(str(pictures))}"
    arguments = [
        "train",
        "tiny",
        "--out",
        tmp_path / "fine",
        "--init",
        run,
        "--init-what",
        what,
        "--set",
        source,
        *FAST,
    ]
    code, _, errors = lexel(capsys, *arguments)
    assert (code, *nothing_but_the_broken_one(errors)) == (0,)
    before, after = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / "fine"))
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert any(name.startswith("decoder.") for name in moved)
    assert not frozen or not any(name.startswith((frozen, "quantizer.", "to_codes.")) for name in moved)


def nothing_but_the_broken_one(errors):
    """The lines of an error stream that are not about the picture that is cut short."""
    known = ("lexel: left out garden/IMG_0099.jpg: ", "lexel: 1 pictures could not be used")
    return [line for line in errors.splitlines() if not line.startswith(known)]


def test_training_names_the_picture_it_could_not_use(pictures, capsys, tmp_path):
    arguments = ["train", "tiny", "--out", tmp_path / "run", "--set", f"data.source={json.dumps(str(pictures))}", *FAST]
    code, _, errors = lexel(capsys, *arguments)
    assert code == 0
    assert "lexel: left out garden/IMG_0099.jpg: " in errors
    code, _, errors = lexel(capsys, *arguments[:3], tmp_path / "strict", *arguments[4:], "--set", "data.on_error=stop")
    assert (code, errors.count("\n")) == (2, 1)
    assert "garden/IMG_0099.jpg cannot be read as an image" in errors


def test_the_other_discriminator_learns_too(pictures, capsys, tmp_path):
    source = f"data.source={json.dumps(str(pictures))}"
    blur = ["--set", "train.discriminator.kind=blur", "--set", "train.discriminator.width=32"]
    arguments = [
        "train",
        "tiny",
        "--out",
        tmp_path / "run",
        "--set",
        source,
        "--set",
        "train.discriminator.start=1",
        *blur,
    ]
    code, _, errors = lexel(capsys, *arguments, *FAST)
    assert code == 0, errors
    assert '"discriminator":' in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_dry_run_prints_the_resolved_recipe_and_writes_nothing(capsys, tmp_path):
    code, out, _ = lexel(capsys, "train", "ibq_16384", "--dry-run")
    assert lexel(capsys, "train", "ibq_16384", "--out", tmp_path / "none", "--dry-run") == (code, out, "")
    assert code == 0
    assert "entropy_batch = -0.05" in out
    assert "106,787,715 parameters" in out
    assert "GiB" in out
    assert list(tmp_path.iterdir()) == []


def test_inspect_says_whether_the_codebook_is_healthy(run, capsys):
    code, out, _ = lexel(capsys, "inspect", run)
    assert code == 0
    assert "codebook size" in out
    assert "try this" in out or "good:" in out
    code, out, _ = lexel(capsys, "inspect", run, "--json")
    assert json.loads(out)["findings"]


def test_a_recipe_is_inspected_without_building_it(capsys):
    _, out, _ = lexel(capsys, "inspect", "ibq_262144", "--json")
    facts = json.loads(out)
    assert facts["parameters"] == 173_896_579
    assert facts["parameters of the encoder and decoder"] + facts["parameters of the quantizer"] == 173_896_579


def test_pictures_go_through_and_the_broken_one_is_named(run, pictures, capsys, tmp_path):
    code, out, errors = lexel(capsys, "reconstruct", run, pictures, "--out", tmp_path, "--size", "native")
    assert code == 0
    assert "12 reconstructions" in out
    assert "left out garden/IMG_0099.jpg" in errors
    assert Image.open(tmp_path / "garden" / "IMG_0002.png").size == (90, 62)
    assert Image.open(tmp_path / "holiday" / "IMG_0003.png").size == (63, 90)  # turned upright by its EXIF orientation


def test_tokens_travel_to_disk_and_back(run, pictures, capsys, tmp_path):
    tokens = tmp_path / "tokens"
    code, out, _ = lexel(
        capsys, "encode", run, pictures, "--out", tokens, "--crops", 2, "--parquet", tmp_path / "parquet"
    )
    assert code == 0
    assert "12 pictures as 8x8 tokens each" in out
    assert list((tmp_path / "parquet").iterdir())
    code, out, _ = lexel(capsys, "decode", run, tokens, "--out", tmp_path / "decoded")
    assert code == 0
    assert len(list((tmp_path / "decoded").rglob("*.png"))) == 12
    folders = [tmp_path / f"part-{number}" for number in (1, 2)]
    small = ["--crops", 2, "--shard-size", 5]
    for number, folder in enumerate(folders, 1):
        code, out, _ = lexel(capsys, "encode", run, pictures, "--out", folder, *small, "--part", f"{number}/2")
        assert (code, f"part {number}/2 is in" in out) == (0, True)
    code, out, _ = lexel(capsys, "merge", *folders, "--out", tmp_path / "merged")
    assert (code, "12 pictures as 8x8 tokens each" in out) == (0, True)
    assert lexel(capsys, "encode", run, pictures, "--out", tmp_path / "one", *small)[0] == 0
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "merged" / path.name).read_bytes(), path.name


def test_evaluation_is_written_and_compared(run, pictures, capsys, tmp_path):
    arguments = ["evaluate", run, "--data", pictures, "--metric", "psnr", "--metric", "usage", "--device", "cpu"]
    code, out, _ = lexel(capsys, *arguments, "--json", tmp_path / "result.json")
    assert code == 0
    assert "psnr" in out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["protocol"]["name"] == "lexel"
    code, out, _ = lexel(capsys, *arguments, "--against", tmp_path / "result.json")
    assert "against" in out
    code, _, errors = lexel(capsys, *arguments, "--protocol", "ibq", "--against", tmp_path / "result.json")
    assert code == 2
    assert "cannot be compared" in errors


def test_whole_pictures_are_evaluated_in_their_own_sizes(run, pictures, capsys, tmp_path):
    arguments = ["evaluate", run, "--data", pictures, "--metric", "psnr", "--device", "cpu"]
    code, _, _ = lexel(capsys, *arguments, "--size", "native", "--json", tmp_path / "whole.json")
    assert code == 0
    result = json.loads((tmp_path / "whole.json").read_text())
    assert result["data"]["images"] == 12
    written = tmp_path / "pictures"
    assert lexel(capsys, "reconstruct", run, pictures, "--out", written, "--size", "native")[0] == 0
    errors = []
    for name in sorted(path.relative_to(written).with_suffix("") for path in written.rglob("*.png")):
        original = ImageOps.exif_transpose(Image.open(pictures / f"{name}.jpg"))
        made = np.asarray(Image.open(written / f"{name}.png"), dtype=float)
        errors.append(np.square(np.asarray(original, dtype=float) - made).mean())
    by_hand = np.mean([10 * np.log10(255**2 / error) for error in errors])
    assert result["metrics"]["psnr"] == pytest.approx(by_hand, abs=1e-3)
    code, _, message = lexel(capsys, *arguments, "--against", tmp_path / "whole.json")
    assert (code, "cannot be compared" in message) == (2, True)
    code, _, message = lexel(capsys, *arguments, "--size", "15")
    assert (code, "multiples of 2" in message) == (2, True)


def test_a_bank_of_the_tokenizers_own_latents_trains_vqgan_lc(run, pictures, capsys, tmp_path):
    bank = tmp_path / "bank.safetensors"
    code, out, _ = lexel(capsys, "bank", run, pictures, "--out", bank, "--codes", 16, "--per-class")
    assert code == 0
    assert "16 features of 8 dimensions" in out
    code, _, errors = lexel(capsys, "bank", run, "photo-crops", "--out", bank, "--split", "test")
    assert code == 2
    assert "choose from train, validation" in errors
    sizes = "codebook_size = 16, codebook_dim = 4, feature_dim = 8"
    quantizer = f'model.quantizer={{ kind = "vqgan_lc", {sizes}, bank = "{bank}" }}'
    source = f"data.source={json.dumps(str(pictures))}"
    code, _, errors = lexel(
        capsys, "train", "tiny", "--out", tmp_path / "lc", "--set", quantizer, "--set", source, *FAST
    )
    assert (code, *nothing_but_the_broken_one(errors)) == (0,)


def generator_command(run, pictures, out):
    changes = {"data.tokenizer": run, "data.images.source": pictures, "generator.classes": 2}
    changes = [part for name, value in changes.items() for part in ("--set", f"{name}={json.dumps(str(value))}")]
    changes[-1] = "generator.classes=2"
    return ["train", "generator_tiny", "--out", out, "--device", "cpu", *changes, *FAST]


@pytest.fixture(scope="module")
def generator(run, pictures, tmp_path_factory):
    """A generator of four steps over the tokens of `run`, of two classes."""
    out = tmp_path_factory.mktemp("runs") / "generator"
    main(*generator_command(run, pictures, out))
    return out


def test_images_are_sampled_by_number_and_by_label(generator, capsys, tmp_path):
    arguments = ["sample", generator, "--device", "cpu", "--per-class", 3, "--seed", 5, "--cfg-scale", 1.5]
    code, out, errors = lexel(capsys, *arguments, "--classes", "garden,1", "--out", tmp_path / "grid.png")
    assert (code, errors) == (0, "")
    assert "6 images in" in out
    assert Image.open(tmp_path / "grid.png").size == (3 * 16 + 2 * 2, 2 * 16 + 2)
    code, out, _ = lexel(
        capsys, *arguments, "--classes", "0,holiday", "--out", tmp_path / "s.npy", "--implementation", "int8"
    )
    assert code == 0
    assert re.search(r"int8 adds [+-]\d\.\d{4} bits a token \(on 2 images\)", out)
    assert np.load(tmp_path / "s.npy").shape == (6, 8, 8)
    parts = [*arguments, "--classes", "all", "--out", tmp_path / "p.npz", "--part"]
    assert [lexel(capsys, *parts, part)[0] for part in ("1/2", "2/2")] == [0, 0]  # a single batch: in the second
    code, out, _ = lexel(capsys, "merge", tmp_path / "p.part-2-of-2.npz", "--out", tmp_path / "p.npz")
    assert (code, "6 images in" in out) == (0, True)
    drafted = [*arguments, "--classes", "all", "--out", tmp_path / "d.npy", "--draft-tokens", 3]
    code, out, _ = lexel(capsys, *drafted, "--draft", generator)
    assert (code, "draft: 100% of 384 proposals stood, in 132 passes over an image" in out) == (0, True)
    code, _, errors = lexel(capsys, *drafted)
    assert (code, errors) == (2, "lexel: --draft-tokens goes with --draft RUN, or with --draft-implementation int8\n")
    code, _, errors = lexel(capsys, *arguments, "--classes", "cat", "--out", tmp_path / "x.png")
    assert (code, errors.count("\n")) == (2, 1)
    assert "no class 'cat'; classes are 0 to 1 or a label" in errors


def test_sub_tokens_have_settings_of_their_own(run, pictures, generator, capsys, tmp_path):
    pairs = tmp_path / "pairs"
    code, _, errors = lexel(capsys, *generator_command(run, pictures, pairs), "--set", "generator.head=factorised")
    assert (code, *nothing_but_the_broken_one(errors)) == (0,)
    tokens = {}
    for name, scales in (("one", "1.5"), ("two", "1.5,1.5"), ("other", "1.5,4")):
        arguments = ["--classes", "0,1", "--cfg-scale", scales, "--temperature", "1.1,1", "--device", "cpu"]
        code, _, errors = lexel(capsys, "sample", pairs, *arguments, "--out", tmp_path / f"{name}.npy")
        assert (code, errors) == (0, "")
        tokens[name] = np.load(tmp_path / f"{name}.npy")
    assert np.array_equal(tokens["one"], tokens["two"])
    assert not np.array_equal(tokens["one"], tokens["other"])
    for scales, message in (("1.5,2", "cfg_scale must be a number, or 1 of them"), ("big", "--cfg-scale 'big'")):
        code, _, errors = lexel(
            capsys, "sample", generator, "--classes", 0, "--cfg-scale", scales, "--out", tmp_path / "x.npy"
        )
        assert (code, errors.count("\n")) == (2, 1)
        assert message in errors


def test_a_generator_is_fine_tuned(run, pictures, generator, capsys, tmp_path):
    fine = ["--init", generator, "--set", "train.lr=1e-9"]
    code, _, errors = lexel(capsys, *generator_command(run, pictures, tmp_path / "fine"), *fine)
    assert (code, *nothing_but_the_broken_one(errors)) == (0,)
    before, after = (load_file(folder / "model.safetensors") for folder in (generator, tmp_path / "fine"))
    assert all(np.allclose(before[name], after[name], atol=1e-6) for name in before)
    code, _, errors = lexel(capsys, *generator_command(run, pictures, tmp_path / "x"), "--init", run)
    assert (code, errors.count("\n")) == (2, 1)
    assert "holds a tokenizer" in errors


def test_a_published_checkpoint_becomes_a_folder(capsys, tmp_path):
    shapes = vqgan_shapes(width=32, multipliers=[1, 2], blocks=1, attended=[1], z=6, dim=4)
    state = random_state({**shapes, "quantize.embedding.weight": (40, 4), "loss.logvar": ()})
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    arguments = ["import", tmp_path / "last.ckpt", "--out", tmp_path / "model"]
    code, _, errors = lexel(capsys, *arguments)
    assert (code, errors.count("\n")) == (2, 1)
    assert "name one of ibq, vqgan" in errors
    code, out, errors = lexel(capsys, *arguments, "--family", "ibq", "--set", "autoencoder.groups=16")
    assert (code, errors) == (0, "")
    assert "ibq (live weights) in" in out
    assert "left out 1 tensors: a weight of the training loss" in out
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["autoencoder"]["groups"], config["quantizer"]["kind"]) == (16, "ibq")
    assert config["provenance"]["source"] == "last.ckpt"


def test_quantizers_are_compared_in_one_table(pictures, capsys, tmp_path):
    source = f"data.source={json.dumps(str(pictures))}"
    arguments = ["compare", "tiny", "--quantizers", "vq,fsq", "--out", tmp_path, "--set", source, "--metric", "psnr"]
    code, out, errors = lexel(
        capsys, *arguments, "--metric", "usage", "--sizes", "16", "--set", "data.validation=0.3", *FAST
    )
    assert (code, errors) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["quantizer", "vq", "fsq", "open"]
    assert (tmp_path / "compare.html").is_file()


MISTAKES = [
    (["train", "recipes/none.toml", "--out", "x"], "recipes/none.toml does not exist"),
    (
        ["train", "tiny", "--out", "x", "--set", "train.stepz=3"],
        "tiny.toml: train has no option 'stepz'; its options are steps",
    ),
    (["train", "tiny", "--out", "x", "--set", "model.quantizer.kind=ibqq"], "unknown quantizer 'ibqq'; choose from"),
    (
        ["train", "tiny", "--out", "x", "--set", "train.discriminator.kind=conv"],
        "unknown discriminator 'conv'; choose from blur, blur_pooled, features, patch",
    ),
    (["train", "tiny", "--out", "x", "--set", "data.source=nowhere"], "there is no file or folder 'nowhere'"),
    (["train", "tiny", "--out", "x", "--device", "cuda:7"], "cuda:7"),
    (["train", "tiny"], "give the run folder: lexel train tiny --out runs/tiny"),
    (["train", "tiny", "--out", "x", "--init-what", "decoder"], "init lacks the option 'source'"),
    (["export", "nowhere", "--out", "x", "--precision", "bf16"], "No such option: --precision"),
    (["inspect", "tiny", "--device", "cuda:7"], "No such option: --device"),
    (["list", "quantizer"], "unknown table 'quantizer'; choose from"),
    (["inspect", "nowhere"], "nowhere"),
    (["reconstruct", "nowhere", "photos", "--out", "x"], "nowhere"),
    (["evaluate"], "give a tokenizer with --data DIR, or --samples with --reference"),
    (["evaluate", "nowhere"], "a tokenizer needs --data DIR"),
    (
        ["evaluate", "nowhere", "--data", "photos", "--reference", "x.npz"],
        "--reference and --tokenizer go with --samples",
    ),
    (
        ["evaluate", "--samples", "x", "--reference", "y", "--size", "64"],
        "--data, --size and --public-set go with a tokenizer",
    ),
    (["sample", "nowhere", "--classes", "0", "--out", "x.png"], "nowhere"),
    (["import", "nowhere", "--out", "x"], "nowhere"),
    (["compare", "generator_tiny", "--quantizers", "vq", "--out", "x"], "is a generator's recipe"),
    (["compare", "tiny", "--quantizers", "vqq", "--out", "x"], "vqq"),
    (["compare", "tiny", "--quantizers", "vq", "--out", "x", "--sizes", "1k"], "is no list of numbers"),
    (["fly"], "No such command 'fly'"),
]


@pytest.mark.parametrize(
    "arguments, message", MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_mistake_is_answered_with_one_line_and_leaves_nothing(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, errors = lexel(capsys, *arguments)
    assert code == 2
    assert errors.startswith("lexel: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_mistakes_about_real_folders_are_told_in_one_line(run, capsys, tmp_path):
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_bytes((run / "config.json").read_bytes())
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        (["reconstruct", half, "photos", "--out", tmp_path / "x"], "it has no model.safetensors"),
        (["reconstruct", run, tmp_path / "empty", "--out", tmp_path / "x"], "there are no images in"),
        (
            ["reconstruct", run, "photos", "--out", tmp_path / "x", "--size", "big"],
            "neither a number of pixels nor 'native'",
        ),
        (["reconstruct", run, "photos", "--out", tmp_path / "x", "--size", "15"], "images need H and W multiples of 2"),
        (["reconstruct", run, "photos", "--out", tmp_path / "x", "--precision", "half"], "unknown precision 'half'"),
        (["decode", run, tmp_path / "empty", "--out", tmp_path / "x"], "holds no tokens"),
        (["sample", run, "--classes", "0", "--out", tmp_path / "x.png"], ""),
    ]:
        code, _, errors = lexel(capsys, *arguments)
        assert (code, errors.count("\n")) == (2, 1), arguments
        assert message in errors
    assert not (tmp_path / "x").exists()


def test_one_picture_alone_can_be_trained_on(pictures, capsys, tmp_path):
    one = pictures / "garden" / "IMG_0000.jpg"
    with pytest.warns(UserWarning, match="has a single image"):
        code, _, _ = lexel(
            capsys, "train", "tiny", "--out", tmp_path / "one", "--set", f"data.source={json.dumps(str(one))}", *FAST
        )
    assert code == 0


def test_help_answers_for_every_command(capsys):
    code, out, _ = lexel(capsys, "--help")
    commands = [line.split()[0] for line in out.split("Commands:")[1].splitlines() if line.strip()]
    assert {
        "demo",
        "train",
        "evaluate",
        "reconstruct",
        "encode",
        "decode",
        "sample",
        "import",
        "export",
        "inspect",
    } <= {*commands}
    for command in commands:
        code, out, _ = lexel(capsys, command, "--help")
        assert (code, "Usage: " in out) == (0, True), command
        runs_a_network = command not in {
            *("inspect", "list", "import", "export", "publish", "merge", "leaderboard", "curves"),
            "studio",  # on the CPU
        }
        assert ({"--device", "--precision"} <= {*out.split()}) == runs_a_network, command


def test_python_m_lexel_is_the_same_command():
    results = [
        subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
        for command in ([sys.executable, "-m", "lexel"], [Path(sys.executable).parent / "lexel"])
    ]
    assert results[0] == results[1] != ""


def test_an_interrupted_training_says_how_to_go_on(pictures, capsys, tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"

    def stop():
        while not (metrics.is_file() and metrics.stat().st_size):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    settings = [f"data.source={json.dumps(str(pictures))}", "train.steps=100000", "train.log_every=1"]
    changes = [part for setting in settings for part in ("--set", setting)]
    code, out, errors = lexel(capsys, "train", "tiny", "--out", tmp_path / "run", "--device", "cpu", *changes)
    assert code == 0, errors
    assert "run the same command again to go on" in out
    assert list((tmp_path / "run" / "checkpoints").glob("*.pt"))


def test_memory_that_is_not_there_is_told_in_one_line(capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("lexel.inspection.inspect", full)
    code, _, errors = lexel(capsys, "inspect", "tiny")
    assert code == 2
    assert errors == "lexel: out of memory; lower the batch size, the picture size, or use a half precision\n"


class Killed:
    images = SimpleNamespace(decoded_on_gpu=False)

    def __getitem__(self, item):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_that_reads_images_is_told_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr("lexel.inspection.inspect", lambda *_: next(look_up(Killed(), range(4), 1)))
    code, _, errors = lexel(capsys, "inspect", "tiny")
    assert code == 2
    assert errors.startswith("lexel: a process that reads images was killed, mostly for want of memory")
    assert errors.count("\n") == 1


def test_other_defects_keep_their_traceback(monkeypatch):
    def broken(*_):
        raise RuntimeError("a defect of ours")

    monkeypatch.setattr("lexel.inspection.inspect", broken)
    monkeypatch.setattr(sys, "argv", ["lexel", "inspect", "tiny"])
    with pytest.raises(RuntimeError, match="a defect of ours"):
        cli.main()


def test_a_tilde_is_the_home_folder_in_every_path_of_a_command(run, pictures, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(pictures)
    assert lexel(capsys, "encode", run, "~/link", "--out=~/t", "--webdataset=~/wd")[0] == 0
    assert lexel(capsys, "decode", run, "~/t", "--out", "~no one")[0] == 0  # no user's home: a name as any other
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "t", "wd", "~no one"]
    assert len(list((tmp_path / "~no one").rglob("*.png"))) > 0


@pytest.mark.parametrize("target", ["picture.png", "model/config.json", "tokens.json", "."])
def test_numbers_and_banks_are_not_written_over_what_they_are_made_of(run, pictures, capsys, tmp_path, target):
    (tmp_path / "model").mkdir()
    for name in ("picture.png", "model/config.json", "tokens.json"):
        (tmp_path / name).write_text('{"lexel": "0.2"}')
    path = tmp_path / target
    for command in (
        ("evaluate", run, "--data", pictures, "--metric", "psnr", "--json", path),
        ("bank", run, pictures, "--codes", "2", "--out", path),
        ("usage", "nowhere", "--json", path),
        ("probe", "nowhere", "--json", path),
    ):
        code, _, errors = lexel(capsys, *command)
        assert code == 2, command
        assert re.fullmatch(r"lexel: .* (is a folder|would be overwritten); give .*\n", errors), errors
    assert target == "." or path.read_text() == '{"lexel": "0.2"}'


@pytest.mark.parametrize(
    "options", [("--size", "9" * 5000), ("--workers", "1000000"), ("--size", "0"), ("--size", "1e3")]
)
def test_numbers_beyond_any_use_are_refused_in_one_line(run, pictures, capsys, tmp_path, options):
    code, _, errors = lexel(capsys, "encode", run, pictures, "--out", tmp_path / "t", *options)
    assert (code, errors.count("\n"), len(errors) < 200) == (2, 1, True), errors
