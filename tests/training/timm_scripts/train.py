"""Trains as timm's train.py does: its factories, moving average, scheduler, and saver of checkpoints."""

import importlib
import json

import torch
from neighbour import parser
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import create_model
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3

options = parser(
    ("--model", "resnet50"),
    ("--data-dir", None),
    ("--output", None),
    ("--opt", "sgd"),
    ("--lr", 0.01),
    ("--momentum", 0.9),
    ("--weight-decay", 0.0),
    ("--layer-decay", 0.8),
    ("--drop-path", 0.1),
    ("--epochs", 2),
    flags=("--pretrained",),
)
options.add_argument("--device-modules", default=None, type=str, nargs="+")
args = options.parse_args()
for module in args.device_modules or ():
    importlib.import_module(module)
model = create_model(
    args.model,
    pretrained=args.pretrained,
    in_chans=3,
    num_classes=args.num_classes,
    drop_rate=0.0,
    drop_path_rate=args.drop_path,
    drop_block_rate=None,
    global_pool=None,
    bn_momentum=None,
    bn_eps=None,
    scriptable=False,
    checkpoint_path="",
)
config = resolve_data_config(vars(args), model=model)
dataset = create_dataset("", root=args.data_dir, split="train", is_training=True)
loader = create_loader(
    dataset, config["input_size"], 8, is_training=True, num_workers=0, use_prefetcher=False, mean=config["mean"]
)
optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
average = ModelEmaV3(model, decay=0.5)
scheduler, epochs = create_scheduler_v2(optimizer, num_epochs=args.epochs, updates_per_epoch=len(loader))
saver = CheckpointSaver(model, optimizer, args=args, model_ema=average, checkpoint_dir=args.output)
criterion, losses = LabelSmoothingCrossEntropy(0.1), []
for epoch in range(epochs):
    model.train()
    for images, labels in loader:
        loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model)
        losses.append(loss.item())
    scheduler.step(epoch + 1)
    saver.save_checkpoint(epoch, metric=-losses[-1])
print(json.dumps({"losses": losses, "size": config["input_size"], "type": type(model).__name__}))
