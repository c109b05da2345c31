"""Mutations of bytes, of text, and of JSON trees."""

import copy
import json
import random
from typing import Any

DIGITS = "@digits@"  # stands for an integer of 5,000 digits, which Python does not print
DEEP = "@deep@"  # stands for 2,000 nested lists

HOSTILE = [
    *(None, True, False, "", [], {}, -1, 0, 1, 2, 3, 7, 64, 2**16, 2**20, 2**31, 2**63, 10**22, 10**400),
    *(0.5, -0.0, 1e308, 1e-308, float("nan"), float("inf"), -float("inf")),
    *("x" * 10_000, "1" * 400, "nope[/x]", "[red]x[/blink]", "\x1b[2J\x1b]0;x\x07", "a\nb\r\tc", "\u202etxt", "\ud800"),
    *(
        "=1+1",
        "../../etc/passwd",
        "hf-hub:a/b",
        "local-dir:.",
        "augmented",
        "resnet18.none",
        "²",
        "NaN",
        "+1%",
        "-200%",
    ),
    *([1] * 5, [None], [[[[[[1]]]]]], {"a": {"b": {"c": {"d": {"e": 1}}}}}, DIGITS, DEEP, ["a"] * 5000),
]
ARGUMENTS = [
    *(
        "num_classes",
        "in_chans",
        "layers",
        "depth",
        "depths",
        "width",
        "embed_dim",
        "img_size",
        "output_stride",
        "block",
    ),
    *("global_pool", "act_layer", "norm_layer", "block_args", "stem_width", "channels", "cardinality", "base_width"),
    *("pretrained", "pretrained_cfg", "checkpoint_path", "plan", "drop_rate", "zero_init_last", "scriptable", "x y"),
]
MODELS = ["resnet18", "test_resnet.r160_in1k", "test_vit", "test_convnext", "test_nfnet.none", "vgg11", "resnet18."]


def hostile(rng: random.Random, *others: Any) -> Any:
    """A hostile value, or one of `others`; a copy, since what it is put into is changed further."""
    return copy.deepcopy(rng.choice([*HOSTILE, *others]))


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Some bytes flipped, cut out, doubled, or put in."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at = rng.randrange(max(len(out), 1))
        match rng.randrange(5):
            case 0 if out:
                out[at] = rng.randrange(256)
            case 1:
                del out[at : at + rng.choice([1, 4, 100, len(out)])]
            case 2:
                out[at:at] = out[at : at + rng.choice([1, 8, 64])]
            case 3:
                out[at:at] = rng.randbytes(rng.choice([1, 4, 8]))
            case _:
                out[at : at + 8] = rng.choice([b"\0" * 8, b"\xff" * 8, (2**40).to_bytes(8, "little")])
    return bytes(out)


def mutate_tree(rng: random.Random, tree: Any) -> Any:
    """A copy of a JSON tree with one to three of its nodes changed."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        path = _random_path(rng, tree)
        if not path:
            return hostile(rng)
        holder = tree
        for key in path[:-1]:
            holder = holder[key]
        _change(rng, holder, path[-1])
    return tree


def _random_path(rng: random.Random, tree: Any) -> list[Any]:
    path = []
    while isinstance(tree, (dict, list)) and tree and (not path or rng.random() < 0.8):
        key = rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
        path.append(key)
        tree = tree[key]
    return path


def _change(rng: random.Random, holder: Any, key: Any) -> None:
    value = holder[key]
    match rng.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(value, (int, float)) and not isinstance(value, bool):
            holder[key] = rng.choice([value + 1, value - 1, value * 2, -value, value * 1000, str(value)])
        case 2 if isinstance(value, list) and value:
            holder[key] = value * rng.choice([2, 50])
        case 3 if isinstance(value, dict):
            value[rng.choice([*ARGUMENTS, "\x1b[1m", "x" * 2000])] = hostile(rng)
        case 4 if isinstance(value, str) and value:
            at = rng.randrange(len(value))
            holder[key] = value[:at] + rng.choice(["\0", "\x1b", "[/]", ".", "9", "é"]) + value[at:]
        case 5 if key == "model":
            holder[key] = rng.choice(MODELS)
        case 6 if key == "model_args":
            holder[key] = {rng.choice(ARGUMENTS): hostile(rng) for _ in range(rng.randrange(1, 4))}
        case _:
            holder[key] = hostile(rng)


def dump(tree: Any) -> str:
    """JSON of a mutated tree, its placeholders filled in."""
    text = json.dumps(tree)
    return text.replace(f'"{DIGITS}"', "9" * 5000).replace(f'"{DEEP}"', "[" * 2000 + "]" * 2000)


def mutate_text(rng: random.Random, text: str) -> str:
    """Some tokens of a text replaced, doubled, dropped or moved."""
    tokens = text.replace("=", " = ").replace("[", " [ ").split(" ")
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(tokens))
        match rng.randrange(4):
            case 0:
                tokens[at] = toml(hostile(rng))
            case 1:
                del tokens[at]
                tokens = tokens or [""]
            case 2:
                tokens[at:at] = tokens[at : at + 3] * rng.choice([1, 1, 300])
            case _:
                tokens[at] = rng.choice(["=", "[", "]", '"', "'''", "\n", ".", "{", "}", "#", ",", "\\", "\0"])
    return " ".join(tokens)


def toml(value: Any) -> str:
    """A value as a TOML file could have it."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return dump(value)
