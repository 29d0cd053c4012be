"""One optimiser step: the exact contrastive gradient over any number of micro-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .examples import Batch

_FEATURES = ("image_features", "text_features")


def contrastive_step(
    model: nn.Module, batches: Sequence[Batch], loss: nn.Module, backward: Callable[[Tensor], None],
    *, dual: bool = False, no_sync: Callable | None = None,
) -> Tensor:  # fmt: skip
    """Adds the gradient of the loss over all micro-batches together to ``.grad``, and returns the loss.

    A contrastive loss compares every study with every report, so gradients of micro-batches cannot just be added. With
    more than one, features are computed first without a graph, the loss is differentiated by the features, and each
    micro-batch is run again to carry its share of that gradient into the model (GradCache, arXiv 2101.06983), with the
    random numbers of the first time.

    Args:
        model: called as ``model(image=..., text=...)``; see :class:`hlip.model.HLIP`.
        batches: on the model's device.
        loss: see :class:`hlip.losses.ContrastiveLoss`.
        backward: ``accelerator.backward``, or ``Tensor.backward``.
        dual: texts are sentences followed by reports.
        no_sync: a context manager factory that keeps distributed training from exchanging gradients before the last
            micro-batch.
    """
    if len(batches) == 1:
        value = loss(model(image=batches[0].images, text=batches[0].tokens))
        backward(value)
        return value.detach()

    outputs, states = [], []
    with torch.no_grad():
        for batch in batches:
            states.append(random_state(batch.images.voxels.device))
            outputs.append(model(image=batch.images, text=batch.tokens))
    leaves = [{name: out[name].detach().requires_grad_() for name in _FEATURES} for out in outputs]
    scales = {k: v.detach().requires_grad_() for k, v in outputs[0].items() if k not in _FEATURES and v is not None}
    joined = {"image_features": torch.cat([leaf["image_features"] for leaf in leaves])}
    if dual:  # all sentences before all reports
        halves = [leaf["text_features"].chunk(2) for leaf in leaves]
        joined["text_features"] = torch.cat([half[0] for half in halves] + [half[1] for half in halves])
    else:
        joined["text_features"] = torch.cat([leaf["text_features"] for leaf in leaves])
    with torch.enable_grad():
        value = loss({**joined, **scales})
    value.backward()

    for i, (batch, state, leaf) in enumerate(zip(batches, states, leaves, strict=True)):
        last = i + 1 == len(batches)
        set_random_state(state, batch.images.voxels.device)
        with contextlib.nullcontext() if last or no_sync is None else no_sync(model):
            out = model(image=batch.images, text=batch.tokens)
            share = sum((out[name] * leaf[name].grad).sum() for name in _FEATURES)
            for name, scale in scales.items():  # counted once, but part of every graph
                if scale.grad is not None:  # in use by this loss
                    share = share + out[name] * (scale.grad if last else 0.0)
            backward(share)
    return value.detach()


def random_state(device: torch.device) -> list[Tensor]:
    """This process's random state: uint8 tensors on the CPU, of torch's CPU generator and, on a GPU, of that GPU's."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_random_state(state: list[Tensor], device: torch.device) -> None:
    """Goes back to what :func:`random_state` gave."""
    torch.set_rng_state(state[0])
    if len(state) > 1 and device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
