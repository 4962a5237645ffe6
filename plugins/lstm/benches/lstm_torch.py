"""Milliseconds of a forward and a backward pass of torch.nn.LSTM, timed as examples/speed.rs times this crate's.

    python lstm_torch.py [threads, default 2]
"""

import sys
import time

import torch

WARM_UP, RUNS = 3, 15

torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
for batch, seq, dim in [(4, 1028, 512), (1028, 9, 256)]:
    torch.manual_seed(0)
    model = torch.nn.LSTM(dim, dim, 1, batch_first=True)
    x = (torch.rand(batch, seq, dim) * 2 - 1).requires_grad_()
    times = []
    for run in range(WARM_UP + RUNS):
        start = time.perf_counter()
        y, _ = model(x)
        forward = time.perf_counter() - start
        y.sum().backward()
        if run >= WARM_UP:
            times.append(((time.perf_counter() - start) * 1e3, forward * 1e3))
    total, forward = sorted(times)[RUNS // 2]
    print(f"batch {batch}, seq {seq}, dim {dim}: {total:.1f} ms (forward {forward:.1f})")
