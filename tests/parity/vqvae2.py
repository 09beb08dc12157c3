"""VQ-VAE-2, evaluation and two steps of training."""

from torch import Tensor

from lexel.tokenizer import Tokenizer
from tests.parity.fixture import Fixture

BUFFERS = {"embed": "weight", "cluster_size": "counts", "embed_avg": "sums"}


def check(fixture: Fixture) -> None:
    for run in fixture.runs():
        x = run["x"]
        size = list(x.shape[2:])
        model = run.load("vqvae2", {} if size[0] == size[1] else {"autoencoder.size": size})
        result = model(x)
        names = zip(("t", "b"), parts(model, result.quantized.z_q), parts(model, result.quantized.indices), strict=True)
        for level, codes, indices in names:
            run.close(f"quant_{level}", codes)
            run.same(f"id_{level}", indices)
        difference = result.quantized.losses["commitment"]
        run.close("diff", difference)
        run.close("rec", result.images)
        total = (result.images - x).square().mean() + 0.25 * difference
        run.close("total", total)
        run.close("decode_code", model.decode_codes(model.quantizer.indices_to_codes(result.quantized.indices)))
        run.gradients(total, run.parameters(model))

        model.train()
        first, published = model(x), run.expected["train_step"]
        run.close("train_step rec", first.images, published["rec"])
        run.close("train_step diff", first.quantized.losses["commitment"], published["diff"])
        for name, theirs in published["buffers_after"].items():
            level, buffer = name.removeprefix("quantize_").split(".")
            ours = getattr(model.quantizer.part("tb".index(level)), BUFFERS[buffer])
            run.close(f"train_step {name}", ours.T if ours.dim() == 2 else ours, theirs)
        second, published = model(x), run.expected["second_train_step"]
        run.close("second_train_step rec", second.images, published["rec"])
        run.close("second_train_step diff", second.quantized.losses["commitment"], published["diff"])


def parts(model: Tokenizer, cells: Tensor) -> tuple[Tensor, ...]:
    return model.quantizer.split(cells)
