"""Images per second of whole models, source against converted, in one process with interleaved rounds.

    python benchmarks/models.py                                       # this machine's CPU, two threads
    python benchmarks/models.py --device cuda --batch 256 --amp bfloat16 --channels-last [--compile]

Quote the ratios: converted speed over the source's, round by round. What ran before in a process decides how often the
allocator returns memory to the system, which takes both models' time: `--only inference` measures a fresh process.
"""

import argparse

import timm
import torch
from measure import interleaved, machine, quartiles, write_results

from augment_cli import convert

MODELS = {
    "ResNet-50": lambda: timm.create_model("resnet50"),
    "AA-ResNet-50": lambda: convert("resnet50", "aa-resnet"),
    "AW-ResNet-50": lambda: convert("resnet50", "aw-resnet"),
}


MODES = ("training", "inference")


def training_step(model, x, target, amp):
    def step() -> None:
        with torch.autocast(x.device.type, amp, enabled=amp is not None):
            loss = torch.nn.functional.cross_entropy(model(x), target)
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def inference(model, x, amp):
    def step() -> None:
        with torch.inference_mode(), torch.autocast(x.device.type, amp, enabled=amp is not None):
            model(x)

    return step


def measure(options) -> dict[str, dict]:
    device = torch.device(options.device)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    amp = getattr(torch, options.amp) if options.amp else None
    x = torch.randn(options.batch, 3, options.size, options.size, device=device).to(memory_format=layout)
    target = torch.randint(1000, (options.batch,), device=device)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    models = {name: make().to(device, memory_format=layout) for name, make in MODELS.items()}
    results = {}
    for mode in options.only:
        steps, peaks = {}, {}
        for name, model in models.items():
            model.train(mode == "training")
            runner = torch.compile(model) if options.compile else model
            steps[name] = training_step(runner, x, target, amp) if mode == "training" else inference(runner, x, amp)
            if device.type == "cuda":
                steps[name]()
                torch.cuda.reset_peak_memory_stats()
                steps[name]()
                peaks[name] = round(torch.cuda.max_memory_allocated() / 2**20)
        seconds = interleaved(steps, options.rounds, synchronize)
        source = seconds["ResNet-50"]
        results[mode] = {
            name: {
                "images_per_second": quartiles([options.batch / s for s in values]),
                "speed_against_source": quartiles([a / b for a, b in zip(source, values, strict=True)]),
            }
            | ({"peak_mib": peaks[name]} if peaks else {})
            for name, values in seconds.items()
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--amp", choices=("bfloat16", "float16"))
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = measure(options)
    for mode, rows in results.items():
        print(f"{mode:14s} {'images/s':>9s}  {'against the source (quartiles)':>32s}")
        for name, row in rows.items():
            against = row["speed_against_source"]
            spread = f"{against['median']:.3f} ({against['low']:.3f} to {against['high']:.3f})"
            peak = f"  {row['peak_mib']:,} MiB" if "peak_mib" in row else ""
            print(f"  {name:12s} {row['images_per_second']['median']:9.2f}  {spread:>32s}{peak}")
    if not options.no_write:
        name = f"models-{options.device}{'-compiled' if options.compile else ''}"
        name += "" if len(options.only) > 1 else f"-{options.only[0]}"
        write_results(name, {"machine": machine(), "options": vars(options), "results": results})


if __name__ == "__main__":
    main()
