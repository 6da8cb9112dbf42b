"""p-values: the probability of a deviation at least as large under the null hypothesis.
Computed from that distribution exactly, so that a sound implementation fails with probability REJECT at most.
"""

import torch

REJECT = 1e-6


def binomial_p(successes, trials, probability):
    """Of a number of successes, two-sided: twice the smaller tail of the binomial distribution."""
    return _two_sided(successes, _binomial(trials), torch.as_tensor(probability, dtype=torch.float64))


def frequencies_p(counts, probabilities):
    """Of the counts of a sample's classes: the smallest binomial p-value times their number (Bonferroni). Unlike the
    chi-square approximation it holds for rare classes too.
    """
    probabilities = torch.as_tensor(probabilities, dtype=torch.float64)
    binomial = _binomial(int(sum(counts)))
    smallest = min(_two_sided(int(count), binomial, p) for count, p in zip(counts, probabilities, strict=True))
    return min(1.0, len(counts) * smallest)


def normal_std_p(x, std):
    """Of independent normal numbers of mean 0 having the standard deviation std: two-sided, by the chi-square
    distribution of the sum of their squares.
    """
    half, statistic = torch.tensor(x.numel() / 2).double(), (x.double() / std).square().sum() / 2
    tails = torch.special.gammainc(half, statistic), torch.special.gammaincc(half, statistic)
    return min(1.0, 2 * min(tails).item())


def _binomial(trials):
    """0 to trials, and the logarithms of the binomial coefficients."""
    k = torch.arange(trials + 1, dtype=torch.float64)
    return k, torch.lgamma(k[-1] + 1) - torch.lgamma(k + 1) - torch.lgamma(k[-1] - k + 1)


def _two_sided(successes, binomial, probability):
    k, coefficients = binomial
    log_mass = coefficients + torch.xlogy(k, probability) + torch.special.xlog1py(k[-1] - k, -probability)
    tails = log_mass[: successes + 1], log_mass[successes:]
    return min(1.0, 2 * min(part.logsumexp(0).exp().item() for part in tails))
