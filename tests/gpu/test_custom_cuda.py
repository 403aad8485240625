"""A CUDA kernel from outside, compiled by nvcc for the device that is there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from twofold.kernels.custom import Entry, Float, In, Int, Out, check, cuda
from twofold.kernels.op import Op

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or shutil.which("nvcc") is None, reason="needs a device and nvcc"),
]

SOURCE = """
__global__ void forward(const float* x, const float* w, float by, float* y, int64_t count, int64_t D) {
    const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
    if (i < count) y[i] = x[i] * w[i % D] * by;
}
void scale(const float* x, const float* w, double by, float* y, int64_t T, int64_t D, void* stream) {
    const int64_t count = T * D;
    if (count) forward<<<(count + 255) / 256, 256, 0, (cudaStream_t)stream>>>(x, w, float(by), y, count, D);
}
"""
FORWARD = Entry("scale", In("x_TD"), In("w_D"), Float("by"), Out("y_TD"), Int("T"), Int("D"))


def scaled(x_TD: Tensor, w_D: Tensor, by: float = 2.0) -> Tensor:
    return x_TD * w_D * by


@pytest.fixture
def op(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Op[..., Tensor]:
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path))
    made = Op(scaled)
    cuda(made, source=SOURCE, forward=FORWARD, why="one pass over memory")
    return made


def test_it_is_its_reference_on_the_device(op: Op[..., Tensor]) -> None:
    report = check(op, rows="T")
    assert report.ok, report
    assert report.cases == 180


def test_it_runs_on_the_stream_of_the_caller(op: Op[..., Tensor]) -> None:
    x, w = torch.randn(512, 4096, device="cuda"), torch.randn(4096, device="cuda")
    op(x, w)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        found = op(x.mT.contiguous().mT + 1, w)  # a copy is made for the call, on the same stream
    stream.synchronize()
    assert torch.equal(found, (x + 1) * w * 2.0)


def test_tensors_of_the_processor_stay_with_the_reference(op: Op[..., Tensor]) -> None:
    x, w = torch.randn(3, 5), torch.randn(5)
    assert torch.equal(op(x, w), scaled(x, w))
