"""Put attention into the backbone of a torchvision detector, and save the backbone.

python examples/detector.py
"""

import torch
from torchvision.models.detection import retinanet_resnet50_fpn

import augment_cli as augment


def main(size: int = 256) -> None:
    detector = retinanet_resnet50_fpn(weights=None, weights_backbone=None)  # give your weights here
    source = detector.backbone
    backbone = augment.convert(source, "aa-resnet", "select.names=body.*", "budget.params=keep", input_size=size)
    detector.backbone = backbone
    plan = backbone.augment_metadata.plan
    print(f"{len(plan.sites)} convolutions of the backbone, {plan.params_before:,} -> {plan.params_after:,} parameters")

    with torch.no_grad():
        found = detector.eval()([torch.rand(3, size, size)])
    print("the detector returns", ", ".join(found[0]))

    augment.save(backbone, "backbone.safetensors", overwrite=True)
    again = augment.load("backbone.safetensors", base=source)  # timm does not know it: `base` gives its architecture
    passed = all(finding.passed for finding in augment.check(again))
    print("saved, loaded and checked" if passed else "the loaded backbone is not what its plan says")


if __name__ == "__main__":
    main()
