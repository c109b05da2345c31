"""Export to other runtimes: ONNX, torch.export, OpenVINO. What is written is run in its runtime and compared."""
