"""What goes over a stage boundary comes out the same, bit for bit, and gradients come back the same."""

import pytest
import torch

from utils.pipeline.layer import Stream
from utils.pipeline.packing import pack, unpack

CPU = torch.device("cpu")


def sent(packed: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """As DeepSpeed hands it on: copies without history, floats with a gradient of their own."""
    return tuple(tensor.detach().clone().requires_grad_(tensor.is_floating_point()) for tensor in packed)


def test_every_wire_keeps_its_bits_shape_and_dtype():
    stream = Stream(
        hidden=torch.randn(2, 3, 5, requires_grad=True).to(torch.bfloat16),
        time=torch.randn(2, 5, requires_grad=True),
        text=torch.randn(2, 7, dtype=torch.bfloat16),
        ids=torch.arange(100).view(4, 25),
        mask=torch.tensor([True, False, True]),
        grid=torch.tensor([3, 4, 5]),
        scalar=torch.tensor(7.5, dtype=torch.float64),
    )
    packed = pack(stream, CPU)
    assert [tensor.is_floating_point() for tensor in packed] == [True, False, False], "one float tensor, and it comes first"
    received = unpack(sent(packed))
    assert list(received) == list(stream)
    for name, tensor in stream.items():
        assert received[name].dtype is tensor.dtype, name
        assert torch.equal(received[name], tensor), name
        assert received[name].requires_grad == tensor.requires_grad, name


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2])
def test_gradients_come_back_as_without_a_boundary(dtypes):
    a, b = (torch.randn(4, 6, dtype=dtype, requires_grad=True) for dtype in dtypes)
    weight = torch.randn(4, 6)

    def loss(stream: Stream) -> torch.Tensor:
        return (stream["a"].float() * weight).sum() + (stream["b"].float() ** 2).sum()

    expected = torch.autograd.grad(loss(Stream(a=a * 1, b=b * 1)), (a, b))
    packed = pack(Stream(a=a * 1, b=b * 1), CPU)
    received = sent(packed)
    loss(unpack(received)).backward()
    packed[0].backward(received[0].grad)
    assert torch.equal(a.grad, expected[0])
    assert torch.equal(b.grad, expected[1])


def test_without_gradients_no_float_tensor_crosses():
    packed = pack(Stream(hidden=torch.randn(2, 3), empty=torch.zeros(0, 4)), CPU)
    assert not any(tensor.is_floating_point() for tensor in packed)
    received = unpack(packed)
    assert received["empty"].shape == (0, 4)


def test_only_geometry_needs_no_bytes():
    packed = pack(Stream(grid=torch.tensor([1, 2, 3])), CPU)
    assert len(packed) == 1
    assert unpack(packed)["grid"].tolist() == [1, 2, 3]
