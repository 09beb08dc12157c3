"""Benchmarks: one command for all of them, one way to keep their figures."""

import argparse
import gc
import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import (
    faults,
    gpu,
    hypotheses,
    losses,
    many,
    million,
    published,
    quantizers,
    results,
    shown,
    soak,
    step,
    study,
)
from benchmarks.__main__ import BENCHMARKS
from lexel.compare import expand
from lexel.config import check
from lexel.quantizers.ibq import IBQ
from lexel.run_folder import RunFolder
from lexel.tokenizer import Tokenizer
from lexel.train.optimization import seed_step
from lexel.train.processes import Processes
from lexel.train.session import Session
from lexel.train.tokenizer import Learner, TokenizerRecipe, train_tokenizer


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_declares_its_options_and_runs(name):
    module = importlib.import_module(f"benchmarks.{name}")
    module.options(argparse.ArgumentParser())
    assert callable(module.run)


def test_the_gpu_benchmark_is_refused_once_and_writes_nothing_without_a_device(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    parser = argparse.ArgumentParser()
    gpu.options(parser)
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        gpu.run(parser.parse_args(["--out", str(tmp_path / "out")]))
    assert not (tmp_path / "out").exists()


def test_the_published_class_is_measured_only_where_a_checkout_of_it_is_named(tmp_path):
    parser = argparse.ArgumentParser()
    quantizers.options(parser)
    plain, named = parser.parse_args([]), parser.parse_args(["--peer", str(tmp_path)])
    assert not quantizers.can_run("published class", 16, 64, plain)
    assert quantizers.can_run("published class", 16, 64, named)
    with pytest.raises(SystemExit, match="is not there"):
        quantizers.times(16, 64, named)


def test_published_code_is_imported_where_it_lies_and_leaves_no_name_behind(tmp_path):
    (tmp_path / "unheard_of").mkdir()
    (tmp_path / "unheard_of" / "model.py").write_text(
        "import lightning\nfrom main import instantiate_from_config\n"
        "class Model(lightning.LightningModule):\n    factor = 3\nprint('a shape')\n"
    )
    before = set(sys.modules)
    with published.importing(tmp_path, "unheard_of/model.py"):
        model = importlib.import_module("unheard_of.model").Model()
    assert model.factor == 3
    assert isinstance(model, published.LightningModule)
    assert not {"unheard_of", "unheard_of.model", "lightning", "main", "torchvision"} & (set(sys.modules) - before)
    with pytest.raises(SystemExit, match="is not there"), published.importing(tmp_path, "other.py"):
        pass


def test_operations_and_waits_of_a_step_are_counted_without_views_and_adams_own_count():
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = torch.optim.Adam([weight], fused=False, foreach=False)
    weight.grad = torch.ones(4, 4)
    with step.Counted() as counted:
        (weight.detach().view(16)[2:] + 1).t()
    assert (counted.operations, counted.waits) == (1, 0)
    with step.Counted() as counted:
        optimizer.step()
    assert counted.waits == 0
    with step.Counted() as counted:
        float(weight.detach().sum())
    assert counted.waits == 1


def test_a_section_is_replaced_and_the_rest_of_the_page_stays(tmp_path):
    page = tmp_path / "RESULTS.md"
    page.write_text("# Results\n\nbefore\n\n<!-- step -->\nold\n<!-- end of step -->\n\nafter\n")
    results.write(page, {"step": 1}, "step", ["new"])
    results.write(page, {"step": 1, "other": 2}, "other", ["added"])
    text = page.read_text()
    assert "before\n\n<!-- step -->\nnew\n<!-- end of step -->\n\nafter" in text
    assert "<!-- other -->\nadded\n<!-- end of other -->" in text
    assert "old" not in text
    assert json.loads(page.with_suffix(".json").read_text()) == results.read(page) == {"step": 1, "other": 2}


def test_the_published_figures_give_the_published_page():
    page = results.PAGE.read_text(encoding="utf-8")
    figures = results.read(results.PAGE)
    for name, part in (("quantizers", figures), *((name, figures[name]) for name in ("step", "samplers", "faults"))):
        lines = importlib.import_module(f"benchmarks.{name}").section(part)
        assert "\n".join(lines).strip() in page, name


def test_the_studys_tables_are_those_of_its_figures():
    page = study.PAGE.read_text(encoding="utf-8")
    for section, lines in study.tables(json.loads(study.FIGURES.read_text(encoding="utf-8"))).items():
        table = page.split(f"<!-- {section} -->\n")[1].split(f"<!-- end of {section} -->")[0]
        assert table == "\n".join(lines) + "\n", f"python -m benchmarks study writes {section}"


def test_the_table_of_losses_is_that_of_its_figures():
    page = (study.PAGE.parents[1] / "losses.md").read_text(encoding="utf-8")
    assert "\n".join(losses.section(json.loads(losses.FIGURES.read_text(encoding="utf-8")))) + "\n\n" in page


def test_a_seed_that_is_added_to_a_row_stands_in_its_place_and_only_once():
    def row(seed, psnr, **more):
        numbers = {name: {"mean": value, "deviation": None, "values": [value]} for name, value in more.items()}
        return {"quantizer": "vq", "seeds": [seed], "runs": [f"vq-{seed}"], "psnr": study.joined([psnr]), **numbers}

    rows = []
    for new in (row(0, 20.0, lpips=0.3), row(2, 23.0, lpips=0.2), row(1, 23.0), row(2, 99.0)):
        study.add(rows, new)
    expected = {"mean": 22.0, "deviation": 1.732051, "values": [20.0, 23.0, 23.0]}
    assert rows == [
        {"quantizer": "vq", "seeds": [0, 1, 2], "runs": ["vq-0", "vq-1", "vq-2"], "psnr": expected}
    ]  # a number that one seed lacks is none of the row's


def quantized_in_float64(quantizer):
    """z_q, indices, the latents' and the codes' gradients, and the terms; with given weights and latents."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        quantizer.double().weight.copy_(torch.randn(64, 8, generator=generator, dtype=torch.float64))
    z = torch.randn(2, 8, 4, 4, generator=generator, dtype=torch.float64).requires_grad_()
    z_q, indices, terms = quantizer(z)
    picture = (z_q * torch.randn(z_q.shape, generator=generator, dtype=torch.float64)).sum()
    (picture + quantizer.loss(terms)).backward()
    return {"z_q": z_q, "indices": indices, "latents": z.grad, "codes": quantizer.weight.grad, **terms}


def test_a_trial_with_its_options_left_alone_is_ibq():
    torch.testing.assert_close(quantized_in_float64(hypotheses.Trial(64, 8)), quantized_in_float64(IBQ(64, 8)))


def test_the_balance_makes_the_terms_gradient_as_long_as_the_pictures():
    trial, z = hypotheses.Trial(64, 8, balance=0.5), torch.randn(2, 8, 4, 4)

    def length(of):
        latents = z.clone().requires_grad_()
        return torch.autograd.grad(of(trial(latents)), latents)[0].norm().item()

    for _ in range(2):
        picture = length(lambda out: out.z_q.square().sum())
        terms = length(lambda out: trial.loss(out.losses))
    assert terms == pytest.approx(picture / 2, rel=1e-4)


def test_a_queues_entropy_is_that_of_the_mean_of_its_batches_with_the_gradient_of_one():
    trial = hypotheses.Trial(64, 8, batches=3)
    rows = torch.randn(5, 64).softmax(1).requires_grad_()
    for row in rows[:-1]:
        trial._batch_entropy(row)
    entropy = trial._batch_entropy(rows[-1])
    mean = rows[2:].mean(0)
    torch.testing.assert_close(entropy, -(mean * (mean + 1e-5).log()).sum())
    (gradient,) = torch.autograd.grad(entropy, rows)
    assert not gradient[:-1].any()
    torch.testing.assert_close(gradient[-1], -((mean + 1e-5).log() + mean / (mean + 1e-5)).detach())


def test_cells_of_equal_mass_hold_equally_many_rows_and_each_row_meets_one():
    rows = torch.randn(256, 6, generator=torch.Generator().manual_seed(0))
    assert shown.cells_met(rows, rows, 64) == 64  # four rows each: none is empty
    assert shown.cells_met(rows, rows[:1].repeat(9, 1), 64) == 1
    assert 1 < shown.cells_met(rows, rows[:8], 64) <= 8


def test_twins_are_pictures_whose_latents_are_nearly_those_of_another():
    latents = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))
    latents[5] = latents[2] + 1e-3
    assert shown.twins(latents) == 2


@pytest.mark.slow
def test_nothing_is_lost_to_faults():
    table = faults.inject(seed=os.getpid(), quick=True)  # other moments and places each time
    assert set(table) == {name for name, kind in faults.FAULTS.items() if kind.quick}
    assert {name: counts[faults.LOST] for name, counts in table.items() if counts[faults.LOST]} == {}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return faults.Place(tmp_path_factory.mktemp("faults"))


def test_damaged_files_and_a_killed_encoding_lose_nothing(place):
    quick = ("kill -9, encoding", "damaged tokens", "damaged shard", "failing reads")  # the others each train twice
    table = faults.inject_into(place, os.getpid(), True, quick, times=1)
    assert set(table) == set(quick)
    assert {name: counts[faults.LOST] for name, counts in table.items() if counts[faults.LOST]} == {}


def test_a_fault_that_changes_the_result_is_called_lost(place, monkeypatch):
    monkeypatch.setattr(faults, "encode", lambda out, seconds=0.0: (out.mkdir(), (out / "tokens.json").write_text("")))
    table = faults.Counter(faults.killed_encoding(place, faults.random.Random(0)) for _ in range(1))
    assert table == {faults.LOST: 1}


@pytest.mark.parametrize("steps", [48, pytest.param(1000, marks=pytest.mark.slow)])
def test_memory_files_and_threads_do_not_grow_over_a_training(tmp_path, steps):
    soaked = soak.soak(steps, tmp_path)
    assert soaked.grows == []
    leaky = soaked._replace(after=soaked.after._replace(files=soaked.before.files + 1))
    assert leaky.grows == ["files"]


@pytest.mark.thorough
def test_nothing_of_a_training_lives_on_when_the_run_goes_on(tmp_path):
    pictures, alive = faults.draw_pictures(tmp_path), []
    for steps in (1, 2, 3, 4):
        plan = faults.recipe(pictures, steps, validate_every=1, save_every=1)
        train_tokenizer(plan, tmp_path / "run", device="cpu")
        gc.collect()
        kinds = (torch.Tensor, torch.nn.Module, torch.optim.Optimizer, Session, RunFolder)
        alive.append(sum(isinstance(each, kinds) for each in gc.get_objects()))
    assert alive[1] == alive[2] == alive[3]


@pytest.mark.slow
def test_parts_of_which_one_is_killed_merge_to_the_tokens_of_an_undisturbed_command(tmp_path, monkeypatch):
    monkeypatch.setenv("LEXEL_CACHE", str(tmp_path / "cache"))
    found = million.million(3000, tmp_path / "work", shard_size=100)
    assert found["equal"]
    assert found["shards"] == 30
    assert 0 < found["killed"]["shards"] < 15
    assert len(million.section({"commit": "abc", "machine": "here", **found})) == 12


@pytest.mark.parametrize("kind", ["affine", "ibq"])
def test_a_training_among_many_takes_the_steps_of_the_training_loop(kind):
    sizes = {"codebook_size": 32, "codebook_dim": 4}
    network = {"width": 8, "multipliers": [1], "patch": 4, "residual_blocks": 1, "attention_levels": []}
    network |= {"middle_attention": False, "z_channels": 8, "groups": 4}
    train = {"steps": 4, "batch_size": 3, "lr": 1e-3, "clip": 1.0, "average_warm_up": True, "average_decay": 0.5}
    train["schedule"] = {"kind": "linear", "warm_up": 2}
    table = {"model": {"quantizer": {"kind": kind, **sizes}, "autoencoder": network}, "train": train}
    recipe = check({**table, "data": {"source": "none", "size": 8}}, TokenizerRecipe, "test")
    pictures = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (planned,) = expand(recipe, [kind])
    training = many.Training(planned, pictures, 4, torch.device("cpu"))
    seed_step(planned.seed, -1, 0)
    processes = Processes("cpu", "float32", [], Path())
    learner = Learner(planned.recipe, Tokenizer(planned.recipe.model), processes)
    with many.dense():
        for number in range(4):
            training.advance(1)
            images = pictures[training.order[number]].float() / 127.5 - 1
            learner.step(images, False, planned.recipe.train.schedule.factor(number, 4))
    average = [*learner.average.module.parameters()]
    for found, expected in zip(
        [*training.tokenizer.parameters(), *training.average],
        [*learner.tokenizer.parameters(), *average],
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
