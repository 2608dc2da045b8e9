"""Each mistake: one clear sentence that names its place, an exit code that is not 0, no traceback."""

import shutil
import struct
import zlib

import numpy as np
import pytest
import soundfile
import torch
from conftest import image, make_tree
from PIL import Image

from tl_modules import ConvNet, TorchvisionBackbone

FIT = "fit --trainer.max_epochs 1 --model.backbone ConvNet --model.backbone.width 4 "
PRETRAIN = "fit --trainer.max_epochs 1 --data Digits --model "
TABLE = "fit --model Regression --model.backbone TabularMLP --data TabularData --data.target table.csv "
FOLDERS = FIT + "--data ImageFolders --data.image_size 32 --data.num_workers 0 --data.target tree "
SOUNDS = "fit --trainer.max_epochs 1 --model.backbone SpeechConvNet --data AudioFolders --data.num_workers 0 "
TEXTS = "fit --trainer.max_epochs 1 --data TextFiles --data.target t.csv --model Classification --model.backbone "
PLUGIN = """
from tl_modules import Method
class NeedsSource(Method):
    required_domains = ("source", "target")
    def forward(self, module, source, target):
        return source.features.mean() - target.features.mean()
"""


def huge_header(path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")
    )


def truncate(path):
    path.write_bytes(path.read_bytes()[:-400])


