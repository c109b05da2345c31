"""What a script imports from its own folder."""

import argparse

import torch
from timm.utils import random_seed


def parser(*pairs, flags=()) -> argparse.ArgumentParser:
    """Options of timm's scripts with their defaults; the type of a default is the option's."""
    made = argparse.ArgumentParser()
    for name, default in pairs:
        made.add_argument(name, default=default, type=str if default is None else type(default))
    for name in flags:
        made.add_argument(name, action="store_true")
    made.add_argument("--num-classes", type=int)
    made.add_argument("--img-size", type=int)
    random_seed(0)
    torch.set_num_threads(1)
    return made
