"""Random numbers as a function of a place in the training: nothing of them is a state to save."""

import random

import numpy as np
import torch

# What a seed is for, the first number of a place.
STEP, DATA = 0, 1


def seed_everything_for(seed: int, *place: int) -> None:
    """Seed Python, numpy and torch (all devices, without waiting for one) from seed and place.

    A training step is at ``(STEP, iteration, rank)``, the batch that it gets is read at
    ``(DATA, iteration, rank)``; iterations are counted from 0 over the whole training. The same
    numbers draw the same again, in whatever process and after whatever was drawn before.
    """
    entropy = [number % 2**32 for number in (seed, *place)]
    derived = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(derived)
    np.random.seed(derived)
    torch.manual_seed(derived)
