"""python -m benchmarks quantizers | step | generator | fingerprint [options]; --help after each names its options"""

import argparse
import sys
from pathlib import Path

from benchmarks import fingerprint, generator, quantizers, training

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    if sys.argv[1:2] == ["generator"]:  # has options of its own
        generator.main(sys.argv[2:])
        return 0
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("quantizers", help="time and memory of forward + backward, and of encoding")
    run.add_argument("--device", default="cpu")
    run.add_argument("--rows", type=int, nargs="*", default=[1024, 4096], help="numbers of latents, N")
    run.add_argument("--sizes", type=int, nargs="*", default=[1024, 16384, 65536, 262144], help="codebook sizes, K")
    run.add_argument("--dim", type=int, default=256)
    run.add_argument("--threads", type=int, default=1)
    run.add_argument("--gigabytes", type=float, default=12.0, help="methods that would need more are left out")
    run.add_argument("--repeats", type=int, help="rounds; by default 9 for small shapes down to 1 for the largest")
    run.add_argument("--parts", nargs="*", default=["time", "memory"], choices=["time", "memory"])
    run.add_argument("--out", type=Path, default=HERE / "RESULTS.md", help="figures go beside it as .json")
    one = commands.add_parser("memory", help="the peak of one method in this process, in MiB (used by `quantizers`)")
    one.add_argument("method")
    one.add_argument("shape", type=int, nargs=3)
    one.add_argument("--device", default="cpu")
    step = commands.add_parser("step", help="a whole training step of a small tokenizer, IBQ beside plain VQ")
    step.add_argument("--size", type=int, default=65536)
    step.add_argument("--repeats", type=int, default=5)
    step.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    commands.add_parser("fingerprint", help="digests of the weights that the two tiny recipes end with")
    arguments = parser.parse_args()
    if arguments.command == "fingerprint":
        fingerprint.main()
    elif arguments.command == "memory":
        print(quantizers.peak(arguments.method, *arguments.shape, arguments.device))
    elif arguments.command == "step":
        training.run(arguments)
    else:
        quantizers.run(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
