"""Training of tokenizers: going on after anything that can happen, bit for bit, and stopping where it must."""

import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from thorough import thorough

from lexel import checkpoint, run_folder
from lexel.checkpoint import load_state
from lexel.config import check
from lexel.errors import UsageError
from lexel.loading import load_tokenizer
from lexel.losses import reconstruction
from lexel.quantizers import save_bank
from lexel.report import write_report
from lexel.run_folder import RunFolder, TrainingStopped
from lexel.run_log import SPEEDS
from lexel.tokenizer import Tokenizer
from lexel.train import tokenizer as training
from lexel.train.optimization import WeightAverage, frozen
from lexel.train.processes import Processes
from lexel.train.recipes import InitConfig, Schedule
from lexel.train.session import Session
from lexel.train.tokenizer import Learner, TokenizerRecipe, train_tokenizer

pytestmark = pytest.mark.usefixtures("undrawn_charts")

STEPS = 8
TIMES = {"seconds", *SPEEDS}
PARTS = ["model", "average", "optimizer", "scaler", "means"]
ADVERSARY = ["discriminator", "lecam", "discriminator_optimizer", "discriminator_scaler"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twenty little pictures: bars and blobs of colour."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for number in range(20):
        coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((20, 18), Image.Resampling.BILINEAR).save(folder / f"{number:02d}.png")
    return folder


def tables(pictures, **train):
    """A recipe as plain tables: every part at work, the discriminator from step 3 on."""
    return {
        "model": {
            "quantizer": train.pop("quantizer", {"kind": "ibq", "codebook_size": 16, "codebook_dim": 4}),
            "autoencoder": {
                "width": 4,
                "multipliers": [1, 2],
                "residual_blocks": 1,
                "attention_levels": [],
                "middle_attention": False,
                "z_channels": 4,
                "groups": 2,
            },
        },
        "data": {"source": str(pictures), "size": 16, "validation": 0.3},
        "train": {
            "steps": STEPS,
            "batch_size": 4,
            "lr": 1e-2,
            "weights": {"l1": 1.0, "l2": 0.5, "adversarial": 0.1},
            "schedule": {"kind": "cosine", "warm_up": 2, "end": 0.1},
            "discriminator": {"start": 3, "layers": 1, "width": 4, "lecam": 0.05},
            "average_decay": 0.8,
            "log_every": 3,
            "validate_every": 3,
            "save_every": 2,
            **train,
        },
    }


def recipe(pictures, **train):
    return check(tables(pictures, **train), TokenizerRecipe, "test")


def interrupted_at(step):
    """A progress callback that sends this process SIGTERM after a step, as a scheduler would."""
    return lambda progress: os.kill(os.getpid(), signal.SIGTERM) if progress.step == step else None


def leaves(value, name=""):
    """The tensors, numbers and strings of a nested state, by path."""
    if isinstance(value, dict):
        return {path: leaf for key, part in value.items() for path, leaf in leaves(part, f"{name}.{key}").items()}
    if isinstance(value, list | tuple):
        return {path: leaf for key, part in enumerate(value) for path, leaf in leaves(part, f"{name}.{key}").items()}
    return {name: value}


def assert_same(first, second):
    """Two training states are equal to the bit, the clock aside."""
    first, second = leaves(first), leaves(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        if name == ".seconds":
            continue
        same = torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        assert same, name


def final_state(folder):
    return load_state(RunFolder(folder, writes=False).checkpoint(STEPS))


def logged(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["kind"] != "choices"]  # of a machine and a start, not of a recipe
    return [{name: value for name, value in line.items() if name not in TIMES} for line in kept]


@pytest.fixture(scope="module")
def straight(pictures, tmp_path_factory):
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight")
    train_tokenizer(recipe(pictures), folder, device="cpu")
    return folder


# ------------------------------------------------------------------------------------------------ going on


@pytest.mark.parametrize("step", [4, *thorough(1)])  # after and before the discriminator began; it stops a step later
def test_a_run_stopped_by_a_signal_goes_on_bit_for_bit(pictures, straight, tmp_path, step):
    first = train_tokenizer(recipe(pictures), tmp_path, device="cpu", progress=interrupted_at(step))
    assert not first.finished
    assert step <= first.step <= step + 1
    second = train_tokenizer(recipe(pictures), tmp_path, device="cpu")
    assert second.finished
    assert_same(final_state(straight), final_state(tmp_path))
    assert logged(straight) == logged(tmp_path)
    for name, value in Tokenizer.from_pretrained(straight).state_dict().items():
        assert torch.equal(value, Tokenizer.from_pretrained(tmp_path).state_dict()[name])


@pytest.mark.parametrize("kind", ["gumbel", *thorough("ema", "soft")])
def test_random_annealed_and_counting_quantizers_go_on_bit_for_bit(pictures, tmp_path, kind):
    from lexel.quantizers import QUANTIZERS

    if kind not in QUANTIZERS:
        pytest.skip(f"no quantizer {kind}")
    chosen = recipe(pictures, quantizer={"kind": kind, "codebook_size": 16, "codebook_dim": 4})
    train_tokenizer(chosen, tmp_path / "straight", device="cpu")
    train_tokenizer(chosen, tmp_path / "resumed", device="cpu", progress=interrupted_at(4))
    train_tokenizer(chosen, tmp_path / "resumed", device="cpu")
    assert_same(final_state(tmp_path / "straight"), final_state(tmp_path / "resumed"))


def test_a_run_goes_on_without_the_bank_that_it_began_with(pictures, tmp_path):
    bank = tmp_path / "bank.safetensors"
    save_bank(torch.randn(16, 6, generator=torch.Generator().manual_seed(0)), bank)
    kind = {"kind": "vqgan_lc", "codebook_size": 16, "codebook_dim": 4, "feature_dim": 6, "bank": str(bank)}
    chosen = recipe(pictures, quantizer=kind, weights={"l1": 1.0})
    train_tokenizer(chosen, tmp_path / "straight", device="cpu")
    train_tokenizer(chosen, tmp_path / "resumed", device="cpu", progress=interrupted_at(4))
    bank.unlink()
    train_tokenizer(chosen, tmp_path / "resumed", device="cpu")
    assert_same(final_state(tmp_path / "straight"), final_state(tmp_path / "resumed"))


@pytest.fixture(scope="module")
def pair(pictures, straight, tmp_path_factory):
    """By precision: its recipe, a run that nothing happened to, and one that was stopped in the middle."""

    @functools.cache
    def made(precision):
        folder, chosen = tmp_path_factory.mktemp(precision), recipe(pictures, precision=precision)
        if precision != "float32":
            train_tokenizer(chosen, folder / "straight", device="cpu")
        train_tokenizer(chosen, folder / "stopped", device="cpu", progress=interrupted_at(4))
        return chosen, straight if precision == "float32" else folder / "straight", folder / "stopped"

    return made


@pytest.mark.parametrize(
    "part", [None, "optimizer", "lecam", *thorough(*sorted({*PARTS, *ADVERSARY} - {"optimizer", "lecam"}))]
)
def test_forgetting_any_part_of_the_state_would_be_seen(pair, tmp_path, part, monkeypatch):
    chosen, whole_run, stopped = pair("fp16" if part is not None and "scaler" in part else "float32")
    shutil.copytree(stopped, tmp_path / "resumed")
    whole = Learner.load_state_dict

    def forget(self, state, source):
        assert self.parts.keys() == {*PARTS, *ADVERSARY}
        kept = dict(self.parts)
        self.parts = {name: value for name, value in kept.items() if name != part}
        whole(self, state, source)
        self.parts = kept

    monkeypatch.setattr(Learner, "load_state_dict", forget)
    monkeypatch.setattr(Session, "saved", lambda self, part: None)  # a second way in for the weights
    train_tokenizer(chosen, tmp_path / "resumed", device="cpu")
    try:
        assert_same(final_state(whole_run), final_state(tmp_path / "resumed"))
        assert logged(whole_run) == logged(tmp_path / "resumed")
        differs = False
    except AssertionError:
        differs = True
    assert differs == (part is not None)


SCRIPT = """
import sys, tomllib, torch
torch.set_num_threads(1)
from lexel.config import load
from lexel.train.tokenizer import TokenizerRecipe, train_tokenizer
train_tokenizer(load(sys.argv[1], TokenizerRecipe), sys.argv[2], device="cpu")
"""


def write_recipe(chosen, path):
    from lexel.config import dump

    path.write_text(dump(chosen))
    return str(path)


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]), **more}


