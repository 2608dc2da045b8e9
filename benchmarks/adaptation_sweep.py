"""Temporary: variants of defaults on the reference pairs, many processes."""

import argparse
import csv
import itertools
import json
import logging
import multiprocessing as mp
import os
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

PAIRS = ("emoji_google_to_twitter", "emoji_twitter_to_google", "wbc_1_to_2", "wbc_2_to_1", "mnist_to_mnistm",
         "clothing_to_disturbed")


def write(features, folder):
    for pair in PAIRS:
        for domain, splits in {"source": ("source_train",), "target": ("target_train", "target_test")}.items():
            out = Path(folder) / pair / domain
            out.mkdir(parents=True, exist_ok=True)
            xs, rows = [], []
            for name in splits:
                with np.load(Path(features) / pair / f"{name}.npz") as f:
                    x, y = f["features"].astype(np.float32), f["labels"]
                for label in y.tolist():
                    rows.append([len(rows), domain, f"{name}{len(rows)}", label, "test" if "test" in name else "train"])
                xs.append(x)
            for split in ("val", "test") if domain == "source" else ("val",):
                label = rows[0][3]
                rows.append([len(rows), domain, f"x{len(rows)}", label, split])
                xs.append(xs[0][:1])
            np.save(out / "features.npy", np.concatenate(xs))
            with (out / "index.csv").open("w", newline="") as f:
                w = csv.writer(f)
                w.writerow(["row", "domain", "id", "label", "split"])
                w.writerows(rows)


class Clip(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.k = k

    def forward(self, x):
        return x.clamp(-self.k, self.k)


class OneScale(nn.Module):
    """(x - mean) / one deviation for all."""

    def __init__(self, width, mean=True):
        super().__init__()
        self.bn = nn.BatchNorm1d(width, affine=False, momentum=None)
        self.centre = mean

    def forward(self, x):
        self.bn(x)
        m, v = self.bn.running_mean, self.bn.running_var
        x = x - m if self.centre else x
        return x / v.mean().sqrt().clamp(min=1e-6)


class Floor(nn.Module):
    """Deviation at least a share of the columns' mean one."""

    def __init__(self, width, share):
        super().__init__()
        self.bn = nn.BatchNorm1d(width, affine=False, momentum=None)
        self.share = share

    def forward(self, x):
        self.bn(x)
        m, v = self.bn.running_mean, self.bn.running_var
        s = v.sqrt()
        return (x - m) / s.clamp(min=float(self.share) * float(s.mean()) + 1e-6)


def experiments():
    from tl_modules import methods as M
    from tl_modules.methods import functional as fn
    from tl_modules.methods.functional import ramp, reverse_gradient

    class Critic:
        def attach(self, module):
            super().attach(module)
            d, layers = self.width(module), []
            for _ in range(self.layers):
                layers += [nn.Linear(d, self.hidden), *([nn.BatchNorm1d(self.hidden)] if self.bn else []), nn.ReLU()]
                d = self.hidden
            self.critic = nn.Sequential(*layers, nn.Linear(d, 1))

        def forward(self, module, source, target):
            scale = self.reversal * (ramp(module.progress, self.gamma) if self.gamma else 1.0)
            xs = [self.critic_input(module, v) for v in (source, target)]
            labels = torch.cat([torch.ones(len(xs[0])), torch.zeros(len(xs[1]))])
            ws = torch.cat([self.sample_weights(v) for v in (source, target)])
            logits = self.critic(reverse_gradient(torch.cat(xs), scale)).squeeze(1)
            each = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
            return (ws * each).mean()

    def make(base):
        class X(Critic, base):
            def __init__(self, hidden=1024, layers=2, bn=True, gamma=10.0, reversal=1.0, **kw):
                super().__init__(**kw)
                self.hidden, self.layers, self.bn, self.gamma, self.reversal = hidden, layers, bn, gamma, reversal
        X.__name__ = base.__name__
        return X

    class MDDX(M.MDD):
        def __init__(self, gamma=10.0, dropout=0.0, **kw):
            super().__init__(**kw)
            self.gamma, self.drop = gamma, dropout

        def attach(self, module):
            from tl_modules import MLPHead
            self.adversary = MLPHead(module.backbone.width, module.num_outputs, self.hidden, self.drop, normalize=False)

        def forward(self, module, source, target):
            scale = self.reversal * ramp(module.progress, self.gamma)
            here, there = (self.adversary(reverse_gradient(x.pooled, scale)) for x in (source, target))
            agreed = F.cross_entropy(here, source.output.argmax(1))
            own = F.one_hot(target.output.argmax(1), there.shape[1]).bool()
            others = there.log_softmax(1).masked_fill(own, -torch.inf).logsumexp(1)
            return self.margin * agreed - others.mean()

    return {"DANNX": make(M.DANN), "CDANX": make(M.CDAN), "PADAX": make(M.PADA), "MDDX": MDDX}


def build(v, data, seed):
    from tl_modules import Classification, TabularMLP, LinearHead
    from tl_modules import methods as M
    from tl_modules.finetuning.optimizer import WarmupCosine

    width = len(data.x_schema["numeric"])
    backbone = TabularMLP(width, v.get("widths", [64, 64]), v.get("dropout", 0.0))
    std = v.get("std", "column")
    first = backbone.model[0]
    if std.startswith("clip"):
        first[0] = nn.Sequential(first[0], Clip(float(std[4:])))
    elif std == "scale":
        first[0] = OneScale(width, False)
    elif std == "centre":
        first[0] = OneScale(width, True)
    elif std == "none":
        first[0] = nn.Identity()
    elif std.startswith("floor"):
        first[0] = Floor(width, float(std[5:]))
    if v.get("l2drop"):
        class L2Drop(nn.Module):
            def forward(self, x):
                if not self.training:
                    return x
                return x * (torch.rand_like(x) > 0.5) * 2**0.5
        backbone.model[-1][-1] = L2Drop()
    heads = {"ln": LinearHead, "linear": lambda i, o: nn.Linear(i, o)}
    if v.get("head") == "mlp":
        from tl_modules import MLPHead
        heads["mlp"] = lambda i, o: MLPHead(i, o, 256, v.get("head_dropout", 0.0), normalize=False)
    if v.get("head") == "ln_default":
        heads["ln_default"] = lambda i, o: nn.Sequential(nn.LayerNorm(i), nn.Linear(i, o))
    head = heads[v.get("head", "ln")]
    methods = []
    for name, kw in v.get("methods", {}).items():
        methods.append((experiments().get(name) or getattr(M, name))(**kw))
    if v.get("mixbn"):
        class Nothing(M.Method):
            required_domains = ("target",)
            def forward(self, module, source, target):
                return target.output.sum() * 0.0
        methods.append(Nothing())
    kind, lr, wd = v.get("opt", "adamw:3e-3:1e-2").split(":")
    lr, wd = float(lr), float(wd)
    if kind == "adamw":
        opt = lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=wd)
    else:
        opt = lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True, weight_decay=wd)
    scheds = {
        "cosine": WarmupCosine,
        "none": None,
        "tllib": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda e: 1.0),
    }
    from tl_modules.finetuning import Full
    full = Full(backbone_lr=v.get("backbone_lr"))
    return Classification(backbone, data.schema, head=head, methods=methods, optimizer=opt, finetuning=full,
                          lr_scheduler=scheds[v.get("sched", "cosine")])


