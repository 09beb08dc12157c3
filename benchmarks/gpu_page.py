"""The section of RESULTS.md that `python -m benchmarks gpu` fills."""

from typing import Any


def section(parts: dict[str, Any]) -> list[str]:
    """The lines of the page, from the parts that were measured."""
    machines = sorted({f"{part['machine']}, commit {part['commit']}" for part in parts.values()})
    lines = ["`python -m benchmarks gpu`: " + "; ".join(machines) + ". Medians; times in milliseconds."]
    for name, write in (
        ("kernels", _kernels),
        ("step", _step),
        ("sampling", _sampling),
        ("learning", _plain),
        ("bulk", _plain),
        ("training", _plain),
        ("tests", _plain),
    ):
        if name in parts:
            lines += ["", *write(parts[name]["figures"])]
    missing = [name for name in ("learning", "training", "tuning") if name not in parts]
    if missing:
        lines += ["", f"Not measured: {', '.join(missing)}."]
    return lines


def _kernels(figures: dict[str, Any]) -> list[str]:
    ceiling = figures["bf16 product, TFLOP/s"]
    lines = [
        "Index backpropagation, forward and backward, D = 256; *dense* is the published computation (bf16: under",
        "autocast). In brackets, how many times it takes of the fastest of ours; MiB beyond the inputs.",
        "",
        "| N x K | method | without entropies | MiB | with entropies | MiB |",
        "|---|---|---|---|---|---|",
    ]
    ours = "triton, bf16"
    for key, value in figures.items():
        shape, _, method = key.partition(": ")
        if not isinstance(value, dict) or "ms" not in value:
            continue
        best = figures.get(f"{shape}: {ours}", {})
        cells = []
        for term in ("", ", entropy"):
            time, memory = value[f"ms{term}"], value[f"MiB{term}"]
            ratio = f" ({time / best[f'ms{term}']:.1f})" if best and method != ours else ""
            cells += [f"{time:.1f}{ratio}", f"{memory:.0f}"]
        lines.append(f"| {shape} | {method} | " + " | ".join(cells) + " |")
    lines += ["", "Search alone; *distances* is all distances and argmin:", ""]
    lines += ["| N x K | dot | l2 | plain tiles, dot | distances |", "|---|---|---|---|---|"]
    for key, value in figures.items():
        if key.endswith(": search"):
            row = [f"{value[name]:.2f}" if name in value else "-" for name in ("auto dot", "auto l2", "tiled dot")]
            row.append(f"{value['distances']:.2f}" if "distances" in value else "-")
            lines.append(f"| {key.removesuffix(': search')} | " + " | ".join(row) + " |")
    lines += ["", "Distance from float64, relative, with entropies; no method of ours gave a wrong index:", ""]
    lines += ["| N x K | method | gradient of z | of the codebook |", "|---|---|---|---|"]
    for key, value in figures.items():
        if key.startswith("error, "):
            shape, _, method = key.removeprefix("error, ").partition(": ")
            lines.append(f"| {shape} | {method} | {value['d_z']:.1e} | {value['d_codebook']:.1e} |")
    shape, bare = next((key, value) for key, value in figures.items() if "bare bf16 products" in key)
    shape = shape.partition(":")[0]
    seven = 5 * bare["z E"] + bare["dL E"] + bare["dL' z"]
    rows, size = (int(number) for number in shape.split(" x "))
    fastest = 7 * 2 * rows * size * 256 / ceiling / 1e9
    time = figures[f"{shape}: {ours}"]["ms"]
    lines += [
        "",
        f"Bounds at {shape}: seven bare products of the library in these shapes take {seven:.1f} ms (ours {time:.1f},",
        f"{time / seven:.2f} of it); at the rate of its largest product, {ceiling:.0f} TFLOP/s, they would take",
        f"{fastest:.1f} ms ({time / fastest:.1f} of it). A copy moves {figures['copy, TB/s']:.1f} TB/s.",
    ]
    return lines


def _step(figures: dict[str, Any]) -> list[str]:
    lines = [
        "A training step of the paper's tokenizer (LPIPS with random weights, discriminator, LeCAM, Adam, averages;",
        "bf16, channels last). *waits* is how often a step waits for the device.",
        "",
        "| batch | quantizer | ms | images/s | peak MiB | waits | kernels |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, value in figures.items():
        batch, _, method = key.partition(": ")
        cells = [f"{value['ms']:.0f}", f"{value['images/s']:.1f}", f"{value['peak MiB']}"]
        cells += [str(value.get(name, "-")) for name in ("waits", "kernels")]
        lines.append(f"| {batch} | {method} | " + " | ".join(cells) + " |")
    return lines


def _sampling(figures: dict[str, Any]) -> list[str]:
    lines = [
        "A position of a generator (256 tokens, guidance on, random weights), beside reading the weights once:",
        "",
    ]
    lines += ["| generator | ms | tokens/s | reading the weights, ms | times that |", "|---|---|---|---|---|"]
    rest = []
    for key, value in figures.items():
        if isinstance(value, dict):
            lines.append(
                f"| {key} | {value['ms']:.2f} | {value['tokens/s']} | {value['weights read, ms']:.2f} | "
                f"{value['times that']:.1f} |"
            )
        else:
            rest.append(f"{key}: {value}")
    return [*lines, "", "; ".join(rest) + "."]


def _plain(figures: dict[str, Any]) -> list[str]:
    lines = []
    for key, value in figures.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {number}" for name, number in value.items())
        lines.append(f"- {key}: {value}")
    return lines
