"""Times as timm's benchmark.py does: inference and a training step, on random images, in a precision."""

import json
import time

import torch
from neighbour import parser
from timm.data import resolve_data_config
from timm.models import create_model, is_model, list_models
from timm.optim import create_optimizer_v2

args = parser(("--model", "resnet50"), ("--batch-size", 2), ("--precision", "float32")).parse_args()
assert is_model(args.model) or not list_models(args.model)  # else a pattern of many models
model = create_model(
    args.model,
    num_classes=args.num_classes,
    in_chans=3,
    global_pool=None,
    scriptable=False,
    drop_rate=0.0,
    drop_path_rate=None,
    drop_block_rate=None,
)
dtype = getattr(torch, args.precision)
model.to(dtype=dtype, memory_format=torch.channels_last)
config = resolve_data_config(vars(args), model=model, use_test_size=True)
images = torch.randn(args.batch_size, *config["input_size"], dtype=dtype).contiguous(memory_format=torch.channels_last)
results = {"model": args.model, "param_count": sum(p.numel() for p in model.parameters())}
with torch.no_grad():
    start = time.perf_counter()
    model.eval()(images)
    results["infer_step_time"] = time.perf_counter() - start
optimizer = create_optimizer_v2(model, opt="sgd", lr=1e-4)
start = time.perf_counter()
labels = torch.empty(args.batch_size, dtype=torch.long).random_(model.num_classes)
torch.nn.functional.cross_entropy(model.train()(images), labels).backward()
optimizer.step()
results["train_step_time"] = time.perf_counter() - start
print(json.dumps(results))
