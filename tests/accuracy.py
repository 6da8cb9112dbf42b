"""The accuracy rule of every backend, stated once."""

import torch


def assert_accurate(actual, exact, plain):
    """`actual` may err from the float64 `exact` at most twice as much as `plain`, plain PyTorch in actual's dtype,
    plus one rounding of the output.
    """
    assert actual.dtype == plain.dtype and actual.shape == exact.shape
    assert torch.isfinite(actual).all()
    error = (actual.double() - exact).abs().max().item() if actual.numel() else 0.0
    plain_error = (plain.double() - exact).abs().max().item() if actual.numel() else 0.0
    rounding = torch.finfo(actual.dtype).eps / 2 * (exact.abs().max().item() if actual.numel() else 0.0)
    assert error <= 2 * plain_error + rounding, (
        f"error {error:.3g}, plain PyTorch's {plain_error:.3g}, rounding {rounding:.3g}"
    )
