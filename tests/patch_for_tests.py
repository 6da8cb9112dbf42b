"""Comparison of a model with itself after dk.patch."""

import copy
from unittest import mock

import torch

import dalle_kernels as dk


def results(model, call):
    """The output of call(model), and the gradient of every parameter for a fixed cotangent."""
    model.zero_grad()
    torch.manual_seed(7)  # of dropout
    out = call(model)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    (out * cotangent).sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_results(model, call, dtype, tolerance):
    """The patched model has the results of the unpatched one up to `tolerance`, relative to the largest value, and
    after undo() the same bits. Returns what was replaced.
    """
    model = copy.deepcopy(model)
    model = model.double() if dtype == torch.float64 else model.float()  # ruDALL-E has a to() of its own
    state = {name: value.clone() for name, value in model.state_dict().items()}
    out, grads = results(model, call)
    random = torch.get_rng_state()
    patch = dk.patch(model)
    assert torch.equal(torch.get_rng_state(), random)
    with mock.patch("dalle_kernels.patch_targets.sparse_attention", wraps=dk.sparse_attention) as attention:
        patched, patched_grads = results(model, call)
    assert patch.kept == {} and attention.call_count >= len(patch.replaced)
    assert_near(patched, out, tolerance)
    assert patched_grads.keys() == grads.keys() and grads
    largest = max(grad.abs().max() for grad in grads.values())
    for name, grad in grads.items():
        assert_near(patched_grads[name], grad, tolerance, largest)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    patch.undo()
    again, grads_again = results(model, call)
    assert torch.equal(again, out) and all(torch.equal(grads_again[name], grads[name]) for name in grads)
    return patch.replaced


def assert_near(actual, expected, tolerance, largest=None):
    error = (actual - expected).abs().max()
    assert error <= tolerance * (expected.abs().max() if largest is None else largest), error