def one(job):
    folder, key, v, pair, seed, steps = job
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for n in ("lightning.pytorch", "lightning.fabric", "tl_modules", "datamodules"):
        logging.getLogger(n).setLevel(logging.ERROR)
    from lightning.pytorch import Trainer, seed_everything
    from datamodules import TabularData

    start = time.perf_counter()
    seed_everything(seed, verbose=False)
    root = Path(folder) / pair
    target = {} if v.get("methods") or v.get("mixbn") else {"target_unseen": True}
    data = TabularData(root / "target", root / "source", seed=seed, drop_last=True, **target)
    try:
        module = build(v, data, seed)
        torch.manual_seed(seed)
        trainer = Trainer(max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                          enable_model_summary=False, accelerator="cpu", num_sanity_val_steps=0, limit_val_batches=0,
                          max_epochs=-1)
        trainer.fit(module, data)
        module.eval()
        hits = []
        with torch.no_grad():
            for batch in data.test_dataloader():
                for x, y, _ in batch.values():
                    hits.append(module(x).argmax(1) == y)
        acc = float(torch.cat(hits).float().mean())
    except Exception as error:
        return {"key": [key, pair, seed], "error": repr(error)[:300]}
    return {"key": [key, pair, seed], "acc": acc, "s": round(time.perf_counter() - start, 2)}


def table(path, reference):
    rows = [json.loads(l) for l in Path(path).read_text().splitlines()]
    found = {}
    for r in rows:
        if "acc" in r:
            k, p, s = r["key"]
            found.setdefault(k, {}).setdefault(p, []).append(100 * r["acc"])
        else:
            print(r)
    for k, by in found.items():
        means = [np.mean(by[p]) if p in by else np.nan for p in PAIRS]
        print(f"{k:60s} {np.nanmean(means):6.1f}  " + " ".join(f"{m:5.1f}" for m in means), sum(map(len, by.values())))


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--features", default="shared/reference/features")
    p.add_argument("--out", required=True)
    p.add_argument("--variants", required=True, help="a JSON file: name -> variant")
    p.add_argument("--jobs", type=int, default=1)
    p.add_argument("--seeds", type=int, default=1)
    p.add_argument("--steps", type=int, default=1000)
    p.add_argument("--pairs", nargs="*", default=PAIRS)
    p.add_argument("--only", default="")
    p.add_argument("--minutes", type=float, default=60.0)
    a = p.parse_args()
    end = time.time() + 60 * a.minutes
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    out = Path(a.out)
    done = {tuple(json.loads(l)["key"]) for l in out.read_text().splitlines()} if out.exists() else set()
    variants = json.loads(Path(a.variants).read_text())
    import lightning.pytorch, tl_modules, datamodules  # noqa
    with tempfile.TemporaryDirectory() as folder:
        write(a.features, folder)
        jobs = [(folder, k, v, pair, seed, a.steps)
                for seed, (k, v), pair in itertools.product(range(a.seeds), variants.items(), a.pairs)
                if (k, pair, seed) not in done and a.only in k]
        with mp.get_context("fork").Pool(a.jobs) as pool, out.open("a") as f:
            for r in pool.imap_unordered(one, jobs):
                f.write(json.dumps(r) + "\n")
                f.flush()
                if time.time() > end:
                    pool.terminate()
                    break
    table(out, None)


if __name__ == "__main__":
    main()
