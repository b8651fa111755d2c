"""The stream between pipeline layers, and the layer that every family's layers derive from."""

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn


class Stream(dict[str, Tensor]):
    """Named tensors that travel from layer to layer.

    A layer returns a stream that holds what later layers still use and nothing else: everything in it is sent at a stage
    boundary, and a tensor that is not used later would get no gradient.
    """

    def clone(self) -> "Stream":
        """A shallow copy.  (DeepSpeed clones what it hands to ``forward``; the layers never write into their inputs.)"""
        return Stream(self)

    def replaced(self, drop: tuple[str, ...] = (), **tensors: Tensor) -> "Stream":
        """A new stream with some tensors replaced or added and some left out."""
        return Stream({name: tensor for name, tensor in {**self, **tensors}.items() if name not in drop})


class PipelineLayer(nn.Module):
    """One step of the pipeline.  Subclasses write :meth:`run`; what surrounds it is done here, once.

    A layer registers exactly the parts of the diffusers model that it owns; helpers without weights (position embeddings) are held
    unregistered, so that a layer's parameters are its block's.
    """

    autocast: AbstractContextManager | None = None
    """Set by the pipeline module from the runtime policy."""

    def run(self, stream: Stream) -> Stream:
        """Compute this layer's part.  Shapes and names of the stream are written in each family's ``layers.py``."""
        raise NotImplementedError

    def forward(self, stream: Stream) -> Stream:
        # A view of each tensor, so that the gradients of its uses in this layer are summed before those of other layers join: as
        # they are when a stage ends here.  Otherwise a tensor that is used in several layers has other bits on other stages.
        stream = Stream({name: tensor.view_as(tensor) if tensor.requires_grad else tensor for name, tensor in stream.items()})
        with self.autocast or nullcontext():
            stream = self.run(stream)
        return Stream({name: tensor.contiguous() for name, tensor in stream.items()})