CASES = {
    "no accumulation at all": (FIT + "--data Digits --trainer.accumulate_grad_batches 0", "accumulate_grad_batches: 0 must be above 0"),
    "no training batch": (FIT + "--data Digits --trainer.limit_train_batches 0", "limit_train_batches: 0 must be above 0, or nothing is trained"),
    "validation after more batches than there are": (FIT + "--data Digits --data.shots_per_class 2 --trainer.val_check_interval 1000", "`val_check_interval` (1000) must be less than or equal to the number of the training batches (1)"),
    "early stopping by an unknown metric": (FIT + "--data Digits --data.shots_per_class 2 --trainer.callbacks EarlyStopping --trainer.callbacks.monitor val_loss", "Early stopping conditioned on metric `val_loss` which is not available"),
    "a scheduler of two packages": (FIT + "--model.lr_scheduler ReduceLROnPlateau", "more than one class is named ReduceLROnPlateau; name one of torch.optim.lr_scheduler.ReduceLROnPlateau, lightning.pytorch.cli."),
    "a scheduler without its argument": (FIT + "--model.lr_scheduler StepLR", "model.lr_scheduler: StepLR needs step_size"),
    "a negative seed": (FIT + "--data Digits --data.seed -1", "seed: -1 must be at least 0"),
    "a negative number of workers": (FIT + "--data Digits --data.num_workers -1", "num_workers: -1 must be at least 0"),
    "weights as a checkpoint": (FIT + "--data Digits --ckpt_path w.pth", "checkpoint: w.pth is no checkpoint of a run; weights alone go to --model.backbone.weights"),
    "a list as a checkpoint": ("test --run trained --ckpt_path w.pth", "checkpoint: w.pth is no checkpoint of a run"),
    "an optimizer without groups": (FIT + "--model.optimizer torch.optim.LBFGS", "LBFGS doesn't support per-parameter options"),
    "barebones": (FIT + "--trainer.barebones true", "barebones: a run consists of what it leaves out"),
    "Lightning's finder of rates": (FIT + "--trainer.callbacks LearningRateFinder", "callbacks: LearningRateFinder supports only one learning rate; use `tl lr-find`"),
    "a logger that is not installed": (FIT + "--trainer.logger CometLogger", "pip install -U 'comet-ml"),
    "an argument that its class refuses": (FIT + "--model.optimizer.lr -1", "Invalid learning rate: -1.0"),
    "texts for images": (TEXTS + "ConvNet", "ConvNet takes images, but the data's inputs are text"),
    "texts in another column": (TEXTS + "ConvNet --data.text txt", "text: there is no column txt (did you mean text?)"),
    "a malformed line of word vectors": (TEXTS + "WordVectors --model.backbone.name v.txt", "v.txt is not a file of word vectors (line 2 has 1 numbers, not 2)"),
    "no file of word vectors": (TEXTS + "WordVectors --model.backbone.name nowhere.txt", "name: there is no file nowhere.txt of word vectors"),
    "missing folder": (FIT + "--data ImageFolders --data.target nowhere", "target: there is no file or folder nowhere"),
    "variable not set": (FIT + "--data ImageFolders --data.target $NOT_SET/x", "a variable that is not set"),
    "no folder given": (FIT + "--data ImageFolders", "target: give a folder of images"),
    "empty class": (FOLDERS, "class empty is empty"),
    "one class": (FOLDERS, "has one class, red"),
    "class mismatch": (FOLDERS + "--data.source other", "only the source has green; only the target has blue"),
    "class only in val": (FOLDERS, "classes that training lacks: purple"),
    "corrupt image": (FOLDERS, "bad.jpg: it cannot be decoded as an image"),
    "truncated image": (FOLDERS, "bad.jpg: it cannot be decoded as an image (image file is truncated"),
    "truncated image in a worker": (FOLDERS.replace("workers 0", "workers 1"), "bad.jpg: it cannot be decoded"),
    "image of floats": (FOLDERS, "bad.tif: its F numbers have no known range; convert it to 8 or 16 bits first"),
    "unknown colour": (FOLDERS + "--data.background whitish", "background: whitish is not a colour; give a name or #rrggbb"),
    "huge header": (FOLDERS, "than max_pixels 50000000"),
    "more labelled than there are": (FIT + "--data Digits --data.labelled 500", "labelled: none of the target's 449 training samples is left unlabelled"),
    "labelled of no target": (FIT + "--data Digits --data.source true --data.target false --data.labelled 5", "give --data.target"),
    "labelled and few shots": (FIT + "--data Digits --data.labelled 5 --data.shots_per_class 1", "labelled: it decides which"),
    "no range of rates": ("lr-find --min_lr 1 --max_lr 0.1", "min_lr, max_lr: 1.0 must be above 0 and below 0.1"),
    "too short a sweep": ("lr-find --steps 5", "steps: 5 must be at least 10"),
    "nothing to draw": ("show-batch --count 0", "count: 0 must be at least 1"),
    "too much to draw": ("show-batch --data Digits --count 1000", "count: 1000 of each of 1 domains are more than a figure's 512 samples"),
    "a folder that is a file": ("show-batch --out file/batch.png", "out: file cannot be written"),
    "unknown command": ("fitt", "there is no command fitt (did you mean fit?)"),
    "unknown option": (FIT + "--modle.backbone ConvNet", "there is no option --modle.backbone (did you mean --model.backbone?)"),
    "class of another kind": (FIT + "--model.head torch.nn.ReLU", "model.head: torch.nn.ReLU is not a subclass of tl_modules.Head"),
    "option without its section": (FIT + "--optimizer.lr 1", "there is no option --optimizer.lr (did you mean --model.optimizer.lr?)"),
    "option without its section and prefix": (FIT + "--epochs 1", "there is no option --epochs (did you mean --trainer.max_epochs?)"),
    "unknown class": (FIT + "--model.finetuning GradualUnfreezin", "model.finetuning: there is no class GradualUnfreezin (did you mean GradualUnfreezing?)"),
    "unknown class in YAML": ("fit -c bad.yaml", "model.backbone: there is no class ConvNett (did you mean ConvNet?)"),
    "unknown argument": (FIT + "--model.backbone.widht 3", "model.backbone.widht: ConvNet has no argument widht (did you mean width?)"),
    "rate that is no number": (FIT + "--model.optimizer AdamW --model.optimizer.lr nan", "model.optimizer.lr: nan is not a finite number"),
    "negative rate": (FIT + "--model.optimizer AdamW --model.optimizer.lr -1", "optimizer, lr_scheduler: their options do not work (Invalid learning rate: -1.0)"),
    "scheduler without steps": (FIT + "--model.lr_scheduler StepLR --model.lr_scheduler.step_size 0", "optimizer, lr_scheduler: their options do not work"),
    "optimizer of other gradients": (FIT + "--model.optimizer SparseAdam", "optimizer, lr_scheduler: their options do not work (SparseAdam"),
    "negative clipping": (FIT + "--trainer.gradient_clip_val -1", "gradient_clip_val: -1 must not be negative"),
    "callbacks that are alike": (FIT + 2 * "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor val/loss ", "Found more than one stateful callback of type `EarlyStopping`"),
    "regression of classes": (FIT + "--model Regression", "schema: the labels are the classes"),
    "unknown argument in YAML": ("fit -c bad.yaml", "model.backbone.widht: ConvNet has no argument widht (did you mean width?)"),
    "unknown key in YAML": ("fit -c bad.yaml", "there is no key modl (did you mean model?)"),
    "wrong type": (FIT + "--trainer.max_epochs many", "trainer.max_epochs: many is not int or null"),
    "wrong type in a plug-in": (FIT + "--data.shots_per_class few", "data.shots_per_class: few is not int or null"),
    "config that is not YAML": ("fit -c bad.yaml", "bad.yaml is not YAML"),
    "no command": ("", "name a command: fit, validate, test, predict"),
    "test of nothing": ("test", "run: `tl test` needs a trained model; pass --run DIR"),
    "missing argument": ("fit --model.backbone TorchvisionBackbone", "model.backbone: TorchvisionBackbone needs name"),
    "crop larger than the image": (FOLDERS + "--data.resize_size 20", "a side of 32 pixels cannot be cropped from a short"),
    "unknown augmentation": (FOLDERS + "--data.augment heavy", "augment: heavy must be a class or one of 'auto', 'none', 'light'"),
    "unknown dotted class": (FIT + "--data.augment+=torchvision.transforms.v2.RandomCropp", "(did you mean RandomCrop?)"),
    "unknown module": (FIT + "--model.methods+=nowhere.Foo", "there is no class nowhere.Foo (No module named 'nowhere')"),
    "missing config": ("fit -c nowhere.yaml", "nowhere.yaml"),
    "unknown architecture": (FIT.replace(".width 4", " TorchvisionBackbone") + "--model.backbone.name resnet19", "no classifier resnet19 (did you mean resnet1"),
    "wrong-shaped weights": (FIT + "--model.backbone.weights w.pth", "tensors have another shape, 0.0.weight is (8, 3, 3, 3) instead of (4, 3, 3, 3)"),
    "another architecture's weights": (FIT + "--model.backbone.weights w.pth", "none of its 120 tensors (conv1.weight, bn1.weight, bn1.bias, ...) has a name and shape"),
    "a part of the weights": (FIT + "--model.backbone.weights w.pth", "tensors are not in it"),
    "missing weights": (FIT + "--model.backbone.weights nowhere.pth", "there is no file or run directory nowhere.pth"),
    "weights that are a pickle": (FIT + "--model.backbone.weights w.pth", "holds Python objects besides tensors"),
    "weights that are not weights": (FIT + "--model.backbone.weights w.safetensors", "cannot be read as tensors"),
    "hub weights of ConvNet": (FIT + "--model.backbone.weights DEFAULT", "ConvNet has no hub entry DEFAULT"),
    "unknown hub weights": (FIT.replace(".width 4", " TorchvisionBackbone") + "--model.backbone.name squeezenet1_0 --model.backbone.weights IMAGENET1K_V9", "(did you mean IMAGENET1K_V1?)"),
    "unwritable run directory": (FIT + "--trainer.default_root_dir file", "cannot be written (Not a directory)"),
    "pretraining of nothing": (PRETRAIN + "SimCLR --model.backbone ConvNet --model.finetuning FeatureExtraction", "finetuning: FeatureExtraction freezes the whole backbone"),
    "views that are all the same": (PRETRAIN + "SimCLR --model.backbone ConvNet --data.augment none", "augment: pretraining compares views"),
    "pretraining of rows on images": (PRETRAIN + "SCARF --model.backbone ConvNet", "SCARF swaps values of columns, so it takes rows of numbers"),
    "rates of two networks": ("lr-find --data Digits --model GAN --model.backbone ConvNet", "lr-find: GAN trains two networks against each other"),
    "a method without its domain": (FIT + "--model.methods+=plugin.NeedsSource", "NeedsSource needs a source domain in training, but the data has only target; pass --data.source"),
    "no teacher": (FIT + "--model.methods+=Distill", "Distill needs teacher"),
    "a teacher that is not a run": (FIT + "--model.methods+=Distill --model.methods.teacher nowhere", "teacher: nowhere is not a run directory"),
    "batches of one": (FIT + "--data.batch_size 1 --data.drop_last true", "in batches of 1 leave a batch of one"),
    "too few shots": (FIT + "--data.shots_per_class 100", "training samples, fewer than 100"),
    "shots without labels": (FIT + "--data.source true --data.shots_per_class 3", "hidden beside a source"),
    "ddp that loses stages": (FIT + "--model.finetuning GradualUnfreezing --trainer.strategy ddp --trainer.devices 1", "pass --trainer.strategy ddp_find_unused_parameters_true"),
    "an adapter that peft lacks": (FIT + "--model.finetuning LoRA --model.finetuning.kind lorra", "kind: peft has no lorra; it has "),
    "adapters nowhere": (FIT + "--model.finetuning LoRA --model.finetuning.targets [query]", "targets: no layer is named ['query']; there are "),
    "a table of nothing": (FIT + "--data Paired", "target: give a table, --data.target FILE"),
    "no input named": (FIT + "--data Paired --data.target bad.yaml", "image, text, numbers: name at least one column as input"),
    "several parts for one input": ('fit --data Digits --model.backbone SeveralBackbones --model.backbone.parts {{"image":{{"class_path":"ConvNet"}}}}', "parts: the data has no input named image"),
    "class weights": (FIT + "--model.class_weights [1,2]", "class_weights: 2 weights for 10 classes"),
    "negative argument": (FIT + "--model.finetuning LastStages --model.finetuning.k -1", "k: -1 must not be negative"),
    "float images outside [0, 1]": (FIT + "--data ImageArrays --data.target a.npz", "images are floats outside [0, 1]"),
    "labels that do not match": (FIT + "--data ImageArrays --data.target a.npz", "labels must have one entry for each of the 6 images, not 5"),
    "run of fit": ("fit --run runs/x", "run: `tl fit` starts a new run"),
    "no run": ("test --run nowhere", "nowhere is not a run directory"),
    "sync_batchnorm on CPU": (FIT + "--trainer.sync_batchnorm true --trainer.strategy ddp --trainer.devices 1 --trainer.accelerator cpu", "sync_batchnorm: it needs GPUs"),
    "save_every_n_steps": (FIT + "--save_every_n_steps 0", "save_every_n_steps: 0 must be at least 1 step"),
    "last without a run": (FIT + "--ckpt_path last", "resume: pass --run DIR, or --name NAME"),
    "command after an option": ("-c bad.yaml fit", "write the command first: `tl fit ...`"),
    "rank of nothing": ("rank --data Digits", "missing: backbones"),
    "rank without data": ("rank ConvNet", "missing: data"),
    "rank by hidden labels": ("rank ConvNet --data Digits --data.source true", "target: labels of its training samples are needed"),
    "rank by an unknown score": ("rank ConvNet --data Digits --by leap", "by: leap is not one of 'linear_probe', 'logme'"),
    "rank within no time": ("rank ConvNet --data Digits --budget_ms 0", "budget_ms: 0 must be above 0"),
    "rank of a missing file": ("rank nowhere.yaml --data Digits", "backbones: nowhere.yaml cannot be read"),
    "rank of a list": ("rank bad.yaml --data Digits", "backbones: bad.yaml is not a mapping of names to backbones"),
    "rank of a number": ("rank bad.yaml --data Digits", "backbones: bad.yaml: a: 3 must be a text or a class_path with init_args"),
    "compress of nothing": ("compress --out x --prune 0.5", "run: `tl compress` needs a trained model; pass --run DIR"),
    "compress by nothing": ("compress --run trained --out x", "compress: nothing to do; pass --prune 0.5, --quantize int8 or both"),
    "compress to nowhere": ("compress --run trained --prune 0.5", "missing: compress.out"),
    "all of the MACs": ("compress --run trained --out x --prune 1", "prune: 1 must be above 0 and below 1"),
    "more MACs than can go": ("compress --run trained --out x --prune 0.99", "pass less than 0.99"),
    "unknown importance": ("compress --run trained --out x --prune 0.5 --importance size", "importance: size is not one of 'magnitude', 'taylor'"),
    "unknown quantization": ("compress --run trained --out x --quantize int4", "quantize: int4 is not one of 'int8', 'int8_dynamic'"),
    "importance by hidden labels": ("compress --run trained --out x --prune 0.5 --importance taylor --data.shots_per_class null --data.source true", "labels of its training samples are needed, but they are hidden"),
    "resume of what is compressed": ("fit --run trained --resume", "checkpoint: it has no optimizer state"),
    "scales that do not fit": ("test --run trained", "its int8 tensors do not match the scales in `quantized`"),
    "a soup of nothing": ("soup --out x", "soup: name the runs first: `tl soup RUN RUN --out NAME`"),
    "a soup of a missing run": ("soup nowhere other --out x", "run: nowhere is not a run directory"),
    "several runs where one is taken": ("benchmark --run a --run b", "run: `tl benchmark` takes one run; `tl test` and `tl predict` take several"),
    "calibrate of nothing": ("calibrate", "run: `tl calibrate` needs a trained model; pass --run DIR"),
    "a ratio without labelled ones": (FIT + "--data Digits --data.unlabelled_ratio 7", "unlabelled_ratio: 7 needs --data.labelled N beside it"),
    "two columns of one name": (TABLE, "table.csv has 2 columns named a; rename or remove all but one"),
    "a table with a line too short": (TABLE, "table.csv line 3 has 1 cells, not 3 as the lines before"),
    "an unknown label column": (TABLE + "--data.label prise", "label: there is no column prise (did you mean price?)"),
    "numbers that are to be classes": (TABLE.replace("Regression", "Classification"), "pass --model Regression, or --data.kind classes if they are classes"),
    "recordings without classes": (FIT + "--data AudioFolders --data.num_workers 0 --data.target sounds", "sounds has no class folders; it needs "),
    "a corrupt recording": (SOUNDS + "--data.target sounds --data.pattern {{label}}_{{index}}.wav", "b_3.wav: it cannot be decoded as audio"),
    "a loader that is not there": (SOUNDS.replace("SpeechConvNet", "TorchBackbone --model.backbone.loader nowhere.load") + "--data.target sounds --data.pattern {{label}}_{{index}}.wav", "loader: nowhere.load cannot be imported"),
    "missing checkpoint": (FIT + "--ckpt_path nowhere.ckpt", "ckpt_path: there is no file nowhere.ckpt"),
}  # fmt: skip


