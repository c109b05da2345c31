"""Validates as timm's validate.py does: arguments resolved by timm, a checkpoint of train.py or none."""

import json

import torch
from neighbour import parser
from timm.data import create_dataset, create_loader, resolve_input_data_config
from timm.layers import apply_test_time_pool
from timm.models import create_model, load_checkpoint, resolve_model_input_args
from timm.utils import accuracy, reparameterize_model

args = parser(
    ("--model", "dpn92"),
    ("--data-dir", None),
    ("--checkpoint", ""),
    ("--batch-size", 4),
    flags=("--pretrained", "--use-ema", "--reparam", "--channels-last", "--torchscript", "--test-pool"),
).parse_args()
pretrained = args.pretrained or not args.checkpoint
given = {"pretrained": pretrained, "num_classes": args.num_classes, "scriptable": args.torchscript}
model = create_model(**resolve_model_input_args(args.model, vars(args), **given)).eval()
if args.checkpoint:
    load_checkpoint(model, args.checkpoint, args.use_ema)
if args.reparam:
    model = reparameterize_model(model)
config = resolve_input_data_config(model, vars(args), use_test_size=True)
if args.test_pool:
    model, _ = apply_test_time_pool(model, config)
if args.channels_last:
    model = model.to(memory_format=torch.channels_last)
if args.torchscript:
    model = torch.jit.script(model)
dataset = create_dataset("", root=args.data_dir, split="validation")
loader = create_loader(
    dataset, config["input_size"], args.batch_size, num_workers=0, use_prefetcher=False, mean=config["mean"]
)
found = []
with torch.inference_mode():
    for images, labels in loader:
        found.append(accuracy(model(images), labels, topk=(1, 3))[0].item())
print(json.dumps({"top1": sum(found) / len(found), "size": config["input_size"]}))
