"""The speed at which a rank hashes its weights, with the tensor sizes of a 70B model in FP8, with scales.

    python -m benchmarks.chat.weights [--gigabytes 9] [--repeats 5]

Runs on a GPU if there is one, otherwise on the CPU. Each matrix is transposed, as vLLM keeps FP8 weights, and has a
scale for each output.
"""

import argparse
import statistics
import sys
import time

import torch

from components.worker import weights

OUTPUTS, INPUTS = 28672, 8192


def seconds(tensors: list[torch.Tensor]) -> float:
    begun = time.perf_counter()
    sums = []
    for tensor in tensors:
        matrix, _ = weights._matrix(tensor)
        with tensor.device:
            sums.append(weights.place_sum(matrix, *weights._whole(matrix)))
    weights._numbers(sums)  # waits for the device
    return time.perf_counter() - begun


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chat.weights", description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=9.0)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = max(1, round(given.gigabytes * 1e9 / (OUTPUTS * INPUTS)))
    tensors = []
    for _ in range(count):
        tensors.append(torch.zeros(OUTPUTS, INPUTS, dtype=torch.uint8, device=device).t())
        tensors.append(torch.zeros(OUTPUTS, 1, device=device))
    seconds(tensors[:2])  # compiles the kernel
    rates = [count * OUTPUTS * INPUTS / seconds(tensors) / 1e9 for _ in range(given.repeats)]
    print(
        f"{device}, {torch.get_num_threads()} threads, {count} matrices of {OUTPUTS * INPUTS / 1e6:.0f} MB: "
        f"{statistics.median(rates):.1f} GB/s ({min(rates):.1f} to {max(rates):.1f})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
