"""The loop that tutorials teach, as a yardstick: a torchvision model, ImageFolder, two workers, fp32.

The frozen part has parameters without gradients and runs in every epoch, as in PyTorch's transfer-learning tutorials;
images are resized and cropped as ours, without augmentation.
"""

import argparse
import json
import time

import torch
from torch import nn
from torchvision import datasets, models, transforms

# after which layer of SqueezeNet's `features` a stage begins
STAGES = (0, 2, 6, 11)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="squeezenet1_0")
    parser.add_argument("--weights")
    parser.add_argument("--way", choices=("features", "last", "gradual", "full"), default="features")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    steps = [transforms.Resize(args.size), transforms.CenterCrop(args.size), transforms.ToTensor()]
    steps.append(transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    data = {s: datasets.ImageFolder(f"{args.data}/{s}", transforms.Compose(steps)) for s in ("train", "validation")}
    loaders = {
        s: torch.utils.data.DataLoader(d, args.batch, shuffle=s == "train", num_workers=2) for s, d in data.items()
    }
    model = models.get_model(args.model)
    if args.weights:
        from safetensors.torch import load_file

        model.load_state_dict({k: v.float() for k, v in load_file(args.weights).items()})
    classes = len(data["train"].classes)
    if args.model.startswith("squeezenet"):
        model.classifier[1] = nn.Conv2d(512, classes, 1)
    else:
        model.fc = nn.Linear(model.fc.in_features, classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    criterion = nn.CrossEntropyLoss()
    best, seconds = 0.0, []
    for epoch in range(args.epochs):
        start = time.perf_counter()
        opened = {"features": 0, "last": 1, "gradual": epoch // 2, "full": 4}[args.way]
        if args.way != "full":
            for number, layer in enumerate(model.features):
                stage = sum(number >= first for first in STAGES)
                layer.requires_grad_(stage > 4 - opened)
        model.train()
        for x, y in loaders["train"]:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
        model.eval()
        correct = 0
        with torch.no_grad():
            for x, y in loaders["validation"]:
                correct += (model(x).argmax(1) == y).sum().item()
        accuracy = correct / len(data["validation"])
        if accuracy > best:
            best = accuracy
            torch.save(model.state_dict(), "best.pt")
        seconds.append(time.perf_counter() - start)
        print(f"epoch {epoch}  loss {loss.item():.3f}  accuracy {accuracy:.4f}", flush=True)
    print(json.dumps({"accuracy": best, "seconds": seconds}))


if __name__ == "__main__":
    main()