@pytest.mark.thorough
def test_a_killed_process_loses_nothing_that_was_saved(pictures, tmp_path):
    chosen = recipe(pictures, steps=400, save_every=1, log_every=1)
    path = write_recipe(chosen, tmp_path / "recipe.toml")
    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, path, str(killed)], env=environment())
    deadline = time.monotonic() + 120
    while not any(killed.glob("checkpoints/0000*[5-9].pt")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = RunFolder(killed, writes=False).steps()[-1]
    assert 0 < reached < 400
    # The same in this process, straight to a few steps beyond; then the killed run is taken up to there.
    goal = reached + 3
    train_tokenizer(chosen, tmp_path / "straight", device="cpu", progress=interrupted_at(goal))
    train_tokenizer(chosen, killed, device="cpu", progress=interrupted_at(goal))
    steps = [RunFolder(folder, writes=False).steps()[-1] for folder in (tmp_path / "straight", killed)]
    assert steps[0] == steps[1] >= goal
    states = [load_state(RunFolder(f, writes=False).checkpoint(steps[0])) for f in (tmp_path / "straight", killed)]
    assert_same(*states)
    assert logged(tmp_path / "straight") == logged(killed)
    assert not list(killed.rglob(".partial-*"))


def test_a_full_disk_ends_the_run_and_keeps_what_was_saved(pictures, straight, tmp_path, monkeypatch):
    def full(path, state):
        if state["step"] == 6:
            Path(path).with_name(f".partial-{Path(path).name}").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, state)

    save = run_folder.save_state
    monkeypatch.setattr(run_folder, "save_state", full)
    with pytest.raises(TrainingStopped, match=r"no space left .* at step 6 \(step 4 is saved\)"):
        train_tokenizer(recipe(pictures), tmp_path, device="cpu")
    monkeypatch.undo()
    train_tokenizer(recipe(pictures), tmp_path, device="cpu")
    assert_same(final_state(straight), final_state(tmp_path))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_is_really_full_ends_the_run_in_words(pictures, tmp_path, monkeypatch):
    temporary = checkpoint._partial
    train_tokenizer(recipe(pictures), tmp_path, device="cpu", progress=interrupted_at(4))
    saved = RunFolder(tmp_path, writes=False).steps()[-1]

    def fill(now):  # what is written from here on fails as the operating system lets it fail
        def on_a_full_disk(path):
            partial = temporary(path)
            partial.symlink_to("/dev/full")
            return partial

        monkeypatch.setattr(checkpoint, "_partial", on_a_full_disk)

    with pytest.raises(TrainingStopped, match=rf"no space left .* \(step {saved} is saved\)"):
        train_tokenizer(recipe(pictures), tmp_path, device="cpu", progress=fill)