def prepare(case, root, trained):
    """Makes the bad thing that a case speaks of."""
    if "--run trained" in CASES[case][0]:
        shutil.copytree(trained, root / "trained")
    if "--data.target t.csv" in CASES[case][0]:
        (root / "t.csv").write_text("text,label\n" + "good,a\nbad,b\n" * 10)
    tree = root / "tree"
    bad = tree / "train" / "red" / "bad.jpg"
    if "--data.target tree" in CASES[case][0]:
        make_tree(tree, classes=("red",) if case == "one class" else ("blue", "red"))
    if "--data.target sounds" in CASES[case][0]:
        (root / "sounds").mkdir()
        for i in range(8):
            soundfile.write(root / "sounds" / f"{'ab'[i % 2]}_{i}.wav", np.full(200, 0.1), 800)
    match case:
        case "a corrupt recording":
            (root / "sounds" / "b_3.wav").write_bytes(b"RIFF, but no more")
        case "a malformed line of word vectors":
            (root / "v.txt").write_text("good 1 2\nbad 1\n")
        case "empty class":
            (tree / "train" / "empty").mkdir()
        case "class mismatch":
            make_tree(root / "other", classes=("green", "red"))
        case "class only in val":
            image(tree / "val" / "purple" / "0.png", (99, 0, 99))
        case "corrupt image":
            bad.write_bytes(b"this is not an image")
        case "truncated image" | "truncated image in a worker":
            image(bad, (9, 9, 9), size=(200, 200))
            truncate(bad)
        case "image of floats":
            image(bad.with_suffix(".tif"), (9, 9, 9), mode="F")
        case "huge header":
            huge_header(bad.with_suffix(".png"))
        case "unknown class in YAML":
            (root / "bad.yaml").write_text(
                "model:\n  class_path: Classification\n  init_args:\n    backbone: ConvNett\n"
            )
        case "unknown argument in YAML":
            (root / "bad.yaml").write_text(
                "model:\n  class_path: Classification\n  init_args:\n    backbone:\n"
                "      class_path: ConvNet\n      init_args:\n        widht: 3\n"
            )
        case "config that is not YAML":
            (root / "bad.yaml").write_text("model: [")
        case "rank of a list":
            (root / "bad.yaml").write_text("[ConvNet]")
        case "rank of a number":
            (root / "bad.yaml").write_text("a: 3")
        case "unknown key in YAML":
            (root / "bad.yaml").write_text("modl: 3\n")
        case "a list as a checkpoint":
            torch.save([1, 2], root / "w.pth")
        case "weights as a checkpoint":
            torch.save(ConvNet(4).model.state_dict(), root / "w.pth")
        case "wrong-shaped weights":
            torch.save(ConvNet(8).model.state_dict(), root / "w.pth")
        case "another architecture's weights":
            torch.save(TorchvisionBackbone("resnet18").model.state_dict(), root / "w.pth")
        case "a part of the weights":
            state = ConvNet(4).model.state_dict()
            torch.save({k: v for k, v in state.items() if not k.startswith("2")}, root / "w.pth")
        case "weights that are a pickle":
            torch.save(ConvNet(4), root / "w.pth")
        case "weights that are not weights":
            (root / "w.safetensors").write_bytes(b"nothing")
        case "unwritable run directory" | "a folder that is a file":
            (root / "file").touch()
        case "resume of what is compressed" | "scales that do not fit":
            files = root / "trained" / "checkpoints"
            content = {k: v for k, v in torch.load(files / "best.ckpt").items() if k != "optimizer_states"}
            if case == "scales that do not fit":
                content["quantized"] = {"kind": "int8", "scales": {"no.such.weight": torch.ones(1)}}
            for name in ("best", "last"):
                torch.save(content, files / f"{name}.ckpt")
        case "two columns of one name":
            (root / "table.csv").write_text("a,a,price\n1,2,3\n")
        case "a table with a line too short":
            (root / "table.csv").write_text("a,b,price\n1,2,3\n4\n")
        case "an unknown label column" | "numbers that are to be classes":
            (root / "table.csv").write_text("a,b,price\n" + "1,2,3\n4,5,6\n" * 5)
        case "a method without its domain":
            (root / "plugin.py").write_text(PLUGIN)
        case "float images outside [0, 1]":
            np.savez(root / "a.npz", images=np.full((6, 8, 8), 2.0), labels=np.arange(6) % 2)
        case "labels that do not match":
            np.savez(root / "a.npz", images=np.zeros((6, 8, 8), np.uint8), labels=np.arange(5) % 2)


