"""How many FLOP/s the GPU reaches in a large matrix product, which nothing that runs on it can beat: printed as a number."""

import torch

SIZE, PRODUCTS = 8192, 50


def matmul_ceiling() -> float:
    """FLOP/s of a product of two (SIZE, SIZE) matrices in bfloat16, random data."""
    a, b = torch.randn(2, SIZE, SIZE, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        a @ b
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(PRODUCTS):
        a @ b
    end.record()
    end.synchronize()
    return PRODUCTS * 2 * SIZE**3 / (begin.elapsed_time(end) / 1000)


if __name__ == "__main__":
    print(matmul_ceiling())
