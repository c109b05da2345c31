"""Convert a model, train it with a plain PyTorch loop, save it, and load it again.

    python examples/train.py

The images are drawn here: the class of one is where two equal squares stand to each other, side by side or one above
the other. A real run would use `augment finetune`, which resumes, validates and logs.
"""

import torch
from torch import Tensor, nn

import augment_cli as augment


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 48, 48) and their classes (count,), 0 or 1."""
    images, labels = torch.randn(count, 3, 48, 48, generator=generator) * 0.1, torch.arange(count) % 2
    for image, label in zip(images, labels, strict=True):
        near, far = torch.randint(0, 12, (2,), generator=generator)
        across = torch.randint(0, 40, (1,), generator=generator)
        for along in (near, 28 + far):
            y, x = (across, along) if label == 0 else (along, across)
            image[:, y : y + 8, x : x + 8] += 1
    return images, labels


def main(steps: int = 40) -> None:
    generator = torch.Generator().manual_seed(0)
    model = augment.convert("test_resnet", "aa", input_size=48, num_classes=2)  # pretrained=True takes trained weights
    groups = augment.param_groups(model, lr=2e-3)  # learning rates by where each parameter comes from
    optimizer = torch.optim.AdamW(groups)
    for step in range(steps):
        images, labels = draw(32, generator)
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.3f}")

    augment.save(model, "squares.safetensors", overwrite=True)
    model = augment.load("squares.safetensors").eval()
    images, labels = draw(200, generator)
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).float().mean()
    print(f"{right:.1%} of 200 unseen images are classified correctly")


if __name__ == "__main__":
    main()