@pytest.mark.parametrize("case", CASES)
def test_one_sentence(case, tl, tmp_path, trained):
    prepare(case, tmp_path, trained)
    line, sentence = CASES[case]
    result = tl(line)
    assert result.code == 2
    errors = [text for text in result.err.splitlines() if text.startswith("tl: error: ")]
    assert len(errors) == 1, result.err
    assert sentence in errors[0]
    assert "Traceback" not in result.err + result.out
    assert len(errors[0]) < 400


def test_skip_counts_the_bad_images(tl, tmp_path, caplog):
    prepare("truncated image", tmp_path, None)
    result = tl(FOLDERS + "--data.on_bad_image skip")
    assert result.code == 0, result.err
    assert "skipped 1 of 17 images" in caplog.text


def test_hub_names_offline_give_one_sentence(tl, monkeypatch, tmp_path):
    from urllib.error import URLError

    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    result = tl(
        FIT.replace(".width 4", " TorchvisionBackbone --model.backbone.name resnet18 --model.backbone.weights DEFAULT")
    )
    assert result.code == 2
    assert "could not be downloaded; without a network" in result.err


def test_a_grey_and_a_transparent_image_are_fine(tl, tmp_path):
    tree = make_tree(tmp_path / "tree", classes=("blue", "red"))
    image(tree / "train" / "red" / "grey.jpg", (9, 9, 9), mode="L")
    image(tree / "train" / "red" / "alpha.png", (9, 9, 9), mode="RGBA")
    Image.new("P", (50, 20)).save(tree / "train" / "red" / "palette.gif")
    assert tl(FOLDERS).code == 0