def test_a_damaged_newest_checkpoint_is_kept_aside_and_the_one_before_it_goes_on(pictures, straight, tmp_path):
    train_tokenizer(recipe(pictures), tmp_path, device="cpu", progress=interrupted_at(4))
    run = RunFolder(tmp_path, writes=False)
    older, newest = run.steps()[-2:]
    half = run.checkpoint(newest).read_bytes()[:1000]
    run.checkpoint(newest).write_bytes(half)
    with pytest.warns(UserWarning, match=rf"{newest:08d}\.pt cannot be read.*\.damaged.*goes on from step {older}"):
        train_tokenizer(recipe(pictures), tmp_path, device="cpu")
    assert run.checkpoint(newest).with_name(f"{newest:08d}.pt.damaged").read_bytes() == half
    assert_same(final_state(straight), final_state(tmp_path))
    assert logged(straight) == logged(tmp_path)


def test_a_run_whose_only_checkpoint_is_damaged_is_not_started_again_unasked(pictures, tmp_path):
    train_tokenizer(recipe(pictures, steps=2, validate_every=8, save_every=8), tmp_path, device="cpu")
    (only,) = (tmp_path / "checkpoints").iterdir()
    only.write_bytes(b"half")
    with pytest.raises(UsageError, match=rf"{only.name}.*no older checkpoint is left: delete .* to start again"):
        train_tokenizer(recipe(pictures, steps=2, validate_every=8, save_every=8), tmp_path, device="cpu")
    assert only.read_bytes() == b"half"


def test_what_was_logged_after_the_checkpoint_is_forgotten_with_a_half_written_line(pictures, straight, tmp_path):
    def crash(progress):
        if progress.step == 7:
            raise RuntimeError("power cut")

    chosen = recipe(pictures, save_every=4)  # steps 6 and 7 are logged, not saved: step 6 validates but is no best
    with pytest.raises(RuntimeError, match="power cut"):
        train_tokenizer(chosen, tmp_path, device="cpu", progress=crash)
    run = RunFolder(tmp_path, writes=False)
    for step in run.steps():
        if step > 4:
            run.checkpoint(step).unlink()
    with run.metrics.open("a") as file:
        file.write('{"step": 7, "kind": "tr')
    assert [line["step"] for line in run.lines("train")] == [3, 6]
    train_tokenizer(chosen, tmp_path, device="cpu")
    assert logged(straight) == logged(tmp_path)
    assert sorted(path.stem for path in run.snapshots.iterdir()) == ["00000003", "00000006", "00000008"]


