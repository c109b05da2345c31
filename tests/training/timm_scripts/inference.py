"""Predicts as timm's inference.py does: names of classes out of the model's configuration, by image."""

import json

import torch
from neighbour import parser
from timm.data import CustomDatasetInfo, create_dataset, create_loader, resolve_input_data_config
from timm.models import create_model, resolve_model_input_args

args = parser(("--model", "resnet50"), ("--data-dir", None), ("--checkpoint", "")).parse_args()
given = {"num_classes": args.num_classes, "pretrained": not args.checkpoint, "checkpoint_path": args.checkpoint}
model = create_model(**resolve_model_input_args(args.model, vars(args), **given)).eval()
config = resolve_input_data_config(model, vars(args), use_test_size=True)
dataset = create_dataset("", root=args.data_dir, split="validation")
loader = create_loader(dataset, batch_size=4, use_prefetcher=True, num_workers=0, device=torch.device("cpu"), **config)
names = model.pretrained_cfg.get("label_names")
known = CustomDatasetInfo(names) if names else None
indices = []
with torch.inference_mode():
    for images, _ in loader:
        indices += model(images).softmax(-1).argmax(-1).tolist()
labels = [known.index_to_label_name(i) for i in indices] if known else indices
print(json.dumps(dict(zip(loader.dataset.filenames(basename=False), labels, strict=True))))
