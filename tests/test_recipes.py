"""Every config parses and trains for a moment; the reference scores hold on the real data."""

import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from conftest import make_tree

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
RECIPES = sorted(p for p in CONFIGS.glob("recipes/*.yaml") if not p.stem.endswith("_compare"))
# those of `tl compare` are test_compare's
FILES = sorted(p for p in CONFIGS.rglob("*.yaml") if not p.stem.endswith("_compare"))


def relative(path):
    return str(path.relative_to(CONFIGS))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_one_subtree_of_one_to_ten_lines(path):
    lines = path.read_text().splitlines()
    if path.parent.name == "recipes":
        assert {"name", "trainer", "model", "data"} == set(yaml.safe_load("\n".join(lines)))
        assert lines[0].startswith("# ")
    else:
        assert len(lines) <= 10
        assert len(yaml.safe_load("\n".join(lines))) == 1


@pytest.mark.parametrize("path", [p for p in FILES if p not in RECIPES], ids=relative)
def test_each_file_layers_onto_a_model(path, ok):
    kind = path.parent.name
    base = "" if kind == "model" else f"-c {CONFIGS / 'model' / 'cnn.yaml'} "
    data = f"-c {CONFIGS / 'data' / 'digits.yaml'} " if path.name == "augment.yaml" else ""
    assert "class_path" in ok(f"fit {base}{data}-c {path} --print_config")


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """The layout of the real data, small and made up."""
    from safetensors.torch import save_file

    from tl_modules import TorchvisionBackbone

    folder = tmp_path_factory.mktemp("data")
    make_tree(folder / "clothing", (("train", 4), ("validation", 2), ("test", 2)), suffix="jpg")
    (folder / "mnist").mkdir()
    (folder / "weights").mkdir()
    generator = np.random.default_rng(0)

    def images(count, *channels):
        return generator.integers(0, 256, (count, 28, 28, *channels), dtype=np.uint8)

    labels = np.arange(200) % 10
    np.savez(folder / "mnist/train10k.npz", images=images(200), labels=labels)
    target = {"train_images": images(200, 3), "train_labels": labels, "test_images": images(40, 3)}
    np.savez(folder / "mnist/mnist_m_10k.npz", **target, test_labels=labels[:40])
    state = {k: v.contiguous() for k, v in TorchvisionBackbone("squeezenet1_0").model.state_dict().items()}
    save_file(state, folder / "weights/squeezenet1_0-imagenet-fp16.safetensors")
    (folder / "fsdd/recordings").mkdir(parents=True)
    for label, speaker, index in product(range(10), ("theo", "george"), (0, 5, 6, 7)):
        wave = 0.1 * generator.standard_normal(1200)
        soundfile.write(folder / f"fsdd/recordings/{label}_{speaker}_{index}.wav", wave, 8000)
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_every_recipe_runs(path, ok, made_up, tmp_path, monkeypatch):
    monkeypatch.setenv("TL_DATA_DIR", str(made_up))
    text = path.read_text()
    needed = re.search(r"tl fit -c configs/(recipes/\S+)", text)
    quick = "--trainer.max_epochs 1 --data.num_workers 0 --trainer.limit_train_batches 2 --trainer.limit_val_batches 2"
    if needed:
        ok(f"fit -c {CONFIGS / needed[1]} {quick}")
    ok(f"fit -c {path} {quick}")
    name = yaml.safe_load(text)["name"]
    ok(f"test --run runs/{name}/version_0 --trainer.limit_test_batches 2")
    metrics = json.loads((tmp_path / "runs" / name / "version_0" / "metrics.json").read_text())
    assert {"test/accuracy", "test/knn"} & metrics.keys()  # pretraining has no label to predict


def reference(ok, recipe, tmp_path, options=""):
    """Test accuracy of a recipe as it stands."""
    ok(f"fit -c {CONFIGS / 'recipes' / recipe}.yaml {options}")
    ok(f"test --run runs/{recipe}")
    return json.loads((tmp_path / "runs" / recipe / "version_0" / "metrics.json").read_text())["test/accuracy"]


@pytest.mark.slow
def test_reference_quick_mnist_m_few_shot(ok, data_dir, tmp_path):
    ok(f"fit -c {CONFIGS}/recipes/mnist_source.yaml --trainer.max_epochs 2 --model.lr_scheduler.T_max 2")
    transferred = reference(ok, "mnist_m_few_shot", tmp_path)
    ok(f"fit -c {CONFIGS}/recipes/mnist_m_few_shot.yaml --model.backbone.weights null --name scratch")
    ok("test --run runs/scratch")
    scratch = json.loads((tmp_path / "runs/scratch/version_0/metrics.json").read_text())["test/accuracy"]
    assert transferred > scratch + 0.1


@pytest.mark.slow
def test_reference_clothing_features(ok, data_dir, tmp_path):
    assert reference(ok, "clothing_features", tmp_path) >= 0.82


@pytest.mark.slow
def test_reference_clothing_gradual(ok, data_dir, tmp_path):
    assert reference(ok, "clothing_gradual", tmp_path) >= 0.85


@pytest.mark.slow
def test_reference_mnist_m_adaptation(ok, data_dir, tmp_path):
    """Without a label of the target, neither in training nor in the choice of the epoch."""
    dann = "--model.methods+=DSBN --model.methods+=DANN --model.methods.hidden 100 --model.methods.batch_norm true"
    assert reference(ok, "mnist_m", tmp_path, f"{dann} --selection.criterion infomax") >= 0.9
