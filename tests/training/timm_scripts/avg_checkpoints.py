"""Averages checkpoints as timm's avg_checkpoints.py does."""

from pathlib import Path

import torch
from neighbour import parser
from timm.models import load_state_dict

args = parser(("--input", ""), ("--output", "averaged.pth"), flags=("--no-use-ema",)).parse_args()
found = [load_state_dict(str(file), not args.no_use_ema) for file in sorted(Path(args.input).glob("checkpoint-*"))]
average = {key: sum(state[key].double() for state in found) / len(found) for key in found[0]}
torch.save({key: value.float() for key, value in average.items()}, args.output)
print(len(found))
