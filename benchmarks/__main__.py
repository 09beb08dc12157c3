"""Lexel's benchmarks: python -m benchmarks NAME [options]; --help after a name tells its options."""

import argparse
import importlib
import sys

BENCHMARKS = {
    "gpu": "everything that only a GPU can tell, in parts",
    "traffic": "kernels started and bytes asked for by the Triton kernels, counted without a GPU",
    "results": "RESULTS.md, written again from the figures that are kept",
    "quantizers": "time and memory of forward + backward, and of encoding, beside the peers",
    "scans": "exact search by scans in float32, bfloat16 and int8: time, and the same codes",
    "clusters": "approximate search in clusters of codes: time and misses beside the exact search",
    "step": "a whole training step of a small tokenizer, IBQ beside plain VQ",
    "generator": "decoding steps of a generator beside the published way",
    "speculative": "sampling with the proposals of a draft beside token after token: tokens a second",
    "losses": "the same small training with other losses, judged by a network that was no teacher",
    "many": "many small trainings at once on one GPU: the figures of docs/studies/which-quantizer.md",
    "study": "the tables of docs/studies/which-quantizer.md from its figures, to which results of `compare` are added",
    "hypotheses": "what might mend IBQ and is no part of Lexel, trained and measured as `compare` does a method",
    "shown": "how many codes held-out pictures can show, by a run's table and by the best tables for its latents",
    "startup": "every command's start beside `import torch` alone: processor time",
    "evaluate": "10,000 pictures evaluated: time and memory",
    "evaluation": "evaluation beside torchmetrics on the same files, metrics and network",
    "protocols": "the published protocols on the same pictures and the same tokenizer",
    "faults": "faults injected into training, encoding and reading: what survived",
    "soak": "a long training: memory, open files and threads that do not grow",
    "million": "a million pictures in tar shards: listed, encoded in parts, one killed, merged",
    "names": "a million and ten million names: put together, ordered, shared out, held by workers, mapped",
    "listing": "image files on a disk, listed and labelled beside walking the tree",
    "throughput": "20,000 JPEG files read, encoded and evaluated: images a second, memory",
    "tiles": "pictures in overlapping tiles beside whole ones: codes, seams, memory",
    "arithmetic": "a training step of a tokenizer counted without weights: GFLOP and kept memory of each part",
    "lines": "lines of code by feature at two commits",
    "fingerprint": "digests of the weights that the two tiny recipes end with",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, text in BENCHMARKS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name in sys.argv[1:2]:  # only the benchmark that is run is imported
            importlib.import_module(f"benchmarks.{name}").options(command)
    arguments = parser.parse_args()
    from lexel.errors import UsageError

    try:
        importlib.import_module(f"benchmarks.{arguments.name}").run(arguments)
    except UsageError as error:
        print(f"benchmarks {arguments.name}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
