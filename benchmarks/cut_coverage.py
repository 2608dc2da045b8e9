"""Measures which classifiers of torchvision and timm can be cut after which stages, and how exact the replay is.

    python benchmarks/cut_coverage.py [--seconds 30] [--parameters 1e8] [--only resnet]

Random weights, four small images. For each number k of frozen stages, 0 < k < all, in an order that spreads them, until
the time per network is used up: the largest difference between replayed and ordinary features, relative to the largest
feature.
"""

import argparse
import gc
import time

import timm
import torch
from torchvision import models

from tl_modules import TimmBackbone, TorchvisionBackbone
from tl_modules.cache.cut import CannotCut, Cut
from tl_modules.cache.leaves import difference

SMALL = ("test_", "atto", "femto", "pico", "nano", "xxs", "tiny", "_xs", "_s0", "_t0", "050", "small", "_s", "b0", "18")


def networks(only):
    """Yields library, name and builder of each network, and the image size to try first."""
    for name in models.list_models(module=models):
        if only in name:
            yield "torchvision", name, lambda name=name: TorchvisionBackbone(name), 64
    for family in timm.list_modules():
        names = timm.list_models(module=family)
        if names and (only in family or any(only in name for name in names)):
            rank = {n: next((i for i, part in enumerate(SMALL) if part in n), len(SMALL)) for n in names}
            name = min(names, key=lambda n, rank=rank: (rank[n], len(n), n))
            yield f"timm {family}", name, lambda name=name: TimmBackbone(name), 64


def images(backbone, side):
    """Returns four images of a size that the network accepts."""
    config = getattr(backbone.model, "pretrained_cfg", {}) or {}
    sides = [config["input_size"][-1]] if config.get("fixed_input_size") else [side, 128, 224, 299]
    for each in sides:
        x = torch.randint(0, 256, (4, 3, each, each), dtype=torch.uint8)
        try:
            if backbone(x).isfinite().all():
                return x
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = error
            continue
        reason = "its features are not finite"
    raise RuntimeError(str(reason).splitlines()[0][:80])


def spread(count):
    """Returns 1 to count, the last first and then halving the gaps."""
    order, gaps = [count, 1], [(1, count)]
    while gaps:
        low, high = gaps.pop(0)
        middle = (low + high) // 2
        if middle not in order:
            order.append(middle)
            gaps += [(low, middle), (middle, high)]
    return [k for k in dict.fromkeys(order) if 0 < k <= count]


@torch.no_grad()
def cover(backbone, x, seconds):
    """Returns the errors by k, and the reasons why other k are not cut."""
    stages, start = backbone.stages(), time.perf_counter()
    whole, errors, reasons = backbone(x), {}, {}
    for k in spread(len(stages) - 1):
        if errors | reasons and time.perf_counter() - start > seconds:
            break
        try:
            cut = Cut(backbone, k, x)
            errors[k] = difference(cut.replay(cut.record(x)), whole)
        except CannotCut as reason:
            reasons[k] = str(reason)
    return len(stages) - 1, errors, reasons


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--parameters", type=float, default=1e8)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    totals = {}
    for library, name, build, side in networks(args.only):
        total = totals.setdefault(library.partition(" ")[0], {"networks": 0, "cut": 0, "ks": 0, "exact": 0, "left": 0})
        weights = models.get_model_weights(name) if library == "torchvision" else None
        backbone, line = None, f"{library:28} {name:36}"
        try:
            if weights and next(iter(weights)).meta["num_params"] > args.parameters:
                raise RuntimeError("too large")
            torch.manual_seed(0)
            backbone = build().eval()
            if sum(p.numel() for p in backbone.parameters()) > args.parameters:
                raise RuntimeError("too large")
            x = images(backbone, side)
            most, errors, reasons = cover(backbone, x, args.seconds)
        except Exception as reason:
            total["left"] += 1
            print(f"{line} left out: {type(reason).__name__} {str(reason)[:80]}", flush=True)
            continue
        total["networks"] += 1
        total["cut"] += bool(errors) and not reasons
        total["ks"] += len(errors) + len(reasons)
        total["exact"] += sum(error <= 1e-5 for error in errors.values())
        why = "; ".join(f"k={k} not cut because {text}" for k, text in list(reasons.items())[:2])
        worst = f"{max(errors.values()):.0e}" if errors else "-"
        print(f"{line} {x.shape[-1]:4} px  cut {len(errors)} of {len(errors) + len(reasons)} tried, {most} possible; "
              f"error {worst} {why}", flush=True)  # fmt: skip
        del backbone, x
        gc.collect()
    for library, total in totals.items():
        print(f"{library}: {total['networks']} networks, {total['cut']} cut wherever tried; {total['exact']} of "
              f"{total['ks']} cuts exact to 1e-5; {total['left']} left out")  # fmt: skip


if __name__ == "__main__":
    main()
