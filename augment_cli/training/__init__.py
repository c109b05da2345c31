"""Fine-tune and evaluate converted models, on timm's parts and accelerate."""