def test_a_finished_run_is_left_as_it_is(pictures, straight):
    before = (straight / "metrics.jsonl").read_bytes(), (straight / "model.safetensors").read_bytes()
    again = train_tokenizer(recipe(pictures), straight, device="cpu")
    assert again.finished
    assert again.step == STEPS
    assert before == ((straight / "metrics.jsonl").read_bytes(), (straight / "model.safetensors").read_bytes())


def test_the_log_has_the_speed_of_reading_of_the_steps_and_of_both(straight):
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "train":
            assert line["data_images_per_second"] > line["images_per_second"] > 0
            assert line["step_images_per_second"] > line["images_per_second"]


def test_the_first_line_of_a_log_says_what_was_chosen_for_the_device_and_the_report_shows_it(straight):
    chosen = json.loads((straight / "metrics.jsonl").read_text().splitlines()[0])
    assert (chosen["kind"], chosen["step"], chosen["precision"]) == ("choices", 0, "float32")
    assert (chosen["optimizer"], chosen["layout"]) == ("Adam, fused", "contiguous")
    assert (chosen["reading_processes"], chosen["search"]) == ("0", "tiled, scanned in float32")
    assert chosen["attention"] in ("flash_attention", "math")
    page = write_report(straight).read_text(encoding="utf-8")
    assert all(value in page for name, value in chosen.items() if name not in ("kind", "step", "seconds"))


def test_a_validation_tells_how_many_tokens_its_usage_stands_on(straight):
    held_out, tokens = 6, 8 * 8
    assert {line["tokens"] for line in logged(straight) if line["kind"] == "validation"} == {held_out * tokens}


def test_a_folder_that_another_process_trains_in_is_left_alone(pictures, tmp_path):
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    unfinished = out / "checkpoints" / ".partial-1"
    unfinished.touch()
    code = (
        f"import sys; from filelock import FileLock; lock = FileLock({str(out / '.lock')!r}); lock.acquire();"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline().strip() == b"held"
        with pytest.raises(UsageError, match="another process trains in"):
            train_tokenizer(recipe(pictures), out, device="cpu")
        assert unfinished.exists()
        assert not (out / "recipe.toml").exists()
        other.stdin.close()
    assert train_tokenizer(recipe(pictures), out, device="cpu").finished


def test_another_recipe_is_refused_in_a_run_folder(pictures, straight):
    with pytest.raises(UsageError, match=r"train\.lr = 0\.01, the recipe now says 0\.02"):
        train_tokenizer(recipe(pictures, lr=2e-2), straight, device="cpu")
    with pytest.raises(UsageError, match=r"train\.steps = 8, the recipe now says 7; a run may grow but not shrink"):
        train_tokenizer(recipe(pictures, steps=7), straight, device="cpu")


def test_a_run_may_grow_and_change_what_it_writes(pictures, tmp_path):
    train_tokenizer(recipe(pictures), tmp_path, device="cpu")
    longer = train_tokenizer(recipe(pictures, steps=STEPS + 2, log_every=1, save_every=1), tmp_path, device="cpu")
    assert longer.step == STEPS + 2
    assert [line["step"] for line in logged(tmp_path) if line["kind"] == "train"][-2:] == [STEPS + 1, STEPS + 2]
    train_tokenizer(recipe(pictures, steps=STEPS + 6), tmp_path, device="cpu", progress=interrupted_at(STEPS + 3))
    starts = [line["step"] for line in RunFolder(tmp_path, writes=False).lines("choices")]
    assert starts == [0, STEPS, STEPS + 2]
    newest = load_state(RunFolder(tmp_path, writes=False).checkpoint(STEPS + 4))["average"]
    for name, value in load_tokenizer(tmp_path).state_dict().items():  # not what was exported at the earlier end
        assert torch.equal(value, newest[f"module.{name}"]), name


# ------------------------------------------------------------------------------------------------ stopping


def test_a_loss_that_is_nan_ends_the_run_with_the_last_good_checkpoint(pictures, tmp_path, monkeypatch):
    calls = []

    def poisoned(a, b):
        calls.append(1)
        return l1(a, b) * (torch.nan if len(calls) == 6 else 1.0)

    l1 = reconstruction.l1
    monkeypatch.setattr(reconstruction, "l1", poisoned)
    with pytest.raises(TrainingStopped, match=r"stopped at step 6: loss and gradient_norm .*l1 nan.*00000004\.pt.*lr"):
        train_tokenizer(recipe(pictures), tmp_path, device="cpu")
    state = load_state(RunFolder(tmp_path, writes=False).checkpoint(4))
    assert all(value.isfinite().all() for value in state["model"].values())


def test_a_codebook_of_one_code_ends_the_run_in_words(pictures, tmp_path):
    begun = recipe(pictures, quantizer={"kind": "vq", "codebook_size": 16, "codebook_dim": 4})
    tokenizer = Tokenizer(begun.model)
    torch.nn.init.zeros_(tokenizer.quantizer.weight)  # equal codes: the first is always nearest; frozen, they stay so
    tokenizer.save_pretrained(tmp_path / "dead")
    table = tables(
        pictures,
        quantizer={"kind": "vq", "codebook_size": 16, "codebook_dim": 4},
        validate_every=1,
        save_every=1,
        collapse_patience=3,
    )
    chosen = check(table | {"init": {"source": str(tmp_path / "dead"), "what": "decoder"}}, TokenizerRecipe, "test")
    with pytest.raises(TrainingStopped, match=r"step 3: the codebook collapsed.*1 of 16.*00000002\.pt.*chosen codes"):
        train_tokenizer(chosen, tmp_path / "run", device="cpu")


def test_a_typo_in_a_recipe_names_the_options(pictures):
    table = tables(pictures)
    with pytest.raises(UsageError, match=r"train has no option 'stepz'; its options are steps, epochs"):
        check(table | {"train": {**table["train"], "stepz": 3}}, TokenizerRecipe, "tiny.toml")


@pytest.mark.parametrize(
    "train, said",
    [
        ({"steps": None}, "either steps or epochs"),
        ({"weights": {"l1": 1.0, "comitment": 1.0}}, "unknown loss term 'comitment'"),
        ({"weights": {"adversarial": 1.0}}, "l1, l2 or lpips"),
        ({"discriminator": None}, "needs a section"),
        ({"accumulation": 3}, "does not divide"),
        ({"schedule": {"kind": "steps"}}, "drops"),
        ({"discriminator": {"loss": "hing"}}, "unknown loss 'hing'"),
        ({"quantizer": {"kind": "vqq"}}, "unknown quantizer 'vqq'"),
        ({"quantizer": {"kind": "vq", "codebook_size": 16}}, "needs the option 'codebook_dim'"),
        ({"betas": [float("nan"), 0.9]}, r"train.betas.0 = nan: it should be a finite number"),
        ({"betas": [0.5, 1.0]}, "less than 1"),
        ({"lr": float("inf")}, "finite"),
        (
            {
                "weights": {"l1": 1.0, "codebook": 1.0},
                "quantizer": {"kind": "bsq", "codebook_size": 16, "codebook_dim": 4},
            },
            "no effect",
        ),
        ({"lpips": "alex"}, "lpips has no effect without weights.lpips"),
        ({"schedule": {"kind": "constant", "hold": 0.5}}, "hold has no effect"),
        ({"schedule": {"start": 0.5}}, "start has no effect without a warm_up"),
        ({"discriminator": {"layers": 1, "width": 4, "lecam_decay": 0.5}}, "lecam_decay has no effect without lecam"),
        ({"discriminator": {"kind": "blur", "width": 32, "statistics": 4}}, "statistics has no effect"),
        ({"discriminator": {"layers": 3, "width": 10**9}}, "cannot be built"),
        ({"evaluations": [{"data": "photos", "every": 2, "metrics": ["fid"]}]}, "unknown metric 'fid'"),
    ],
)
def test_recipes_that_cannot_work_are_refused_before_training(pictures, train, said):
    with pytest.raises(UsageError, match=said):
        recipe(pictures, **train)


# ------------------------------------------------------------------------------------------------ one step


def learner(pictures, **train):
    chosen = recipe(pictures, **train)
    torch.manual_seed(0)
    return Learner(chosen, Tokenizer(chosen.model), Processes("cpu", chosen.train.precision))


def images(count=4):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_accumulated_gradients_are_those_of_the_whole_batch(pictures):
    quantizer = {"kind": "vq", "codebook_size": 16, "codebook_dim": 4}
    whole = learner(pictures, quantizer=quantizer)
    parts = learner(pictures, quantizer=quantizer, accumulation=4)
    seen_whole, seen_parts = whole.step(images(), False, 1.0), parts.step(images(), False, 1.0)
    for name in seen_whole:
        assert float(seen_parts[name]) == pytest.approx(float(seen_whole[name]), rel=1e-5), name
    for (name, one), other in zip(whole.tokenizer.named_parameters(), parts.tokenizer.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_accumulated_gradients_of_the_discriminator_are_those_of_the_whole_batch(pictures):
    quantizer = {"kind": "vq", "codebook_size": 16, "codebook_dim": 4}
    adversary = {"layers": 1, "width": 4}
    whole = learner(pictures, quantizer=quantizer, discriminator=adversary)
    parts = learner(pictures, quantizer=quantizer, discriminator=adversary, accumulation=2)
    twice = torch.cat([images(2), images(2)])  # each half has the batch statistics of the whole
    for player in (whole, parts):
        player.step(twice, True, 1.0)
    grads = [[p.grad for p in player.adversary.discriminator.parameters()] for player in (whole, parts)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_the_tokenizer_faces_the_discriminator_as_it_has_just_become(pictures):
    player = learner(pictures)
    adversary = player.adversary
    weights = []
    adversary.optimizer.register_step_post_hook(
        lambda *_: weights.append([parameter.detach().clone() for parameter in adversary.discriminator.parameters()])
    )
    generator_loss = adversary.generator_loss

    def judged(made):
        weights.append([parameter.detach().clone() for parameter in adversary.discriminator.parameters()])
        return generator_loss(made)

    adversary.generator_loss = judged
    before = [parameter.detach().clone() for parameter in adversary.discriminator.parameters()]
    player.step(images(), True, 1.0)
    learned, faced = weights
    assert all(torch.equal(one, other) for one, other in zip(learned, faced, strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(before, faced, strict=True))


def test_the_discriminator_gathers_no_gradient_from_the_tokenizers_turn(pictures):
    player = learner(pictures)
    kept = []
    adversary = player.adversary
    adversary.optimizer.register_step_post_hook(
        lambda *_: kept.extend(parameter.grad.clone() for parameter in adversary.discriminator.parameters())
    )
    player.step(images(), True, 1.0)
    for before, parameter in zip(kept, adversary.discriminator.parameters(), strict=True):
        assert torch.equal(before, parameter.grad)
        assert parameter.requires_grad


def test_the_adaptive_weight_makes_both_pull_equally_at_the_last_layer(pictures):
    adversary = {"layers": 1, "width": 4, "adaptive": True}
    player = learner(pictures, discriminator=adversary, weights={"l1": 1, "adversarial": 0.5})
    seen = player.step(images(), True, 0.0)
    last = player.tokenizer.decoder.conv_out.weight
    made = player.tokenizer(images()).images
    likeness = reconstruction.l1(made, images())
    with frozen(player.adversary.discriminator):
        pull = torch.autograd.grad(likeness, last, retain_graph=True)[0].norm()
        push = torch.autograd.grad(player.adversary.generator_loss(made), last)[0].norm()
    assert float(seen["adversarial_weight"]) == pytest.approx(0.5 * float(pull / push), rel=0.02)


@pytest.mark.parametrize("kind", ["soft", "gumbel", "ema", "residual"])
@pytest.mark.parametrize("first", [True, False])
def test_the_discriminator_gets_what_the_tokenizers_training_pass_gives(pictures, kind, first):
    quantizer = {"kind": kind, "codebook_size": 16, "codebook_dim": 4}
    adversary = {"layers": 1, "width": 4, "first": first}
    player = learner(pictures, quantizer=quantizer, discriminator=adversary, accumulation=2, lr=1e-30)
    scored, shown = [], []
    forward, step = player._forward, player.adversary.step
    player._forward = lambda images: scored.append(forward(images)) or scored[-1]
    player.adversary.step = lambda reals, fakes, factor: shown.extend(fakes) or step(reals, fakes, factor)
    before = {name: value.clone() for name, value in player.tokenizer.quantizer.named_buffers()}
    with torch.random.fork_rng():
        player.step(images(), True, 1.0)
    assert len(shown) == 2
    if first:
        for fake, reconstruction in zip(shown, scored, strict=True):
            assert torch.equal(fake, reconstruction.images)
    else:  # new reconstructions; with no learning to speak of they are those of the next training pass
        moved = {name: value.clone() for name, value in player.tokenizer.quantizer.named_buffers()}
        assert kind != "ema" or not torch.equal(moved["weight"], before["weight"])
        with torch.random.fork_rng():
            again = player._reconstructions(list(images().split(2)))
        assert all(fake.shape == other.shape for fake, other in zip(shown, again, strict=True))
        for name, value in player.tokenizer.quantizer.named_buffers():  # looking moves no statistics
            assert torch.equal(value, moved[name])


def test_with_first_off_the_tokenizer_faces_the_discriminator_of_the_step_before(pictures):
    player = learner(pictures, discriminator={"layers": 1, "width": 4, "first": False})
    adversary, faced, learned_on = player.adversary, [], []
    before = [parameter.detach().clone() for parameter in adversary.discriminator.parameters()]
    generator_loss, step = adversary.generator_loss, adversary.step

    def judged(reconstructions):
        faced.extend(parameter.detach().clone() for parameter in adversary.discriminator.parameters())
        return generator_loss(reconstructions)

    adversary.generator_loss = judged
    adversary.step = lambda reals, fakes, factor: learned_on.extend(fakes) or step(reals, fakes, factor)
    old = player.tokenizer(images()).images
    player.step(images(), True, 1.0)
    assert all(torch.equal(one, other) for one, other in zip(before, faced, strict=True))
    new = player.tokenizer(images()).images
    assert torch.equal(learned_on[0], new)  # the discriminator learns on what the updated tokenizer gives
    assert not torch.equal(old, new)


def test_batch_norm_over_stated_images_is_the_same_for_any_micro_batch(pictures):
    quantizer = {"kind": "vq", "codebook_size": 16, "codebook_dim": 4}
    weights = {"l1": 1.0, "adversarial": 0.1}

    def trained(accumulation, statistics):
        adversary = {"layers": 1, "width": 4, "statistics": statistics}
        player = learner(
            pictures, quantizer=quantizer, weights=weights, discriminator=adversary, accumulation=accumulation
        )
        player.step(images(), True, 1.0)
        return [parameter.grad for parameter in player.adversary.discriminator.parameters()]

    stated, parts = trained(1, 2), trained(2, 2)
    for one, other in zip(stated, parts, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
    differs = [not torch.allclose(one, other, rtol=1e-2) for one, other in zip(stated, trained(1, 4), strict=True)]
    assert any(differs)  # it does matter
    with pytest.raises(UsageError, match="statistics = 3 does not divide a micro-batch of 4 images"):
        recipe(pictures, discriminator={"layers": 1, "width": 4, "statistics": 3})


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_weights_and_losses_in_float32(pictures, precision):
    player = learner(pictures, precision=precision)
    seen = player.step(images(), True, 1.0)
    assert all(parameter.dtype == torch.float32 for parameter in player.tokenizer.parameters())
    assert all(torch.isfinite(torch.as_tensor(seen[name])) for name in ("loss", "l1", "adversarial", "discriminator"))
    full = learner(pictures).step(images(), True, 1.0)
    assert float(seen["l1"]) == pytest.approx(float(full["l1"]), rel=0.05)
    assert float(seen["l1"]) != float(full["l1"])  # it did run in half precision


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(pictures, tmp_path):
    chosen = recipe(
        pictures,
        quantizer={"kind": "vq", "codebook_size": 16, "codebook_dim": 4},
        weights={"l1": 1.0},
        discriminator=None,
        steps=3,
        lr=1e-4,
    )
    train_tokenizer(chosen, tmp_path / "one", device="cpu")
    path = write_recipe(chosen, tmp_path / "recipe.toml")
    (tmp_path / "script.py").write_text(SCRIPT)
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000), "WORLD_SIZE": "2"}
    together = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py"), path, str(tmp_path / "two")],
            env=environment(**port, RANK=str(rank), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true"),
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in together] == [0, 0]
    one, two = (load_state(tmp_path / name / "checkpoints" / "00000003.pt") for name in ("one", "two"))
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-4, atol=2e-5, msg=name)
    for first, second in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        for name, value in first.items():
            assert second[name] == (pytest.approx(value, rel=1e-3, abs=1e-4) if name != "kind" else value), name


# ------------------------------------------------------------------------------------------------ parts


def test_the_published_learning_rate_drops_after_epochs_250_and_300():
    schedule = Schedule(kind="steps", drops=[250, 300])
    factors = [schedule.factor(epoch * 5005 - late, 330 * 5005, 5005) for epoch in (250, 300) for late in (1, 0)]
    assert factors == pytest.approx([1.0, 0.1, 0.1, 0.01])


def test_learning_annealing_rises_holds_and_falls_in_a_line():
    schedule = Schedule(kind="linear", warm_up=4, start=0.005, hold=0.3, end=0.01)  # FVQ's, over 40 epochs of 10 steps
    factors = [schedule.factor(step, 400, 10) for step in range(400)]
    assert factors[0] == pytest.approx(0.005)
    assert factors[20] == pytest.approx(0.005 + 0.995 / 2)
    assert factors[40] == factors[147] == 1.0  # 40 + 0.3 * 359 = 147.7
    assert factors[399] == pytest.approx(0.01)
    falls = [before - after for before, after in pairwise(factors[150:])]
    assert max(falls) == pytest.approx(min(falls))


def test_the_average_follows_the_closed_form():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    average = WeightAverage(model, 0.9)
    for value in (1.0, 2.0):
        torch.nn.init.constant_(model.weight, value)
        average.update(model)
    assert average.module.weight.item() == pytest.approx(0.9 * (0.1 * 1.0) + 0.1 * 2.0)


def test_the_best_and_the_newest_checkpoints_stay(tmp_path, pictures):
    run = RunFolder(tmp_path, keep_last=2, best="psnr")
    run.claim(recipe(pictures))
    for step, psnr in enumerate([10.0, 14.0, 12.0, 14.0, 13.0], start=1):
        run.log(step, "validation", 0.0, {"psnr": psnr})
        run.save(step, {})
    assert run.steps() == [2, 4, 5]
    assert run.best_step() == 2


def test_weights_to_use_are_the_averages_the_live_ones_or_the_best(pictures, straight):
    state = final_state(straight)
    for weights, tensor in (("live", "model"), ("average", "average")):
        loaded = load_tokenizer(straight, weights).state_dict()
        for name, value in loaded.items():
            assert torch.equal(value, state[tensor][name if weights == "live" else f"module.{name}"])
    best = RunFolder(straight, writes=False).best_step()
    expected = load_state(RunFolder(straight, writes=False).checkpoint(best))["average"]
    for name, value in load_tokenizer(straight, "best").state_dict().items():
        assert torch.equal(value, expected[f"module.{name}"])


def test_a_recipe_lists_protocols_to_measure_by_while_it_trains(pictures, straight, tmp_path):
    listed = [{"data": str(pictures), "every": 4, "metrics": ["psnr"], "limit": 3}]
    train_tokenizer(recipe(pictures, evaluations=listed), tmp_path / "run", device="cpu")
    lines = [line for line in logged(tmp_path / "run") if line["kind"] == "evaluation"]
    assert [line["step"] for line in lines] == [4, 8]
    assert all(line[f"psnr ({pictures.name})"] > 0 for line in lines)
    assert_same(final_state(tmp_path / "run"), final_state(straight))  # measuring changes nothing


def test_a_tracker_gets_the_recipe_and_the_numbers(pictures, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_tokenizer(recipe(pictures, trackers=["tensorboard"], steps=3), tmp_path, device="cpu")
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents*")).parent))
    events.Reload()
    (line,) = [line for line in logged(tmp_path) if line["kind"] == "train"]
    (event,) = events.Scalars("train/l1")
    assert (event.step, event.value) == (3, pytest.approx(line["l1"]))


# ------------------------------------------------------------------------------------------------ fine-tuning


def fine_tuned(pictures, source, out, what, quantizer=None):
    table = tables(pictures, **({"quantizer": quantizer} if quantizer else {}))
    chosen = check(table | {"init": {"source": str(source), "what": what}}, TokenizerRecipe, "test")
    return train_tokenizer(chosen, out, device="cpu")


@pytest.mark.parametrize("kind", ["ibq", "ema"])
def test_fine_tuning_the_decoder_leaves_every_index_as_it_was(pictures, tmp_path, kind):
    quantizer = {"kind": kind, "codebook_size": 16, "codebook_dim": 4}
    before = Tokenizer(recipe(pictures, quantizer=quantizer).model).eval()
    before.save_pretrained(tmp_path / "source")
    after = fine_tuned(pictures, tmp_path / "source", tmp_path / "run", "decoder", quantizer).average.eval()
    for name, value in before.quantizer.state_dict().items():
        assert torch.equal(after.quantizer.state_dict()[name], value), name
    indices = before.encode(images())
    assert torch.equal(indices, after.encode(images()))
    assert not torch.equal(before.decode(indices), after.decode(indices))


def test_fine_tuning_starts_where_the_source_stands(pictures, straight):
    chosen = recipe(pictures)
    tokenizer = Tokenizer(chosen.model)
    training.initialise(tokenizer, InitConfig(source=str(straight)))
    for name, value in Tokenizer.from_pretrained(straight).state_dict().items():
        assert torch.equal(tokenizer.state_dict()[name], value)


def test_a_new_codebook_of_another_size_keeps_encoder_and_decoder(pictures, straight):
    table = tables(pictures, quantizer={"kind": "vq", "codebook_size": 64, "codebook_dim": 4})
    tokenizer = Tokenizer(check(table, TokenizerRecipe, "test").model)
    training.initialise(tokenizer, InitConfig(source=str(straight), what="codebook"))
    source = Tokenizer.from_pretrained(straight).state_dict()
    for name, value in tokenizer.state_dict().items():
        assert name.startswith("quantizer.") or torch.equal(source[name], value), name
    assert tokenizer.codebook_size == 64


def test_fine_tuning_from_another_architecture_is_refused(pictures, straight, tmp_path):
    with pytest.raises(UsageError, match="another quantizer"):
        fine_tuned(pictures, straight, tmp_path, "all", {"kind": "vq", "codebook_size": 64, "codebook_dim": 4})
